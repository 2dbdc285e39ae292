"""Tables of Markdown pages, made where they stand from the rows of comparisons.

    <!-- compare scores dense_2x smoe : "cifar10_long=CIFAR-10, 40 epochs" camvid_budget -->
    <!-- end -->

Words before the colon are rows, or contrasts in quotes for `forest` and `together`. Those after it
are comparisons with what a table calls them.
"""

import json
import re
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from vqmoe_vision.moe.config import check

from .figures import PREDICTED, TOGETHER
from .frame import TEST, Made, contrasts, forest, scores_of, summary
from .report import contrast_table, ends, markdown
from .statistics import paired_difference

_BLOCK = re.compile(r'(<!-- compare (\w+) (.*?) -->\n).*?(<!-- end -->)', re.DOTALL)


def fill(text: str, find: Callable[[str], Made], folder: Path) -> str:
    """The page with its tables made anew.

    Args:
        text: Of the page.
        find: Gives a comparison by its name.
        folder: Where `control.json`, `scenes.json` and `generators.json` lie.
    """

    def table(block: re.Match[str]) -> str:
        check(block[2] in _KINDS, 'compare', block[2], f'one of {[*_KINDS]}')
        rows, _, names = block[3].partition(':')
        titles = dict(name.partition('=')[::2] for name in shlex.split(names))
        found = {title or name: find(name) for name, title in titles.items()}
        made = _KINDS[block[2]](found, shlex.split(rows), folder)
        # as all tables of the pages, without the blanks that line up columns
        cells = re.sub('-{3,}', '---', re.sub(r' *\| *', '|', markdown(made)))
        return f'{block[1]}\n{cells}\n\n{block[4]}'

    return _BLOCK.sub(table, text)


def _scores(found: Mapping[str, Made], rows: Sequence[str], _: Path) -> pd.DataFrame:
    """Scores by row and comparison; in brackets what a row has over the first."""
    columns: dict[str, list[str]] = {'': [_name(row) for row in rows]}
    for title, (comparison, _results, values) in found.items():
        of = scores_of(values, TEST, comparison.metric)
        columns[title] = []
        for row in rows:
            own, base = of.get(row, {}), of.get(rows[0], {})
            mean, less = pd.Series(own, dtype=float).mean(), paired_difference(own, base).mean
            beside = '' if row == rows[0] else f' ({less:+.1f})'
            columns[title].append(f'{mean:.1f}{beside}' if own else '-')
    return pd.DataFrame(columns)


def _forest(found: Mapping[str, Made], rows: Sequence[str], _: Path) -> pd.DataFrame:
    """Contrasts, a column each, and those in the place of rows: by the noise of each budget."""
    frame = forest(found, rows)
    return _wide((of.contrast, of.comparison, _bounded(of)) for of in frame.itertuples())


def _together(found: Mapping[str, Made], rows: Sequence[str], _: Path) -> pd.DataFrame:
    """What contrasts say over comparisons, a line each."""
    frame, lines = forest(found, rows), []
    for contrast, of in frame.groupby('contrast', sort=False):
        pooled = next(of[of.comparison == TOGETHER].itertuples())
        means = of.difference[of.comparison != TOGETHER]
        lines.append(
            {
                'contrast': _name(str(contrast)),
                'mean (95 % interval)': _bounded(pooled),
                'another recipe': ends(*(getattr(pooled, name) for name in PREDICTED)),
                'I²': f'{pooled.heterogeneity:.0%}'.replace('%', ' %'),
                'comparisons': f'{(means > 0).sum()} above 0, {(means < 0).sum()} below',
            }
        )
    return pd.DataFrame(lines)


def _bounded(of: Any) -> str:
    return f'{of.difference:+.2f} ({ends(of.low, of.high)})'


def _verdicts(found: Mapping[str, Made], rows: Sequence[str], _: Path) -> pd.DataFrame:
    """The finding of each contrast, a column each."""
    tables = {title: contrasts(*made)['finding'] for title, made in found.items()}
    return _wide((c, title, word) for title, of in tables.items() for c, word in of.items())


def _wide(cells: Iterable[tuple[Any, str, str]]) -> pd.DataFrame:
    """A column for each contrast, and a line for each comparison, in their order."""
    columns = defaultdict[str, dict[str, str]](dict)
    for contrast, title, cell in cells:
        columns[_name(contrast)][title] = cell
    return pd.DataFrame(columns).rename_axis(index='').reset_index()


def _contrasts(found: Mapping[str, Made], rows: Sequence[str], _: Path) -> pd.DataFrame:
    (made,) = found.values()
    table = contrast_table(made.comparison, contrasts(*made)).drop(columns='seeds')
    return table.assign(contrast=table['contrast'].map(_name))


def _rows(found: Mapping[str, Made], rows: Sequence[str], _: Path) -> pd.DataFrame:
    """Rows of one comparison: all, or those that it has of the ones that are named."""
    (made,) = found.values()
    frame, lines = summary(*made), []
    for row in (row for row in rows or frame.index if row in frame.index):
        of: Any = frame.loc[row]
        bounds = ends(of['pooled_low'], of['pooled_high'])
        own = '-' if bounds == '-' else f'{of["difference"]:+.2f} ({bounds})'
        lines.append(
            {
                'row': _name(row),
                'score': f'{of["score"]:.2f} ± {of["std"]:.2f}',
                f'minus {_name(made.comparison.reference)}': own,
            }
        )
    return pd.DataFrame(lines)


def _control(found: Mapping[str, Made], rows: Sequence[str], folder: Path) -> pd.DataFrame:
    """Accuracy of the control by row and separation, means over seeds."""
    means = _means(folder / 'control.json').loc[[*rows]]
    return _shown(means.map('{:.1f}'.format).rename(columns='separation {:g}'.format))


def _scenes(found: Mapping[str, Made], rows: Sequence[str], folder: Path) -> pd.DataFrame:
    """The same of the control with images, and the way from frozen to oracle that is gone."""
    means, spread = (_means(folder / 'scenes.json', kind).loc[[*rows]] for kind in ('mean', 'std'))
    frozen, oracle = means.loc['frozen'], means.loc['oracle']
    way = (100 * (means - frozen) / (oracle - frozen)).map('{:.0f} %'.format)
    scores = means.map('{:.1f} ± '.format) + spread.map('{:.1f}'.format)
    scores = scores.rename(columns='pattern {:g}'.format)
    return _shown(scores.join(way.rename(columns='of the way, {:g}'.format)))


def _generators(found: Mapping[str, Made], rows: Sequence[str], folder: Path) -> pd.DataFrame:
    """Return accuracy by generator and row, the separations of a cell in rising order."""
    frame = _read_rows(folder / 'generators.json')
    means = frame.groupby(['generator', 'row', 'separation'], sort=False).accuracy.mean()
    cells = means.map('{:.0f}'.format).groupby(['generator', 'row'], sort=False).agg(' / '.join)
    table = cells.unstack('row')[[*rows]].reindex(frame.generator.unique())
    return _shown(table.rename(columns=_name))


def _read_rows(path: Path) -> pd.DataFrame:
    return pd.DataFrame(json.loads(path.read_text())['rows'])


def _means(path: Path, kind: str = 'mean') -> pd.DataFrame:
    frame = _read_rows(path)
    return frame.pivot_table(index='row', columns='separation', values='accuracy', aggfunc=kind)


def _shown(table: pd.DataFrame) -> pd.DataFrame:
    return table.rename(index=_name).rename_axis(index='', columns=None).reset_index()


def _name(row: str) -> str:
    return row.replace('_', '-')


_KINDS: dict[str, Callable[[Mapping[str, Made], Sequence[str], Path], pd.DataFrame]] = {
    'scores': _scores,
    'forest': _forest,
    'together': _together,
    'verdicts': _verdicts,
    'contrasts': _contrasts,
    'rows': _rows,
    'control': _control,
    'scenes': _scenes,
    'generators': _generators,
}
