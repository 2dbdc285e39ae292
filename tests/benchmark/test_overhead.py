"""What the runner adds, on a clock that only the stubs move."""

from collections.abc import Callable
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmengine.optim import OptimWrapper

from benchmark import overhead
from benchmark.overhead import Pairs, measure_overhead
from benchmark.training import WARM_UP, Finished

BATCHES = 50
# milliseconds; warm-up is slow, and the runner once faster than the bare step
BARE = [900] * WARM_UP + [40, 50, 45, 47, 90]
ADDED = [70] * WARM_UP + [3, -1, 2, 8, 4]


def wrapper(counts: int = 1, **options: Any) -> OptimWrapper:
    optimizer = torch.optim.SGD(torch.nn.Linear(3, 2).parameters(), lr=0.1)
    made = OptimWrapper(optimizer, accumulative_counts=counts)
    vars(made).update(options)
    return made


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which side of each pair ran, in their order, by a runner whose steps are all stubs."""
    now, ran = [0.0], []
    monkeypatch.setattr(overhead, 'time', SimpleNamespace(process_time=lambda: now[0]))

    def taking(side: str, milliseconds: list[int]) -> Callable:
        left = iter(milliseconds)

        def run(*args: Any) -> None:
            assert args[-1] == 'a batch'
            ran.append(side)
            now[0] += next(left) / 1e3

        return run

    whole = [bare + added for bare, added in zip(BARE, ADDED, strict=True)]
    loop = SimpleNamespace(run_iter=taking('whole', whole))
    runner = SimpleNamespace(train_loop=loop, optim_wrapper=wrapper())
    runner.call_hook = lambda name: None

    def train() -> None:
        runner.call_hook('before_run')
        runner.call_hook('before_train')
        for index in range(BATCHES):
            now[0] += 0.3  # the data, which neither has
            loop.run_iter(index, 'a batch')

    runner.train = train

    @contextmanager
    def running(settings: Any) -> Any:
        with suppress(Finished):
            yield runner

    monkeypatch.setattr(overhead, 'running', running)
    monkeypatch.setattr(overhead, 'settings_of', lambda *args: None)
    monkeypatch.setattr(Pairs, '_bare', staticmethod(taking('bare', BARE)))
    return ran


@pytest.mark.parametrize(
    ('iterations', 'bare', 'added'), [(5, 47, [0.5, 3, 6]), (3, 45, [-1, 2, 3]), (1, 40, [3, 3, 3])]
)
def test_what_is_added_is_the_whole_less_the_bare_step(
    order: list[str], iterations: int, bare: float, added: list[float]
) -> None:
    row = measure_overhead('a config', ['a=1'], iterations)
    assert row['bare_ms'] == pytest.approx(bare)
    assert row['added_ms'] == pytest.approx(added)
    assert (row['config'], row['options']) == ('a config', ['a=1'])
    # in turns, for whoever is second finds the batch in the processor's caches
    turns = ['bare', 'whole', 'whole', 'bare'] * BATCHES
    assert order == turns[: 2 * (WARM_UP + iterations)]


def pairs_of(wrapper: OptimWrapper) -> Pairs:
    loop = SimpleNamespace(run_iter=None)
    return Pairs(SimpleNamespace(train_loop=loop, optim_wrapper=wrapper), 1)


@pytest.mark.parametrize(
    ('bad', 'message'),
    [
        (wrapper(4), r'optim_wrapper\.accumulative_counts=4 .*: 1 with --overhead'),
        # what mmengine's `AmpOptimWrapper` has, which needs a GPU
        (
            wrapper(loss_scaler=torch.amp.GradScaler('cpu')),
            r"optim_wrapper\.loss_scale='a loss scale' .*: dict\(enabled=False\) with --overhead",
        ),
    ],
    ids=['accumulated', 'scaled'],
)
def test_steps_that_a_bare_one_is_not(bad: OptimWrapper, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pairs_of(bad)


def test_a_scale_that_is_off_is_none() -> None:
    pairs_of(wrapper(loss_scaler=torch.amp.GradScaler('cpu', enabled=False)))
