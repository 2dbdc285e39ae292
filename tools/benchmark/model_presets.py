"""Named sets of networks, with the ratios that they are held to."""

from __future__ import annotations

from vqmoe_vision.moe import METHODS

from .cells import Cell
from .gates import limit, not_slower_compiled
from .gpu_limits import NUM_IMAGES, network_sizes, over_dense
from .methods import matched_options
from .networks import Comparison
from .presets import Preset

_PRECISIONS = (('float32', False), ('bfloat16', True))


def _model(method: str, top_k: int = 2, size: str = 'small') -> str:
    """A ViT of a method, 197 tokens and eight experts, with K experts per token."""
    options = matched_options(method, Cell(tokens=197, experts=8, top_k=top_k))
    return ','.join([f'vit_{size}_{method}', *(f'{key}={options[key]}' for key in options)])


_SMOE_1, _SMOE_2, _VQMOE = _model('smoe', top_k=1), _model('smoe'), _model('vqmoe')
_MODEL_GATES = (
    limit(_SMOE_1, 'vit_small_patch16_224', 1.07, dtype='float32', mode='training'),
    limit(_SMOE_1, 'vit_small_patch16_224', 1.14, dtype='bfloat16', mode='training'),
    limit(_VQMOE, _SMOE_2, 1.05, mode='training'),
)

# --- discrete: what the discrete form saves of the full one, by size and number of MoE blocks ---


def _forms(size: str, experts: int, moe_layers: str) -> tuple[Comparison, Comparison]:
    """Full, discrete and dense: prediction of one image, then of eight, and training."""
    full = f'vit_{size}_vqmoe,num_experts={experts},moe_layers={moe_layers}'
    models = (f'{full},form=discrete', f'vit_{size}_patch16_224')
    return (
        Comparison(models=models, baseline=full, batch=1, modes=('inference',)),
        Comparison(models=models, baseline=full, batch=8),
    )


def _saving(*sizes: tuple[str, int]) -> Preset:
    """CPU time of one thread, which other work on the machine disturbs least."""
    comparisons = (
        comparison
        for size, experts in sizes
        for moe_layers in ('last2', 'every2', 'every1')
        for comparison in _forms(size, experts, moe_layers)
    )
    return Preset(comparisons=tuple(comparisons), threads=1, clock='process', repeats=5)


# --- serving: latency of one image and of eight, `--compiled` beside it ---

_EVERY_2 = 'moe_layers=every2'
_SERVED = f'num_experts=8,{_EVERY_2}'
# images: the discrete form over dense
_SERVING_LIMITS = {1: 1.25, 8: 1.10}


def _serving(size: str, dtype: str) -> Preset:
    """All in one dtype, weights too; CPU time of one thread, unless the command says otherwise."""
    dense, vqmoe = f'vit_{size}_patch16_224', f'vit_{size}_vqmoe,{_SERVED}'
    discrete = f'{vqmoe},form=discrete'
    models = (f'vit_{size}_smoe,{_SERVED},top_k=1', vqmoe, discrete)
    comparisons = (
        Comparison(models=models, baseline=dense, batch=n, dtype=dtype, modes=('inference',))
        for n in _SERVING_LIMITS
    )
    limits = (
        limit(discrete, dense, at_most, batch=n, dtype=dtype)
        for n, at_most in _SERVING_LIMITS.items()
    )
    return Preset(
        comparisons=tuple(comparisons), threads=1, clock='process', repeats=9, gates=tuple(limits)
    )


def _more_weights() -> Preset:
    """The multiply-accumulates stay; only the weights that are read grow."""
    models = [f'vit_small_vqmoe,form=discrete,num_experts={n},{_EVERY_2}' for n in (2, 4, 8, 16)]
    comparisons = (
        Comparison(models=tuple(models), batch=n, modes=('inference',)) for n in _SERVING_LIMITS
    )
    return Preset(comparisons=tuple(comparisons), threads=1, clock='process', repeats=9)


# --- gpu: of `benchmark.py gpu`, whose ten minutes compiling takes most of: training steps alone,
# and methods beside SMoE in the smallest alone ---


def _on_a_card() -> Preset:
    comparisons, gates = [], []
    for size, at_most in network_sizes().items():
        smoe, dense = _model('smoe', 1, size), f'vit_{size}_patch16_224'
        models = (_SMOE_1, _SMOE_2, _VQMOE) if smoe == _SMOE_1 else (smoe,)
        comparisons.append(
            Comparison(
                models=models,
                baseline=dense,
                batch=NUM_IMAGES,
                dtype='bfloat16',
                amp=True,
                modes=('training',),
            )
        )
        gates += [*over_dense(smoe, dense, at_most), *not_slower_compiled(*models)]
    return Preset(comparisons=tuple(comparisons), repeats=20, gates=tuple(gates), compiled=True)


MODEL_PRESETS = {
    **{
        f'serving-{size}{suffix}': _serving(size, dtype)
        for size in ('tiny', 'small', 'base')
        for suffix, dtype in (('', 'float32'), ('-bfloat16', 'bfloat16'))
    },
    'serving-experts': _more_weights(),
    # the number of experts changes no work, and eight in all blocks of base would need 24 GB
    'discrete': _saving(('tiny', 8), ('small', 8), ('base', 4)),
    'table': Preset(
        comparisons=tuple(
            Comparison(models=(_SMOE_1, *map(_model, METHODS)), dtype=dtype, amp=amp)
            for dtype, amp in _PRECISIONS
        ),
        repeats=9,
        gates=_MODEL_GATES,
    ),
    'compiled': Preset(
        comparisons=tuple(
            Comparison(models=(_SMOE_1, _VQMOE), dtype=dtype, amp=amp) for dtype, amp in _PRECISIONS
        ),
        repeats=7,
        gates=not_slower_compiled(_SMOE_1, _VQMOE),
        compiled=True,
    ),
    'gpu': _on_a_card(),
}
