from types import SimpleNamespace
from typing import Any

import torch
from mmengine.runner import Runner
from torch.utils.data import Dataset

import vqmoe_vision.engine  # noqa: F401  registers keep_worker_seed
from vqmoe_vision.engine.seeding import ReseedHook


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
