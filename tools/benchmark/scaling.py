"""`benchmark.py scaling`: what many processes cost, by formula and as measured with a few here.

The formulas are in `scaling_costs`, the measurement in `scaling_measured`; here are the networks
they are taken of, and the tables.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import timm
import torch
from torch import nn

from vqmoe_vision.models import complexity
from vqmoe_vision.models.sharding import whole_parameters
from vqmoe_vision.moe import MoeLayer
from vqmoe_vision.moe.codebooks.ema import UsageCodebook
from vqmoe_vision.moe.config import check
from vqmoe_vision.moe.experts import Experts

from . import scaling_costs as costs
from .networks import parse_model
from .report import markdown
from .scaling_costs import DDP, FSDP2, Block, Cluster, Network
from .scaling_measured import Measured, measure

SMALL = 'vit_tiny_vqmoe,depth=4,img_size=64'  # of what is measured, by default
PROCESSES = (2, 4)
LARGE = {
    'ViT-B': 'vit_base_patch16_224',
    'ViT-B, SMoE top-1': 'vit_base_smoe,num_experts=8,top_k=1',
    'ViT-B, VQMoE': 'vit_base_vqmoe,num_experts=8',
    'ViT-L': 'vit_large_patch16_224',
    'ViT-L, SMoE top-1': 'vit_large_smoe,num_experts=8,top_k=1',
    'ViT-L, VQMoE': 'vit_large_vqmoe,num_experts=8',
}
GPUS = (8, 32, 64, 256)
_HALF = {'parameter_bytes': 2, 'row_bytes': 2}  # bfloat16, in which large models compute


def build(spec: str) -> Any:
    """A vision transformer by name and options, as of `benchmark.py model`."""
    name, options = parse_model(spec)
    return timm.create_model(name, **options)


def sizes_of(model: Any) -> Network:
    """What of a network travels, is kept, or is computed."""
    macs = complexity(model).macs
    layers = [m for m in model.modules() if isinstance(m, MoeLayer)]
    whole = whole_parameters(model)
    experts = [m for m in model.modules() if isinstance(m, Experts)]
    of_experts = {p for m in experts for p in m.parameters()}
    blocks = []
    for block in model.blocks:
        own = set(block.parameters())
        blocks.append(
            Block(
                dense=_shapes(block, own - of_experts - whole),
                experts=_shapes(block, own & of_experts),
            )
        )
    in_blocks = set(model.blocks.parameters())
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    return Network(
        blocks=tuple(blocks),
        rest=_shapes(model, set(model.parameters()) - in_blocks - whole),
        whole=sum(p.numel() for p in whole),
        codebooks=tuple(
            (m.num_codes, m.dim) for m in model.modules() if isinstance(m, UsageCodebook)
        ),
        row_elements=sum(tokens * m.experts_per_token * model.embed_dim for m in layers),
        macs=macs,
    )


def _shapes(module: nn.Module, chosen: set[Any]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(p.shape) for p in module.parameters() if p in chosen)


def way_name(placed: int) -> str:
    """In words."""
    return {DDP: 'DDP', FSDP2: 'FSDP2'}.get(placed, f'experts on {placed}')


def predict(images: int, cluster: Cluster) -> list[dict[str, Any]]:
    """ViT-B and ViT-L on 8 to 256 GPUs, by formula."""
    check(images >= 1, '--batch', images, 'at least 1')
    rows = []
    for name, spec in LARGE.items():
        with torch.device('meta'):
            network = sizes_of(build(spec))
        title = f'{name}, {network.params / 1e6:.0f} M'
        ways = (DDP, FSDP2, 8) if network.row_elements else (DDP, FSDP2)
        rows += [
            {'network': title, **_predicted(network, placed, gpus, images, cluster)}
            for placed in ways
            for gpus in GPUS
        ]
    return rows


def _predicted(
    network: Network, placed: int, gpus: int, images: int, cluster: Cluster
) -> dict[str, Any]:
    sent: dict[str, float] = {}
    for transfer in costs.transfers(network, placed, gpus, images, **_HALF):
        sent[transfer.what] = sent.get(transfer.what, 0.0) + transfer.sent
    return {
        'way': way_name(placed),
        'gpus': gpus,
        'sent': sent,
        'memory': costs.memory(network, placed, gpus, _HALF['parameter_bytes'])._asdict(),
        'efficiency': costs.efficiency(network, placed, gpus, images, cluster, **_HALF),
    }


def predicted_tables(rows: Sequence[dict[str, Any]]) -> str:
    """Three tables in Markdown of what `predict` returns."""
    cells = {
        'GB that a GPU sends in a step': lambda r: f'{sum(r["sent"].values()) / 1e9:.2f}',
        'GB of parameters, gradients and AdamW, and beside them': _memory_cell,
        'share of a step in which a GPU computes, at worst and at best': lambda r: (
            f'{r["efficiency"][0]:.2f} to {r["efficiency"][1]:.2f}'
        ),
    }
    parts = []
    for title, cell in cells.items():
        lines: dict[tuple[str, str], list[str]] = {}
        for row in rows:
            lines.setdefault((row['network'], row['way']), []).append(cell(row))
        head = ['network', 'way', *(f'{gpus} GPUs' for gpus in GPUS)]
        parts += ['', f'{title}:', '', markdown(head, [[*k, *v] for k, v in lines.items()])]
    return '\n'.join(parts)


def _memory_cell(row: dict[str, Any]) -> str:
    *kept, beside = row['memory'].values()
    return f'{sum(kept) / 1e9:.2f} + {beside / 1e9:.2f}'


def measure_scaling(spec: str, images: int, every: Sequence[int]) -> list[dict[str, Any]]:
    """A step in each way with a few processes on the CPU, beside the formulas."""
    check(images >= 1, '--batch', images, 'at least 1')
    check(min(every) >= 2, '--processes', list(every), 'at least 2 each')
    with torch.device('meta'):
        model = build(spec)
        network = sizes_of(model)
    experts = {m.num_experts for m in model.modules() if isinstance(m, Experts)}
    rows = []
    for processes in every:
        divisors = [m for m in range(2, processes + 1) if processes % m == 0]
        shared = [m for m in divisors if experts and all(n % m == 0 for n in experts)]
        ways = [DDP, FSDP2, *shared]
        found = measure(partial(build, spec), ways, processes, images)
        rows += [
            _beside(network, placed, processes, images, measured)
            for placed, measured in zip(ways, found, strict=True)
        ]
    return rows


def _beside(
    network: Network, placed: int, processes: int, images: int, measured: Measured
) -> dict[str, Any]:
    sent = costs.transfers(network, placed, processes, images)
    gloo = costs.transfers(network, placed, processes, images, reduce_scatters=2)
    kept = costs.memory(network, placed, processes)
    return {
        'processes': processes,
        'way': way_name(placed),
        'sent': sum(t.sent for t in sent),
        'counted': math.fsum(measured.counted.values()),
        'counted_by_operator': measured.counted,
        'gloo': sum(t.sent for t in gloo),
        'sockets': measured.sockets,
        'memory': list(kept[:3]),
        'kept': list(measured.kept),
    }


def measured_table(rows: Sequence[dict[str, Any]]) -> str:
    """What `measure_scaling` returns, in Markdown and MB."""
    head = ['processes', 'way', 'sent, formula', 'counted', 'gloo, formula', 'sockets']
    head += [f'{what}, {how}' for what in ('parameters', 'gradients', 'AdamW') for how in _HOW]
    lines = []
    for row in rows:
        cells = [row[name] for name in ('sent', 'counted', 'gloo', 'sockets')]
        cells += [n for pair in zip(row['memory'], row['kept'], strict=True) for n in pair]
        megabytes = ['' if n is None else f'{n / 1e6:.2f}' for n in cells]
        lines.append([str(row['processes']), row['way'], *megabytes])
    return markdown(head, lines)


_HOW = ('formula', 'kept')
