"""What every test starts from: the same seeds, one thread, and no GPU test without a GPU."""

import gc
import os
import random
from collections.abc import Iterator

import hypothesis
import numpy as np
import pytest
import torch

from .quicker import quicken

# Looking for garbage takes a quarter of the time of all imports.
gc.disable()

# Derandomized: a red run can be repeated. No deadline: the first example pays for warm-up.
hypothesis.settings.register_profile('repository', derandomize=True, deadline=None)
hypothesis.settings.load_profile('repository')

# The tensors of the tests are so small that more threads only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Threads as in training on a CPU, where groups of rows are padded."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope='module')
def _environment() -> Iterator[None]:
    """A program that runs inside a test sets variables, such as how torch.load behaves."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True, scope='module')
def _collected() -> None:
    """Nothing older than a file of tests is looked through for garbage.

    mmengine collects it for each data set that it builds: with all tests and what they import in
    memory that takes longer than most tests.
    """
    gc.collect()
    gc.freeze()


def pytest_collection_finish() -> None:
    gc.enable()
    quicken()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if 'gpu' in item.keywords:
            item.add_marker(pytest.mark.skip(reason='needs a CUDA device'))
