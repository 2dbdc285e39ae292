"""Whole layers, of every method that the package has.

An option that sets how much a layer computes is set for K experts per token; a method that then
computes something else is left out of the cell. So a new method needs nothing here.

Legend: B images, N tokens per image, T = B * N, D width, E experts, K experts per token.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vqmoe_vision.moe import METHODS, MoeLayer, collect_losses
from vqmoe_vision.moe.codebooks import Quantized
from vqmoe_vision.moe.dispatch import run_experts, run_experts_evenly
from vqmoe_vision.moe.experts import Experts
from vqmoe_vision.moe.kernels import compute_dtype
from vqmoe_vision.moe.layer import Decisions, RoutedMlp
from vqmoe_vision.moe.losses import values_of
from vqmoe_vision.moe.raw_patches import Host, RawPatches
from vqmoe_vision.moe.routing import Routing

from .cells import Cell, Settings
from .contenders import Contender, UnsuitableError, place
from .inputs import PATCH, Batch, Inputs
from .ours import (
    PROBE_ROUNDS,
    ExpertsLoop,
    make_experts,
    mean_load,
    run_experts_loop,
    with_loops,
)

# methods by the name of their contender; SMoE's is 'layer', which limits and peers refer to
LAYERS = {'layer' if method == 'smoe' else method: method for method in METHODS}


def matched_options(method: str, cell: Cell) -> dict[str, Any]:
    """Options with which a layer of a method computes K experts per token."""
    names = METHODS[method].config.option_names()
    values = {
        'top_k': cell.top_k,
        'slots_per_token': float(cell.top_k),
        'capacity_factor': float(cell.top_k),
        'form': 'full' if cell.top_k > 1 else 'discrete',
    }
    # one of them: beside top_k a capacity drops tokens
    return next(({name: value} for name, value in values.items() if name in names), {})


def whole_layer(
    name: str, method: str, cell: Cell, settings: Settings, inputs: Inputs, **options: Any
) -> Contender:
    """The layer of a method: routing in float32, losses, dispatch, experts."""
    macs, rows = _cost(method, cell, options)
    # groups of whole rows per expert
    if abs(rows - cell.top_k * cell.tokens) >= cell.experts:
        raise UnsuitableError(f'it computes {rows / cell.tokens:g} experts per token')
    module = place(_build(method, cell, make_experts(cell), options), cell, settings)
    assert isinstance(module, MoeLayer)
    _start(module, inputs.batch(0))
    module.train(settings.backward)
    # a subclass may compute more than its routing tells
    routed = isinstance(module, RoutedMlp) and type(module).run is RoutedMlp.run
    oracle = routed_oracle if routed else loops_oracle
    found = Contender(name, module, run_layer, cell.batch * rows, cell.batch * macs, oracle)
    if isinstance(module, RoutedMlp):
        counts, kept = routing_counts(module, inputs)
        found.load, found.rows = mean_load(counts), found.rows * kept
        found.drop_rate = 1 - kept if 'capacity_factor' in options else None
    return found


def _build(
    method: str, cell: Cell, experts: Experts, options: dict[str, Any], **factory: Any
) -> MoeLayer:
    entry = METHODS[method]
    options = {'num_experts': cell.experts, **matched_options(method, cell), **options}
    try:
        config = entry.config.from_options(**options)
    except ValueError as reason:  # K experts per token are not possible
        raise UnsuitableError(str(reason)) from None
    read = entry.reader(config, lambda: _MeanPixels(cell), **factory)
    host = Host(cell.tokens, raw_patches=RawPatches(read))
    return entry.build(cell.width, config, experts, host, **factory)


class _MeanPixels(nn.Module):
    """In the place of a network that reads images: a layer is timed, not what is beside it."""

    num_features, num_prefix_tokens = 3, 0

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self.image_size = self.sizes = (PATCH, PATCH * cell.tokens)
        self.grid_size = (1, cell.tokens)

    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))

    def forward_features(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(images, PATCH).flatten(2).mT


def _cost(method: str, cell: Cell, options: dict[str, Any]) -> tuple[int, int]:
    """Multiply-accumulates of an image, and its rows that pass through experts."""
    macs = []
    for hidden in (cell.hidden, 2 * cell.hidden):
        experts = Experts(cell.experts, cell.width, hidden, device='meta')
        layer = _build(method, cell, experts, options, device='meta').eval()
        images = torch.empty(1, 3, PATCH, PATCH * cell.tokens, device='meta')
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            _show_images(layer, images)
            layer(torch.empty(1, cell.tokens, cell.width, device='meta'))
        macs.append(counter.get_total_flops() // 2)
    return macs[0], (macs[1] - macs[0]) // (2 * cell.width * cell.hidden)


def _start(module: MoeLayer, batch: Batch) -> None:
    """Let state that learns without gradients, such as codes, start from tokens."""
    module.train()
    _show_images(module, batch.images)
    with torch.no_grad(), collect_losses(module):
        module(batch.x)


def _show_images(module: nn.Module, images: Tensor) -> None:
    """Let layers that look at raw patches see them, as the stem of a model does."""
    for part in module.modules():
        patches = getattr(part, 'raw_patches', None)
        if isinstance(patches, RawPatches):
            patches.show(images, (1, images.shape[-1] // PATCH))


def experts_only(layer: Contender, cell: Cell) -> Contender:
    """The products of such a layer, and its dispatch: what it decides is given."""
    module = layer.module
    assert isinstance(module, MoeLayer)

    def given(batch: Batch) -> Batch:
        kept: Decisions = {}
        module.recorder.watcher = lambda decisions, *_: kept.update(decisions)
        with torch.no_grad():
            run_layer(module, batch)
        module.recorder.watcher = None
        return replace(batch, decided=_as_given(kept, module.experts.num_experts))

    # a slot is a mixture of the tokens of its image, and a token's answer one of slots
    mixed = cell.tokens if hasattr(module, 'slots_per_expert') else 0
    macs = int(layer.rows * 2 * cell.width * (cell.hidden + mixed))
    name, experts = f'experts_only:{layer.name}', module.experts
    return Contender(name, experts, run_given, layer.rows, macs, given_oracle, given=given)


def given_oracle(module: nn.Module, batch: Batch) -> Sequence[Tensor]:
    assert isinstance(module, Experts)
    return run_given(ExpertsLoop(module), batch)


def _as_given(decisions: Decisions, num_experts: int) -> dict[str, Any]:
    """Two mixtures, or one routing of those of all branches, with leaves in place of weights."""
    mixtures = {k: v.requires_grad_() for k, v in decisions.items() if isinstance(v, Tensor)}
    if 'dispatch' in mixtures:
        return mixtures
    parts = [part for part in decisions.values() if isinstance(part, Routing | Quantized)]
    found = next((part for part in parts if isinstance(part, Routing)), None)
    if found is None or len(parts) > 1:
        chosen = [part.indices.view(len(part.indices), -1) for part in parts]
        indices = torch.cat(chosen, dim=1) % num_experts
        found = Routing(indices, torch.rand(indices.shape))
    weights = found.weights.detach().requires_grad_()
    return {'routing': replace(found, weights=weights, losses={}, stats={})}


def run_given(module: Any, batch: Batch) -> Sequence[Tensor]:
    """Experts alone, sparse or soft, on what a layer decided."""
    if 'routing' in batch.decided:
        return [run_experts(module, batch.x.flatten(0, 1), batch.decided['routing'])]
    dtype = compute_dtype(batch.x)
    dispatch, combine, x = (
        t.to(dtype) for t in (batch.decided['dispatch'], batch.decided['combine'], batch.x)
    )
    slots = (dispatch.mT @ x).unflatten(1, (module.num_experts, -1)).transpose(0, 1)
    answers = run_experts_evenly(module, slots.flatten(1, 2)).view(slots.shape)
    return [combine @ answers.transpose(0, 1).flatten(1, 2)]


def _for_router(module: RoutedMlp, x: Tensor) -> Tensor:
    return x if module.router.per_image else x.flatten(0, 1)


@torch.no_grad()
def routing_counts(module: RoutedMlp, inputs: Inputs) -> tuple[Tensor, float]:
    """Assignments of every expert in some batches (rounds, E), and the share that is kept."""
    counts, kept = [], []
    for index in range(PROBE_ROUNDS):
        batch = inputs.batch(index)
        _show_images(module, batch.images)
        routing = module.router(_for_router(module, batch.x))
        indices = routing.indices.flatten()
        counts.append(indices.bincount(minlength=inputs.cell.experts).cpu())
        everything = torch.ones(1) if routing.kept is None else routing.kept.float()
        kept.append(everything.mean().item())
    return torch.stack(counts), sum(kept) / len(kept)


def run_layer(
    module: nn.Module, batch: Batch, call: Callable[[Tensor], Tensor] | None = None
) -> Sequence[Tensor]:
    """A layer, perhaps compiled, inside its collector, as a training step runs it."""
    assert isinstance(module, MoeLayer)
    call = module if call is None else call  # one that is compiled has a length, and no truth
    _show_images(module, batch.images)
    if not module.training or not module.needs_collecting:
        return [call(batch.x)]
    with collect_losses(module, update_state=False) as collected:
        answer, loss = call(batch.x), collected.total()
    module.observed = {}
    return [answer, loss] if loss.requires_grad else [answer]


def routed_oracle(module: nn.Module, batch: Batch) -> Sequence[Tensor]:
    """A layer that is a router and experts, dispatched and computed by a plain loop."""
    assert isinstance(module, RoutedMlp)
    _show_images(module, batch.images)
    tokens = batch.x.flatten(0, 1)
    routing = module.router(_for_router(module, batch.x))
    rows = tokens.to(compute_dtype(tokens))
    answer = run_experts_loop(module.experts, rows, routing).view(batch.x.shape)
    if not module.training or not routing.losses:
        return [answer]
    return [answer, torch.stack(list(values_of(routing.losses).values())).sum()]


def loops_oracle(module: nn.Module, batch: Batch) -> Sequence[Tensor]:
    return run_layer(with_loops(module), batch)
