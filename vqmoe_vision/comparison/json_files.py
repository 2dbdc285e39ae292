"""Files of JSON that hold one object each, such as rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vqmoe_vision.engine.checkpoint_files import write_atomically


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes a file, of which others see the old content or the new one."""
    # a line for each field, so that a difference of two versions can be read
    lines = ',\n'.join(f'{json.dumps(k)}: {json.dumps(v)}' for k, v in content.items())
    write_atomically(path, f'{{\n{lines}\n}}\n'.encode())


def is_there(path: Path) -> bool:
    """Whether anything has that name, be it a folder or a link to what is gone."""
    return path.is_symlink() or path.exists()


def load(path: Path) -> dict[str, Any]:
    """The content of a file."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f'{path} is damaged: it cannot be read ({error.strerror})') from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path} is damaged: {error}') from error
    if not isinstance(content, dict):
        raise ValueError(f'{path} is damaged: it holds no object')
    return content
