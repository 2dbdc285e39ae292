"""What the pictures of the report share: their size and letters, and the words that stand for them.

Needs matplotlib (extra `train`).
"""

import base64
import io
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

WIDTH = 8.6  # inches; the page shows a picture about as wide
DPI = 110
MOST_LETTERS = 100  # of a name; file systems end at 255
ANNOTATED = 16  # more columns leave no room for numbers in the cells
# Letters that can be read at half the size, on a background of their own: the page may be dark.
STYLE: Any = {  # matplotlib's own type differs between its versions
    'font.size': 14,
    'axes.titlesize': 15,
    'figure.facecolor': 'white',
}

P = ParamSpec('P')
R = TypeVar('R')


@dataclass(frozen=True)
class Picture:
    """A figure and what a reader who does not see it has to know."""

    name: str  # of its file
    title: str
    alt: str
    figure: Figure


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Makes a function draw in `STYLE`, and leaves the settings of the caller alone."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


def panels(
    count: int, width: float, height: float, room: float = 0.0, sharex: bool = False
) -> tuple[Figure, Any]:
    """A figure of one column of panels or two, with one y axis for all; sizes in inches."""
    columns = min(count, 2)
    lines = -(-count // columns)
    figure = Figure(figsize=(width, lines * height + room), layout='constrained')
    grid = figure.subplots(lines, columns, squeeze=False, sharex=sharex, sharey=True)
    for number, axes in enumerate(grid.flat):
        axes.set_visible(number < count)
        axes.grid(alpha=0.3)
    return figure, grid


def percent(share: float) -> str:
    """A share in words of a page, which no line breaks: '14 %', '0.3 %', '0 %'."""
    if 0 < share < 0.0005:
        return 'under\N{NO-BREAK SPACE}0.1\N{NO-BREAK SPACE}%'
    digits = 1 if 0 < share < 0.01 else 0
    return f'{100 * share:.{digits}f}\N{NO-BREAK SPACE}%'


def short(name: str) -> str:
    """A layer or decider as an axis can show it: 'blocks.1.mlp.quantizer.codebook' has no room."""
    return name.replace('.mlp', '').replace('quantizer.', '')


def listed(names: Sequence[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return ' and '.join([', '.join(names[:-1]), names[-1]] if len(names) > 1 else names)


def spread(shares: Tensor, word: str) -> str:
    """How shares of experts or codes spread, in words."""
    most, least = percent(shares.max().item()), percent(shares.min().item())
    if most == least:
        return f'all {len(shares)} {word}s take {most}'
    return (
        f'{word} {int(shares.argmax())} takes most, {most}, '
        f'{word} {int(shares.argmin())} least, {least}'
    )


def heat_map(
    axes: Axes, values: Tensor, limits: tuple[float, float], form: str, colours: str = 'viridis'
) -> None:
    """Draws a matrix with its numbers in the cells, where there is room, and a colour bar."""
    shown = axes.imshow(values.numpy(), vmin=limits[0], vmax=limits[1], cmap=colours, aspect='auto')
    bar = axes.figure.colorbar(shown, ax=axes, pad=0.02)
    bar.outline.set_visible(False)
    rows, columns = values.shape
    axes.set_xticks(range(0, columns, -(-columns // ANNOTATED)))
    if columns > ANNOTATED or rows > 2 * ANNOTATED:
        return
    for row in range(rows):
        for column in range(columns):
            value = values[row, column].item()
            if value == value:
                place = (value - limits[0]) / ((limits[1] - limits[0]) or 1)
                red, green, blue, _ = matplotlib.colormaps[colours](place)
                dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
                axes.text(
                    column,
                    row,
                    f'{value:{form}}',
                    ha='center',
                    va='center',
                    color='white' if dark else 'black',
                    fontsize=11 if columns > 10 else 12,
                )


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
