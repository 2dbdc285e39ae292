"""Where weights come from when timm builds a model, and the filter that fits them.

`pretrained=True` and `upcycle=` go through timm's loading, with `fit_pretrained` as its filter.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import timm
from timm.layers import to_2tuple
from timm.models import (
    get_arch_name,
    get_pretrained_cfg,
    load_model_config_from_hf,
)

from ..moe.config import check, did_you_mean
from .described import Described, describe, describe_folder
from .hosts import VIT_MODULES
from .normalization import KEY, of_buffer
from .origin import Origin, origin_of
from .sparse_model import SparseModel
from .state_dicts import StateDict
from .stated_experts import experts_of_file
from .transfer import Size, transfer
from .weight_files import (
    SUFFIXES,
    check_in_one_piece,
    is_file_name,
    is_of_numpy,
    named_source,
    unreadable,
)

# Owner on the Hugging Face hub of published weights; None while there are none, because timm lists
# every configuration with such a name as a model that it can load.
HUB_NAME: str | None = None
# What names of timm begin with whose configuration is beside their weights.
FOLDERS = ('local-dir:', 'hf-hub:')
_SOURCES = ('state_dict', 'file', 'hf_hub_id', 'url')
# Arguments that name weights, of timm, of this package and of a task, and what leaves them out.
GIVEN = {'pretrained': False, 'upcycle': None, 'checkpoint_path': None, 'checkpoint': None}
_ALLOWED = (
    "a timm model name such as 'vit_small_patch16_224.augreg_in21k_ft_in1k', 'hf-hub:NAME', "
    f"'local-dir:FOLDER', or a file ({', '.join(SUFFIXES)})"
)
_logger = logging.getLogger(__name__)


def check_one_source(arguments: Mapping[str, Any]) -> None:
    """Refuses weights from two places: one would replace the other, and the report tell of one."""
    names = [name for name in GIVEN if arguments.get(name)]
    if len(names) > 1:
        first, second = names[:2]
        allowed = f'{GIVEN[first]} with {second}={arguments[second]!r}'
        check(False, first, arguments[first], allowed)


def upcycle_source(
    upcycle: str | PathLike[str], cache_dir: str | Path | None = None
) -> tuple[dict[str, Any], Described]:
    """Where timm finds the weights of a dense model, and what they are of."""
    file = file_of(upcycle)
    check(isinstance(upcycle, str | PathLike) and upcycle != '', 'upcycle', upcycle, _ALLOWED)
    upcycle = str(upcycle)
    if upcycle.startswith(FOLDERS):
        return folder_source(upcycle, 'upcycle', cache_dir)
    allowed = f'a file that has been downloaded, or {_ALLOWED}'
    check('://' not in upcycle, 'upcycle', upcycle, allowed)
    if is_of_numpy(upcycle):
        raise ValueError(unreadable(upcycle))
    if file:
        return {'file': file}, describe(file)
    if not timm.is_model(upcycle):
        hint = did_you_mean(upcycle, timm.list_models(module='vision_transformer'))
        check(False, 'upcycle', upcycle, _ALLOWED + hint)
    fits = timm.models.is_model_in_modules(upcycle, VIT_MODULES)
    allowed = "one of timm's VisionTransformers, whose blocks ours have"
    check(fits, 'upcycle', upcycle, allowed)
    if not timm.models.is_model_pretrained(upcycle):
        check(False, 'upcycle', upcycle, _with_weights(upcycle))
    config = get_pretrained_cfg(upcycle)
    assert config is not None
    return place_of(config.to_dict()), Described.of(config.to_dict(), upcycle.partition('.')[0])


def _with_weights(name: str) -> str:
    known = timm.list_models(f'{get_arch_name(name)}.*', pretrained=True)
    if not known:
        return 'a model with weights'
    return f'a name that has weights: {", ".join(known)}{did_you_mean(name, known)}'


def folder_source(
    source: str, field: str, cache_dir: str | Path | None = None
) -> tuple[dict[str, Any], Described]:
    """As `upcycle_source`, of what timm has saved as a folder or on the hub."""
    scheme, _, rest = source.partition(':')
    if scheme == 'local-dir':
        found = (Path(rest) / 'config.json').is_file()
        check(found, field, source, 'a folder with the config.json and weights of a model')
        described = describe_folder(rest, f'{field}={source!r}')
        return {'source': 'local-dir', 'file': rest, 'custom_load': False}, described
    with named_source(source):
        config, name, arguments = load_model_config_from_hf(rest, cache_dir=cache_dir)
        return place_of(config), Described.of(config, name, arguments)


def file_of(upcycle: Any) -> str:
    """The file that the source of `upcycle_source` is; empty if it is none."""
    source = str(upcycle) if isinstance(upcycle, PathLike) else upcycle
    named = isinstance(source, str) and not source.startswith(FOLDERS)
    return os.path.expanduser(source) if named and is_file_name(source) else ''


def place_of(config: dict[str, Any]) -> dict[str, Any]:
    """Where the weights of a configuration are."""
    names = ('source', 'hf_hub_filename', *_SOURCES)
    # the format of what the address leads to; the hub has timm's own
    return {k: config[k] for k in names if config.get(k)} | {'custom_load': False}


def source_of(config: dict[str, Any]) -> str:
    """What weights of a pretrained configuration are called in messages; empty if it has none."""
    name = next((name for name in _SOURCES if config.get(name)), '')
    return name if name == 'state_dict' else str(config.get(name, ''))


def said_of(
    upcycle: str | PathLike[str] | None,
    config: dict[str, Any],
    overlay: dict[str, Any],
    own: Described,
    cache_dir: Any = None,
) -> tuple[dict[str, Any], Described]:
    """Where the weights are that `upcycle` names, and what is known beside weights without them."""
    stated = overlay if upcycle else {**config, **overlay}
    described = describe(source_of(stated))
    if upcycle is None:
        of_config = not described.name and source_of(stated) == source_of(config)
        # timm would look for those of the overlay as it does for the weights of the model
        place = dict.fromkeys(('source', *_SOURCES)) if source_of(overlay) else {}
        return place, own if of_config else described
    found, named = upcycle_source(upcycle, cache_dir)
    # nothing is left of where the model's own weights are
    place = {**dict.fromkeys(('source', *_SOURCES)), **found}
    if not source_of(overlay):
        return place, named
    place['source'] = None  # elsewhere, where the name says only what the place does not
    entries = {**named.config, **described.config}
    return place, Described(entries, described.name, described.arguments)


def known_weights(
    upcycle: str | PathLike[str] | None,
    config: dict[str, Any],
    overlay: dict[str, Any],
    own: Described,
    cache_dir: Any = None,
) -> tuple[dict[str, Any], Callable[..., StateDict]]:
    """What timm has to know of the weights that a model begins with, and the filter for them."""
    stated = overlay if upcycle else {**config, **overlay}
    place, described = said_of(upcycle, config, overlay, own, cache_dir)
    known = {name: value for name, value in described.config.items() if name not in stated}
    offset = stated.get('label_offset')
    check(not offset, 'pretrained_cfg.label_offset', offset, '0, a head is that of its classes')
    complete = {**known, **place, **overlay}
    origin = origin_of(described, source_of({**config, **complete}))
    follow = not {'mean', 'std'} & stated.keys()
    return complete, partial(fit_pretrained, origin=origin, follow=follow)


def fit_pretrained(
    state_dict: dict[str, Any], model: Any, origin: Origin | None = None, follow: bool = True
) -> StateDict:
    """Filter function for timm's loading of models with experts: what `transfer` fits, upcycled."""
    state = state_dict.get('model', state_dict)
    state = state.get('state_dict', state)
    source = source_of(model.pretrained_cfg)
    check_in_one_piece(state, source)
    how = model.upcycling if isinstance(model, SparseModel) else None
    origin = origin or origin_of(describe(source), source)
    sizes = _image_sizes(model, origin)
    stated = experts_of_file(source) if origin is None else None
    fitted, report = transfer(model, state, source, sizes, how, origin, stated)
    # timm drops a head of another number of classes, whatever the file holds: loaded here instead
    model.load_state_dict(fitted, strict=False)
    model.weights_report = report
    if follow and (known := of_buffer(state.get(KEY))) is not None:
        model.pretrained_cfg.update(mean=known.mean, std=known.std)
    for line in report.lines():
        # of a head that has as many classes nobody asked to begin anew
        level = logging.WARNING if line in report.warnings else logging.INFO
        _logger.log(level, '%s: %s', source, line)
    return model.state_dict()


def _image_sizes(model: Any, origin: Origin | None) -> list[Size]:
    """What is known of the images that the positions of the weights belong to."""
    arguments = getattr(model, 'pretrained_model_args', {})
    given = arguments.get('img_size')  # recorded since timm 1.0.31
    built = None if origin is None else origin.model.patch_embed.img_size
    stated = model.pretrained_cfg.get('input_size', (3,))[1:]
    return [to_2tuple(size) for size in (given, built, stated) if size]
