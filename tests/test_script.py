"""Scripts that know nothing of the package, timm's own among them, run on its models.

timm's scripts are in its repository alone, not on PyPI. They are tested once `make timm-scripts`
has put those of the installed version into `.venv/timm-src`.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.task import TrainingTask

from vqmoe_vision.moe import METHODS

SCRIPTS = Path(sys.prefix) / 'timm-src'
MODEL = '--img-size 32 --num-classes 2 --model-kwargs img_size=32 patch_size=8 embed_dim=32 depth=2'
READ = '--device cpu --batch-size 4 --workers 0'


def run_script(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, '-m', 'vqmoe_vision.script', *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_a_script_finds_the_models_its_arguments_and_its_neighbours(tmp_path: Path) -> None:
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
    # timm before 1.0.27 tells its tasks nothing of a step
    assert task == ('Moe' if hasattr(TrainingTask, 'update_ema') else '') + 'ClassificationTask'
    assert (done.returncode, done.stderr) == (3, '')


def test_a_missing_script_is_one_line(tmp_path: Path) -> None:
    done = run_script('validate.py', cwd=tmp_path)
    assert done.stderr == 'script=validate.py is not possible: there is no such file\n'
    assert (done.returncode, done.stdout) == (2, '')


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of two classes, of one colour each."""
    for split in ('train', 'validation'):
        for name, color in {'red': (200, 30, 30), 'blue': (30, 30, 200)}.items():
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(4):
                Image.new('RGB', (40, 40), color).save(tmp_path / split / name / f'{name}{i}.png')
    return tmp_path


@pytest.mark.long
@pytest.mark.skipif(not (SCRIPTS / 'train.py').exists(), reason="timm's scripts: make timm-scripts")
@pytest.mark.parametrize('method', METHODS)
def test_train_py_trains_experts_over_a_resume(method: str, folder: Path) -> None:
    model = ['--model', f'vit_tiny_{method}', *MODEL.split(), 'num_heads=2']
    if 'stage1_steps' in METHODS[method].config.option_names():
        model.append('stage1_steps=3')  # of four updates, two of them per epoch
    options = f'{READ} --data-dir . --epochs 2 --warmup-epochs 0 --output out --model-ema'

    def train(name: str, *arguments: str) -> None:
        named = [*options.split(), '--experiment', name, *arguments]
        done = run_script(SCRIPTS / 'train.py', *named, *model, cwd=folder)
        assert done.returncode == 0, done.stderr
        assert 'MoeClassificationTask: criterion=' in done.stderr
        assert 'training without collect_losses' not in done.stderr

    def learned(path: str) -> dict[str, list[int]]:
        """Values of what counts updates, and of what starts or ends with one."""
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(folder / 'out' / path, weights_only=True)['state_dict']
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


@pytest.mark.long
@pytest.mark.skipif(not (SCRIPTS / 'train.py').exists(), reason="timm's scripts: make timm-scripts")
@pytest.mark.parametrize('method', METHODS)
def test_timms_scripts(method: str, folder: Path) -> None:
    def run(name: str, options: str) -> str:
        model = ['--model', f'vit_tiny_{method}', *MODEL.split(), 'num_heads=2']
        done = run_script(SCRIPTS / name, *options.split(), *model, cwd=folder)
        assert done.returncode == 0, done.stderr
        return done.stdout

    checkpoint = '--checkpoint out/a/last.pth.tar'
    run('train.py', f'{READ} --data-dir . --epochs 1 --output out --experiment a --model-ema')
    found = run('validate.py', f'{READ} --data-dir . --split validation {checkpoint}')
    assert json.loads(found.split('--result\n')[1])['top1'] >= 50
    timed = run(
        'benchmark.py',
        '--device cpu --batch-size 4 --bench both --num-bench-iter 10 --num-warm-iter 1',
    )
    assert json.loads(timed.split('--result\n')[1])['train_samples_per_sec'] > 0
    pytest.importorskip('pandas', reason="timm's inference.py writes tables with it")
    run('inference.py', f'{READ} --data-dir validation --results-dir out {checkpoint}')
    (table,) = (folder / 'out').glob('vit_tiny_*.csv')
    assert len(table.read_text().splitlines()) == 9
