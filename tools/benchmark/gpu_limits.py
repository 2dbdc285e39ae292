"""What an H100 shall reach in `benchmark.py gpu`, in bfloat16; not run."""

from __future__ import annotations

from vqmoe_vision.models.vit_moe import SIZES

from .gates import Gate, limit, not_slower_compiled

NUM_IMAGES = 128  # of 197 tokens: 25,216
# width: an MoE, as a layer and as a whole network, over dense
OVER_DENSE = {384: 1.20, 768: 1.11, 1024: 1.09}


def over_dense(ours: str, dense: str, at_most: float, **where: object) -> tuple[Gate, ...]:
    """Ours over dense, eager and compiled."""
    forms = ('', '+compiled')
    return tuple(limit(f'{ours}{form}', f'{dense}{form}', at_most, **where) for form in forms)


def layer_limits() -> tuple[Gate, ...]:
    """Of the experts alone, and of the layer with its router."""
    names = ('ours', 'layer')
    limits: list[Gate] = []
    for width, at_most in OVER_DENSE.items():
        for name in names:
            limits += over_dense(name, 'dense', at_most, width=width)
        limits += not_slower_compiled(*names, width=width)
    return tuple(limits)


def network_sizes() -> dict[str, float]:
    """Sizes of ViT that have one of these widths, with their limits."""
    widths = {size: given['embed_dim'] for size, given in SIZES.items()}
    return {size: OVER_DENSE[width] for size, width in widths.items() if width in OVER_DENSE}
