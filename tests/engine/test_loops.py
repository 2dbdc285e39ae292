"""An epoch that goes on in its middle."""

from types import SimpleNamespace
from typing import Any

import pytest
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.logging import MessageHub
from mmengine.runner import IterBasedTrainLoop
from torch import nn
from torch.utils.data import DataLoader

from vqmoe_vision.engine.loops import PROCESSES, SEEN, ResumableEpochLoop, check_batches
from vqmoe_vision.engine.seeding import SeededInfiniteSampler, SeededSampler


class Recorded(ResumableEpochLoop):
    """Keeps the batches, and trains nothing."""

    def __init__(self, runner: Any, dataloader: DataLoader) -> None:
        self._runner, self.dataloader, self._epoch = runner, dataloader, 1
        self.batches: list[tuple[int, list[int]]] = []

    def run_iter(self, idx: int, data_batch: Any) -> None:
        self.batches.append((idx, data_batch.tolist()))


@pytest.mark.parametrize('kind', [SeededSampler, DefaultSampler])
def test_what_an_epoch_has_seen_is_passed_over_once(kind: Any) -> None:
    hub = MessageHub(kind.__name__)
    runner = SimpleNamespace(call_hook=lambda *_: None, model=nn.Identity(), message_hub=hub)
    sampler = kind(range(10), seed=3)
    loop = Recorded(runner, DataLoader(range(10), batch_size=3, sampler=sampler))
    loop.run_epoch()
    whole, loop.batches = loop.batches, []
    assert [index for index, _ in whole] == [0, 1, 2, 3]  # of 3, 3, 3 and 1
    hub.update_info(SEEN, 2)  # as a checkpoint after two batches
    loop.run_epoch()
    resumed, loop.batches = loop.batches, []
    assert resumed == whole[2:]
    loop.run_epoch()
    assert loop.batches == whole
    hub.update_info(SEEN, 2)
    hub.update_info(PROCESSES, 4)
    with pytest.raises(ValueError, match=r'1 process is not possible: .* which goes on with 4'):
        loop.run_epoch()


@pytest.mark.parametrize('kind', [SeededSampler, SeededInfiniteSampler, InfiniteSampler])
def test_a_batch_that_no_epoch_fills_is_refused_and_one_of_several_rounds_is_not(kind: Any) -> None:
    loader = DataLoader(range(4), batch_size=6, sampler=kind(range(4)), drop_last=True)
    loop = object.__new__(IterBasedTrainLoop)
    runner: Any = SimpleNamespace(train_dataloader=loader, train_loop=loop)
    if kind is SeededSampler:
        with pytest.raises(ValueError, match=r'^train_dataloader\.batch_size=6 must be at most 4'):
            check_batches(runner)
    else:
        check_batches(runner)
        assert len(next(iter(loader))) == 6


@pytest.mark.parametrize('kind', [SeededInfiniteSampler, InfiniteSampler])
def test_an_epoch_that_never_ends_is_refused(kind: Any) -> None:
    loader = DataLoader(range(4), sampler=kind(range(4)))
    loop = object.__new__(ResumableEpochLoop)
    runner: Any = SimpleNamespace(train_dataloader=loader, train_loop=loop)
    said = rf"^train_dataloader\.sampler\.type='{kind.__name__}' is not .* ends: SeededSampler for"
    with pytest.raises(ValueError, match=said):
        check_batches(runner)
    runner.train_dataloader = DataLoader(range(4), sampler=SeededSampler(range(4)))
    check_batches(runner)
