"""tools/analyze.py, for both tasks, on models that were never trained."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS, init_default_scope

from vqmoe_vision.analysis.cli import analyze
from vqmoe_vision.engine.cli import load_config

from .. import refused
from ..rows import CONFIGS

DIGITS = CONFIGS / 'classification/digits/demo/vit_tiny_vqmoe_demo.py'
SCENES = CONFIGS / 'segmentation/segmenter_vit-4x96-vqmoe_mask_1xb64-1k_digits-48x48.py'
SMALL = {'depth': 2, 'embed_dim': 24, 'num_heads': 2}

pytestmark = pytest.mark.usefixtures('unpainted')


@pytest.fixture
def untrained(tmp_path) -> Callable[..., tuple[str, str]]:
    """Writes a small config and a checkpoint of its model; gives both paths."""

    def write(base: Path = DIGITS, name: str = 'run', seed: int = 0) -> tuple[str, str]:
        folder, model = tmp_path / name, SMALL
        folder.mkdir(exist_ok=True)
        if base == SCENES:
            model = {'backbone': model, 'decode_head': {'num_layers': 1}}
        path, checkpoint = folder / 'config.py', folder / f'seed_{seed}.pth'
        path.write_text(f'_base_ = {str(base)!r}\nmodel = {model!r}\n')
        config = load_config(str(path))
        init_default_scope(config.default_scope)
        torch.manual_seed(seed)
        torch.save({'state_dict': MODELS.build(config.model).state_dict()}, checkpoint)
        return str(path), str(checkpoint)

    return write


@pytest.fixture
def report(tmp_path, capsys) -> Callable[..., dict]:
    """Runs the tool; gives what `numbers.json` says, once the page is there."""

    def run(*words: str) -> dict:
        analyze([*words, '--num-images', '12', '--out', str(tmp_path / 'out')])
        page = Path(capsys.readouterr().out.strip())
        assert page == tmp_path / 'out/report.html' and page.stat().st_size > 10_000
        return json.loads((tmp_path / 'out' / 'numbers.json').read_text())

    return run


def test_a_segmentor_beside_a_classifier(untrained, report):
    beside = untrained(SCENES, 'scenes')
    one, other = report(*untrained(), '--beside', *beside)['surveys']
    assert one['title'] == 'run/seed_0' and other['title'] == 'scenes/seed_0'
    assert 'background' in other['classes']
    for survey in (one, other):
        (counts,) = {len(r) for r in survey['layers']['blocks.1.mlp']['expert_by_class']['router']}
        assert counts == len(survey['classes'])


def test_checkpoints_of_one_run_are_compared_in_their_order(untrained, report):
    config, first = untrained(seed=0)
    second = untrained(seed=1)[1]
    found = report(config, first, second)
    (change,) = found['changes']
    assert (change['before'], change['after']) == ('run/seed_0', 'run/seed_1')
    assert found['convergence'] is None  # of two, one is the start and one the end
    # of two routers that were drawn apart, most tokens find another of eight experts
    assert change['shares']['blocks.1.mlp.router'] > 0.5


def test_mistakes_are_one_line(untrained, tmp_path):
    config, checkpoint = untrained()
    (tmp_path / 'broken').mkdir()
    (tmp_path / 'broken' / 'b.png').write_bytes(b'nothing')
    (tmp_path / 'file').touch()
    for flags, said in (
        ([checkpoint], 'twice'),
        (['--num-images', '0'], '--num-images=0'),
        (['--images', str(tmp_path / 'absent')], 'is not a folder'),
        (['--images', str(tmp_path / 'broken')], 'b.png cannot be read'),
        (['--out', str(tmp_path / 'file' / 'out')], 'cannot be written'),
    ):
        refused(f'^error: .*{said}', analyze, [config, checkpoint, *flags], error=SystemExit)
    refused(r'^error: .*absent\.pth', analyze, [config, 'absent.pth'], error=SystemExit)


def test_checkpoints_that_are_not_of_one_run_in_its_order_are_refused(untrained):
    config, first = untrained(seed=0)
    second, third = (str(Path(first).with_name(name)) for name in ('b.pth', 'c.pth'))
    state = torch.load(first)['state_dict']
    for path, step, seed in ((first, 2, 1), (second, 1, 1), (third, 3, 7)):
        torch.save({'state_dict': state, 'meta': {'iter': step, 'seed': seed}}, path)
    refused('^error: .*iter=1', analyze, [config, first, second], error=SystemExit)
    refused('^error: .*seed=7', analyze, [config, first, third], error=SystemExit)
