"""The list of faults is whole: each has its line, its tests and its room."""

from collections import Counter
from pathlib import Path

import pytest

from .faults.table import FAULTS, Fault

ROOT = Path(__file__).parents[2]
ROOMS = {
    'moe', 'methods', 'models', 'engine', 'classification', 'segmentation', 'comparison',
    'analysis',
}  # fmt: skip


def test_at_least_36_and_four_a_room() -> None:
    assert len(FAULTS) >= 36
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    rooms = Counter(fault.room for fault in FAULTS)
    assert rooms.keys() == ROOMS
    assert min(rooms.values()) >= 4


@pytest.mark.parametrize('fault', FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_of_one_line_that_occurs_once(fault: Fault) -> None:
    text = (ROOT / fault.file).read_text()
    assert text.count(fault.old) == 1, f'{fault.file} has moved on: take the fault along'
    assert '\n' not in fault.old + fault.new
    changed = text.replace(fault.old, fault.new)
    assert changed != text
    compile(changed, fault.file, 'exec')  # no error of syntax, which any test would find
    assert fault.tests
    assert all((ROOT / 'tests' / name).is_file() for name in fault.tests.split())
