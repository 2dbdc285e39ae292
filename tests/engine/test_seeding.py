from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmengine.runner import Runner
from torch.utils.data import Dataset

import vqmoe_vision.engine  # noqa: F401  registers keep_worker_seed
from vqmoe_vision.engine.seeding import ReseedHook, SeededInfiniteSampler, seed_generators


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
