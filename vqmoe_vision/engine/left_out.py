"""Image files that a data set does not take: a line of the log says so."""

import logging
from collections.abc import Sequence
from pathlib import Path

from mmengine.logging import print_log
from PIL import Image

# Of phones; Pillow reads them with a plugin only.
_OF_PHONES = frozenset({'.heic', '.heif', '.avif'})


def tell_left_out(folder: Path, files: Sequence[str], taken: Sequence[str]) -> None:
    """Warns of files that look like images and are left out because of how their names end."""
    kinds = Image.registered_extensions()
    images = [
        file
        for file in files
        if (ending := Path(file).suffix.lower()) in _OF_PHONES
        or Image.MIME.get(kinds.get(ending, ''), '').startswith('image/')
    ]
    if images:
        print_log(
            f'{folder}: {len(images)} files that look like images are left out, such as '
            f'{images[0]}: taken are those that end in {", ".join(taken)}',
            'current',
            logging.WARNING,
        )
