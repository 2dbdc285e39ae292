"""Which validations a run that resumes still owes."""

from types import SimpleNamespace
from typing import Any

import pytest
from mmengine.logging import MessageHub
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop
from torch import nn
from torch.utils.data import DataLoader

from vqmoe_vision.engine.loops import progress_of, validation_was_cut_off


class Epochs(EpochBasedTrainLoop):
    """Trains nothing."""

    def run_epoch(self) -> None:
        self._epoch += 1


class Iterations(IterBasedTrainLoop):
    """Trains nothing."""

    def run_iter(self, data_batch: Any) -> None:
        self._iter += 1


LOOPS = {'max_epochs': Epochs, 'max_iters': Iterations}


@pytest.mark.parametrize('limit', LOOPS)
def test_a_validation_is_owed_where_the_loop_validates(limit: str) -> None:
    validated: list[int] = []
    runner: Any = SimpleNamespace(
        call_hook=lambda *_: None,
        model=nn.Identity(),
        message_hub=MessageHub(f'owed, {limit}'),
        _resume=True,
        iter=-1,
        visualizer=SimpleNamespace(),
        val_loop=SimpleNamespace(run=lambda: validated.append(progress_of(runner)[0])),
    )

    def loop() -> Any:
        more = {'val_interval': 3, 'dynamic_intervals': [(6, 2)], limit: 11}
        runner.train_loop = LOOPS[limit](runner, DataLoader(range(20)), **more)
        return runner.train_loop

    loop().run()
    assert validated == [3, 6, 8, 10, 11]
    owed = []
    for done in range(12):
        resumed = loop()
        resumed._epoch = resumed._iter = done
        if validation_was_cut_off(runner):
            owed.append(done)
    assert owed == validated
