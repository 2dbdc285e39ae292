"""Weights from elsewhere for a vision transformer: fitted, and nothing lost in silence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..moe import moe_layers
from ..moe.config import check
from ..moe.raw_patches import READER, image_reader
from .fitting import (
    Size,
    fit_head,
    fit_layers,
    fitted_stem,
    in_names_of,
    left_out,
    pooled_otherwise,
    rename_norm,
    resized_positions,
    strip_names,
    without_norm,
)
from .hosts import Transformer
from .origin import Origin, other_pooling, refuse_other_function
from .refusals import (
    perhaps_rotary,
    refuse_gated,
    refuse_misfits,
    refuse_other_tokens,
    refuse_values,
)
from .state_dicts import (
    CLASSIFIERS,
    Report,
    StateDict,
    as_tensors,
    part_of,
)
from .stated_experts import StatedExperts, compare_experts, experts_of, saved_with
from .upcycle import Upcycling, units_left_out, upcycle


@dataclass(frozen=True)
class _Transfer:
    """What is known of a checkpoint beside its weights, and how experts are made of it."""

    path: str
    image_sizes: Sequence[Size]
    upcycling: Upcycling | None
    origin: Origin | None
    saved_with: str
    whole: bool  # every block is needed: features of fewer would be others


def fit_state(
    model: Transformer, state_dict: StateDict, path: str, image_sizes: Sequence[Size] = ()
) -> tuple[StateDict, list[str]]:
    """The part of a checkpoint that belongs into a model, resized where that can be done."""
    state, report = transfer(model, state_dict, path, image_sizes)
    return state, [f'{path}: {line}' for line in report.lines()]


def transfer(
    model: Transformer,
    state_dict: StateDict,
    path: str,
    image_sizes: Sequence[Size] = (),
    upcycling: Upcycling | None = None,
    origin: Origin | None = None,
    stated: StatedExperts | None = None,
    whole: bool = False,
) -> tuple[StateDict, Report]:
    """The part of a checkpoint that belongs into a model, and what becomes of each tensor.

    A head is taken if classes and pooling agree. Nothing else may be missing but what dense models
    lack: routers, codebooks, slots; and the last norm, with a warning.
    """
    expected = model.state_dict()
    on_meta = any(value.is_meta for value in expected.values())
    check(not on_meta, 'device', 'meta', f'one with memory for the weights of {path!r}')
    if origin is not None:
        refuse_other_function(model, origin, path)
        stated = experts_of(origin.model)
    others = Report.of_warnings(compare_experts(model, stated, path))
    how = _Transfer(path, image_sizes, upcycling, origin, saved_with(stated, model), whole)
    state, outside = strip_names(state_dict, expected, path)
    state = as_tensors(state, expected, path)
    reader = image_reader(model)
    if reader is None:
        fitted, report = _fit_network(model, state, expected, outside, how)
        return fitted, others.joined(report)
    part = part_of(state, READER)
    state, expected = (
        {k: v for k, v in names.items() if not k.startswith(READER)} for names in (state, expected)
    )
    result, report = _fit_network(model, state, expected, outside, how)
    read, more = reader.adapted(part, state, path, image_sizes)
    return result | read, others.joined(report).joined(more)


def _fit_network(
    model: Transformer,
    state: StateDict,
    expected: StateDict,
    outside: tuple[str, ...],
    how: _Transfer,
) -> tuple[StateDict, Report]:
    """As `transfer`, of all but what reads images, by timm's names."""
    path, origin = how.path, how.origin
    whole = how.whole or any(k.startswith(CLASSIFIERS) for k in expected)
    refuse_gated(expected, state, path)
    refuse_other_tokens(state, expected, path, model)
    doubts = perhaps_rotary(state, model) if origin is None else ()
    pooling = other_pooling(model, origin) if origin is not None else ''
    if not pooling and pooled_otherwise(expected, state):
        pooling = 'its features are pooled otherwise'
    state, remarks = rename_norm(state, expected)
    state, network, dropped, head, warnings = fit_head(state, expected, pooling)
    positions = resized_positions(state, model, path, how.image_sizes)
    filtered = in_names_of(model, {**state, **positions}, path)
    dropped_by_timm = left_out(state, filtered)
    filtered |= positions  # timm takes them for those of the model's default size and resizes again
    filtered |= fitted_stem(filtered, network)
    fitted = fit_layers(filtered, model)
    refuse_misfits(network, fitted, path, whole, how.saved_with)
    refuse_values(network, filtered, path)
    norm = without_norm(network, fitted)
    made, copied, lost = (
        _upcycled(model, fitted, path, how.upcycling) if how.upcycling else ({}, {}, ())
    )
    result = {name: value for name, value in fitted.items() if name in network} | made
    used = {*result, *copied.values()}
    return result, Report.of_result(
        result,
        expected,
        _resized(state, result),
        copied,
        unused=(*(k for k in filtered if k not in used), *dropped_by_timm),
        outside=(*outside, *dropped),
        remarks=(*doubts, *remarks, *head, *norm, *lost),
        warnings=(*doubts, *warnings, *norm, *lost),
    )


def _resized(
    state: StateDict, result: StateDict
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    return {
        name: (tuple(state[name].shape), tuple(value.shape))
        for name, value in result.items()
        if name in state and _is_fitted(name, state[name], value)
    }


def _is_fitted(name: str, before: Tensor, after: Tensor) -> bool:
    """Whether a tensor was resized; positions may be as many on another grid."""
    other = name == 'pos_embed' and before.shape == after.shape and not before.equal(after)
    return other or before.shape != after.shape


def _upcycled(
    model: Transformer, state: StateDict, path: str, how: Upcycling
) -> tuple[StateDict, dict[str, str], tuple[str, ...]]:
    """Experts made of the dense MLPs in their place, which tensor each was made of, and losses."""
    made: StateDict = {}
    sources: dict[str, str] = {}
    lost: dict[str, None] = {}
    for name, layer in moe_layers(model).items():
        prefix = f'{name}.'
        part = part_of(state, prefix)
        if not part:
            raise ValueError(
                f'checkpoint {path!r} does not fit the model: it has neither an MLP nor experts '
                f'for {name}, and would leave them random'
            )
        if not any(key.startswith('experts.') for key in part):
            experts = upcycle(part, layer.experts, how, f'{name} of checkpoint {path!r}')
            lost |= dict.fromkeys(units_left_out(part, layer.experts))
            made |= {f'{prefix}experts.{key}': value for key, value in experts.items()}
            sources |= {f'{prefix}experts.{key}': prefix + key for key in experts}
    allowed = f'its defaults, checkpoint {path!r} has no dense MLP to make experts of'
    check(bool(made) or how == Upcycling(), 'upcycling', how, allowed)
    return made, sources, tuple(lost)
