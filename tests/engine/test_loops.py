"""An epoch that goes on in its middle."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.logging import MessageHub
from mmengine.runner import IterBasedTrainLoop
from torch import nn
from torch.utils.data import DataLoader

from vqmoe_vision import collect_losses, update_state
from vqmoe_vision.engine.seeding import (
    PROCESSES,
    SEEN,
    ResumableEpochLoop,
    SeededInfiniteSampler,
    SeededSampler,
    check_batches,
    keep_accumulated,
    restore_accumulated,
)


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
    with pytest.raises(ValueError, match=r'^number of processes=1 is not possible: 4,'):
        loop.run_epoch()


@pytest.mark.parametrize('kind', [SeededSampler, SeededInfiniteSampler, InfiniteSampler])
def test_a_batch_that_no_epoch_fills_is_refused_and_one_of_several_rounds_is_not(kind: Any) -> None:
    loader = DataLoader(range(4), batch_size=6, sampler=kind(range(4)), drop_last=True)
    loop = object.__new__(IterBasedTrainLoop)
    runner: Any = SimpleNamespace(train_dataloader=loader, train_loop=loop)
    if kind is SeededSampler:
        with pytest.raises(ValueError, match=r'^train_dataloader\.batch_size=6 .* at most 4'):
            check_batches(runner)
    else:
        check_batches(runner)
        assert len(next(iter(loader))) == 6


@pytest.mark.parametrize(
    ('method', 'options'), [('vqmoe', {}), ('smoe', {'bias_update_rate': 0.1})]
)
def test_what_waits_for_a_step_is_in_the_checkpoint(method: str, options: dict) -> None:
    sizes = dict(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2, moe_layers=[0])
    make = partial(timm.create_model, f'vit_tiny_{method}', num_experts=4, **sizes, **options)
    model, resumed = make(), make()
    resumed.load_state_dict(model.state_dict())
    with collect_losses(model, update_state=False):
        model(torch.randn(2, 3, 8, 8)).sum().backward()
    wrapper = SimpleNamespace(should_update=lambda: False)
    runner: Any = SimpleNamespace(model=model, optim_wrapper=wrapper)
    goes_on, best = dict[str, Any](optimizer={}), dict[str, Any]()
    for checkpoint in (goes_on, best):  # which is saved without an optimizer
        keep_accumulated(runner, checkpoint)
    assert best == {}
    logger = SimpleNamespace(info=lambda text: None)
    restore_accumulated(SimpleNamespace(model=resumed, logger=logger), goes_on)  # type: ignore[arg-type]
    gradients = [[p.grad for p in each.parameters()] for each in (model, resumed)]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for each in (model, resumed):
        update_state(each)
    torch.testing.assert_close(resumed.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert any(not torch.equal(before[n], value) for n, value in model.state_dict().items())
