"""Ratios that a run must not exceed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Row = Mapping[str, Any]
# what tells the configurations of two rows apart
IDENTITY = ('tokens', 'batch', 'width', 'experts', 'top_k', 'dtype', 'amp', 'skew', 'mode')

SLACK = 1.25  # of a measured ratio over the expected one; no card has been measured yet


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Time of a contender over that of another, or of itself elsewhere, at most so much."""

    contender: str
    against: str
    at_most: float | None  # None: by what operations and bytes of both let expect, and some more
    where: Mapping[str, Any] = field(default_factory=dict)  # fields of rows that are judged
    # Fields in which the row of `against` differs. The machine may be a third slower by then, so
    # that each time is over that of dense in its own rounds.
    versus: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f'{_named(self.contender, self.where)} over {_named(self.against, self.versus)}'


def limit(contender: str, against: str, at_most: float | None, **where: object) -> Gate:
    """A gate in the rows that have some fields."""
    return Gate(contender=contender, against=against, at_most=at_most, where=where)


def elsewhere(at_most: float, **fields: Mapping[str, Any]) -> Gate:
    """Ours over ours in other rows."""
    return Gate(contender='ours', against='ours', at_most=at_most, **fields)


def not_slower_compiled(*contenders: str, **where: object) -> tuple[Gate, ...]:
    """What torch.compile may cost each of some contenders."""
    return tuple(limit(f'{name}+compiled', name, 1.05, **where) for name in contenders)


def judge(gates: Sequence[Gate], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Hold measured rows against gates, and every peer against ours at equal work.

    One row per limit and configuration; its 'result' is 'met', 'missed', or why nothing was judged.
    """
    judged = [row for gate in gates for row in _judge(gate, rows)]
    for row in rows:
        if row.get('ours_to_peer') is not None:
            name = f'{row["equal_to"]} over {row["contender"]} at {_configuration(row)}'
            judged.append(_judged(name, 1.0, row['ours_to_peer']))
    return judged


def _judged(name: str, at_most: Any, ratio: float | None, reason: str = '') -> dict[str, Any]:
    met = ratio is not None and ratio <= at_most  # nan is missed too
    result = reason or ('met' if met else 'missed')
    return {'limit': name, 'ratio': ratio, 'at_most': at_most, 'result': result}


def _judge(gate: Gate, rows: Sequence[Row]) -> list[dict[str, Any]]:
    wanted = {'contender': gate.contender, **gate.where}
    chosen = [row for row in rows if _has(row, wanted)]
    if not chosen:
        return [_judged(str(gate), gate.at_most, None, 'not measured')]
    found = []
    for row in chosen:
        same = {key: row[key] for key in IDENTITY if key in row}
        others = [r for r in rows if _has(r, {**same, 'contender': gate.against, **gate.versus})]
        name = f'{gate} at {_configuration(row)}'
        spent, most = 'to_dense' if gate.versus else 'median_ms', gate.at_most
        if not others or (most is None and 'expected_ms' not in row):
            reason = 'nothing to expect it by' if others else 'nothing to compare with'
            found.append(_judged(name, most, None, reason))
            continue
        if most is None:
            most = SLACK * row['expected_ms'] / others[0]['expected_ms']
        found.append(_judged(name, most, row[spent] / others[0][spent]))
        found[-1]['expected'] = most / SLACK if gate.at_most is None else None
    return found


def _has(row: Row, fields: Mapping[str, Any]) -> bool:
    return all(key in row and row[key] == value for key, value in fields.items())


def _named(contender: str, fields: Mapping[str, Any]) -> str:
    return ' '.join([contender, *(f'{key}={value}' for key, value in fields.items())])


def _configuration(row: Row) -> str:
    amp = ' amp' if row.get('amp') else ''
    parts = [f'{row["batch"]} x {row["tokens"]} tokens']
    if 'experts' in row:
        parts.append(f'{row["experts"]} experts, top-{row["top_k"]}, skew {row["skew"]:g}')
    return ', '.join([*parts, f'{row["dtype"]}{amp}', row['mode']])
