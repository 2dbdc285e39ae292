from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.hooks import CheckpointHook, Hook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from timm.optim import Lamb
from torch import nn

from vqmoe_vision.engine import NonFiniteError, hooks
from vqmoe_vision.engine.hooks import (
    CheckpointFitHook,
    ClassCountHook,
    MoeStateHook,
    NonFiniteGuardHook,
)
from vqmoe_vision.engine.routing import RoutingStatistics
from vqmoe_vision.models.compat import STATED
from vqmoe_vision.moe.optimizer import check_optimizer

SIZES: Any = dict(img_size=16, patch_size=8, embed_dim=12, depth=2, num_heads=3, num_experts=2)


@pytest.mark.parametrize('several', [False, True])
def test_optimizers_are_taught_the_experts_once_before_their_state_is_loaded(several: bool) -> None:
    model = timm.create_model('vit_tiny_smoe', **SIZES)
    optimizer = Lamb(model.parameters())
    wrapper: Any = OptimWrapper(optimizer)
    if several:
        wrapper = OptimWrapperDict(experts=wrapper)
    with pytest.raises(ValueError, match='Lamb'):
        check_optimizer(optimizer, model)
    for _ in range(2):  # a test after the training runs too
        MoeStateHook().before_run(SimpleNamespace(model=model, optim_wrapper=wrapper))
    check_optimizer(optimizer, model)
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    MoeStateHook().before_run(SimpleNamespace(model=model, optim_wrapper=None))  # of a test alone


def stub_runner(hooks: Sequence[Hook] = ()) -> Any:
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, torch.inf)
    return SimpleNamespace(model=model, iter=4, max_iters=9, hooks=hooks)


def test_guard_looks_at_the_weights_before_a_checkpoint_is_written() -> None:
    runner = stub_runner()
    content = {'state_dict': runner.model.state_dict(), 'meta': {'iter': 5}}
    with pytest.raises(NonFiniteError, match=r'parameter weight .* at iteration 5'):
        NonFiniteGuardHook().before_save_checkpoint(runner, content)


def test_guard_looks_before_the_checkpoint_of_an_epoch_removes_an_older_one() -> None:
    with pytest.raises(NonFiniteError, match=r'parameter weight .* at iteration 4'):
        NonFiniteGuardHook().after_train_epoch(stub_runner())


def test_guard_looks_before_the_checkpoint_of_an_iteration_removes_an_older_one() -> None:
    guard = NonFiniteGuardHook()
    due = stub_runner([CheckpointHook(interval=5, by_epoch=False)])
    with pytest.raises(NonFiniteError, match=r'parameter weight .* at iteration 5'):
        guard.after_train_iter(due, 0)  # the fifth iteration
    # no checkpoint now: nothing to look at
    guard.after_train_iter(stub_runner([CheckpointHook(6, by_epoch=False)]), 0)


@pytest.mark.parametrize('kind', ['parameter', 'buffer'])
def test_guard_passes_over_buffers_that_are_built_infinite_alone(kind: str) -> None:
    model = nn.BatchNorm1d(2)
    model.register_buffer('mask', torch.tensor([0.0, -torch.inf]))
    name = {'parameter': 'weight', 'buffer': 'running_mean'}[kind]
    runner: Any = SimpleNamespace(model=model, iter=4)
    guard = NonFiniteGuardHook()
    guard.before_run(runner)
    content = {'state_dict': model.state_dict(), 'meta': {'iter': 4}}
    guard.after_train_epoch(runner)
    guard.before_save_checkpoint(runner, content)
    getattr(model, name).data.fill_(torch.inf)  # by a checkpoint, for example
    with pytest.raises(NonFiniteError, match=rf'^{kind} {name} became'):
        guard.after_train_epoch(runner)
    with pytest.raises(NonFiniteError, match=rf'^{kind} {name} became'):
        guard.before_save_checkpoint(runner, content)


def test_layers_hear_how_long_the_training_is() -> None:
    model = timm.create_model(
        'vit_tiny_stablemoe', img_size=8, patch_size=4, embed_dim=12, depth=2, num_heads=3
    )
    model_of_run = SimpleNamespace(routed_model=model)
    runner = SimpleNamespace(
        model=model_of_run,
        cfg={},
        max_iters=250,
        optim_wrapper=sgd_wrapper(model),
        hooks=[CheckpointFitHook()],  # which fits what reads images
    )
    MoeStateHook().before_train(runner)
    assert model.blocks[1].mlp.stage1_steps == 25  # a tenth


def sgd_wrapper(model: nn.Module, accumulate: int = 1) -> OptimWrapper:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return OptimWrapper(optimizer, accumulative_counts=accumulate)


def test_state_moves_once_per_step_of_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(1, 1)
    wrapper = sgd_wrapper(model, accumulate=2)
    wrapper.initialize_count_status(model, 0, 5)
    runner: Any = SimpleNamespace(model=SimpleNamespace(routed_model=model), max_iters=5)
    runner.cfg = {}
    runner.optim_wrapper = wrapper
    runner.hooks = [CheckpointFitHook()]
    announced: list[int] = []
    monkeypatch.setattr(hooks, 'start_training', lambda _, updates: announced.append(updates))
    moved: list[int] = []
    hook = MoeStateHook()
    hook.before_train(runner)
    for iteration in range(1, 6):
        monkeypatch.setattr(hooks, 'update_state', lambda _, at=iteration: moved.append(at))
        wrapper.update_params(model(torch.ones(1, 1)).sum())
        hook.after_train_iter(runner, iteration - 1)
    assert moved == [2, 4, 5]  # every second batch, and the one that is left over
    assert announced == [3]


def test_training_and_validation_are_reported_apart() -> None:
    statistics, written = RoutingStatistics(), []
    runner = SimpleNamespace(
        model=SimpleNamespace(routing_statistics=statistics),
        logger=SimpleNamespace(info=lambda line: None),
        visualizer=SimpleNamespace(add_scalars=lambda scalars, step: written.append(scalars)),
        iter=4,
    )
    hook = MoeStateHook()
    for load, report in (([1.0, 0.0], hook.before_val_epoch), ([0.5, 0.5], hook.after_val_epoch)):
        statistics.add({'layer/load': torch.tensor(load)})
        report(runner, **({'metrics': {}} if report == hook.after_val_epoch else {}))
    hook.after_train_epoch(runner)  # nothing was trained since
    assert [(next(iter(s)), s[next(iter(s))]) for s in written] == [
        ('train_epoch/layer/load_min', 0.0),
        ('val/layer/load_min', 0.5),
    ]


class Reporting(nn.Linear):
    """Stands for a model; has what `MoeStateHook` reads of one."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.routing_statistics = RoutingStatistics()


def test_routing_of_an_epoch_survives_a_stop_in_its_middle() -> None:
    loads = [torch.tensor([share, 1 - share]) for share in (1.0, 0.75, 0.5)]
    runners = [SimpleNamespace(model=Reporting(), _resume=True) for _ in range(3)]
    whole, stopped, resumed = (runner.model.routing_statistics for runner in runners)
    for load in loads:
        whole.add({'layer/load': load})
    for load in loads[:2]:
        stopped.add({'layer/load': load})
    checkpoint: dict[str, Any] = {}
    MoeStateHook().before_save_checkpoint(runners[1], checkpoint)
    MoeStateHook().after_load_checkpoint(runners[2], checkpoint)
    resumed.add({'layer/load': loads[2]})
    assert resumed.means().keys() == whole.means().keys() == {'layer/load'}
    torch.testing.assert_close(resumed.means(), whole.means(), rtol=0, atol=0)


def test_routing_of_a_validation_that_is_cut_off_is_not_kept() -> None:
    runner = SimpleNamespace(model=Reporting().eval(), _resume=True)
    runner.model.routing_statistics.add({'layer/load': torch.ones(2) / 2})
    checkpoint: dict[str, Any] = {}
    MoeStateHook().before_save_checkpoint(runner, checkpoint)
    resumed = SimpleNamespace(model=Reporting(), _resume=True)
    MoeStateHook().after_load_checkpoint(resumed, checkpoint)  # as one of before, without any
    assert resumed.model.routing_statistics.means() == {}


def runner_for(num_classes: int) -> Any:
    loader = SimpleNamespace(dataset=SimpleNamespace(metainfo={'classes': ('cat', 'dog')}))
    model = SimpleNamespace(num_classes=num_classes)
    return SimpleNamespace(
        model=model,
        train_dataloader=loader,
        val_dataloader=loader,
        test_dataloader=loader,
        val_loop=None,
    )


@pytest.mark.parametrize('stage', ['before_train', 'before_test'])
def test_class_count(stage: str) -> None:
    getattr(ClassCountHook(), stage)(runner_for(2))
    with pytest.raises(ValueError, match=r'num_classes=3.* has 2 classes \(cat, dog'):
        getattr(ClassCountHook(), stage)(runner_for(3))


def test_validation_set_with_other_classes() -> None:
    training = runner_for(2)
    training.val_loop = object()
    ClassCountHook().before_train(training)
    metainfo = {'classes': ('cat', 'owl')}
    training.val_dataloader = SimpleNamespace(dataset=SimpleNamespace(metainfo=metainfo))
    with pytest.raises(ValueError, match='only one of them has dog, owl'):
        ClassCountHook().before_train(training)
    metainfo['classes'] = ('dog', 'cat')
    with pytest.raises(ValueError, match='have their classes in different orders'):
        ClassCountHook().before_train(training)
    metainfo['classes'] = ['cat', 'dog']  # a file of names is read as a list
    ClassCountHook().before_train(training)
    del metainfo['classes']
    with pytest.raises(ValueError, match=r'val_dataloader\.dataset has no classes; metainfo=dict'):
        ClassCountHook().before_train(training)


def load_meta(hook: ClassCountHook, meta: dict[str, Any], resume: bool) -> None:
    hook.after_load_checkpoint(SimpleNamespace(_resume=resume), {'meta': meta})


@pytest.mark.parametrize('split', ['train', 'val', 'test'])
def test_data_sets_of_one_kind_count_classes_from_one_label_on(split: str) -> None:
    def run(trained: Any, now: Any, **other_data: str) -> None:
        hook, runner = ClassCountHook(), runner_for(2)
        seen, other = ({'classes': ('cat', 'dog'), **made} for made in (trained, now))
        runner.val_loop = 'a loop' if split == 'val' else None
        for name, metainfo in (('train', seen), (split, other)):
            loader = SimpleNamespace(dataset=SimpleNamespace(metainfo=metainfo))
            setattr(runner, f'{name}_dataloader', loader)
        scenes = dict(type='Scenes', data_root='data/scenes')
        wrapped = dict(type='RepeatDataset', times=2, dataset=scenes)
        loaders = {'train_dataloader': wrapped, f'{split}_dataloader': {**scenes, **other_data}}
        runner.cfg = Config({name: dict(dataset=dataset) for name, dataset in loaders.items()})
        load_meta(hook, {'dataset_meta': seen}, resume=split == 'train')
        hook.before_test(runner) if split == 'test' else hook.before_train(runner)

    reduced, kept = dict(reduce_zero_label=True), dict(reduce_zero_label=False)
    for trained, now in ((reduced, kept), (kept, reduced)):
        value, before = now['reduce_zero_label'], trained['reduce_zero_label']
        said = rf'^{split}_dataloader\.dataset\.reduce_zero_label={value} is not .*: {before}, as'
        with pytest.raises(ValueError, match=said):
            run(trained, now)
        run(trained, trained)
        if split != 'train':
            run(trained, now, type='CamVid')  # whose files may be written otherwise
            run(trained, now, data_root='data/others')
        run({}, now)  # of others, or of classification


def load(hook: ClassCountHook, classes: Sequence[str] | None, resume: bool) -> None:
    load_meta(hook, {STATED: {'classes': classes}}, resume)


@pytest.mark.parametrize(('stage', 'resume'), [('before_test', False), ('before_train', True)])
@pytest.mark.parametrize('classes', [('dog', 'cat'), ('cat', 'owl')])
def test_classes_are_those_of_the_training(
    stage: str, resume: bool, classes: tuple[str, ...]
) -> None:
    hook, first = ClassCountHook(), next(i for i in (0, 1) if classes[i] != ('cat', 'dog')[i])
    message = rf"its class {first} is '{classes[first]}', that of \w+_dataloader\.dataset is '"
    load(hook, classes, resume)
    with pytest.raises(ValueError, match=rf'{message}.*; give the classes the names of'):
        getattr(hook, stage)(runner_for(2))
    load_meta(hook, {'dataset_meta': {'classes': classes}}, resume)  # others may spell otherwise
    getattr(hook, stage)(runner_for(2))
    for same in (['cat', 'dog'], None):
        load(hook, same, resume)
        getattr(hook, stage)(runner_for(2))


def test_another_task_may_start_from_weights() -> None:
    hook = ClassCountHook()
    load(hook, ('dog', 'cat'), resume=False)
    hook.before_train(runner_for(2))
    hook.before_test(runner_for(2))  # of what it has become
