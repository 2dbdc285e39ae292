"""`--cfg-options`, also as docs/how-to/commands.md writes them."""

import argparse
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS

from vqmoe_vision.engine.cli import load_config, run
from vqmoe_vision.engine.config import (
    add_config_options,
    check_fields,
    flat,
    merge_options,
    parse_options,
)
from vqmoe_vision.engine.model import scope_of

from .test_cli import DIGITS

DOCUMENT = (Path(__file__).parents[2] / 'docs/how-to/commands.md').read_text().replace('\\\n', ' ')
DOCUMENTED = re.findall(r'^python tools/train\.py \$C --cfg-options (.+)$', DOCUMENT, re.M)


@pytest.mark.parametrize(
    ('written', 'value'),
    [
        ("{'layer_decay': 0.8}", {'layer_decay': 0.8}),
        ("{'custom_keys': {'head': {'lr_mult': 2}}}", {'custom_keys': {'head': {'lr_mult': 2}}}),
        ('{}', {}),
        ("[{'type': 'A', 'size': (1, 2)}, 'b']", [{'type': 'A', 'size': (1, 2)}, 'b']),
        # as mmengine reads them
        ('[(1,2),(a,b)]', [(1, 2), ('a', 'b')]),
        ('epoch_{}.pth', 'epoch_{}.pth'),
        ('1,2', [1, 2]),
    ],
)  # fmt: skip
def test_values(written: str, value: Any) -> None:
    assert parse_options([f'a.b={written}']) == {'a.b': value}


def test_only_a_hook_that_is_there_is_left_out() -> None:
    hooks = {'logger2': {'type': 'LoggerHook'}, 'runtime': {'type': 'StepValuesHook'}}
    config = Config({'default_hooks': hooks})
    merge_options(config, {'default_hooks.logger2': None, 'default_hooks.timer': None})
    merge_options(config, {'default_hooks.runtime.priority': None})  # an option of a hook
    with pytest.raises(ValueError, match=r'^default_hooks\.logger3=None is not possible'):
        merge_options(config, {'default_hooks.logger3': None})
    check_fields(config)
    runtime = {'type': 'StepValuesHook', 'priority': None}
    assert config.default_hooks == {'runtime': runtime, 'timer': None}  # which mmengine pops


PLACES = {
    'model.checkpoint': '~/x.pth',
    'model.upcycle': 'local-dir:~/folder',
    'model.pretrained_cfg_overlay.file': '~/y.pth',
    'load_from': '~/z.pth',
    'train_dataloader.dataset.data_root': '~',
    'custom_hooks': [{'type': 'a~b', 'path': '~/w'}],
}


def test_the_folder_of_the_user_is_known_in_every_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('HOME', str(tmp_path))
    expected = {
        name: value if value == 'a~b' else value.replace('~', str(tmp_path))
        for name, value in flat(PLACES).items()
    }
    # in a file of the user, and among options
    own = tmp_path / 'own.py'
    load_config(str(DIGITS), PLACES).dump(own)
    own.write_text(own.read_text().replace(str(tmp_path), '~'))
    for config in (load_config(str(own)), load_config(str(DIGITS), PLACES)):
        found = flat(config.to_dict())
        assert {name: found[name] for name in expected} == expected

    parser = argparse.ArgumentParser()
    parser.add_argument('files', nargs='+')
    parser.add_argument('--out', type=Path)
    add_config_options(parser)
    seen: list[Any] = []
    run(
        parser, ['~/a.pth', 'local-dir:~/b', '--out=~/c.json', '--cfg-options', 'upcycle=~/d'],
        lambda args: seen.append((args.files, args.out, args.cfg_options)),
    )  # fmt: skip
    home = str(tmp_path)
    files = [f'{home}/a.pth', f'local-dir:{home}/b']
    assert seen == [(files, tmp_path / 'c.json', {'upcycle': f'{home}/d'})]


@pytest.mark.parametrize('options', DOCUMENTED)
def test_documented_options_are_read_and_make_an_optimizer(options: str) -> None:
    given = parse_options(shlex.split(options, comments=True))
    # nothing is left as text that was meant as more
    assert not [v for v in flat(given).values() if isinstance(v, str) and v[:1] in '{[(']
    config = load_config(str(DIGITS), given)
    with scope_of(config):
        build_optim_wrapper(MODELS.build(config.model), config.optim_wrapper)


CIFAR = 'classification/cifar10.py'
NAME = f'vqmoe_vision::{CIFAR}'


@pytest.mark.parametrize(
    'base', [repr(NAME), f'[{NAME!r}]', f'__import__("vqmoe_vision").config_path({CIFAR!r})']
)
def test_a_config_outside_builds_on_it(base: str, tmp_path: Path) -> None:
    path = tmp_path / 'mine.py'
    path.write_text(f'_base_ = {base}\nmodel = dict(num_classes=7)\n')
    expected = load_config(NAME, {'model.num_classes': 7}).to_dict()
    assert load_config(str(path)).to_dict() == expected
    # nothing tells registries to look for a package
    assert '_scope_' not in load_config(str(path)).dump()
    if base.startswith('__import__'):  # as any program of mmengine reads it
        assert Config.fromfile(path).to_dict() == expected
