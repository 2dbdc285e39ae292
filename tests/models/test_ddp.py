"""Two processes on half a batch each against one process on the whole batch.

Losses that are means over tokens, and their gradients, are the same. Balance losses are not: every
rank balances its own tokens, and a balance loss is no mean of per-token terms (a product of a load
and a mean probability, a coefficient of variation). The comparison leaves them out; training with
them is tested for ranks that stay equal.
"""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.task import ClassificationTask
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import vqmoe_vision
from vqmoe_vision.models.timm_tasks import MoeClassificationTask
from vqmoe_vision.moe import METHODS, start_training

WORLD = 2


# no mean over the tokens of a batch: shares and their products
NO_MEANS = ('importance_weight', 'load_weight', 'balance_weight', 'router_noise')


def means_only(method: str) -> dict[str, float]:
    """Options without the losses that are no mean over tokens, and without noise, but with z."""
    names = METHODS[method].config.option_names()
    options = {name: 0.0 for name in NO_MEANS if name in names}
    return {**options, **({'z_weight': 0.1} if 'z_weight' in names else {})}


class TrainStep(nn.Module):
    """Model and losses in one module, which is what DistributedDataParallel has to wrap."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        with vqmoe_vision.collect_losses(self.model, update_state=False) as collected:
            return F.cross_entropy(self.model(images), targets) + collected.total()


def make(method: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    size = {'img_size': 16, 'patch_size': 8, 'embed_dim': 16, 'depth': 2, 'num_heads': 2}
    return timm.create_model(f'vit_tiny_{method}', **size, num_classes=10, **options).train()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, 16, 16, generator=generator), torch.arange(8)


def loss_and_gradients(step: nn.Module, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
    loss = step(images, targets)
    loss.backward()
    grads = {n.removeprefix('module.'): p.grad for n, p in step.named_parameters()}
    return {'loss': loss.detach(), **grads}


def wrap(model: nn.Module) -> DistributedDataParallel:
    return DistributedDataParallel(TrainStep(model), find_unused_parameters=False)


def gradients_of_a_task(method: str, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Of a task of timm's kind, which adds the losses outside of what DDP wraps."""
    task = MoeClassificationTask(
        make(method, **means_only(method)), nn.CrossEntropyLoss(), verbose=False
    )
    task.prepare_distributed()
    task(images, targets)['loss'].backward()
    return {f'model.{n}': p.grad for n, p in task.trainable_module.module.named_parameters()}


def after_three_steps(method: str, rank: int) -> dict[str, Tensor]:
    """State of a default model whose ranks see different images and different noise."""
    model = make(method)
    start_training(model, 20)  # StableMoE freezes its router after two
    step = wrap(model)
    optimizer = torch.optim.AdamW(step.parameters(), lr=1e-2)
    torch.manual_seed(rank)
    for _ in range(3):
        optimizer.zero_grad()
        step(torch.randn(4, 3, 16, 16), torch.arange(4)).backward()
        optimizer.step()
        vqmoe_vision.update_state(step)
    return model.state_dict()


def worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group('gloo', f'file://{folder}/init', rank=rank, world_size=WORLD)
    found = {}
    for method in METHODS:
        images, targets = (half.chunk(WORLD)[rank] for half in batch())
        step = wrap(make(method, **means_only(method)))
        found[method] = {
            'step': loss_and_gradients(step, images, targets),
            'state': after_three_steps(method, rank),
        }
        if hasattr(ClassificationTask, 'update_ema'):
            found[method]['task'] = gradients_of_a_task(method, images, targets)
    torch.save(found, folder / f'rank{rank}.pth')
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp('ddp')
    torch.multiprocessing.spawn(worker, (folder,), nprocs=WORLD)
    return [torch.load(folder / f'rank{rank}.pth', weights_only=True) for rank in range(WORLD)]


def test_loss_and_gradients_are_those_of_the_joint_batch(ranks, method: str) -> None:
    expected = loss_and_gradients(TrainStep(make(method, **means_only(method))), *batch())
    first, second = (rank[method]['step'] for rank in ranks)
    torch.testing.assert_close((first.pop('loss') + second.pop('loss')) / 2, expected.pop('loss'))
    assert first.keys() == expected.keys()
    # one mean over eight images against the mean of two means over four
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(second, first, rtol=0, atol=0)


def test_a_task_of_timm_has_the_same_gradients(ranks, method: str) -> None:
    if 'task' not in ranks[0][method]:
        pytest.skip('tasks of timm before 1.0.27 know no steps')
    for rank in ranks:
        expected = {name: g for name, g in rank[method]['step'].items() if name != 'loss'}
        torch.testing.assert_close(rank[method]['task'], expected, rtol=0, atol=0)


def test_ranks_stay_equal(ranks, method: str) -> None:
    first, second = (rank[method]['state'] for rank in ranks)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    start = make(method).state_dict()
    unchanged = [name for name, value in first.items() if torch.equal(value, start[name])]
    assert 'head.weight' not in unchanged and 'blocks.1.mlp.experts.fc1.weight' not in unchanged


def test_state_without_gradients_has_moved_on_every_rank(ranks) -> None:
    prefix = 'blocks.1.mlp.'
    for rank in ranks:
        assert rank['vqmoe']['state'][f'{prefix}quantizer.codebook.started']
        assert rank['vqmoe']['state'][f'{prefix}quantizer.codebook.updates'] == 3
        assert rank['stablemoe']['state'][f'{prefix}router.distilled.frozen']
        assert rank['stablemoe']['state'][f'{prefix}router.distilled.steps'] == 3
