"""Where weights come from when timm builds a model, and the filter that fits them.

`pretrained=True` and `upcycle=` both go through timm's own loading, with `fit_pretrained` as its
filter function.
"""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
from timm.layers import to_2tuple
from timm.models import get_pretrained_cfg, load_model_config_from_hf
from timm.models._hub import load_model_config_from_path  # timm.models exports the hub's alone

from ..moe.config import check
from .hosts import VIT_MODULES
from .sparse_model import SparseModel
from .state_dicts import StateDict
from .transfer import Size, transfer

# Owner on the Hugging Face hub of published weights; None while there are none, because timm lists
# every configuration with such a name as a model that it can load.
HUB_NAME: str | None = None
_SUFFIXES = ('.pth', '.pt', '.bin', '.tar', '.safetensors')
_SOURCES = ('state_dict', 'file', 'hf_hub_id', 'url')
_ALLOWED = (
    "a timm model name such as 'vit_small_patch16_224.augreg_in21k_ft_in1k', 'hf-hub:NAME', "
    f"'local-dir:FOLDER', or a file ({', '.join(_SUFFIXES)})"
)
_logger = logging.getLogger(__name__)


def upcycle_overlay(upcycle: str, cache_dir: str | Path | None = None) -> dict[str, Any]:
    """What timm's `pretrained_cfg_overlay` has to say for a model to start from a dense one.

    Beside the place of the weights these are the entries that belong to them: normalisation, image
    size and number of classes.

    Args:
        upcycle: Name of a timm model, with or without tag; 'hf-hub:' and a name, 'local-dir:' and a
            folder as timm saves it; or a file.
        cache_dir: Where to keep what comes from the hub, as in timm's `create_model`.

    Raises:
        ValueError: It is none of these, or has no weights.
    """
    check(isinstance(upcycle, str) and upcycle != '', 'upcycle', upcycle, _ALLOWED)
    scheme, _, rest = upcycle.partition(':')
    if scheme == 'local-dir':
        found = (Path(rest) / 'config.json').is_file()
        check(found, 'upcycle', upcycle, 'a folder with the config.json and weights of a model')
        return _about_weights(load_model_config_from_path(rest)[0])
    if scheme == 'hf-hub':
        with named_source(upcycle):
            return _about_weights(load_model_config_from_hf(rest, cache_dir=cache_dir)[0])
    if is_file(upcycle):
        return {'file': upcycle}
    if not timm.is_model(upcycle):
        nearest = get_close_matches(upcycle, timm.list_models(module='vision_transformer'), 1)
        hint = f'; did you mean {nearest[0]}?' if nearest else ''
        check(False, 'upcycle', upcycle, _ALLOWED + hint)
    fits = timm.models.is_model_in_modules(upcycle, VIT_MODULES)
    check(fits, 'upcycle', upcycle, "one of timm's VisionTransformers, whose blocks ours have")
    check(timm.models.is_model_pretrained(upcycle), 'upcycle', upcycle, 'a model with weights')
    config = get_pretrained_cfg(upcycle)
    assert config is not None
    return _about_weights(config.to_dict())


def is_file(upcycle: str) -> bool:
    """Whether the source of `upcycle_overlay` is a file, which says nothing beside its weights."""
    return upcycle.endswith(_SUFFIXES) and not upcycle.startswith(('local-dir:', 'hf-hub:'))


def _about_weights(config: dict[str, Any]) -> dict[str, Any]:
    own = ('architecture', 'tag')
    # the format of what the address leads to; the hub has timm's own
    return {k: v for k, v in config.items() if k not in own} | {'custom_load': False}


def config_beside(path: str) -> dict[str, Any]:
    """What timm's folder says of the weights in it, such as `mean`, `std` and `input_size`.

    Args:
        path: File of weights.

    Returns:
        timm's `pretrained_cfg`; empty if there is no config.json of timm beside the file.

    Raises:
        ValueError: There is one that cannot be read.
    """
    file = Path(path).with_name('config.json')
    if not path.endswith('.safetensors') or not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:  # no text, or no JSON
        raise ValueError(f'{str(file)!r}, beside the weights, cannot be read: {error}') from error
    config = content.get('pretrained_cfg') if isinstance(content, dict) else None
    return config if isinstance(config, dict) else {}


def source_of(config: dict[str, Any]) -> str:
    """What weights of a pretrained configuration are called in messages; empty if it has none.

    Args:
        config: timm's `pretrained_cfg`, or an overlay of it.
    """
    name = next((name for name in _SOURCES if config.get(name)), '')
    return name if name == 'state_dict' else str(config.get(name, ''))


@contextmanager
def named_source(source: str) -> Iterator[None]:
    """Say in one line that weights cannot be read, whatever the file or the hub raises.

    Args:
        source: A file, whose checksums are compared, or anything else.

    Raises:
        ValueError: In the place of what was raised. One that says itself what is wrong stays.
    """
    if source.endswith(_SUFFIXES):
        check_file(source)
    try:
        yield
    except Exception as error:  # bytes and networks can fail in any way
        if type(error) in (ValueError, TypeError, AssertionError):
            raise
        reason = next(iter(str(error).splitlines()), '') or type(error).__name__
        raise ValueError(f'weights of {source!r} cannot be read: {reason}') from error


def check_file(path: str) -> None:
    """Refuse a file that is not there, or whose checksums do not match; torch ignores them.

    Args:
        path: A checkpoint. Formats without checksums are passed.

    Raises:
        ValueError: It is missing or damaged.
    """
    if not Path(path).is_file():
        raise ValueError(f'checkpoint {path!r} does not exist')
    try:
        with open(path, 'rb') as file:
            if file.read(4) != b'PK\x03\x04':  # older formats have no checksums
                return
        with zipfile.ZipFile(path) as archive:
            spoilt = archive.testzip()
    except Exception as error:  # a flipped bit can make it fail in any way
        raise ValueError(f'checkpoint {path!r} is damaged: {error}') from error
    if spoilt is not None:
        raise ValueError(f'checkpoint {path!r} is damaged: {spoilt} does not match its checksum')


def fit_pretrained(state_dict: dict[str, Any], model: Any) -> StateDict:
    """Filter function for timm's loading: what `transfer` fits, and experts made of dense MLPs.

    It loads what fits itself. timm drops a head if the configuration of the weights has another
    number of classes, whatever the file holds, and is no longer strict then; by that time all that
    could be missing has been refused or reported.

    Args:
        state_dict: As in the source.
        model: A `Transformer`. It gets the weights, and `weights_report`.

    Returns:
        All of the model's state, in which timm has nothing left to miss.

    Raises:
        ValueError: As `transfer`.
    """
    state = state_dict.get('model', state_dict)
    state = state.get('state_dict', state)
    source = source_of(model.pretrained_cfg)
    how = model.upcycling if isinstance(model, SparseModel) else None
    fitted, report = transfer(model, state, source, _image_sizes(model), how)
    model.load_state_dict(fitted, strict=False)
    model.weights_report = report
    for line in report.lines():
        _logger.info('%s: %s', source, line)
    return model.state_dict()


def _image_sizes(model: Any) -> list[Size]:
    """What the configuration of the weights says of the images that their positions belong to."""
    given = getattr(model, 'pretrained_model_args', {}).get(
        'img_size'
    )  # recorded since timm 1.0.31
    stated = model.pretrained_cfg.get('input_size', (3,))[1:]
    return [to_2tuple(size) for size in (given, stated) if size]
