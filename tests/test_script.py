"""Scripts that know nothing of the package, timm's own among them, run on its models.

timm's train.py is in its repository alone, and tested once `make timm-scripts` has fetched it.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from vqmoe_vision.moe import METHODS

SCRIPTS = Path(sys.prefix) / 'timm-src'
MODEL = '--img-size 32 --num-classes 2 --model-kwargs img_size=32 patch_size=8 embed_dim=32 depth=2'
READ = '--device cpu --batch-size 4 --workers 0'


def run_script(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, '-m', 'vqmoe_vision.script', *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_a_script_finds_the_models_its_arguments_and_its_neighbours(tmp_path):
    folder = tmp_path / 'scripts'
    folder.mkdir()
    (folder / 'neighbour.py').write_text('import timm\nnames = timm.list_models("vit_tiny_*")\n')
    (folder / 'script.py').write_text(
        'import json, sys, neighbour\n'
        'from timm.task import ClassificationTask\n'
        'assert __name__ == "__main__"\n'
        'print(json.dumps([sys.argv, neighbour.names, ClassificationTask.__name__]))\n'
        'sys.exit(3)\n'
    )
    done = run_script('scripts/script.py', '-h', '--model', 'x', cwd=tmp_path)
    argv, names, task = json.loads(done.stdout)
    assert argv == ['scripts/script.py', '-h', '--model', 'x']
    assert {f'vit_tiny_{method}' for method in METHODS} <= set(names)
    assert task == 'MoeClassificationTask'
    assert (done.returncode, done.stderr) == (3, '')

    done = run_script('validate.py', cwd=tmp_path)
    assert done.stderr == 'script=validate.py is not possible: there is no such file\n'
    assert (done.returncode, done.stdout) == (2, '')


@pytest.mark.long
@pytest.mark.skipif(not (SCRIPTS / 'train.py').exists(), reason="timm's scripts: make timm-scripts")
@pytest.mark.parametrize('method', METHODS)
def test_train_py_trains_experts_over_a_resume(method, tmp_path):
    for name in ('train/red', 'train/blue', 'validation/red', 'validation/blue'):
        (tmp_path / name).mkdir(parents=True)
        for i in range(4):
            Image.new('RGB', (40, 40), Path(name).name).save(tmp_path / name / f'{i}.png')
    model = ['--model', f'vit_tiny_{method}', *MODEL.split(), 'num_heads=2']
    if 'stage1_steps' in METHODS[method].config.option_names():
        model.append('stage1_steps=3')  # of four updates, two of them per epoch
    options = f'{READ} --data-dir . --epochs 2 --warmup-epochs 0 --output out --model-ema'

    def train(name: str, *arguments: str) -> None:
        named = [*options.split(), '--experiment', name, *arguments]
        done = run_script(SCRIPTS / 'train.py', *named, *model, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert 'MoeClassificationTask: criterion=' in done.stderr
        assert 'training without collect_losses' not in done.stderr

    def learned(path: str) -> dict[str, list[int]]:
        """Values of what counts updates, and of what starts or ends with one."""
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(tmp_path / 'out' / path, weights_only=True)['state_dict']
        kinds = ('codebook.updates', 'codebook.started', 'distilled.steps', 'distilled.frozen')
        return {
            kind: [int(value) for name, value in state.items() if name.endswith(kind)]
            for kind in kinds
        }

    train('whole')
    train('resumed', '--resume', 'out/whole/checkpoint-0.pth.tar')
    first = learned('whole/checkpoint-0.pth.tar')
    for last in (learned('whole/last.pth.tar'), learned('resumed/last.pth.tar')):
        for counted, changed in (('codebook.updates', 'started'), ('distilled.steps', 'frozen')):
            layers = len(first[counted])
            assert (first[counted], last[counted]) == ([2] * layers, [4] * layers)
            assert last[f'{counted.partition(".")[0]}.{changed}'] == [1] * layers
