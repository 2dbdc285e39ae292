"""Rows as text, and runs as JSON."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

LAYER_COLUMNS = {
    'contender': '{:<28}',
    'median_ms': '{:>10.2f}',
    'min_ms': '{:>10.2f}',
    'gflops': '{:>9.1f}',
    'to_dense': '{:>9.2f}',
    'to_bound': '{:>9.2f}',
    'peak_mb': '{:>9.1f}',
    'load': '{:>6.2f}',
    'ours_to_peer': '{:>13.2f}',
}
NETWORK_COLUMNS = {
    'contender': '{:<38}',
    'mode': '{:<10}',
    'median_ms': '{:>10.1f}',
    'min_ms': '{:>10.1f}',
    'images_per_s': '{:>13.1f}',
    'to_baseline': '{:>12.2f}',
    'peak_mb': '{:>9.1f}',
    'params': '{:>11}',
    'active_params': '{:>14}',
}

LIMIT_COLUMNS = {'result': '{:<24}', 'ratio': '{:>6.2f}', 'expected': '{:>9.2f}'}
LIMIT_COLUMNS |= {'at_most': '{:>8.3g}', 'limit': '  {:<}'}


def table(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """Rows as aligned text under a line of names; what a row does not have is left blank."""
    widths = {name: len(form.format('' if '<' in form else 0)) for name, form in columns.items()}

    def aligned(name: str, text: str) -> str:
        side = '<' if '<' in columns[name] else '>'
        return f'{text:{side}{widths[name]}}'

    lines = [' '.join(aligned(name, name) for name in columns)]
    for row in rows:
        cells = []
        for name, form in columns.items():
            value = row.get(name)
            cells.append(' ' * widths[name] if value is None else form.format(value))
        lines.append(' '.join(cells).rstrip())
    return '\n'.join(lines)


def layer_table(title: str, rows: Sequence[Row], skipped: Mapping[str, str]) -> str:
    """One cell of `moe`: its table, what equal work means for its peers, and who is missing."""
    per_expert = rows[0]['tokens_per_expert']
    lines = ['', f'{title}, {per_expert:.0f} tokens per expert, {rows[0]["mode"]}']
    lines.append(table(rows, LAYER_COLUMNS))
    for row in rows:
        if row['equal_to']:
            lines.append(f'  {row["contender"]}: beside {row["equal_to"]}; {row["note"]}')
        elif row['drop_rate'] is not None:
            lines.append(f'  {row["contender"]}: drops {row["drop_rate"]:.1%} of assignments')
    lines += [f'  {name} left out: {reason}' for name, reason in skipped.items()]
    return '\n'.join(lines)


def network_table(title: str, rows: Sequence[Row]) -> str:
    """One comparison of `model`, and where the time of training steps goes."""
    lines = ['', title, table(rows, NETWORK_COLUMNS)]
    for row in rows:
        if row['parts_ms']:
            parts = ', '.join(f'{part} {ms:.1f} ms' for part, ms in row['parts_ms'].items())
            lines.append(f'  {row["contender"]}: {parts}')
    return '\n'.join(lines)


def write(path: Path, run: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run, indent=1) + '\n')
