"""Models that are spread over processes: FSDP2 of torch, and experts that live on some of them.

Where experts are placed on M of N processes, each of the N / M groups of M processes has all of
them once, and what FSDP2 spreads of an expert's parameters is spread over the groups.
"""

from collections import defaultdict
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from ..moe import moe_layers
from ..moe.config import check
from ..moe.distributed import place_experts
from ..moe.experts import Experts
from ..moe.raw_patches import image_reader


def shard_model(
    model: nn.Module,
    expert_processes: int = 1,
    param_dtype: torch.dtype | None = None,
    timeout: float | None = None,
) -> nn.Module:
    """Spread parameters over all processes, in place; the loss of each is a mean over tokens."""
    processes = dist.get_world_size()
    check(
        isinstance(expert_processes, int)
        and expert_processes >= 1
        and processes % expert_processes == 0,
        'expert_processes',
        expert_processes,
        f'it must divide {processes}, the number of processes',
    )
    device = next(model.parameters()).device.type
    everyone = init_device_mesh(device, (processes,))
    whole = whole_parameters(model)
    _AveragedGradients([p for p in model.parameters() if p in whole and p.requires_grad])
    options: dict = {
        'mp_policy': MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32),
        'ignored_params': whole,
        'shard_placement_fn': partial(_place, processes),
    }
    if expert_processes > 1:
        shape = (processes // expert_processes, expert_processes)
        groups = _groups(device, shape, timeout)
        place_experts(model, groups['experts'])
        in_groups = {**options, 'shard_placement_fn': partial(_place, shape[0])}
        for experts in [m for m in model.modules() if isinstance(m, Experts)]:
            fully_shard(experts, mesh=groups['groups'], **in_groups)
    for block in blocks_of(model):
        fully_shard(block, mesh=everyone, **options)
    fully_shard(model, mesh=everyone, **options)
    return model


def _groups(device: str, shape: tuple[int, int], timeout: float | None) -> DeviceMesh:
    """Neighbours share one set of all experts; `groups` are those with the same experts."""
    # not by init_device_mesh, whose new groups have torch's own timeout
    wait = None if timeout is None else timedelta(seconds=timeout)
    places = torch.arange(shape[0] * shape[1]).view(shape)
    own: list = []
    # all processes take part in making each group
    for rows in (places.T, places):
        made = {tuple(ranks): dist.new_group(ranks, wait) for ranks in rows.tolist()}
        own.append(next(made[ranks] for ranks in made if dist.get_rank() in ranks))
    return DeviceMesh.from_group(own, device, places, mesh_dim_names=('groups', 'experts'))


def _place(processes: int, parameter: nn.Parameter) -> Shard:
    """The dimension of a tensor that FSDP2 is to cut, by default the first."""
    own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    # what does not divide evenly is filled up, and the filling travels
    return Shard(next((i for i, size in enumerate(own.shape) if size % processes == 0), 0))


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """What FSDP2 gathers as a unit; blocks inside of others come first, as it asks."""
    blocks: list[nn.Module] = []
    reader = image_reader(model)  # has no parameters to gather, and its own dtype
    apart = set() if reader is None else set(reader.modules())
    for name, module in model.named_modules():
        inside = [block for block in module.children() if block not in apart]
        # of timm and of mmseg's heads: what a network has many of, one after the other;
        # mmcv calls the different parts of a feed-forward network layers as well
        alike = len({type(block) for block in inside}) == 1
        if name.rpartition('.')[2] in ('blocks', 'layers') and alike:
            blocks += inside
    return blocks[::-1]


def whole_parameters(model: nn.Module) -> set[nn.Parameter]:
    """What decides in MoE layers, and scalars, which FSDP2 does not take: each process has all."""
    # updates of codebooks and stages read and write them between steps, in their own dtype
    whole = {p for p in model.parameters() if p.ndim == 0}
    for layer in moe_layers(model).values():
        norms = [norm for norm in layer.modules() if isinstance(norm, nn.LayerNorm)]
        spread = {p for part in (layer.experts, *norms) for p in part.parameters()}
        whole |= set(layer.parameters()) - spread
    return whole


class _AveragedGradients:
    """Averages gradients over all processes as a backward pass ends, those of a dtype at once."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        # in the order of the model: that of arrival may be another one on each process
        self._places = {parameter: place for place, parameter in enumerate(parameters)}
        self._arrived: defaultdict[int, list[Any]] = defaultdict(list)  # by backward pass
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._arrive)

    def _arrive(self, parameter: Tensor) -> None:
        number = torch._C._current_graph_task_id()
        if number not in self._arrived:
            Variable._execution_engine.queue_callback(partial(self._average, number))
        self._arrived[number].append(parameter)

    def _average(self, number: int) -> None:
        parts: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)
        for parameter in sorted(self._arrived.pop(number), key=self._places.__getitem__):
            parts[parameter.grad.dtype].append(parameter.grad)
        for gradients in parts.values():
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            sizes = [gradient.numel() for gradient in gradients]
            means = [m.view_as(g) for m, g in zip(flat.split(sizes), gradients, strict=True)]
            torch._foreach_copy_(gradients, means)
