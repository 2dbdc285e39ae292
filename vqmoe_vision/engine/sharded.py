"""Runs whose model is spread over processes, as the config's `parallel` says.

Their files have whole tensors, so that any number of processes goes on from them.
"""

import logging
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import get_world_size
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from vqmoe_vision.models.sharding import shard_model
from vqmoe_vision.moe.config import check
from vqmoe_vision.moe.optimizer import mixes_experts

from .optim import scales_loss
from .processes import timeout_of
from .routing import RoutingStatistics
from .sharded_saves import (
    KERNELS_FOR_LISTS,
    JointSaves,
    whole,
    whole_state,
)

FIELD = 'parallel'
_OPTIONS = ('expert_processes', 'param_dtype', 'state_dict_type')
_SAVES = ('full', 'sharded')  # the words of Composer and Lightning


def check_parallel(config: Config) -> None:
    """Refuses options of `parallel` that there are not, or that nothing would follow."""
    options = config.get(FIELD)
    if options is None:
        return
    check(
        isinstance(options, dict) and not options.keys() - set(_OPTIONS),
        FIELD,
        options,
        f'its options are {", ".join(_OPTIONS)}, such as {FIELD}.expert_processes=1',
    )
    check(get_world_size() > 1, FIELD, options, 'it needs several processes, see --launcher')
    wrapper = config.get('model_wrapper_cfg')
    check(wrapper is None, FIELD, options, 'it goes without model_wrapper_cfg')


def spread(runner: Runner) -> None:
    """Lets a run spread its model, if its config has `parallel`."""
    options = runner.cfg.get(FIELD)
    if options is not None:
        runner.register_hook(ShardingHook(**options))


def check_optim_wrapper(wrapper: Any) -> None:
    """Refuses what looks at gradients or weights as wholes."""
    name = type(wrapper.optimizer).__name__
    allowed = 'one that treats all elements of a tensor alike, such as AdamW, beside parallel'
    check(not mixes_experts(wrapper.optimizer), 'optim_wrapper.optimizer.type', name, allowed)
    for kernel in KERNELS_FOR_LISTS:
        asked = wrapper.optimizer.defaults.get(kernel)
        allowed = 'None beside parallel: its kernels take tensors of one layout'
        check(not asked, f'optim_wrapper.optimizer.{kernel}', asked, allowed)
    by_norm = not wrapper.clip_grad_kwargs or wrapper.grad_name == 'grad_norm'
    check(by_norm, 'optim_wrapper.clip_grad.type', 'value', "'norm' beside parallel")
    allowed = f"{FIELD} goes without: use dtype='bfloat16' and loss_scale=dict(enabled=False)"
    check(not scales_loss(wrapper), 'optim_wrapper.loss_scale', 'a loss scale', allowed)


class ShardingHook(Hook):
    """Spreads the model of a run over all processes while it trains.

    Args:
        expert_processes: As `shard_model`.
        param_dtype: 'bfloat16' or 'float32'; None for that of the parameters.
        state_dict_type: 'full' for checkpoints of whole tensors, or 'sharded' for a folder of parts
            beside each.

    Raises:
        ValueError: `param_dtype` or `state_dict_type` is another one.
    """

    # after all that a training starts with, which sees the whole model
    priority = 'LOWEST'

    def __init__(
        self,
        expert_processes: int = 1,
        param_dtype: str | None = None,
        state_dict_type: str = 'full',
    ) -> None:
        dtypes = {None: None, 'bfloat16': torch.bfloat16, 'float32': torch.float32}
        # float16 needs a loss scale
        allowed = "'bfloat16', 'float32' or None"
        check(param_dtype in list(dtypes), f'{FIELD}.param_dtype', param_dtype, allowed)
        allowed = ' or '.join(map(repr, _SAVES))
        check(state_dict_type in _SAVES, f'{FIELD}.state_dict_type', state_dict_type, allowed)
        self.expert_processes, self.param_dtype = expert_processes, dtypes[param_dtype]
        self.in_parts = state_dict_type == 'sharded'

    def before_run(self, runner: Runner) -> None:
        """Refuses what has no meaning for a part of a model."""
        options = runner.cfg[FIELD]
        averages = any(isinstance(hook, EMAHook) for hook in runner.hooks)
        check(not averages, FIELD, options, 'it goes without EMAHook, which averages whole models')
        compiled = runner.cfg.get('compile')
        check(not compiled, 'compile', compiled, f'it goes without {FIELD}')

    def before_train(self, runner: Runner) -> None:
        """Spreads the model, and what the optimizer knows of it after a resume."""
        # torch warns that a norm over groups and experts, added up one after the other, may differ
        # between ranks; here each of them adds up the same numbers in the same order
        logging.getLogger('torch.distributed.tensor._redistribute').setLevel(logging.ERROR)
        wrapper = runner.optim_wrapper
        check_optim_wrapper(wrapper)
        optimizer = wrapper.optimizer
        device = next(runner.model.parameters()).device
        self._whole = deepcopy(runner.model.cpu())  # no second model on a GPU
        runner.model.to(device)
        for name, value in vars(runner.model).items():
            if isinstance(value, RoutingStatistics):  # who reads them may ask either of the two
                setattr(self._whole, name, value)
        before = dict(runner.model.named_parameters())
        shard_model(runner.model, self.expert_processes, self.param_dtype, timeout_of(runner.cfg))
        self._sharded = runner.model
        _exchange(optimizer, before, dict(runner.model.named_parameters()))
        if wrapper.clip_grad_kwargs:
            _replace_clip(wrapper, clip_grad_norm)
        # whoever saves: all processes have to take part, and the runner's own asks the first alone
        runner.save_checkpoint = JointSaves(runner, runner.model, self.in_parts)

    def before_val(self, runner: Runner) -> None:
        """Validates on a whole copy."""
        if not hasattr(self, '_sharded'):  # a validation that comes before the training
            return
        self._whole.load_state_dict(whole_state(self._sharded.state_dict()))
        runner.model = self._whole.to(next(self._sharded.buffers()).device)

    def after_val(self, runner: Runner) -> None:
        """Goes on with the parts."""
        if hasattr(self, '_sharded'):
            self._whole.cpu()
            runner.model = self._sharded

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Puts what belongs to all in place of the parts of the first process."""
        if isinstance(runner.save_checkpoint, JointSaves):
            checkpoint.update(runner.save_checkpoint.state)


def clip_grad_norm(
    parameters: Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """As `torch.nn.utils.clip_grad_norm_`, which takes parameters of one layout alone."""
    layouts: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            layout = parameter.device_mesh if isinstance(parameter, DTensor) else None
            layouts.setdefault(layout, []).append(parameter)
    norms = []
    for group in layouts.values():
        gradients = [p.grad for p in group if p.grad is not None]
        norms.append(whole(get_total_norm(gradients, norm_type, foreach=foreach)))
    total = get_total_norm(norms, norm_type, error_if_nonfinite)
    for group in layouts.values():
        clip_grads_with_norm_(group, max_norm, total, foreach)
    return total


def _replace_clip(wrapper: Any, clip: Callable[..., Tensor]) -> None:
    """Where the norm is kept from whoever would read it, inside of that."""
    keeper = wrapper.clip_func if hasattr(wrapper.clip_func, 'clip') else None
    if keeper is None:
        wrapper.clip_func = clip
    else:
        keeper.clip = clip


def _exchange(
    optimizer: torch.optim.Optimizer, before: dict[str, nn.Parameter], now: dict[str, nn.Parameter]
) -> None:
    """Gives an optimizer parts of parameters for whole ones, and parts of what it knows of them."""
    parts: dict[Tensor, nn.Parameter] = {p: now[name] for name, p in before.items()}
    for group in optimizer.param_groups:
        group['params'] = [parts[p] for p in group['params']]
        # kernels for lists of tensors take one layout alone, and on CUDA torch takes them unasked
        group.update({name: False for name in KERNELS_FOR_LISTS if name in group})
    for p in [p for p in optimizer.state if p in parts]:
        known = optimizer.state.pop(p)
        optimizer.state[parts[p]] = {
            name: _part_of(value, parts[p]) for name, value in known.items()
        }


def _part_of(value: Any, part: Tensor) -> Any:
    if not isinstance(part, DTensor) or not isinstance(value, Tensor) or value.shape != part.shape:
        return value
    return distribute_tensor(value, part.device_mesh, part.placements, src_data_rank=None)
