"""Several processes through the tools, on a CPU: what they train, count, write and say."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from torch import Tensor
from torch.utils._pytree import tree_leaves

from vqmoe_vision.engine import cli
from vqmoe_vision.engine.checkpoint import read_content
from vqmoe_vision.engine.record import read_history

from ..forked import spawn
from ..soak.kinds import FOUR_SCENES, SCENES, same
from .ranks import run_all
from .tiny import TINY

# 360 images of validation and test are no multiple of 2 times 77
CLASSIFICATION = f"""{TINY}
custom_imports = dict(imports=['vqmoe_vision.classification', 'dies'])
model = dict(moe=dict(preset='ema'))  # codes learn without gradients
total_batch_size = 100
test_dataloader = dict(batch_size=77)
"""
SEGMENTATION = f"""
_base_ = {str(SCENES)!r}
model = dict(
    backbone=dict(patch_size=16, embed_dim=12, depth=2, num_heads=3, moe=dict(num_experts=2)),
    decode_head=dict(num_layers=1),
)
{FOUR_SCENES}
total_batch_size = 4
train_cfg = dict(max_iters=4, val_interval=2)
default_hooks = dict(checkpoint=dict(interval=2))
test_dataloader = dict(batch_size=2, dataset=dict(num_scenes=5))
"""
DIES = """
import os, time
from mmengine.hooks import Hook
from mmengine.registry import DATASETS, HOOKS

@DATASETS.register_module()
def uneven(**options):
    found = DATASETS.build(dict(type='digits', **options))
    found.source = found.source[int(os.environ['RANK']):]
    return found

@HOOKS.register_module()
class Dies(Hook):
    def __init__(self, how):
        self.how = how

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.rank == 1 and runner.epoch == 1 and batch_idx == 0:
            if self.how == 'raise':
                raise ValueError('this rank has had enough')
            if self.how == 'wait':
                time.sleep(60)
            os.kill(os.getpid(), int(self.how))
"""
EXPERTS = 'parallel.expert_processes=2'
GONE = 'another process has ended: its own line says why, unless it was killed'
NAMES = {
    'pytorch': ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'),
    'slurm': ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID'),
}


def ranks(tool: str, *arguments: str, launcher='pytorch', more: Any = ((), ())) -> dict[str, Any]:
    """A run of a rank for each tuple in `more`, its own arguments."""
    size = str(len(more))
    runs = []
    for rank, own in enumerate(more):
        variables = dict(zip(NAMES[launcher], (str(rank), size, str(rank)), strict=True))
        given = [*arguments, '--launcher', launcher, *own]
        runs.append({'variables': variables, 'arguments': given})
    return {'tool': tool, 'ranks': runs}


def start(folder: Path, runs: dict[str, Any]) -> dict[str, list[int]]:
    files = {'c.py': CLASSIFICATION, 's.py': SEGMENTATION, 'dies.py': DIES}
    for name, text in (files | {'runs.json': json.dumps(runs)}).items():
        (folder / name).write_text(text)
    spawn(run_all, (folder,), nprocs=1)
    return json.loads((folder / 'ended.json').read_text())


def said(folder: Path, run: str) -> list[str]:
    return [(rank / 'err').read_text() for rank in sorted((folder / run).iterdir())]


@pytest.fixture(scope='module')
def run(tmp_path_factory) -> tuple[Path, dict[str, list[int]]]:
    folder = tmp_path_factory.mktemp('ranks')
    config, work = str(folder / 'c.py'), str(folder / 'w')
    out = ('--out', f'{folder}/2.json')
    kill = ('--cfg-options', 'default_hooks.dies.type=Dies', 'default_hooks.dies.how="9"')
    faster = ('--cfg-options', 'optim_wrapper.optimizer.lr=0.5')
    runs = {
        'killed': ranks('train', config, '--work-dir', work, *kill),
        'resumed': ranks('train', config, '--work-dir', work, '--resume'),
        'tested': ranks('test', config, f'{work}/epoch_2.pth', '--work-dir', work, *out),
        'different': ranks('train', config, '--work-dir', work, more=((), faster)),
        'sharded': ranks('train', config, '--work-dir', f'{work}p', '--cfg-options', EXPERTS),
    }
    return folder, start(folder, runs)


def test_a_killed_rank_ends_the_run_with_one_line_of_the_first(run):
    folder, ended = run
    assert ended['killed'][1] == -9
    first, other = said(folder, 'killed')
    # Rank 0 loses the connection, or the launcher's SIGTERM reaches it first: in the loop, where
    # it saves, or after the training and before its own line, where it says nothing.
    assert (ended['killed'][0], first) in ((1, f'error: rank 0: {GONE}\n'), (-15, '')) or (
        ended['killed'][0] == -15 and first.startswith('SIGTERM: saved iteration 3;')
    )
    assert first.count('\n') <= 1 and not other


def test_the_run_goes_on_from_its_last_checkpoint(run):
    folder, ended = run
    assert ended['resumed'] == [0, 0]
    assert 'resumed epoch: 1, iter: 3' in (folder / 'resumed/0/out').read_text()
    content = read_content(str(folder / 'w/epoch_2.pth'))
    assert (content['meta']['epoch'], content['meta']['iter']) == (2, 6)
    # of 309 images each of two processes took 50 a step, three times
    kept = Config.fromfile(folder / 'w/c.py', import_custom_modules=False)
    assert (kept.total_batch_size, kept.train_dataloader.batch_size) == (100, 50)


def test_only_the_first_rank_says_and_writes_something(run):
    folder, _ = run
    for name in ('resumed', 'tested'):
        assert (folder / name / '1/out').read_text() == ''
        assert said(folder, name) == ['', '']
    assert len(list((folder / 'w').glob('*/*.log'))) == 3
    assert len(list((folder / 'w').rglob('events.out.tfevents*'))) == 3


def test_scores_are_those_of_one_process(run, monkeypatch):
    folder, ended = run
    assert ended['tested'] == [0, 0]
    monkeypatch.syspath_prepend(folder)
    one = folder / '1.json'
    arguments = [str(folder / 'c.py'), str(folder / 'w/epoch_2.pth'), '--out', str(one)]
    cli.test([*arguments, '--work-dir', str(folder / 'one')])
    expected, found = (json.loads((folder / f'{n}.json').read_text()) for n in (1, 2))
    accuracies = {name: value for name, value in expected.items() if 'accuracy' in name}
    assert len(accuracies) > 1 and expected.keys() == found.keys()
    assert {name: found[name] for name in accuracies} == accuracies


def test_a_run_that_is_spread_over_ranks_writes_what_another_writes(run):
    folder, ended = run
    assert ended['sharded'] == [0, 0]
    expected, found = (read_content(str(folder / w / 'epoch_2.pth')) for w in ('w', 'wp'))
    for part in ('state_dict', 'optimizer'):
        leaves = (tree_leaves(content[part]) for content in (expected, found))
        theirs, ours = ([leaf for leaf in one if isinstance(leaf, Tensor)] for one in leaves)
        assert len(ours) > 40
        # float32: experts sum the tokens of both ranks at once, and Adam, after six steps, makes
        # as much of a rounding error of a tiny gradient as of another
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_different_configs_are_one_line(run):
    folder, ended = run
    assert ended['different'][0] == 1 and ended['different'][1] != 0
    assert said(folder, 'different') == [
        'error: rank 0: the ranks have different configs: optim_wrapper.optimizer.lr is 0.002 on '
        'rank 0 and 0.5 on rank 1\n',
        '',
    ]


@pytest.mark.long
def test_slurm_segmentation_and_what_goes_wrong(tmp_path):
    config, scenes, work = str(tmp_path / 'c.py'), str(tmp_path / 's.py'), str(tmp_path / 'w')
    test = ('test', scenes, f'{work}s/iter_4.pth', '--work-dir', work)
    hook = ('--cfg-options', 'default_hooks.dies.type=Dies')
    bad = ('train', config, '--work-dir', work)
    told = (*hook, 'default_hooks.dies.how="15"', 'train_cfg.max_epochs=99')
    history = ('--cfg-options', 'default_hooks.history.type=RoutingHistoryHook')
    runs = {
        'slurm': ranks('train', scenes, '--work-dir', f'{work}s', *history, launcher='slurm'),
        'spread': ranks('train', scenes, '--work-dir', f'{work}p', *history, EXPERTS),
        'two': ranks(*test, '--out', str(tmp_path / '2.json')),
        'one': ranks(*test, '--out', str(tmp_path / '1.json'), more=((),)),
        'told': ranks(*bad, *told),
        'told-spread': ranks('train', config, '--work-dir', f'{work}t', *told, EXPERTS),
        'raises': ranks(*bad, *hook, 'default_hooks.dies.how=raise'),
        'late': ranks(*bad, *hook, 'default_hooks.dies.how=wait', 'env_cfg.dist_cfg.timeout=10'),
        'data': ranks(*bad, '--cfg-options', 'train_dataloader.dataset.type=uneven'),
        'batch': ranks(*bad, '--cfg-options', 'train_dataloader.batch_size=900'),
        'shown': ranks('test', config, f'{work}s/iter_4.pth', '--show-dir', work),
    }
    ended = start(tmp_path, runs)
    assert [ended[name] for name in ('slurm', 'spread', 'two', 'one')] == [[0, 0]] * 3 + [[0]]
    expected, found = (json.loads((tmp_path / f'{n}.json').read_text()) for n in (1, 2))
    assert {n: found[n] for n in ('mIoU', 'aAcc')} == {n: expected[n] for n in ('mIoU', 'aAcc')}
    records = [read_history(Path(f'{work}{name}/routing.jsonl')) for name in 'sp']
    assert len(records[0]) == 4
    # as far as two layouts round differently
    torch.testing.assert_close(records[1], records[0], rtol=1e-2, atol=1e-4)
    # the first rank saves, though another one was told to stop
    for name in ('told', 'told-spread'):
        assert ended[name] == [-15, -15]
        (line,) = ''.join(said(tmp_path, name)).splitlines()
        again = 'go on with: the same command, --resume'
        assert re.fullmatch(rf'SIGTERM: saved iteration \d+; {again}', line)
    # spread: between two iterations of all, the one that is under way
    assert read_content(f'{work}t/iter_4.pth')['meta']['iter'] == 4
    for name, message in {
        'late': 'another process has not answered within env_cfg.dist_cfg.timeout',
        'data': 'the ranks have different data sets: len(train_dataloader.dataset) is 309',
        'batch': 'the number of training images for each of 2 processes',
        'shown': "--show-dir='",
    }.items():
        assert ended[name][0] == 1 and ended[name][1] != 0, name
        (line,) = ''.join(said(tmp_path, name)).splitlines()
        assert line.startswith('error: rank 0: ') and message in line
    first, other = said(tmp_path, 'raises')
    assert 0 not in ended['raises'] and other == 'error: rank 1: this rank has had enough\n'
    assert first in ('', f'error: rank 0: {GONE}\n')


PARTS = 'parallel.state_dict_type=sharded'


@pytest.mark.long
def test_a_run_that_saves_in_parts(tmp_path):
    config, whole, parts = str(tmp_path / 'c.py'), tmp_path / 'w', tmp_path / 'wp'
    spread = ('train', config, '--cfg-options', EXPERTS)
    told = ('default_hooks.dies.type=Dies', 'default_hooks.dies.how="15"', 'train_cfg.max_epochs=9')
    out = ('--work-dir', str(parts), '--out', str(tmp_path / 'scores.json'))
    runs = {
        'whole': ranks(*spread, '--work-dir', str(whole)),
        'parts': ranks(*spread, PARTS, '--work-dir', str(parts)),
        'told': ranks(*spread, PARTS, *told, '--work-dir', str(tmp_path / 'stopped')),
        'tested': ranks('test', config, f'{parts}/epoch_2.pth', *out, more=((),)),
    }
    ended = start(tmp_path, runs)
    statuses = [ended[name] for name in ('whole', 'parts', 'tested')]
    assert statuses == [[0, 0], [0, 0], [0]], said(tmp_path, 'parts')
    assert 'accuracy/top1' in json.loads((tmp_path / 'scores.json').read_text())
    names = sorted(path.name for path in whole.glob('*.pth'))
    assert sorted(path.name for path in parts.glob('*.pth')) == names and 'epoch_2.pth' in names
    assert len(list(parts.glob('*.sharded'))) == len(names) > 1 and not list(parts.glob('.*.part'))
    for name in names:
        expected, found = (read_content(str(work / name)) for work in (whole, parts))
        assert found.keys() == expected.keys()
        assert all(same(found[p], expected[p]) for p in {'state_dict', 'optimizer'} & found.keys())
    assert ended['told'] == [-15, -15]
    assert 'SIGTERM: saved iteration 4;' in ''.join(said(tmp_path, 'told'))
    assert read_content(str(tmp_path / 'stopped/iter_4.pth'))['meta']['iter'] == 4
    goes_on(tmp_path, parts)


def goes_on(folder: Path, saved: Path) -> None:
    """One process, two with whole models, and four that are spread otherwise and save in parts."""
    layouts = {'1': ((), 1), '2': ((), 2), '4': ((PARTS, 'parallel.param_dtype=float32'), 4)}
    runs = {}
    for name, (options, processes) in layouts.items():
        work = shutil.copytree(saved, folder / f'again{name}')
        arguments = ('train', str(folder / 'c.py'), '--resume', '--work-dir', str(work))
        more = ('--cfg-options', 'train_cfg.max_epochs=3', *options)
        runs[name] = ranks(*arguments, *more, more=((),) * processes)
    ended = start(folder, runs)
    for name, (_, processes) in layouts.items():
        assert ended[name] == [0] * processes, said(folder, name)
        content = read_content(str(folder / f'again{name}/epoch_3.pth'))
        assert (content['meta']['epoch'], content['meta']['iter']) == (3, 9)  # three each
        written_in_parts = list((folder / f'again{name}').glob('epoch_3.*.sharded'))
        assert len(written_in_parts) == (processes == 4)
