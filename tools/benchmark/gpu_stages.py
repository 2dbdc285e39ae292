"""`benchmark.py gpu`: its parts run one after another, whatever becomes of one, into one row."""

import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import vqmoe_vision

from .gates import Gate, judge
from .report import write

PACKAGE = Path(vqmoe_vision.__file__).parent
Part = Callable[[], list[dict[str, Any]]]


def run_stages(
    run: dict[str, Any],
    parts: Sequence[tuple[str, str, Part]],
    gates: Sequence[Gate],
    out: Path,
) -> None:
    """Runs parts (stage, title, part), and saves after each, whatever becomes of the next."""
    run['failed'], run['seconds'], timed = [], {}, []
    for stage, title, part in parts:
        begin, rows = time.perf_counter(), []
        with outcome('done', step=title) as done:
            rows = part()
        run['seconds'][title] = round(time.perf_counter() - begin, 1)
        run.setdefault(stage, []).extend(rows)
        checked = [row for row in rows if 'ok' in row]
        for row in checked:
            print(*row.values(), sep='  ', flush=True)
        run['failed'] += [row for row in (*checked, done) if not row['ok']]
        timed += [row for row in rows if 'median_ms' in row]
        run['limits'] = judge(gates, timed)
        write(out, run)


@contextmanager
def outcome(good: str, **names: str) -> Iterator[dict[str, Any]]:
    """The row of what runs inside the block: any error is a result, and what follows runs too."""
    row: dict[str, Any] = {**names, 'result': good, 'ok': True}
    try:
        yield row
    except Exception as error:
        text = str(error).strip().partition('\n')[0]
        place = place_of(reversed([*traceback.walk_tb(error.__traceback__)]))
        row.update(result=f'{type(error).__name__}: {text} ({place})', ok=False)


def place_of(steps: Iterable[tuple[FrameType, int]]) -> str:
    """File and line of this package among frames, the innermost first, or else of the first."""
    places = [(Path(frame.f_code.co_filename), line) for frame, line in steps]
    own = [place for place in places if place[0].is_relative_to(PACKAGE)]
    file, line = (own or places)[0]
    return f'{file.relative_to(PACKAGE.parent) if own else file.name}:{line}'
