"""Names that are almost those that mmengine reads are refused, and hooks are left out by None."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.runner import Runner

from vqmoe_vision.engine import cli
from vqmoe_vision.engine.cli import train
from vqmoe_vision.engine.known_names import _HOOKS, check_names, check_spelling
from vqmoe_vision.engine.options import merge_options

from .test_cli import TINY


@pytest.mark.parametrize('tool', [train, cli.test])
@pytest.mark.parametrize(
    ('option', 'said'),
    [
        (
            'default_hooks.checkpont.interval=2',
            "default_hooks.checkpont={'interval': 2} is not possible: a hook of this name needs a "
            'type; did you mean checkpoint?',
        ),
        (
            'default_hooks.checkpont=None',
            'default_hooks.checkpont=None is not possible: there is no hook of this name to leave '
            'out; did you mean checkpoint?',
        ),
        (
            'default_hooks={"loger": None}',
            'default_hooks.loger=None is not possible: did you mean logger?',
        ),
        (
            'default_hooks.checkpoint=2',
            'default_hooks.checkpoint=2 is not possible: a hook of this name needs a type',
        ),
        (
            'auto_scale_lr.enabled=True',
            'auto_scale_lr.enabled=True is not possible: did you mean enable?',
        ),
        (
            'default_hooks=True',
            'default_hooks=True is not possible: a dictionary of hooks by name',
        ),
        (
            'env_cfg=None',
            'env_cfg=None is not possible: a dictionary with some of cudnn_benchmark, dist_cfg, '
            'mp_cfg, resource_limit',
        ),
        (
            'auto_scale_lr=True',
            'auto_scale_lr=True is not possible: a dictionary with some of base_batch_size, enable',
        ),
        (
            'auto_scale_lr.enable=True',
            'auto_scale_lr.base_batch_size=None is not possible: a number above 0, the batch size '
            'that the learning rate is for',
        ),
        (
            'env_cfg.cudnn_benchmrk=False',
            'env_cfg.cudnn_benchmrk=False is not possible: did you mean cudnn_benchmark?',
        ),
        (
            'randomness.sed=3',
            'randomness.sed=3 is not possible: did you mean seed?',
        ),
        (
            'env_cfg.mp_cfg.start_method=fork',
            "env_cfg.mp_cfg.start_method='fork' is not possible: did you mean mp_start_method?",
        ),
    ],
)
def test_what_nothing_would_read_is_refused(
    option: str, said: str, tool: Callable[[list[str]], None], tmp_path: Path
) -> None:
    path = tmp_path / 'tiny.py'
    path.write_text(TINY.replace('NAME', repr(tmp_path.name)))
    files = [str(path)] if tool is train else [str(path), 'absent.pth']
    with pytest.raises(SystemExit) as caught:
        tool([*files, '--cfg-options', option])
    assert str(caught.value.code) == f'error: {said}'


@pytest.mark.parametrize('mode', ['reduce-overhead', 'max-autotune'])
def test_cuda_graphs_overwrite_what_the_log_reads_later(mode: str) -> None:
    with pytest.raises(ValueError, match=rf"compile\.mode='{mode}' is .*no-cudagraphs"):
        check_names(Config({'compile': {'mode': mode}}))
    for possible in (True, None, {}, {'mode': 'default'}, {'mode': f'{mode}-no-cudagraphs'}):
        check_names(Config({'compile': possible}))


@pytest.mark.parametrize('base', [0, -8, float('nan'), '64', True])
def test_a_batch_size_that_no_rate_can_be_for(base: Any) -> None:
    scale = {'enable': True, 'base_batch_size': base}
    with pytest.raises(ValueError, match=r'base_batch_size=.* a number above 0'):
        check_names(Config({'auto_scale_lr': scale}))
    check_names(Config({'auto_scale_lr': {**scale, 'enable': False}}))


@pytest.mark.parametrize('base', [64, 64.0, 12.5, np.int64(64)])
def test_a_batch_size_that_mmengine_divides_by(base: Any) -> None:
    check_names(Config({'auto_scale_lr': {'enable': True, 'base_batch_size': base}}))


@pytest.mark.parametrize(
    'name', ['clases', 'Classes', 'CLASSES', 'classe', 'classess', 'pallete', 'palettes']
)
def test_almost_a_name(name: str) -> None:
    with pytest.raises(ValueError, match=rf'x\.{name}=1 is .* did you mean (classes|palette)\?'):
        check_spelling('x', {name: 1}, ('classes', 'palette'))


@pytest.mark.parametrize(
    'name',
    [
        'classes',
        'classes2',
        'class_names',
        'num_classes',
        'thing_classes',
        'palette_en',
        'city',
        '',
    ],
)
def test_a_name_of_ones_own(name: str) -> None:
    check_spelling('x', {name: 1}, ('classes', 'palette'))
    environment = {'allow_tf32': True, 'cudnn_benchmark': True}
    check_names(Config({'env_cfg': environment, 'randomness': {'warn_only': True}}))


def test_any_hook_of_a_config_is_left_out_by_none() -> None:
    # the third and fourth are almost mmengine's
    left_out = ('visualization', 'ema_of_mine', 'logger2', 'val_checkpoint')
    own = {**dict.fromkeys(left_out), 'ema': {'type': 'EMAHook'}}
    config = Config({'default_hooks': {**own, **dict.fromkeys(_HOOKS)}})
    check_names(config)
    registered: list[Any] = []

    class Collecting:
        """Of a runner only what takes hooks."""

        register_hook = staticmethod(registered.append)

    # mmengine's own six are gone too, so that the names are all that it has
    Runner.register_default_hooks(Collecting(), config.default_hooks)
    assert registered == [{'type': 'EMAHook'}]


def test_only_a_hook_that_is_there_is_left_out_by_an_option() -> None:
    hooks = {'logger2': {'type': 'LoggerHook'}, 'runtime': {'type': 'RuntimeInfoHook'}}
    config = Config({'default_hooks': hooks})
    merge_options(config, {'default_hooks.logger2': None, 'default_hooks.timer': None})
    assert config.default_hooks == {**hooks, 'logger2': None, 'timer': None}
    with pytest.raises(ValueError, match=r'hooks\.logger3=None is .*; did you mean logger\?'):
        merge_options(config, {'default_hooks.logger3': None})
    merge_options(config, {'default_hooks.runtime.priority': None})  # an option of a hook
    merge_options(config, {'default_hooks': None})
    assert config.default_hooks is None


def test_what_a_config_need_not_say() -> None:
    check_names(Config({'default_hooks': None, 'auto_scale_lr': None}))
    check_names(Config({}))
