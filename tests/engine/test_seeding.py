import random
from copy import deepcopy
from functools import partial
from itertools import islice, product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from mmengine.dataset import BaseDataset, DefaultSampler, InfiniteSampler
from mmengine.logging import MessageHub
from mmengine.registry import DATASETS
from mmengine.runner import IterBasedTrainLoop, Runner, loops
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils.fetch import _MapDatasetFetcher

from vqmoe_vision import collect_losses, update_state
from vqmoe_vision.engine import seeding
from vqmoe_vision.engine.config import OURS, renamed
from vqmoe_vision.engine.seeding import SeededInfiniteSampler, SeededSampler, seed_generators

from .. import cases, refused
from ..soak.kinds import same


class Noise(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.rand(())


def loader_of(dataset: Dataset, sampler: str, **options: Any) -> Any:
    own = dict(worker_init_fn='keep_worker_seed', collate_fn='default_collate')
    config = {name: dict(type=kind) for name, kind in own.items()} | options
    config |= dict(dataset=dataset, sampler=dict(type=sampler, shuffle=True))
    return Runner.build_dataloader(config, seed=0)


def test_augmentation_differs_between_epochs_and_is_repeated_on_resuming():
    loader, drawn = loader_of(Noise(), 'DefaultSampler', batch_size=4, num_workers=1), []
    for iteration in (0, 1, 0):
        seeding.ReseedHook().before_train_epoch(SimpleNamespace(seed=0, iter=iteration))
        drawn.append(next(iter(loader)).tolist())
    assert drawn[0] == drawn[2] != drawn[1]


class Seeded(Noise):
    def __getitem__(self, index: Any) -> torch.Tensor:
        seed_generators(*index.parts)
        return torch.stack([torch.tensor(float(index)), torch.rand(())])


def test_processes_draw_the_noise_of_one():
    def drawn(rank: int, size: int) -> list[tuple[int, tuple[int, ...]]]:
        sampler = SeededInfiniteSampler(Seeded(), shuffle=True, seed=0)
        sampler.rank, sampler.world_size = rank, size
        return [(int(index), index.parts) for index in islice(sampler.indices, 8 // size)]

    pairs = zip(drawn(0, 2), drawn(1, 2), strict=True)
    assert [sample for pair in pairs for sample in pair] == drawn(0, 1)


def test_a_training_by_epochs_draws_anew_in_every_epoch():
    def drawn(seed: int, epoch: int) -> list[float]:
        sampler = SeededSampler(Seeded(), shuffle=False, seed=seed)
        sampler.set_epoch(epoch)
        return [float(Seeded()[index][1]) for index in sampler]

    noise = [value for run in product((0, 1), (0, 1)) for value in drawn(*run)]
    assert len(set(noise)) == 16
    assert drawn(0, 1) == noise[4:8]


@cases('num_workers, drop_last', (0, False), (0, True), (2, True))
@pytest.mark.parametrize('sampler', ['SeededInfiniteSampler', 'SeededSampler'])
def test_a_resumed_run_by_iterations_sees_the_same(sampler, num_workers, drop_last, monkeypatch):
    """Also after the end of an epoch, whose last batch is smaller or left out."""
    monkeypatch.setattr(loops.time, 'sleep', lambda seconds: None)  # mmengine's, at such an end

    def batches(done: int) -> list[list[list[float]]]:
        options = dict(batch_size=3, num_workers=num_workers, drop_last=drop_last)
        iterator = loops._InfiniteDataloaderIterator(loader_of(Seeded(), sampler, **options))
        iterator.skip_iter(done)  # as mmengine's loop when it resumes
        return [next(iterator).tolist() for _ in range(done, 4 if num_workers else 8)]

    whole = batches(0)
    for done in (1, 3) if num_workers else (1, 3, 6):  # workers start anew in every epoch
        assert batches(done) == whole[done:]


class Inner(BaseDataset):
    """Noise of four samples that seeds itself, and that wrappers of mmengine take."""

    def load_data_list(self) -> list[dict[str, Any]]:
        return [dict(sample_idx=index) for index in range(4)]

    def get_cat_ids(self, idx: int) -> list[int]:
        return [0] if idx else [1]  # the first sample has a rare class

    def __getitem__(self, idx: int) -> float:
        seeding.seed_sample(idx)
        return idx + random.random() + np.random.rand() + float(torch.rand(()))


INNER = dict(type=Inner, metainfo={'classes': ('a',)})
CONCATENATED = dict(type='ConcatDataset', datasets=[INNER, INNER, INNER])
NESTED = {
    'plain': INNER,
    'ConcatDataset': CONCATENATED,
    'RepeatDataset': dict(type='RepeatDataset', dataset=CONCATENATED, times=3),
    'ClassBalancedDataset': dict(type='ClassBalancedDataset', dataset=INNER, oversample_thr=1.0),
}


@pytest.mark.parametrize('sampler', [SeededInfiniteSampler, SeededSampler])
@pytest.mark.parametrize('name', NESTED)
def test_a_wrapper_keeps_the_seeds_of_samples(name, sampler):
    dataset = DATASETS.build(renamed(NESTED[name], OURS, set()))
    fetch = _MapDatasetFetcher(dataset, True, list, False).fetch

    def drawn(of_all: int) -> list[float]:
        seed_generators(of_all)
        return fetch(list(islice(sampler(dataset, shuffle=True, seed=0), len(dataset))))

    first = drawn(0)
    assert drawn(1) == drawn(2) == first
    assert len(set(first)) == len(dataset)


class Recorded(seeding.ResumableEpochLoop):
    def __init__(self, runner: Any, dataloader: DataLoader) -> None:
        self._runner, self.dataloader, self._epoch = runner, dataloader, 1
        self.batches: list[tuple[int, list[int]]] = []

    def run_iter(self, idx: int, data_batch: Any) -> None:
        self.batches.append((idx, data_batch.tolist()))


@pytest.mark.parametrize('kind', [SeededSampler, DefaultSampler])
def test_what_an_epoch_has_seen_is_passed_over_once(kind):
    hub = MessageHub(kind.__name__)
    runner = SimpleNamespace(call_hook=lambda *_: None, model=nn.Identity(), message_hub=hub)
    loader = DataLoader(range(10), batch_size=3, sampler=kind(range(10), seed=3))
    loop = Recorded(runner, loader)
    loop.run_epoch()
    whole, loop.batches = loop.batches, []
    assert [index for index, _ in whole] == [0, 1, 2, 3]  # of 3, 3, 3 and 1
    hub.update_info(seeding.SEEN, 2)  # as a checkpoint after two batches
    for _ in range(2):
        loop.run_epoch()
    assert loop.batches == whole[2:] + whole
    hub.update_info(seeding.SEEN, 2)
    hub.update_info(seeding.PROCESSES, 4)
    refused(r'^number of processes=1 is not possible: 4,', loop.run_epoch)


@pytest.mark.parametrize('kind', [SeededSampler, SeededInfiniteSampler, InfiniteSampler])
def test_a_batch_that_no_epoch_fills_is_refused_and_one_of_several_rounds_is_not(kind):
    loader = DataLoader(range(4), batch_size=6, sampler=kind(range(4)), drop_last=True)
    loop = object.__new__(IterBasedTrainLoop)
    runner: Any = SimpleNamespace(train_dataloader=loader, train_loop=loop)
    if kind is SeededSampler:
        refused(r'^train_dataloader\.batch_size=6 .* at most 4', seeding.check_batches, runner)
    else:
        seeding.check_batches(runner)
        assert len(next(iter(loader))) == 6


@cases(
    'method, options', ('vqmoe', {'preset': 'ema'}), ('smoe', {'bias_update_rate': 0.1}), ids=str
)
def test_what_waits_for_a_step_is_in_the_checkpoint(method, options):
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
        seeding.keep_accumulated(runner, checkpoint)
    assert best == {}
    logger: Any = SimpleNamespace(info=lambda text: None)
    seeding.restore_accumulated(SimpleNamespace(model=resumed, logger=logger), goes_on)
    assert same(*([p.grad for p in each.parameters()] for each in (model, resumed)))
    before = deepcopy(model.state_dict())
    for each in (model, resumed):
        update_state(each)
    assert same(resumed.state_dict(), model.state_dict()) and not same(before, model.state_dict())
