"""Weights from elsewhere for a vision transformer: renamed, resized, none lost in silence."""

import math
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed_nhwc
from timm.models import adapt_input_conv
from timm.models.vision_transformer import VisionTransformer

from ..moe import moe_layers
from ..moe.config import check
from ..moe.raw_patches import READER, image_reader
from .compat import (
    CLASSIFIERS,
    HEADS,
    NORMS,
    Network,
    StateDict,
    below,
    compare,
    is_out_of_memory,
    misfit,
    other_pooling,
    part_of,
    refuse_misfits,
    refuse_rotary,
    refuse_values,
    refuse_without_values,
    shorten,
    without,
)
from .layers import Convertible, timms_class
from .normalization import KEY, Normalization, of_buffer
from .upcycle import Upcycling, upcycle

Size = tuple[int, ...]
_STEM = 'patch_embed.proj.weight'
_TOKENS = ('cls_token', 'reg_token', 'dist_token')
# timm's name for DINOv2's and DINOv3's
_OTHER_TOKENS = {'register_tokens': 'reg_token', 'storage_tokens': 'reg_token'}
# mmseg's `VisionTransformer` has other names for the same parts.
_FROM_MMSEG = (
    (r'^patch_embed\.projection\.', 'patch_embed.proj.'),
    (r'^layers\.', 'blocks.'),
    (r'^ln1\.', 'norm.'),
    (r'\.ln([12])\.', r'.norm\1.'),
    (r'\.attn\.attn\.in_proj_', '.attn.qkv.'),
    (r'\.attn\.attn\.out_proj\.', '.attn.proj.'),
    (r'\.ffn\.layers\.0\.0\.', '.mlp.fc1.'),
    (r'\.ffn\.layers\.1\.', '.mlp.fc2.'),
)


@dataclass(frozen=True)
class Report:
    """What became of each tensor of a model, and of each of a checkpoint."""

    # of the model
    loaded: tuple[str, ...] = ()
    resized: dict[str, tuple[Size, Size]] = field(default_factory=dict)
    copied: dict[str, str] = field(default_factory=dict)  # and of which tensor of the checkpoint
    initialised: tuple[str, ...] = ()
    # of the checkpoint: without a place in the model, and outside of the model's part
    unused: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()  # those of the remarks that nobody may have meant
    normalization: Normalization | None = None  # of images, if the checkpoint is of a run

    @classmethod
    def of(
        cls,
        result: StateDict,
        expected: Iterable[str],
        resized: dict[str, tuple[Size, Size]],
        copied: dict[str, str],
        **others: Any,
    ) -> 'Report':
        """That of a state dict which a model loads."""
        loaded = tuple(k for k in result if k not in resized and k not in copied)
        return cls(loaded, resized, copied, tuple(k for k in expected if k not in result), **others)

    def joined(self, other: 'Report') -> 'Report':
        """Both reports as one, of two parts of a model."""
        pairs = ((name, value, vars(other)[name]) for name, value in vars(self).items())
        tensors = ((name, a, b) for name, a, b in pairs if name != 'normalization')
        return Report(**{k: a | b if isinstance(a, dict) else a + b for k, a, b in tensors})

    def lines(self) -> list[str]:
        """For a log; a head that starts anew has its line among the remarks."""
        notes = list(self.remarks)
        notes += [
            f'{name} resized from {before} to {after}'
            if before != after
            else f'{name} resized from another grid of as many positions, {before}'
            for name, (before, after) in self.resized.items()
        ]
        initialised = [name for name in self.initialised if not name.startswith(CLASSIFIERS)]
        found = [*self.loaded, *self.resized]
        number = len(found) + len(self.copied) + len(initialised)
        whole = 'model' if any(name.startswith(CLASSIFIERS) for name in found) else 'backbone'
        notes.append(f'loaded {len(found)} of the {number} tensors of the {whole}')
        if self.copied:
            experts = [name for name in self.copied if '.experts.' in name]
            notes.append(f'made of dense MLPs: {", ".join(experts)}')
        if initialised:
            notes.append(f'not in the checkpoint, as initialised: {", ".join(initialised)}')
        if self.unused:
            notes.append(f'not in the model, unused: {", ".join(self.unused)}')
        return notes

    def listed(self) -> list[str]:
        """Every tensor, with what became of it."""
        return [
            *(f'{name}: loaded' for name in self.loaded),
            *(f'{name}: resized from {old} to {new}' for name, (old, new) in self.resized.items()),
            *(f'{name}: made of {source}' for name, source in self.copied.items()),
            *(f'{name}: as initialised' for name in self.initialised),
            *(f'{name} of the source: unused' for name in (*self.unused, *self.outside)),
        ]


def transfer(
    model: Convertible,
    state_dict: StateDict,
    path: str,
    image_sizes: Sequence[Size] = (),
    upcycling: Upcycling | None = None,
    network: Network | None = None,
    whole: bool = False,
) -> tuple[StateDict, Report]:
    """The part of a checkpoint that belongs into a model, and what becomes of each tensor.

    A head is taken if classes and pooling agree. Nothing else may be missing but what dense models
    lack: routers, codebooks, slots; and the last norm, with a warning.
    """
    expected = model.state_dict()
    others = compare(model, network, path, whole=False)
    state, outside = in_names_of_timm(state_dict, expected, path)
    on_meta = any(value.is_meta for value in expected.values())
    check(not on_meta, 'device', 'meta', f'one with memory for the weights of {path!r}')
    refuse_without_values(state, path, expected)
    config = getattr(model, 'pretrained_cfg', None) or {}
    own = network.img_size if network is not None else ()
    sizes = [size for size in (own, *image_sizes, config.get('input_size', ())[1:]) if size]
    reader = image_reader(model)
    shown = part_of(state, READER) if reader is not None else {}
    if reader is not None:
        expected, state = without(expected, READER), without(state, READER)
    result, report = _fit(model, state, expected, path, sizes, upcycling, network, whole)
    report = Report(outside=outside, remarks=others, warnings=others).joined(report)
    if reader is not None:
        read, more = reader.adapted(shown, state, path, sizes)
        result, report = result | read, report.joined(more)
    return result, replace(report, normalization=of_buffer(state_dict.get(KEY)))


def _fit(
    model: Convertible,
    state: StateDict,
    expected: StateDict,
    path: str,
    sizes: Sequence[Size],
    how: Upcycling | None,
    network: Network | None,
    whole: bool,  # every block is needed: features of fewer would be others
) -> tuple[StateDict, Report]:
    """As `transfer`, of all but what reads images, by timm's names."""
    whole = whole or any(k.startswith(CLASSIFIERS) for k in expected)
    rotary = refuse_rotary(state, model, path)
    # by which timm's filter would take positions apart
    theirs = {_OTHER_TOKENS.get(name, name): value for name, value in state.items()}
    ours, theirs = ({k: x[k] for k in _TOKENS if k in x} for x in (expected, theirs))
    refuse_misfits(ours, theirs, path, whole=True)
    doubts = rotary if network is None or 'rotary positions' not in network.facts else ()
    pooling = other_pooling(model, network)
    # as far as names tell
    parts = ('attn_pool.latent', 'norm.weight', 'fc_norm.weight')
    if not pooling and any((name in expected) != (name in state) for name in parts):
        pooling = 'its features are pooled otherwise'
    state, renamed = _rename_norm(state, expected)
    body, dropped, note, asked = _fit_head(state, expected, pooling)
    state = {name: value for name, value in state.items() if name not in dropped}
    positions = _resized_positions(state, model, path, sizes)
    filtered = _filtered(model, {**state, **positions}, path)
    lost_by_timm = _left_out(state, filtered)
    filtered |= positions  # timm takes them for those of the model's default size and resizes again
    filtered |= _fitted_stem(filtered, body)
    fitted = _fit_layers(filtered, model)
    refuse_misfits(body, fitted, path, whole)
    refuse_values(body, filtered, path)
    norms = [name for name in body if name.startswith(NORMS) and name not in fitted]
    lacking = f'the checkpoint has no {shorten(norms)}: the last norm is as initialised'
    no_norm = (lacking,) if norms else ()
    made, copied = _upcycled(model, fitted, path, how) if how is not None else ({}, {})
    result = {name: value for name, value in fitted.items() if name in body} | made
    used = {*result, *copied.values()}
    resized = {
        name: (tuple(before.shape), tuple(value.shape))
        for name, value in result.items()
        if (before := state.get(name)) is not None
        # positions may be as many on another grid
        if before.shape != value.shape or (name == 'pos_embed' and not before.equal(value))
    }
    return result, Report.of(
        result,
        expected,
        resized,
        copied,
        unused=(*(k for k in filtered if k not in used), *lost_by_timm),
        outside=dropped,
        remarks=(*doubts, *renamed, *note, *no_norm),
        # of as many classes, nobody has asked for a fresh head
        warnings=(*doubts, *(() if asked else note), *no_norm),
    )


def in_names_of_timm(
    state_dict: StateDict, expected: StateDict, path: str
) -> tuple[StateDict, tuple[str, ...]]:
    """Without the prefix of a run, and by timm's names; and what else there is in the run."""
    # of a segmentation run, of a classification run (or of a backbone alone), of a run of mmseg's
    # own backbone, of rstrudel/segmenter, of timm
    for prefix in ('backbone.model.', 'model.', 'backbone.', 'encoder.', ''):
        state = part_of(state_dict, prefix)
        if is_of_mmseg(state):
            state = from_mmseg(state)
        if any(name in expected and not name.startswith(HEADS) for name in state):
            return state, tuple(k for k in state_dict if not k.startswith(prefix))
    raise ValueError(
        f'checkpoint {path!r} has no key of the model: it has {shorten(state_dict) or "none"}; '
        f'the model has {shorten(expected)}'
    )


def is_of_mmseg(state: StateDict) -> bool:
    """Whether tensors have the names of mmseg's `VisionTransformer`."""
    return any(name.startswith('layers.0.') for name in state)


def from_mmseg(state: StateDict) -> StateDict:
    """The same tensors in timm's names; a stem without a bias gets one of zeros."""
    renamed = {replaced(name, _FROM_MMSEG): value for name, value in state.items()}
    if _STEM in renamed:  # mmseg's has no bias since 1.2
        renamed.setdefault('patch_embed.proj.bias', torch.zeros_like(renamed[_STEM][:, 0, 0, 0]))
    return renamed


def replaced(name: str, replacements: Sequence[tuple[str, str]]) -> str:
    """A name after all replacements."""
    for theirs, ours in replacements:
        name = re.sub(theirs, ours, name)
    return name


def _rename_norm(state: StateDict, expected: StateDict) -> tuple[StateDict, tuple[str, ...]]:
    """A classifier that averages its features normalises them afterwards, others before."""
    for theirs, ours in (('fc_norm', 'norm'), ('norm', 'fc_norm')):
        name, other = f'{ours}.weight', f'{theirs}.weight'
        if name in expected and name not in state and other in state:
            renamed = {re.sub(rf'^{theirs}\.', f'{ours}.', k): v for k, v in state.items()}
            return renamed, (f'{theirs} becomes {ours}',)
    return state, ()


def _fit_head(
    state: StateDict, expected: StateDict, pooling: str
) -> tuple[StateDict, tuple[str, ...], tuple[str, ...], bool]:
    """What has to fit, names that are dropped, what to say, and whether a fresh head was asked."""
    head = {k: v for k, v in expected.items() if k.startswith(CLASSIFIERS)}
    if not head:
        dropped = tuple(k for k in state if k.startswith(HEADS) and k not in expected)
        return expected, dropped, (), True
    between = [k for k in state if k.startswith('pre_logits.')]
    theirs = {k: v for k, v in state.items() if k.startswith(CLASSIFIERS)}
    problem = misfit(head, theirs)
    if not problem and not pooling and not between:
        return expected, (), ('the head is the one of the checkpoint',), True
    if between:
        pooling = f"the checkpoint's stands behind {shorten(sorted(between))}, which timm has not"
    note = f'the head is a fresh one, {problem or pooling}'
    body = {k: v for k, v in expected.items() if k not in head}
    return body, (*theirs, *between), (note,), bool(problem)


def _filtered(model: Convertible, state: StateDict, path: str) -> StateDict:
    """By timm's names, in the sizes of the model as far as timm's filter can do that."""
    try:
        of_timm = sys.modules[timms_class(model).__module__].checkpoint_filter_fn
        options = {'adapt_layer_scale': True} if isinstance(model, VisionTransformer) else {}
        return of_timm(state, model, **options)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f'checkpoint {path!r} does not fit the model: {error}') from error


def _left_out(state: StateDict, filtered: StateDict) -> tuple[str, ...]:
    """What timm's filter drops, such as the mask token of DINOv2."""
    renamed = {value.data_ptr() for name, value in filtered.items() if name not in state}
    return tuple(
        name
        for name, value in state.items()
        if name not in filtered and value.data_ptr() not in renamed
    )


def _resized_positions(
    state: StateDict, model: Any, path: str, image_sizes: Sequence[Size]
) -> StateDict:
    """The position embedding for the model's grid, if an image size fits it."""
    own = getattr(model, 'pos_embed', None)
    if own is None or own.ndim != 3 or not {'pos_embed', _STEM} <= state.keys():
        return {}
    no_embed_class = getattr(model, 'no_embed_class', False)
    if 'register_tokens' in state and not no_embed_class:
        # where timm adds the position of the class token to it, which leaves it none
        raise ValueError(
            f"checkpoint {path!r} has DINOv2's registers, which have no positions: "
            'no_embed_class=False is not possible'
        )
    prefix = 0 if no_embed_class else model.num_prefix_tokens
    leading, positions = state['pos_embed'].tensor_split([prefix], dim=1)
    patch, number = state[_STEM].shape[-2:], positions.shape[1]
    for height, width in image_sizes:
        grid = (height // patch[0], width // patch[1])
        if math.prod(grid) == number:
            new_size = list(model.patch_embed.grid_size)
            resized = resample_abs_pos_embed_nhwc(positions.unflatten(1, grid), new_size)
            return {'pos_embed': torch.cat([leading, resized.flatten(1, 2)], dim=1)}
    if number == math.prod(model.patch_embed.grid_size):
        return {}  # as many as the model has, which is all that is known
    # timm would reshape any number somehow; DINOv2's files have a prefix that it takes off first
    if (number == 0 or math.isqrt(number) ** 2 != number) and 'mask_token' not in state:
        raise ValueError(
            f'checkpoint {path!r} does not fit the model: pos_embed is '
            f'{tuple(state["pos_embed"].shape)}, no square with '
            f'no_embed_class={no_embed_class}; of other images '
            'pretrained_cfg_overlay=dict(input_size=(3, HEIGHT, WIDTH)) says the size'
        )
    return {}


def _fitted_stem(state: StateDict, expected: StateDict) -> StateDict:
    """The patch embedding for images of other channels than three, as timm makes it."""
    theirs, ours = state.get(_STEM), expected.get(_STEM)
    if theirs is None or ours is None or theirs.shape[1] != 3 or ours.shape[1] == 3:
        return {}
    return {_STEM: adapt_input_conv(ours.shape[1], theirs)}


def _fit_layers(state: StateDict, model: Convertible) -> StateDict:
    """What each MoE layer makes of its part, if that has experts like its own."""
    for name, layer in moe_layers(model).items():
        prefix = f'{name}.'
        part = part_of(state, prefix)
        experts = {k: v for k, v in layer.state_dict().items() if k.startswith('experts.')}
        if all(k in part and part[k].shape == v.shape for k, v in experts.items()):
            state = without(state, prefix) | below(prefix, layer.fit_state(part))
    return state


def _upcycled(
    model: Convertible, state: StateDict, path: str, how: Upcycling
) -> tuple[StateDict, dict[str, str]]:
    """Experts made of the dense MLPs in their place, and which tensor each was made of."""
    made: StateDict = {}
    sources: dict[str, str] = {}
    for name, layer in moe_layers(model).items():
        prefix = f'{name}.'
        part = part_of(state, prefix)
        if not part:
            raise ValueError(
                f'checkpoint {path!r} does not fit the model: it has neither an MLP nor experts '
                f'for {name}, and would leave them random'
            )
        if not any(key.startswith('experts.') for key in part):
            where = f'{name} of checkpoint {path!r}'
            experts = upcycle(part, layer.experts, how, where, layer.summands)
            made |= below(f'{prefix}experts.', experts)
            sources |= {f'{prefix}experts.{key}': prefix + key for key in experts}
    check(bool(made) or how == Upcycling(), 'upcycling', how, f'None, no dense MLP in {path!r}')
    return made, sources
