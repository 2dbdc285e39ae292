"""Tiny cells: 2 images of 12 tokens, width 16, four experts."""

import pytest

from benchmark.cells import Cell, Settings


@pytest.fixture
def cell() -> Cell:
    return Cell(tokens=12, batch=2, width=16, experts=4, top_k=2)


@pytest.fixture
def settings() -> Settings:
    return Settings(repeats=2)
