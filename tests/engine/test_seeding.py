import random
from functools import partial
from itertools import islice, product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.dataset import BaseDataset, dataset_wrapper
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


def epochs_of_noise(**loader: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    config = dict(
        dataset=Noise(),
        sampler=dict(type='DefaultSampler', shuffle=False),
        batch_size=4,
        num_workers=1,
        collate_fn=dict(type='default_collate'),
        **loader,
    )
    loader = Runner.build_dataloader(config, seed=0)
    hook = ReseedHook()
    drawn = []
    for iteration in (0, 1, 0):
        hook.before_train_epoch(SimpleNamespace(seed=0, iter=iteration))
        drawn.append(next(iter(loader)))
    return tuple(drawn)


def test_augmentation_differs_between_epochs_and_is_repeated_on_resuming() -> None:
    first, second, again = epochs_of_noise(worker_init_fn=dict(type='keep_worker_seed'))
    assert not torch.equal(first, second)
    torch.testing.assert_close(first, again, rtol=0, atol=0)


def test_seeds_of_neighbouring_runs_do_not_meet() -> None:
    drawn = []
    for seed, iteration in ((0, 1), (1, 0)):
        ReseedHook().before_train_iter(SimpleNamespace(seed=seed, iter=iteration), 0)
        drawn.append(torch.rand(3))
    assert not torch.equal(*drawn)


class Seeded(Noise):
    """Noise with the seed that the index brings."""

    def __getitem__(self, index: Any) -> torch.Tensor:
        seed_generators(*index.parts)
        return torch.stack([torch.tensor(float(index)), torch.rand(())])


def stream(num_workers: int, skip: int = 0, seed: int = 0) -> list[list[float]]:
    """Indices and noise of the first eight samples of a run, or of those that follow `skip`."""
    config = dict(
        dataset=Seeded(),
        sampler=dict(type='SeededInfiniteSampler', shuffle=True),
        batch_size=2,
        num_workers=num_workers,
        worker_init_fn=dict(type='keep_worker_seed'),
        collate_fn=dict(type='default_collate'),
    )
    loader = Runner.build_dataloader(config, seed=seed)
    drawn = loader.sampler.indices
    for _ in range(skip):
        next(drawn)
    batches = zip(range((8 - skip) // 2), loader, strict=False)
    return [sample for _, batch in batches for sample in batch.tolist()]


@pytest.mark.parametrize('num_workers', [0, 1, 2])
def test_noise_of_a_sample_follows_from_its_position(num_workers: int) -> None:
    whole = stream(0)
    assert stream(num_workers) == whole
    assert stream(num_workers, skip=4) == whole[4:]


def test_processes_draw_the_noise_of_one() -> None:
    def drawn(rank: int, size: int) -> list[tuple[int, tuple[int, ...]]]:
        sampler = SeededInfiniteSampler(Seeded(), shuffle=True, seed=0)
        sampler.rank, sampler.world_size = rank, size
        return [(int(index), index.parts) for index in islice(sampler.indices, 8 // size)]

    pairs = zip(drawn(0, 2), drawn(1, 2), strict=True)
    assert [sample for pair in pairs for sample in pair] == drawn(0, 1)


def test_noise_is_drawn_anew_for_every_sample_epoch_and_seed() -> None:
    # four samples: the second half is the second epoch
    noise = [value for _, value in stream(0)]
    assert sorted(index for index, _ in stream(0)[:4]) == [0, 1, 2, 3]
    assert len({*noise, *(value for _, value in stream(0, seed=1))}) == 16


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
@pytest.mark.parametrize('num_workers', [0, 1])
@pytest.mark.parametrize('sampler', ['SeededInfiniteSampler', 'SeededSampler'])
def test_a_resumed_run_by_iterations_sees_what_the_whole_one_sees(
    sampler: str, num_workers: int, drop_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after the end of an epoch, whose last batch is smaller or left out."""
    monkeypatch.setattr(loops.time, 'sleep', lambda seconds: None)  # mmengine's, at such an end

    def batches(done: int) -> list[list[list[float]]]:
        config = dict(
            dataset=Seeded(),  # four samples
            sampler=dict(type=sampler, shuffle=True),
            batch_size=3,
            num_workers=num_workers,
            drop_last=drop_last,
            worker_init_fn=dict(type='keep_worker_seed'),
            collate_fn=dict(type='default_collate'),
        )
        iterator = loops._InfiniteDataloaderIterator(Runner.build_dataloader(config, seed=0))
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


def wrapped(name: str) -> Any:
    """Of Inner, as a config builds it."""
    inner = [Inner(metainfo={'classes': ('a',)}) for _ in range(3)]
    arguments = {
        'ConcatDataset': dict(datasets=inner),
        'RepeatDataset': dict(dataset=inner[0], times=3),
        'ClassBalancedDataset': dict(dataset=inner[0], oversample_thr=1.0),
    }
    kind = renamed(dict(type=name), OURS, set())
    return DATASETS.build(dict(**kind, **arguments[name]))


WRAPPERS = [
    kind.__name__
    for kind in vars(dataset_wrapper).values()
    if isinstance(kind, type) and kind.__module__ == dataset_wrapper.__name__
]
NESTED = {
    'plain': Inner,
    **{name: partial(wrapped, name) for name in WRAPPERS},
    'repeated concatenation': lambda: DATASETS.build(
        dict(
            type='RepeatDataset',
            times=2,
            dataset=dict(type='ConcatDataset', datasets=[Inner(), Inner()]),
        )
    ),
}


@pytest.mark.parametrize('sampler', [SeededInfiniteSampler, SeededSampler])
@pytest.mark.parametrize('name', NESTED)
def test_a_wrapper_keeps_the_seeds_of_samples(name: str, sampler: Any) -> None:
    dataset = NESTED[name]()
    fetch = _MapDatasetFetcher(dataset, True, list, False).fetch

    def drawn(of_all: int) -> list[float]:
        seed_generators(of_all)
        return fetch(list(islice(sampler(dataset, shuffle=True, seed=0), len(dataset))))

    first = drawn(0)
    assert drawn(1) == drawn(2) == first
    # the second round of a sample is no repetition of the first
    assert len(set(first)) == len(dataset)


def test_numbers_of_numpy_keep_the_seed() -> None:
    index = next(iter(SeededInfiniteSampler(Inner(), shuffle=False, seed=3)))
    number = np.cumsum([2, 3])[0]
    for found in (index + number, index - number, index % number, index // number):
        assert found.parts == index.parts
