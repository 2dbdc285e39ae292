"""Other libraries' layers, set up to do the work that one of ours does.

Names are those of packages on PyPI (extra `bench`), but for MoE Jetpack, which is on no registry
and is written here from its formulas. Nothing is taken from a peer: it keeps its router, losses,
biases or their absence, and runs as its documentation shows. Each comes with the contender of ours
that it is compared with:

- soft peers with our SoftMoE layer: the same slots, experts, widths, and the same normalisation;
- peers that drop tokens with our SMoE layer under a capacity at which it keeps as many assignments;
- others with our dropless SMoE layer. Gated experts have three matrices, so their hidden width is
  two thirds of ours.

Legend: B images, N tokens per image, T = B * N, D width, H hidden width, E experts, K experts per
token, C capacity.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from vqmoe_vision.moe.layer import RoutedMlp

from .cells import MLP_RATIO, Cell, Settings
from .contenders import Contender, UnsuitableError, autocast, place
from .inputs import Batch, Inputs
from .methods import routing_counts, whole_layer
from .ours import PROBE_ROUNDS, on_tokens

GATHER_LIMIT = 2e9  # bytes; what `batched_mm` may copy out of the weights for one product


def slots_per_expert(cell: Cell) -> int:
    """Slots of an expert for which all experts together answer K * N times per image."""
    return max(round(cell.top_k * cell.tokens / cell.experts), 1)


def soft_moe(cell: Cell, settings: Settings, inputs: Inputs) -> list[Contender]:
    """SoftMoELayerWrapper around timm's Mlp; the paper's normalisation."""
    from soft_moe import SoftMoELayerWrapper

    slots = slots_per_expert(cell)
    sizes = {'in_features': cell.width, 'hidden_features': cell.hidden}
    module = SoftMoELayerWrapper(cell.width, cell.experts, slots, Mlp, **sizes)
    equal = whole_layer('softmoe', 'softmoe', cell, settings, inputs)
    return [equal, _soft_peer('soft-moe', module, equal, cell, settings)]


def soft_moe_pytorch(cell: Cell, settings: Settings, inputs: Inputs) -> list[Contender]:
    """SoftMoE with plain GELU experts; its RMS normalisation is our preset 'lucidrains'."""
    from soft_moe_pytorch import SoftMoE

    slots = slots_per_expert(cell)
    sizes: dict[str, Any] = {'num_experts': cell.experts, 'expert_mult': MLP_RATIO}
    module = SoftMoE(cell.width, num_slots=slots, **sizes)
    equal = whole_layer(
        'softmoe-lucidrains', 'softmoe', cell, settings, inputs, preset='lucidrains'
    )
    return [equal, _soft_peer('soft-moe-pytorch', module, equal, cell, settings)]


def _soft_peer(
    name: str, module: nn.Module, equal: Contender, cell: Cell, settings: Settings
) -> Contender:
    # the logits, both mixtures and the experts are the same products in both
    note = f'{slots_per_expert(cell)} slots per expert in both'
    peer = Contender(name, place(module, cell, settings), on_tokens, equal.rows, equal.macs)
    peer.equal_to, peer.note = equal.name, note
    return peer


class EinsumSoftMoE(nn.Module):
    """SoftMoE as MoE Jetpack (arXiv 2406.04801) has it, products as einsums over all experts."""

    def __init__(self, cell: Cell, slots: int) -> None:
        super().__init__()
        sizes = (cell.experts, cell.width, cell.hidden)
        self.slot_embed = nn.Parameter(torch.randn(cell.width, cell.experts, slots))
        self.scale = nn.Parameter(torch.ones(()))
        self.weight1 = nn.Parameter(torch.randn(sizes) * 0.02)
        self.weight2 = nn.Parameter(torch.randn(sizes).mT.contiguous() * 0.02)
        self.bias1 = nn.Parameter(torch.zeros(cell.experts, 1, cell.hidden))
        self.bias2 = nn.Parameter(torch.zeros(cell.experts, 1, cell.width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D); e experts, p slots of each."""
        slot_embed = self.scale * F.normalize(self.slot_embed, dim=0)
        logits = torch.einsum('bnd,dep->bnep', F.normalize(x, dim=-1), slot_embed)
        slots = torch.einsum('bnd,bnep->bepd', x, logits.softmax(dim=1))
        hidden = F.gelu(torch.einsum('bepd,edh->beph', slots, self.weight1) + self.bias1)
        answers = torch.einsum('beph,ehd->bepd', hidden, self.weight2) + self.bias2
        combine = logits.flatten(2).softmax(dim=2).view_as(logits)
        return torch.einsum('bepd,bnep->bnd', answers, combine)


def moe_jetpack(cell: Cell, settings: Settings, inputs: Inputs) -> list[Contender]:
    """The SoftMoE layer of MoE Jetpack; the paper's normalisation."""
    module = EinsumSoftMoE(cell, slots_per_expert(cell))
    equal = whole_layer('softmoe', 'softmoe', cell, settings, inputs)
    return [equal, _soft_peer('moe-jetpack', module, equal, cell, settings)]


def mixture_of_experts(cell: Cell, settings: Settings, inputs: Inputs) -> list[Contender]:
    """Top-2 with capacity by one-hot products; experts without biases."""
    from mixture_of_experts import MoE

    if cell.top_k != 2:
        raise UnsuitableError('it routes to two experts, nothing else')
    sizes: dict[str, Any] = {'num_experts': cell.experts, 'hidden_dim': cell.hidden}
    module = MoE(cell.width, activation=nn.GELU, **sizes)
    return _dropping_peer('mixture-of-experts', module, 2, _pair, cell, settings, inputs)


def _pair(module: nn.Module, batch: Batch) -> Sequence[Tensor]:
    answer, loss = module(batch.x)
    return [answer, loss] if module.training else [answer]


def st_moe_pytorch(cell: Cell, settings: Settings, inputs: Inputs) -> list[Contender]:
    """Top-n (n >= 2) with capacity by one-hot products; GEGLU experts of 2 / 3 H, balance and z."""
    from st_moe_pytorch import MoE

    if cell.top_k < 2:
        raise UnsuitableError('it routes to two experts or more')
    sizes: dict[str, Any] = {'num_experts': cell.experts, 'expert_hidden_mult': MLP_RATIO}
    module = MoE(cell.width, gating_top_n=cell.top_k, **sizes)
    return _dropping_peer('st-moe-pytorch', module, 3, _tuple, cell, settings, inputs)


def _tuple(module: nn.Module, batch: Batch) -> Sequence[Tensor]:
    result = module(batch.x)
    return [result.outputs, result.total_aux_loss] if module.training else [result.outputs]


def _dropping_peer(
    name: str,
    module: nn.Module,
    matrices: int,
    forward: Any,
    cell: Cell,
    settings: Settings,
    inputs: Inputs,
) -> list[Contender]:
    module = place(module, cell, settings)
    hidden = cell.hidden if matrices == 2 else int(cell.width * MLP_RATIO * 2 / 3)
    peer = Contender(name, module, forward, 0, 0)
    kept, slots = _dispatched(peer, cell, settings, inputs)
    peer.rows, peer.drop_rate = kept * cell.num_rows, 1 - kept
    gate = cell.num_tokens * cell.width * cell.experts
    moving = 2 * cell.num_tokens * (slots // cell.batch) * cell.width
    peer.macs = gate + moving + slots * matrices * cell.width * hidden
    equal = _capped_layer(f'capped={name}', kept, cell, settings, inputs)
    assert equal.drop_rate is not None
    peer.equal_to = equal.name
    peer.note = (
        f'drops {peer.drop_rate:.1%} of assignments, computes {slots} places; '
        f'ours drops {equal.drop_rate:.1%}'
    )
    return [equal, peer]


@torch.no_grad()
def _dispatched(
    peer: Contender, cell: Cell, settings: Settings, inputs: Inputs
) -> tuple[float, int]:
    """Share of assignments that a peer keeps, and its places, from its own dispatch tensor."""
    seen: list[Tensor] = []
    gate = peer.module.get_submodule('gate')
    hook = gate.register_forward_hook(lambda _, __, out: seen.append(out[0]))
    try:
        with autocast(cell, settings):
            for index in range(PROBE_ROUNDS):
                peer.forward(peer.module, inputs.batch(index))
    finally:
        hook.remove()
    # (B, N, E, C), one where a token has a place, up to the rounding of a straight-through trick
    kept = sum((dispatch > 0.5).sum().item() for dispatch in seen) / len(seen)
    return kept / cell.num_rows, seen[0].shape[0] * seen[0].shape[2] * seen[0].shape[3]


def _capped_layer(
    name: str, kept: float, cell: Cell, settings: Settings, inputs: Inputs
) -> Contender:
    """Our SMoE layer with the capacity at which it keeps the share nearest to `kept`."""
    dropless = whole_layer(name, 'smoe', cell, settings, inputs).module
    assert isinstance(dropless, RoutedMlp)
    counts, _ = routing_counts(dropless, inputs)
    places = torch.arange(1, int(counts.max()) + 1)
    shares = counts[..., None].clamp(max=places).sum(dim=(0, 1)) / counts.sum()
    capacity = int((shares - kept).abs().argmin()) + 1
    # half a place less, so that the layer's rounding up gives this capacity whatever the fraction
    factor = (capacity - 0.5) * cell.experts / cell.num_rows
    factors = {'capacity_factor': factor, 'eval_capacity_factor': factor}
    return whole_layer(name, 'smoe', cell, settings, inputs, **factors)


def transformers(cell: Cell, settings: Settings, inputs: Inputs) -> list[Contender]:
    """Mixtral's block with each of its experts implementations, and its balance loss."""
    implementations, gated = ['eager', 'grouped_mm'], _gated_hidden(cell)
    # batched_mm copies a matrix out of the weights for every assignment
    copied = cell.num_rows * 2 * gated * cell.width * cell.compute_dtype.itemsize
    if copied <= GATHER_LIMIT:
        implementations.append('batched_mm')
    made = [_mixtral(name, gated, cell, settings) for name in implementations]
    if copied > GATHER_LIMIT:
        made[0].note += f'; batched_mm left out, it would copy {copied / 1e9:.1f} GB of weights'
    return [whole_layer('layer', 'smoe', cell, settings, inputs), *made]


def _gated_hidden(cell: Cell) -> int:
    """Two thirds of H, as a multiple of eight, which grouped_mm needs."""
    return max(round(cell.hidden * 2 / 3 / 8), 1) * 8


def _mixtral(implementation: str, hidden: int, cell: Cell, settings: Settings) -> Contender:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import (
        MixtralSparseMoeBlock,
        load_balancing_loss_func,
    )

    config = MixtralConfig(
        hidden_size=cell.width,
        intermediate_size=hidden,
        num_local_experts=cell.experts,
        num_experts_per_tok=cell.top_k,
        hidden_act='gelu',
    )
    config._experts_implementation = implementation
    module = MixtralSparseMoeBlock(config)
    for parameter in module.parameters():  # empty memory until a whole model initialises them
        nn.init.trunc_normal_(parameter, std=0.02)
    logits: list[Tensor] = []
    # as MixtralForCausalLM does with output_router_logits=True
    module.gate.register_forward_hook(lambda _, __, out: logits.append(out[0]))

    def forward(module: nn.Module, batch: Batch) -> Sequence[Tensor]:
        logits.clear()
        answer = module(batch.x)
        if not module.training:
            return [answer]
        loss = load_balancing_loss_func((logits[0],), cell.experts, cell.top_k)
        return [answer, 0.001 * loss]

    per_row = 3 * cell.width * hidden
    macs = cell.num_tokens * cell.width * cell.experts + cell.num_rows * per_row
    rows = cell.num_rows * per_row / (2 * cell.width * cell.hidden)
    name = f'transformers/{implementation}'
    peer = Contender(name, place(module, cell, settings), forward, rows, macs, equal_to='layer')
    peer.note = f'gated experts of hidden width {hidden}, no biases'
    return peer
