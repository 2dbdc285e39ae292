"""Scores of a test in a file that says which weights they are of."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from vqmoe_vision.models.normalization import KEY
from vqmoe_vision.moe.config import check

from .checkpoint_files import write_atomically
from .record import digest_of

# Name of the digest among the scores.
WEIGHTS = 'weights'


def write_numbers(path: Path, metrics: dict[str, Any], model: nn.Module) -> None:
    """Writes what a test has measured."""
    named = {**metrics, WEIGHTS: weights_digest(model)}
    content = f'{json.dumps(named, indent=2, default=float)}\n'
    if passed_on(path):
        path.write_text(content)
    else:
        write_atomically(path, content.encode())


def passed_on(path: Path) -> bool:
    """Whether what is written goes elsewhere, as into a pipe, /dev/stdout or what a link names."""
    return path.is_symlink() or (path.exists() and not path.is_file())


def weights_digest(model: nn.Module) -> str:
    """A digest of a run's model, which all files with the same weights have in common."""
    return digest_of({k: v for k, v in model.state_dict().items() if k != KEY})


def read_numbers(path: str, model: nn.Module, checkpoint: Path) -> dict[str, float]:
    """The scores of a model that `write_numbers` has written."""
    try:
        values = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:  # not there, no text or no JSON
        raise ValueError(f'numbers={path!r} cannot be read: {error}') from error
    tested = values.pop(WEIGHTS, None) if isinstance(values, dict) else None
    numeric = isinstance(values, dict) and all(type(v) in (int, float) for v in values.values())
    check(numeric, 'numbers', path, 'a file that tools/test.py --out wrote: numbers by name')
    remedy = f'test those of {checkpoint.name} again with --out'
    own = weights_digest(model)
    other = f'scores of the weights {own}, and these are of {tested}: {remedy}, or name the '
    check(tested == own, 'numbers', path, f'{other}checkpoint that was tested with --checkpoint')
    return dict(values)
