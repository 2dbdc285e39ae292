"""What counts as the same config in two processes."""

from types import SimpleNamespace
from typing import Any

import pytest
from mmengine.config import Config

from vqmoe_vision.engine import alike


def test_a_set_is_the_same_in_whatever_order_a_process_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[str] = []
    monkeypatch.setattr(alike, 'all_gather_object', lambda value: sent.append(value) or [value])
    processes: Any = SimpleNamespace(size=2)
    orders = {0, 8}, {8, 0}  # as sets of words, whose order is another one in each process
    assert list(map(repr, orders)) == ['{0, 8}', '{8, 0}']
    for ignored in (*orders, {0, 9}):
        alike.check_configs(processes, Config({'evaluator': {'ignored': ignored}}))
    assert sent[0] == sent[1] != sent[2]
