import random
from itertools import islice, product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS
from mmengine.runner import Runner, loops
from torch.utils.data import Dataset
from torch.utils.data._utils.fetch import _MapDatasetFetcher

import vqmoe_vision.engine  # noqa: F401  registers keep_worker_seed
from vqmoe_vision.engine.config import OURS, renamed
from vqmoe_vision.engine.seeding import (
    ReseedHook,
    SeededInfiniteSampler,
    SeededSampler,
    seed_generators,
    seed_sample,
)


class Noise(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.rand(())


def loader_of(dataset: Dataset, sampler: str, **options: Any) -> Any:
    config = dict(
        dataset=dataset,
        sampler=dict(type=sampler, shuffle=True),
        worker_init_fn=dict(type='keep_worker_seed'),
        collate_fn=dict(type='default_collate'),
        **options,
    )
    return Runner.build_dataloader(config, seed=0)


def test_augmentation_differs_between_epochs_and_is_repeated_on_resuming() -> None:
    loader, drawn = loader_of(Noise(), 'DefaultSampler', batch_size=4, num_workers=1), []
    for iteration in (0, 1, 0):
        ReseedHook().before_train_epoch(SimpleNamespace(seed=0, iter=iteration))
        drawn.append(next(iter(loader)).tolist())
    assert drawn[0] == drawn[2] != drawn[1]


class Seeded(Noise):
    """Noise with the seed that the index brings."""

    def __getitem__(self, index: Any) -> torch.Tensor:
        seed_generators(*index.parts)
        return torch.stack([torch.tensor(float(index)), torch.rand(())])


def test_processes_draw_the_noise_of_one() -> None:
    def drawn(rank: int, size: int) -> list[tuple[int, tuple[int, ...]]]:
        sampler = SeededInfiniteSampler(Seeded(), shuffle=True, seed=0)
        sampler.rank, sampler.world_size = rank, size
        return [(int(index), index.parts) for index in islice(sampler.indices, 8 // size)]

    pairs = zip(drawn(0, 2), drawn(1, 2), strict=True)
    assert [sample for pair in pairs for sample in pair] == drawn(0, 1)


def test_a_training_by_epochs_draws_anew_in_every_epoch() -> None:
    def drawn(seed: int, epoch: int) -> list[float]:
        sampler = SeededSampler(Seeded(), shuffle=False, seed=seed)
        sampler.set_epoch(epoch)
        return [float(Seeded()[index][1]) for index in sampler]

    # two seeds with two epochs of four samples each
    noise = [value for run in product((0, 1), (0, 1)) for value in drawn(*run)]
    assert len(set(noise)) == 16
    assert drawn(0, 1) == noise[4:8]


@pytest.mark.parametrize('drop_last', [False, True])
@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize('sampler', ['SeededInfiniteSampler', 'SeededSampler'])
def test_a_resumed_run_by_iterations_sees_what_the_whole_one_sees(
    sampler: str, num_workers: int, drop_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after the end of an epoch, whose last batch is smaller or left out."""
    monkeypatch.setattr(loops.time, 'sleep', lambda seconds: None)  # mmengine's, at such an end

    def batches(done: int) -> list[list[list[float]]]:
        options = dict(batch_size=3, num_workers=num_workers, drop_last=drop_last)
        iterator = loops._InfiniteDataloaderIterator(loader_of(Seeded(), sampler, **options))
        iterator.skip_iter(done)  # as mmengine's loop when it resumes
        return [next(iterator).tolist() for _ in range(done, 8)]

    whole = batches(0)
    for done in (1, 3, 6):
        assert batches(done) == whole[done:]


class Inner(BaseDataset):
    """Noise of four samples that seeds itself, and that wrappers of mmengine take."""

    def load_data_list(self) -> list[dict[str, Any]]:
        return [dict(sample_idx=index) for index in range(4)]

    def get_cat_ids(self, idx: int) -> list[int]:
        return [0] if idx else [1]  # the first sample has a rare class

    def __getitem__(self, idx: int) -> float:
        seed_sample(idx)
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
def test_a_wrapper_keeps_the_seeds_of_samples(name: str, sampler: Any) -> None:
    dataset = DATASETS.build(renamed(NESTED[name], OURS, set()))
    fetch = _MapDatasetFetcher(dataset, True, list, False).fetch

    def drawn(of_all: int) -> list[float]:
        seed_generators(of_all)
        return fetch(list(islice(sampler(dataset, shuffle=True, seed=0), len(dataset))))

    first = drawn(0)
    assert drawn(1) == drawn(2) == first
    # the second round of a sample is no repetition of the first
    assert len(set(first)) == len(dataset)
