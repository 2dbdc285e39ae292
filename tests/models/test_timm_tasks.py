"""Tasks of timm that train what MoE layers add, as timm's `train.py` uses them."""

import copy
from typing import Any

import pytest
import timm.task
import torch
from timm.optim import create_optimizer_v2
from timm.task import TrainingTask
from torch import Tensor, nn

from vqmoe_vision.models.timm_tasks import MoeClassificationTask, TrainsExperts, install

TARGETS = torch.arange(4)


def make_task(model: nn.Module) -> Any:
    return MoeClassificationTask(model.train(), nn.CrossEntropyLoss(), verbose=False)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def step(task: Any, optimizer: torch.optim.Optimizer, batches: list[Tensor]) -> Tensor:
    """What `train.py` does for one update, accumulating over the batches."""
    for images in batches:
        loss = task(images, TARGETS)['loss']
        loss /= len(batches)
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    task.update_ema(step=1)
    return loss.detach()


def test_a_task_trains_as_the_loop_of_the_readme(tiny_variant, train_step, images):
    model = tiny_variant(depth=2)
    twin = copy.deepcopy(model)
    torch.manual_seed(1)  # router noise
    expected = train_step(twin, None, images, TARGETS)
    task = make_task(model)
    torch.manual_seed(1)
    result = task(images, TARGETS)
    result['loss'].backward()
    torch.testing.assert_close(result['loss'].detach(), expected, rtol=0, atol=0)
    torch.testing.assert_close(gradients(model), gradients(twin), rtol=0, atol=0)
    task.update_ema()
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize('checkpointing', [False, True])
def test_state_moves_once_per_step_and_travels_in_checkpoints(make_tiny, checkpointing):
    options = {'vqmoe': {}, 'stablemoe': {'stage1_steps': 2}}
    moved = {}
    for method, chosen in options.items():
        torch.manual_seed(0)
        task = make_task(make_tiny(method, depth=2, **chosen))
        task.trainable_module.set_grad_checkpointing(checkpointing)
        task.setup_ema(decay=0.5)
        optimizer = create_optimizer_v2(task.trainable_module, opt='adamw', lr=1e-2)
        for _ in range(3):
            step(task, optimizer, [torch.randn(4, 3, 32, 32) for _ in range(2)])
        state = task.get_checkpoint_state()
        again = make_task(make_tiny(method, depth=2, **chosen))
        again.load_checkpoint_state(state['state_dict'])
        moved |= again.trainable_module.state_dict()
        averages = task.get_checkpoint_state(ema=True)
        moved |= {f'ema.{k}': v for k, v in averages['state_dict_ema'].items()}
    prefix = 'blocks.1.mlp.'
    assert moved[f'{prefix}quantizer.codebook.updates'] == 3
    assert moved[f'{prefix}quantizer.codebook.started']
    assert moved[f'ema.{prefix}quantizer.codebook.started']
    assert moved[f'{prefix}router.distilled.steps'] == 3
    assert moved[f'{prefix}router.distilled.frozen']


ORIGINALS = {
    name: task
    for name, task in vars(timm.task).items()
    if isinstance(task, type) and issubclass(task, TrainingTask)
}


def restore() -> None:
    for name, task in ORIGINALS.items():
        setattr(timm.task, name, task)


def test_install_leaves_nothing_of_timms_but_the_base():
    install()
    install()  # a second time changes nothing
    try:
        found = {name: getattr(timm.task, name) for name in ORIGINALS}
    finally:
        restore()
    assert found.pop('TrainingTask') is TrainingTask
    assert found['ClassificationTask'] is MoeClassificationTask
    for name, task in found.items():
        assert task.__mro__[1:3] == (TrainsExperts, ORIGINALS[name]), name
