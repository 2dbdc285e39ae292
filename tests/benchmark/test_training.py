"""Clocks around mmengine's loop, on a clock that only the stub moves."""

from types import SimpleNamespace

import pytest

from benchmark import training
from benchmark.training import WARM_UP, Finished, StepClock


def test_every_part_is_what_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(training, '_now', lambda: now[0])

    def taking(milliseconds: float, *calls):
        def run(*args, **kwargs) -> None:
            now[0] += milliseconds / 1e3
            for call in calls:
                call()

        return run

    wrapper = SimpleNamespace(backward=taking(20), step=taking(3), zero_grad=taking(1))
    inside = (lambda: wrapper.backward(), lambda: wrapper.step(), lambda: wrapper.zero_grad())
    model = SimpleNamespace(train_step=taking(10, *inside))
    runner = SimpleNamespace(model=model, optim_wrapper=wrapper, call_hook=taking(2))
    clock = StepClock(runner, iterations=1)
    runner.call_hook('before_train')
    with pytest.raises(Finished):
        for _ in range(WARM_UP + 1):
            now[0] += 0.005  # data
            runner.call_hook('before_train_iter', batch_idx=0)
            runner.model.train_step()
            runner.call_hook('after_train_iter', batch_idx=0)
    assert clock.steps[-1] == pytest.approx(
        {'data': 5, 'forward': 10, 'backward': 20, 'optimizer': 4, 'hooks': 4}
    )
