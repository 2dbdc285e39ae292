"""Names that mmengine would pass over are refused, and hooks are left out by None."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config
from mmengine.runner import Runner

from vqmoe_vision.engine import cli
from vqmoe_vision.engine.cli import train
from vqmoe_vision.engine.known_names import _HOOKS, check_names

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
            'default_hooks.checkpoint=2',
            'default_hooks.checkpoint=2 is not possible: a hook of this name needs a type',
        ),
        (
            'auto_scale_lr.enabled=True',
            'auto_scale_lr.enabled=True is not possible: the options are base_batch_size, enable; '
            'did you mean enable?',
        ),
        (
            'auto_scale_lr=True',
            'auto_scale_lr=True is not possible: a dictionary with some of base_batch_size, enable',
        ),
        (
            'auto_scale_lr.enable=True',
            'auto_scale_lr.base_batch_size=None is not possible: the batch size that the learning '
            'rate is for, a whole number above 0',
        ),
        (
            'env_cfg.cudnn_benchmrk=False',
            'env_cfg.cudnn_benchmrk=False is not possible: the options are cudnn_benchmark, '
            'dist_cfg, mp_cfg, resource_limit; did you mean cudnn_benchmark?',
        ),
        (
            'randomness.sed=3',
            'randomness.sed=3 is not possible: the options are deterministic, diff_rank_seed, '
            'seed; did you mean seed?',
        ),
        (
            'env_cfg.mp_cfg.start_method=fork',
            "env_cfg.mp_cfg.start_method='fork' is not possible: the options are mp_start_method, "
            'opencv_num_threads; did you mean mp_start_method?',
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


@pytest.mark.parametrize('base', [0, -8, 2.5, '64', True])
def test_a_batch_size_that_no_rate_can_be_for(base: Any) -> None:
    scale = {'enable': True, 'base_batch_size': base}
    with pytest.raises(ValueError, match=r'base_batch_size=.* a whole number above 0'):
        check_names(Config({'auto_scale_lr': scale}))
    check_names(Config({'auto_scale_lr': {**scale, 'enable': False}}))


def test_any_hook_of_a_config_is_left_out_by_none() -> None:
    own = {'visualization': None, 'ema': {'type': 'EMAHook'}}
    config = Config({'default_hooks': {**own, **dict.fromkeys(_HOOKS)}})
    check_names(config)
    registered: list[Any] = []

    class Collecting:
        """Of a runner only what takes hooks."""

        register_hook = staticmethod(registered.append)

    # mmengine's own six are gone too, so that the names are all that it has
    Runner.register_default_hooks(Collecting(), config.default_hooks)
    assert registered == [{'type': 'EMAHook'}]


def test_what_a_config_need_not_say() -> None:
    check_names(Config({'default_hooks': None, 'env_cfg': None, 'auto_scale_lr': None}))
    check_names(Config({}))
