"""What a config may say of spreading a model, and gradients whose layouts differ."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from timm.optim import create_optimizer_v2

from vqmoe_vision.engine import sharded
from vqmoe_vision.engine.sharded import (
    ShardingHook,
    _exchange,
    check_optim_wrapper,
    check_parallel,
    clip_grad_norm,
    spread,
    whole_state,
)
from vqmoe_vision.engine.sharded_saves import with_kernels


@pytest.mark.parametrize(
    ('fields', 'processes', 'message'),
    [
        (
            {'parallel': {'expert': 2}},
            2,
            r"parallel={'expert': 2} is not possible: its options are expert_pr",
        ),
        ({'parallel': 2}, 2, r'parallel=2 is not possible: its options are expert_processes'),
        ({'parallel': {}}, 1, r'parallel={} is not possible: it needs several processes'),
        (
            {'parallel': {}, 'model_wrapper_cfg': {'type': 'MMDistributedDataParallel'}},
            2,
            'it goes without model_wrapper_cfg',
        ),
    ],
)
def test_refused(
    fields: dict[str, Any], processes: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharded, 'get_world_size', lambda: processes)
    with pytest.raises(ValueError, match=message):
        check_parallel(Config(fields))


def test_a_model_is_spread_where_the_config_says_so() -> None:
    hooks: list[ShardingHook] = []
    for options in ({}, {'parallel': None}, {'parallel': {'expert_processes': 2}}):
        config = Config({'model': {}, **options})
        runner: Any = SimpleNamespace(cfg=config, register_hook=hooks.append)
        spread(runner)
        assert config.to_dict() == {'model': {}, **options}  # which a next run may change
    (hook,) = hooks
    assert hook.expert_processes == 2


@pytest.mark.parametrize('name', ['int8', 'float16', 'nn', ['float32']])
def test_dtypes_that_parameters_cannot_have(name: Any) -> None:
    message = re.escape(f'parallel.param_dtype={name!r} is not possible')
    with pytest.raises(ValueError, match=message):
        ShardingHook(param_dtype=name)


@pytest.mark.parametrize('name', ['parts', ['sharded']])
def test_ways_to_save_that_there_are_not(name: Any) -> None:
    message = re.escape(f"state_dict_type={name!r} is not possible: 'full' or 'sharded'")
    with pytest.raises(ValueError, match=message):
        ShardingHook(state_dict_type=name)


def wrapper(kind: str = 'SGD', clip_grad: dict | None = None, **options: Any) -> OptimWrapper:
    optimizer = create_optimizer_v2(torch.nn.Linear(3, 2), kind, lr=0.1)
    made = OptimWrapper(optimizer, clip_grad=clip_grad)
    vars(made).update(options)
    return made


def test_optimizers_that_see_wholes() -> None:
    check_optim_wrapper(wrapper(clip_grad={'max_norm': 1.0}))
    for bad, message in [
        (wrapper('lamb'), r"optimizer.type='Lamb' is not possible: one that treats all elements"),
        (
            wrapper(clip_grad={'type': 'value', 'clip_value': 1.0}),
            r"clip_grad.type='value' is not possible: 'norm' beside parallel",
        ),
        # what mmengine's `AmpOptimWrapper` has, which needs a GPU
        (wrapper(loss_scaler=torch.amp.GradScaler('cpu')), r'optim_wrapper.loss_scale=.*bfloat16'),
    ]:
        with pytest.raises(ValueError, match=message):
            check_optim_wrapper(bad)
    check_optim_wrapper(wrapper(loss_scaler=torch.amp.GradScaler('cpu', enabled=False)))
    for kernel in ('foreach', 'fused'):
        made = OptimWrapper(
            torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], **{kernel: True})
        )
        with pytest.raises(ValueError, match=rf'optim_wrapper\.optimizer\.{kernel}=True is not'):
            check_optim_wrapper(made)


@pytest.mark.parametrize('kernels', [{}, {'foreach': True}, {'fused': True}, {'foreach': False}])
def test_a_file_keeps_the_kernels_of_a_model_that_is_not_spread(kernels: dict[str, bool]) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), **kernels)
    expected = optimizer.state_dict()
    named = dict(model.named_parameters())
    _exchange(optimizer, named, named)
    assert not any(optimizer.param_groups[0][kernel] for kernel in ('foreach', 'fused'))
    assert with_kernels(optimizer.state_dict(), optimizer) == expected


@pytest.mark.parametrize(
    'options',
    [{}, {'norm_type': 'inf'}, {'norm_type': 1}, {'foreach': False}, {'error_if_nonfinite': True}],
    ids=str,
)
def test_clips_as_torch_does(options: dict[str, Any]) -> None:
    one, other = (torch.nn.Linear(3, 2) for _ in range(2))
    other.load_state_dict(one.state_dict())
    x = torch.randn(4, 3)
    norms = []
    for layer, clip in ((one, torch.nn.utils.clip_grad_norm_), (other, clip_grad_norm)):
        layer(x).square().sum().backward()
        norms.append(clip(list(layer.parameters()), max_norm=0.1, **options))
    torch.testing.assert_close(*norms)
    for parameter, same in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(same.grad, parameter.grad)


def test_a_norm_that_is_not_finite_is_an_error_where_torch_has_one() -> None:
    layer = torch.nn.Linear(3, 2)
    (layer(torch.ones(4, 3)) * torch.inf).sum().backward()
    messages = []
    for clip in (torch.nn.utils.clip_grad_norm_, clip_grad_norm):
        assert not clip(list(layer.parameters()), max_norm=0.1).isfinite()
        with pytest.raises(RuntimeError, match='is non-finite, so it cannot be clipped') as caught:
            clip(list(layer.parameters()), max_norm=0.1, error_if_nonfinite=True)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_whole_tensors_stay_what_they_are() -> None:
    state = {'a': [torch.ones(2), 3], 'b': {'c': 'd'}}
    assert str(whole_state(state)) == str(state)
