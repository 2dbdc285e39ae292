"""Where weights are, how their files are read as data, and how a model takes them.

`upcycle=`, `pretrained=True` and `checkpoint_path=` end in one way: a model is built without
weights, they are read by `read_weights`, and `load_weights` fits them or refuses them.
"""

import argparse
import hashlib
import json
import logging
import os
import re
import socket
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from os import PathLike
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from unittest.mock import patch
from urllib.parse import urlsplit
from urllib.request import getproxies

import numpy as np
import timm
import torch
from huggingface_hub import constants
from timm.models import load_model_config_from_hf, load_pretrained
from timm.models import load_state_dict as load_file
from timm.models._hub import load_model_config_from_path  # timm.models exports the hub's alone
from torch import nn
from torch.serialization import get_safe_globals, safe_globals

from ..moe.config import check, did_you_mean
from ..moe.methods import METHODS
from .compat import (
    Network,
    StateDict,
    compare,
    is_out_of_memory,
    misfit_of,
    network_of_run,
    refuse_values,
    refuse_without_values,
)
from .fitting import in_names_of_timm, transfer
from .layers import VIT_MODULES, Convertible, method_of
from .moe_vit import SparseModel
from .normalization import Normalization, check_normalization
from .upcycle import BEGINNING, read_upcycling

# What names of timm begin with whose configuration is beside their weights.
FOLDERS = ('local-dir:', 'hf-hub:')
_OF_TORCH = ('.pth', '.pt', '.bin', '.tar', '.ckpt')
# What timm's `save_for_hf` writes, in the order in which timm reads it.
OF_TIMM = ('model.safetensors', 'pytorch_model.bin')
# timm's description beside them, in which `publish` leaves the digest of the first one.
CONFIG, DIGEST = 'config.json', 'weights_sha256'
# What a file has in the place of a tensor that lies in a folder beside it.
IN_PARTS = 'in the folder beside this file'
# Of a configuration what says where weights are, and of which model; the format is that of a place.
_SOURCES = ('state_dict', 'file', 'hf_hub_id', 'url')
_PLACES = (*_SOURCES, 'source', 'hf_hub_filename', 'custom_load')
_NOT_OF_WEIGHTS = (*_PLACES, 'architecture', 'tag', 'label_offset')
# Arguments that name weights, of timm, of this package and of a task, and what leaves them out.
GIVEN = {'pretrained': False, 'upcycle': None, 'checkpoint_path': None, 'checkpoint': None}
# Arguments of `create_model` that name a file or an address: what a file says may not do so.
_NAMING = (*GIVEN, 'pretrained_cfg', 'pretrained_cfg_overlay', 'cache_dir')
# The largest numbers that a file may ask for. Larger ones would hold the process for hours, or fill
# its memory, before a weight is compared.
_LARGEST = {'depth': 1000, 'embed_dim': 32768, 'mlp_ratio': 64, 'num_experts': 65536}
_LARGEST_OF_OTHERS = 2**24
_ALLOWED = (
    "a VisionTransformer of timm such as 'vit_small_patch16_224.augreg_in21k_ft_in1k', "
    f"'hf-hub:NAME', 'local-dir:FOLDER', or a file ({', '.join((*_OF_TORCH, '.safetensors'))})"
)
# What mmengine calls the class of its log.
_LOG = 'mmengine.logging.history_buffer.HistoryBuffer'
_NUMBERS = '?' + np.typecodes['AllInteger'] + np.typecodes['AllFloat']
_KNOWN: list = [
    argparse.Namespace,  # timm's train.py and the authors of MAE and DeiT leave arguments
    np.ndarray,
    np.dtype,
    *{type(np.dtype(code)) for code in _NUMBERS},
    # numpy's functions that rebuild an array and a scalar; their module depends on the version
    np.ndarray(0).__reduce__()[0],
    np.float32(0).__reduce__()[0],
]
_logger = logging.getLogger(__name__)


class _NoLog:
    """In the place of a log that nobody asks for."""

    def __setstate__(self, state: object) -> None:
        """Keeps nothing."""


def beside_weights(log: type) -> list:
    """All that may be beside weights, for torch's list of what it may read."""

    def name_of(owner: object, name: str) -> None:
        """What a log calls to name its means and minima: those of the code that reads it."""
        if owner is not log:
            raise UnpicklingError(f'{name} of {owner!r} is not part of a log')

    # by name: timm and mmengine, which list some themselves, strike theirs out after each file
    known = ((item, f'{item.__module__}.{item.__qualname__}') for item in _KNOWN)
    return [*known, (log, _LOG), (name_of, 'builtins.getattr')]


_PASSED_OVER = beside_weights(_NoLog)


def _silent_hub(source: str) -> str:
    """The hub's address if weights come from there and it does not answer; else empty."""
    if '/' not in source or '://' in source or constants.HF_HUB_OFFLINE or getproxies():
        return ''
    address = urlsplit(constants.ENDPOINT)
    port = address.port or {'http': 80}.get(address.scheme, 443)
    try:  # its library would ask again and again, for most of a minute
        socket.create_connection((address.hostname, port), timeout=5).close()
    except OSError:
        return constants.ENDPOINT
    return ''


@contextmanager
def reading(source: str, verify: bool = True) -> Iterator[None]:
    """Lets torch read data alone, from a file of sound checksums; says in one line what fails."""
    # torch reads a file of any name
    local = (is_file_name(source) and '://' not in source) or Path(source).exists()
    if local and verify:
        check_file(source)
    known = get_safe_globals()
    silent_hub = '' if local else _silent_hub(source)
    # where logs are read, as by mmengine, they stay what they are
    names = {item[1] for item in known if isinstance(item, tuple)}
    new = [] if _LOG in names else [item for item in _PASSED_OVER if item not in known]
    try:
        offline = constants.HF_HUB_OFFLINE or bool(silent_hub)
        with safe_globals(new), patch.object(constants, 'HF_HUB_OFFLINE', offline):
            yield
    except Exception as error:  # bytes and networks can fail in any way
        if type(error) is ValueError or is_out_of_memory(error):  # the file may well be whole
            raise
        reason = next(iter(str(error).splitlines()), '') or type(error).__name__
        if silent_hub:
            reason = f'{silent_hub} does not answer, and they are not in its cache'
        # torch's words for a file are advice to run the code in it
        if local or 'weights_only' in reason:
            raise ValueError(unreadable(source)) from error
        raise ValueError(
            f'weights of {source!r} cannot be read: {reason.rstrip(".")}; a file of them needs no '
            'network: upcycle=FILE, in a config model.pretrained=False model.checkpoint=FILE'
        ) from error


def load_content(path: str) -> Any:
    """Return all that a file of torch holds, mapped into memory where its entries are stored."""
    mapped = zipfile.is_zipfile(path)
    if mapped:  # torch would take the bytes of a compressed entry for those of its tensor
        with zipfile.ZipFile(path) as archive:
            mapped = {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
    return torch.load(path, 'cpu', weights_only=True, mmap=mapped)


def unreadable(path: str) -> str:
    """What to say of a file whose bytes are no weights of torch."""
    if path.lower().endswith(('.npz', '.npy')):
        return f'checkpoint {path!r} is of NumPy, which dense models of timm alone read'
    return (
        f'checkpoint {path!r} is damaged, or holds more than weights and is not loaded, as it may '
        'run code: save its state_dict() alone'
    )


def is_file_name(source: str) -> bool:
    """Whether a source is called as a file of weights is, wherever it lies."""
    return source.endswith('.safetensors') or source.lower().endswith(_OF_TORCH)


def weights_in(source: str) -> str:
    """The file of weights in a folder of timm; anything else as it is."""
    folder = Path(source)
    if not folder.is_dir():
        return source
    found = [folder / name for name in OF_TIMM if (folder / name).is_file()][:1]
    endings = ('.safetensors', '.pth', '.pth.tar', '.bin')
    found = found or sorted(path for path in folder.iterdir() if path.name.endswith(endings))
    names = [path.name for path in found]
    check(len(names) == 1, f'weights in folder {source!r}', names, f'one, or {OF_TIMM[0]}')
    return str(found[0])


def check_file(path: str) -> None:
    """Refuse a file that is not there, or whose checksums do not match; torch ignores them."""
    if not Path(path).is_file():
        raise ValueError(f'checkpoint {path!r} does not exist')
    # as other libraries split large weights, with an index beside them
    if re.search(r'-\d+-of-(?!0*1\.)\d+\.', Path(path).name):
        raise ValueError(f'checkpoint {path!r} is one of several parts: write them as one file')
    try:
        if not zipfile.is_zipfile(path):
            config = Path(path).with_name(CONFIG)
            if Path(path).name == OF_TIMM[0] and config.is_file():
                described = json.loads(config.read_bytes())
                stated = described.get(DIGEST) if isinstance(described, dict) else None
                if stated is not None and 'transformers_version' in described:
                    stated = None  # of the folder that transformers read: it has written others
                if stated not in (None, digest_of(Path(path))):
                    raise ValueError(f'it does not match {DIGEST} in {str(config)!r}')
            return
        with zipfile.ZipFile(path) as archive:
            # torch reads nothing of what is marked as a folder
            folders = (each.filename for each in archive.infolist() if each.external_attr & 0x10)
            spoilt = archive.testzip() or next(folders, None)
    except Exception as error:  # a flipped bit can make it fail in any way
        raise ValueError(f'checkpoint {path!r} is damaged: {error}') from error
    if spoilt is not None:
        raise ValueError(f'checkpoint {path!r} is damaged: {spoilt} does not match its checksum')


def digest_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def lacks_tensors(state: Mapping) -> bool:
    """Whether a file has words in the place of some tensors."""
    return any(isinstance(value, str) and value == IN_PARTS for value in state.values())


@dataclass(frozen=True)
class Described:
    """What timm's configuration says of weights beside their tensors."""

    config: dict = field(default_factory=dict)  # of `pretrained_cfg`, without a place
    name: str = ''
    arguments: dict = field(default_factory=dict)

    @classmethod
    def of(cls, config: dict, name: str, arguments: Any = None) -> 'Described':
        """Of what timm's functions return, without what its experts were made of."""
        kept = {k: v for k, v in config.items() if k not in _NOT_OF_WEIGHTS}
        given = checked_arguments(arguments or {}, f'{CONFIG} of {name}')
        given = {k: v for k, v in given.items() if k not in BEGINNING}
        if given and 'num_classes' in config:  # beside the arguments, where `save` leaves it alone
            given.setdefault('num_classes', config['num_classes'])
        method = given.get('method', method_of(name))
        if given and method in METHODS:
            with suppress(ValueError):  # which the model says when it is built
                preset = METHODS[method].config.former_preset(given)
                given |= {} if preset is None else {'preset': preset}
        return cls(kept, name, given)

    def network(self, source: str) -> Network | None:
        """The network that is described, built without memory."""
        if not self.name:
            return None
        try:
            with torch.device('meta'):
                network = Network.of(timm.create_model(self.name, **self.arguments), self.name)
        except Exception as error:
            raise ValueError(
                f'{source!r} is said to be of {self.name} with {self.arguments}, which timm does '
                f'not build: {error}'
            ) from error
        size = () if 'img_size' in self.arguments else self.config.get('input_size', ())[1:]
        return replace(network, img_size=tuple(size) or network.img_size)


def describe(source: str) -> Described:
    """What timm's config.json says of a folder, or of a file in it; that of others nothing."""
    path = Path(source)
    folder = path if path.is_dir() else path.parent
    of_folder = (source and path.is_dir()) or path.suffix == '.safetensors' or path.name in OF_TIMM
    file = folder / CONFIG
    try:
        content = json.loads(file.read_text()) if of_folder and file.is_file() else None
    except (OSError, ValueError) as error:  # no text, or no JSON
        raise ValueError(f'{str(file)!r} cannot be read: {error}') from error
    if not isinstance(content, dict) or not isinstance(content.get('architecture'), str):
        return Described()
    config, name, arguments = load_model_config_from_path(folder)
    allowed = 'the name of a model in timm.list_models()'
    check(timm.is_model(name), f'{str(file)!r}: architecture', name, allowed)
    check_normalization(config, f'{str(file)!r}: ')
    return Described.of(config, name, arguments)


def network_of(source: str) -> Network | None:
    """What a file, or a folder of timm, says of the network that its weights are of."""
    file = weights_in(source)
    described = describe(source)
    if described.name or file.endswith('.safetensors') or not Path(file).is_file():
        return described.network(source)
    with reading(file, verify=False):
        return network_of_run(load_content(file))


def check_one_source(arguments: Mapping) -> None:
    """Refuses weights from two places: one would replace the other, and the report tell of one."""
    for first, second in pairwise(name for name in GIVEN if arguments.get(name)):
        check(False, first, arguments[first], f'{GIVEN[first]} with {second}={arguments[second]!r}')
    overlay, path = arguments.get('pretrained_cfg_overlay'), arguments.get('checkpoint_path')
    place = source_of(overlay) if path and isinstance(overlay, dict) else ''
    check(not place, 'pretrained_cfg_overlay', place, f'no place of weights, with {path!r}')


def source_of(config: Mapping) -> str:
    """What weights of a pretrained configuration are called in messages; empty if it has none."""
    name = next((name for name in _SOURCES if config.get(name)), '')
    return name if name == 'state_dict' else str(config.get(name, ''))


def place_of(config: Mapping) -> dict:
    """Where the weights of a configuration are, and nothing of where others would be."""
    found = {name: config[name] for name in _PLACES if config.get(name)}
    # the format of what the address leads to; the hub has timm's own
    return {**dict.fromkeys(_PLACES), **found, 'custom_load': False}


def of_one_place(config: Mapping) -> dict:
    """A configuration without the places that a folder or a repository names beside itself."""
    kept = {'local-dir': ('file',), 'hf-hub': ('hf_hub_id', 'hf_hub_filename')}.get(
        config.get('source') or ''
    )
    if kept is None:
        return {**config}
    others = {*_PLACES} - {'source', *kept}
    return {name: value for name, value in config.items() if name not in others}


def checked_arguments(arguments: Mapping, where: str) -> dict:
    """Arguments that a file states, less those that name files; sizes beyond reason are refused."""
    for name, value in arguments.items():
        largest = _LARGEST.get(name, _LARGEST_OF_OTHERS)
        for number in value if isinstance(value, list | tuple) else [value]:
            in_reach = not isinstance(number, int | float) or abs(number) <= largest
            check(in_reach, f'{where}: {name}', value, f'at most {largest}')
    return {name: value for name, value in arguments.items() if name not in _NAMING}


def find_source(
    source: str | PathLike[str], cache_dir: str | Path | None = None, field: str = 'upcycle'
) -> tuple[dict, Described]:
    """Where timm finds the weights of a dense model, and what is known of them."""
    check(isinstance(source, str | PathLike) and source != '', field, source, _ALLOWED)
    name = str(source)
    scheme, _, rest = name.partition(':')
    if scheme == 'local-dir':
        described = describe(rest)
        check(bool(described.name), field, name, f'a folder with the {CONFIG} of timm')
        return place_of({'source': 'local-dir', 'file': rest}), described
    if scheme == 'hf-hub':
        with reading(name):
            config, name, arguments = load_model_config_from_hf(rest, cache_dir=cache_dir)
        check(timm.is_model(name), field, source, 'a repository of a model that timm knows')
        return place_of(of_one_place(config)), Described.of(config, name, arguments)
    if is_file_name(name) and '://' not in name:
        file = os.path.expanduser(name)
        return place_of({'file': file}), describe(file)
    hint = did_you_mean(name, timm.list_models(module='vision_transformer'))
    check(timm.models.is_model_in_modules(name, VIT_MODULES), field, name, _ALLOWED + hint)
    config = (timm.models.get_pretrained_cfg(name) or timm.models.PretrainedCfg()).to_dict()
    found = place_of(config)
    known = ', '.join(timm.list_models(f'{name.partition(".")[0]}.*', pretrained=True))
    check(bool(source_of(found)), field, name, f'a name that has weights: {known}')
    return found, Described.of(config, name.partition('.')[0])


def overlay_for(
    upcycle: str | PathLike[str] | None,
    config: dict,
    overlay: dict,
    own: Described,
    cache_dir: str | Path | None = None,
) -> tuple[dict, Described]:
    """Timm's `pretrained_cfg_overlay` for the weights that a model begins with, and their source.

    What a call states counts first, then what stands beside the weights, then `config`, of whose
    weights `own` is known.
    """
    stated = overlay if upcycle else {**config, **overlay}
    offset = stated.get('label_offset')
    check(not offset, 'pretrained_cfg.label_offset', offset, '0, a head is that of its classes')
    source = source_of(overlay) or source_of(stated)
    described = describe(source)
    place: dict = {}
    if upcycle is not None:
        place, named = find_source(upcycle, cache_dir)
        if not source_of(overlay):
            described = named
        else:  # elsewhere, where the name says only what the place does not
            entries = {**named.config, **described.config}
            described = Described(entries, described.name, described.arguments)
    elif not described.name and source == source_of(config):
        described = own
    if source_of(overlay):  # timm would look for those of the overlay as for those of the model
        place = place_of(overlay)
    known = {name: value for name, value in described.config.items() if name not in stated}
    return {**known, **place, **overlay}, described


def read_weights(model: Any, cache_dir: str | Path | None = None) -> StateDict:
    """The weights that a model's `pretrained_cfg` names, as timm reads them."""
    config = {**model.pretrained_cfg, 'custom_load': False}
    source = source_of(config)
    hint = '; upcycle=NAME makes experts of a dense one' if isinstance(model, SparseModel) else ''
    check(bool(source), 'pretrained', True, f'False, no weights of {config["architecture"]}{hint}')
    if config.get('file'):
        config |= {'source': None, 'file': weights_in(config['file'])}
    found: dict = {}

    def keep(state: dict, model: nn.Module) -> StateDict:
        found.update(state)
        return model.state_dict()

    with reading(config.get('file') or source):
        load_pretrained(
            model,
            config,
            num_classes=config['num_classes'],
            in_chans=(config.get('input_size') or (3,))[0],
            filter_fn=keep,
            cache_dir=cache_dir,
        )
    state = found.get('model', found)
    return state.get('state_dict', state)


def load_weights(
    model: Any, described: Described, cache_dir: str | Path | None = None, follow: bool = True
) -> None:
    """All of the weights that a model's `pretrained_cfg` names that fit, or none; logs a report."""
    source = source_of(model.pretrained_cfg)
    state = read_weights(model, cache_dir)
    network = described.network(source)
    network = network or (network_of(source) if model.pretrained_cfg.get('file') else None)
    how = read_upcycling(model.upcycling) if isinstance(model, SparseModel) else None
    fitted, report = transfer(model, state, source, (), how, network)
    model.load_state_dict(fitted, strict=False)
    known, beside = report.normalization, described.config
    if known is None and {'mean', 'std'} <= beside.keys():
        known = Normalization.of(beside, channels=(beside.get('input_size') or (3,))[0])
    model.weights_report = replace(report, normalization=known)
    if follow and known is not None:
        model.pretrained_cfg.update(mean=known.mean, std=known.std)
    for line in report.lines():
        level = logging.WARNING if line in report.warnings else logging.INFO
        _logger.log(level, '%s: %s', source, line)


def read_fitting(model: nn.Module, path: str) -> StateDict:
    """A file of all of a model's weights, in its names; it may be on the meta device."""
    with reading(path):
        state = load_file(path)
    expected = model.state_dict()
    if isinstance(model, Convertible):
        for line in compare(model, network_of(path), path):
            _logger.warning('%s: %s', path, line)
        if expected.keys().isdisjoint(state):
            state, _ = in_names_of_timm(state, expected, path)  # of a run
    refuse_without_values(state, path, expected)
    if problem := misfit_of(model, state):
        raise ValueError(
            f'checkpoint {path!r} does not fit the model: {problem}; options of the model, '
            'such as num_classes=10, have to be those of its weights'
        )
    refuse_values(expected, state, path)
    return state
