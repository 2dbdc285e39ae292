"""What timm's config.json beside a file of weights says of them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg
from timm.models._hub import load_model_config_from_path  # timm.models exports the hub's alone

from ..moe.config import check
from .normalization import check_normalization
from .upcycle import BEGINNING
from .weight_files import CONFIG, OF_TIMM

# Of a configuration what says where weights are, and of which model; the format is that of a place.
_PLACES = ('source', 'file', 'url', 'hf_hub_id', 'hf_hub_filename', 'state_dict', 'custom_load')
_OWN = ('architecture', 'tag')
# By which timm would cut a head that has been fitted.
_CUT = 'label_offset'


@dataclass(frozen=True)
class Described:
    """What is known of weights beside their tensors."""

    config: dict[str, Any] = field(default_factory=dict)
    name: str = ''
    arguments: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, config: dict[str, Any], name: str, arguments: Any = None) -> Described:
        """Of what timm's functions return, without its place and what its experts were made of."""
        kept = {k: v for k, v in config.items() if k not in (*_PLACES, *_OWN, _CUT)}
        return cls(kept, name, {k: v for k, v in (arguments or {}).items() if k not in BEGINNING})


def describe(source: str) -> Described:
    """What timm's config.json says of weights."""
    path = Path(source)
    folder = path if path.is_dir() else path.parent
    if not source or not (path.is_dir() or path.suffix == '.safetensors' or path.name in OF_TIMM):
        return Described()
    return _read(folder) if (folder / CONFIG).is_file() else Described()


def describe_folder(folder: str, what: str) -> Described:
    """As `describe`, of a folder that has to be one of timm."""
    found = describe(folder) if Path(folder).is_dir() else Described()
    if not found.name:
        raise ValueError(
            f'{what}: {folder!r} has no {CONFIG} of timm, which names the architecture'
        )
    return found


def _read(folder: Path) -> Described:
    """Of a folder with a config.json; that of another library says nothing."""
    file = folder / CONFIG
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:  # no text, or no JSON
        raise ValueError(f'{str(file)!r} cannot be read: {error}') from error
    if not isinstance(content, dict) or not isinstance(content.get('architecture'), str):
        return Described()
    for name in ('pretrained_cfg', 'model_args'):
        fits = isinstance(content.get(name, {}), dict)
        check(fits, f'{name} in {str(file)!r}', content.get(name), 'a dictionary')
    config, name, arguments = load_model_config_from_path(folder)
    known = {entry.name for entry in fields(PretrainedCfg)}
    for entry in config.keys() - known:
        check(False, f'{entry} in {str(file)!r}', config[entry], "an entry of timm's PretrainedCfg")
    check_normalization(config, f'{str(file)!r}: ')
    return Described.of(config, name, arguments)
