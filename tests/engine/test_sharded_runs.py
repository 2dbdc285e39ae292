"""Runs that save in parts, through the tools: what they write, and who goes on from it."""

import json
import shutil
from pathlib import Path

import pytest

from vqmoe_vision.engine.checkpoint import read_content

from ..soak.bits import same
from .test_processes import EXPERTS, ranks, said, start

PARTS = 'parallel.state_dict_type=sharded'


@pytest.mark.long
def test_a_run_that_saves_in_parts(tmp_path: Path) -> None:
    config, whole, parts = str(tmp_path / 'c.py'), tmp_path / 'w', tmp_path / 'wp'
    spread = ('train', config, '--cfg-options', EXPERTS)
    told = ('default_hooks.dies.type=Dies', 'default_hooks.dies.how="15"', 'train_cfg.max_epochs=9')
    runs = {
        'whole': ranks(*spread, '--work-dir', str(whole)),
        'parts': ranks(*spread, PARTS, '--work-dir', str(parts)),
        'told': ranks(*spread, PARTS, *told, '--work-dir', str(tmp_path / 'stopped')),
        'tested': ranks(
            'test', config, f'{parts}/epoch_2.pth', '--work-dir', str(parts),
            '--out', str(tmp_path / 'scores.json'), more=((),),
        ),
    }  # fmt: skip
    ended = start(tmp_path, runs)
    assert {name: ended[name] for name in ('whole', 'parts', 'tested')} == {
        'whole': [0, 0],
        'parts': [0, 0],
        'tested': [0],
    }, said(tmp_path, 'parts')
    assert 'accuracy/top1' in json.loads((tmp_path / 'scores.json').read_text())
    names = sorted(path.name for path in whole.glob('*.pth'))
    assert sorted(path.name for path in parts.glob('*.pth')) == names and 'epoch_2.pth' in names
    assert len(list(parts.glob('*.sharded'))) == len(names) > 1 and not list(parts.glob('.*.part'))
    for name in names:
        expected, found = (read_content(str(work / name)) for work in (whole, parts))
        assert found.keys() == expected.keys()
        for part in {'state_dict', 'optimizer'} & found.keys():
            assert same(found[part], expected[part])
    # rank 1 was told, and all of them saved
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
        assert content['meta']['epoch'] == 3
        written_in_parts = list((folder / f'again{name}').glob('epoch_3.*.sharded'))
        assert len(written_in_parts) == (processes == 4)
