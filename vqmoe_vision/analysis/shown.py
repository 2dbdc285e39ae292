"""Pictures as the report's page and its files hold them.

Needs matplotlib (extra `train`).
"""

import base64
import io
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

from .drawing import Picture

DPI = 110
MOST_LETTERS = 100  # of a name; file systems end at 255


@dataclass(frozen=True)
class Shown:
    """A picture as the page and a file hold it."""

    file: str
    title: str
    alt: str
    png: bytes

    @property
    def uri(self) -> str:
        """The picture as the address of an image."""
        return 'data:image/png;base64,' + base64.b64encode(self.png).decode()


def shown(pictures: Iterable[Picture | None], title: str) -> list[Shown]:
    """Draws pictures; the title of their model begins the names of their files."""
    return [_png(picture, title) for picture in pictures if picture is not None]


def _png(picture: Picture, title: str) -> Shown:
    data = io.BytesIO()
    # without the version of matplotlib: the same survey gives the same file
    picture.figure.savefig(data, format='png', dpi=DPI, metadata={'Software': None})
    return Shown(
        f'{_file_name(title)}-{picture.name}.png', picture.title, picture.alt, data.getvalue()
    )


def _file_name(title: str) -> str:
    """A title as part of a file's name; long or odd ones are told apart by a checksum."""
    words = title.replace('/', '--')
    name = re.sub(r'[^\w.-]+', '_', words)[-MOST_LETTERS:]
    return name if name == words else f'{name}-{zlib.crc32(title.encode()):08x}'
