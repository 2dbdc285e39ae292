import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.model import ExponentialMovingAverage as theirs
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS
from mmengine.runner import Runner
from timm.optim import Lamb
from torch import nn
from torch.utils.data import ConcatDataset

from vqmoe_vision.classification.datasets import ImageClassification, class_folder
from vqmoe_vision.engine import NonFiniteError, hooks, step_values
from vqmoe_vision.engine.checkpoint import read_content
from vqmoe_vision.engine.config import take_ours
from vqmoe_vision.engine.hooks import ClassCountHook, MoeStateHook
from vqmoe_vision.engine.model import RoutingStatistics
from vqmoe_vision.engine.step_values import check_losses
from vqmoe_vision.models.compat import STATED
from vqmoe_vision.moe.optimizer import check_optimizer

from .. import cases, refused
from ..runs import messages
from ..soak.kinds import same
from .tiny import NO_VALIDATION, TRANSFORM, config_of, resumed, trained, write_image

SIZES: Any = dict(img_size=16, patch_size=8, embed_dim=12, depth=2, num_heads=3, num_experts=2)


def test_optimizers_are_taught_the_experts_once_before_their_state_is_loaded():
    model = timm.create_model('vit_tiny_smoe', **SIZES)
    optimizer = Lamb(model.parameters())
    wrapper = OptimWrapper(optimizer)
    refused('Lamb', check_optimizer, optimizer, model)
    for _ in range(2):  # a test after the training runs too
        MoeStateHook().before_run(SimpleNamespace(model=model, optim_wrapper=wrapper))
    check_optimizer(optimizer, model)
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    MoeStateHook().before_run(SimpleNamespace(model=model, optim_wrapper=None))  # of a test alone


@cases('kind, name', ('parameter', 'weight'), ('buffer', 'running_mean'))
def test_guard_passes_over_buffers_that_are_built_infinite_alone(kind, name):
    model = nn.BatchNorm1d(2)
    model.register_buffer('mask', torch.tensor([0.0, -torch.inf]))
    runner: Any = SimpleNamespace(model=model, iter=4)
    guard = hooks.NonFiniteGuardHook()
    guard.before_run(runner)
    content = {'state_dict': model.state_dict(), 'meta': {'iter': 4}}
    guard.before_save_checkpoint(runner, content)
    getattr(model, name).data.fill_(torch.inf)  # by a checkpoint, for example
    with pytest.raises(NonFiniteError, match=rf'^{kind} {name} became'):
        guard.before_save_checkpoint(runner, content)


def test_state_moves_once_per_step_of_the_optimizer(monkeypatch):
    model = nn.Linear(1, 1)
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1), accumulative_counts=2)
    wrapper.initialize_count_status(model, 0, 5)
    of_run = dict(max_iters=5, cfg={}, optim_wrapper=wrapper, hooks=[hooks.CheckpointFitHook()])
    runner: Any = SimpleNamespace(model=SimpleNamespace(routed_model=model), **of_run)
    announced, moved, hook = [], [], MoeStateHook()
    monkeypatch.setattr(hooks, 'start_training', lambda _, updates: announced.append(updates))
    hook.before_train(runner)
    for iteration in range(1, 6):
        monkeypatch.setattr(hooks, 'update_state', lambda _, at=iteration: moved.append(at))
        wrapper.update_params(model(torch.ones(1, 1)).sum())
        hook.after_train_iter(runner, iteration - 1)
    assert moved == [2, 4, 5]  # every second batch, and the one that is left over
    assert announced == [3]


ONCE = {**NO_VALIDATION, 'train_cfg.max_epochs': 1}


@cases('option', {'moe.preset': 'ema'}, {'model_name': 'vit_tiny_smoe'}, {}, ids=str)
def test_a_runner_without_the_hook_says_that_state_stands_still(option, tmp_path):
    more = {f'model.{name}': value for name, value in option.items()}
    config = config_of(tmp_path / 'run', **ONCE, **more)
    config.custom_hooks = []
    trained(config)
    told = sum('has no MoeStateHook' in line for line in messages(tmp_path / 'run'))
    assert told == ('moe.preset' in option)  # the other two have no state that moves


@pytest.mark.parametrize('priority', ['VERY_HIGH', 'LOWEST', 'NORMAL'])
def test_averages_are_taken_between_the_codebooks_and_the_save(priority, tmp_path):
    ema = {'default_hooks.ema.type': 'EMAHook', 'default_hooks.ema.priority': priority}
    runner = Runner.from_cfg(config_of(tmp_path / 'run', **ONCE, **ema))
    if priority == 'NORMAL':
        hooks.check_hooks(runner)
        return
    said = rf"^EMAHook\.priority='{priority}' is not possible: after MoeStateHook "
    refused(said, hooks.check_hooks, runner)


@cases('before, now', (None, True), (True, None))
def test_a_run_goes_on_with_the_kernels_of_its_config(before, now, tmp_path):
    # a file's own would stay otherwise, and a loss scale stop at those that are not fused
    trained(config_of(tmp_path / 'run', **ONCE, **{'optim_wrapper.optimizer.fused': before}))
    config = resumed(tmp_path / 'run', **ONCE, **{'optim_wrapper.optimizer.fused': now})
    config.train_cfg.max_epochs += 1
    groups = trained(config).optim_wrapper.optimizer.param_groups
    assert [group['fused'] for group in groups] == [now] * len(groups)


def test_averages_in_one_operator_are_mmengines_to_the_bit(tmp_path):
    config = config_of(tmp_path / 'run', **{'default_hooks.ema.type': 'EMAHook'})
    assert take_ours(config) == ''  # our configs name our types, and a file is the same by both
    kind = MODELS.get(config.default_hooks.ema.ema_type)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2).half())
    options: Any = {'momentum': 0.3, 'interval': 2, 'update_buffers': True}
    pairs = [[each(model, **kw) for each in (kind, theirs)] for kw in ({}, options)]
    assert isinstance(pairs[0][0], theirs) and type(pairs[0][0]) is not theirs
    for _ in range(5):
        for value in filter(torch.is_floating_point, model.state_dict().values()):
            value.copy_(torch.randn_like(value))
        for pair in pairs:
            for each in pair:
                each.update_parameters(model)
            own, expected = (each.state_dict() for each in pair)
            assert [*own] == [*expected] and same(own, expected)


def classes(root: Path, part: str, dev_size: int) -> ImageClassification:
    for name in ('cat', 'dog'):
        for number in range(10):
            write_image(root / 'train' / name / f'{number}.png')
    return class_folder(str(root), part, TRANSFORM, dev_size=dev_size)


def test_validation_sees_no_image_of_training(tmp_path):
    dev, other = classes(tmp_path, 'dev', 8), classes(tmp_path / 'other', 'train', 3)
    seen = classes(tmp_path / '..' / tmp_path.name, 'train', 3)
    for one in (seen, ConcatDataset([other, seen])):
        refused(r'^val_dataloader\.dataset\.dev_size=8 ', hooks.check_held_out, one, dev)
    for one in (other, classes(tmp_path, 'train', 8), classes(tmp_path, 'trainval', 3)):
        hooks.check_held_out(one, dev)


def runner_for(num_classes: int = 2, **of_loaders: Any) -> Any:
    loaders = {
        f'{split}_dataloader': SimpleNamespace(dataset=SimpleNamespace(metainfo={'classes': names}))
        for split, names in {**dict.fromkeys(('train', 'val', 'test'), 'ab'), **of_loaders}.items()
    }
    model = SimpleNamespace(num_classes=num_classes)
    return SimpleNamespace(model=model, val_loop='a loop', cfg={}, **loaders)


@cases(
    'runner, message',
    (runner_for(3), 'num_classes=3 is not possible: 2, the number of classes'),
    (runner_for(train=()), r'train_dataloader\.dataset\.classes='),
    (runner_for(val='ac'), r"val_dataloader\.dataset\.classes=\['b', 'c'\]"),
    (runner_for(val='ba'), r"val_dataloader\.dataset\.classes='another order'"),
)
def test_classes_that_differ(runner, message):
    ClassCountHook().before_train(runner_for(val=['a', 'b']))  # a file of names is read as a list
    refused(message, ClassCountHook().before_train, runner)


@pytest.mark.parametrize('stage', ['before_test', 'before_train'])
@pytest.mark.parametrize('trained', ['ba', 'ac'])
def test_classes_are_those_of_the_training(stage, trained):
    hook, meta = ClassCountHook(), {STATED: {'classes': list(trained)}}
    hook.after_load_checkpoint(SimpleNamespace(_resume=stage == 'before_train'), {'meta': meta})
    refused(r"its class \d is '\w', that of \w+_dataloader", getattr(hook, stage), runner_for())
    hook.after_load_checkpoint(SimpleNamespace(_resume=False), {'meta': meta})
    hook.before_train(runner_for())  # another task may start from weights


def test_routing_of_an_epoch_survives_a_stop_in_its_middle():
    loads = [torch.tensor([share, 1 - share]) for share in (1.0, 0.75, 0.5)]
    models: list[Any] = [nn.Linear(1, 1) for _ in range(3)]
    whole, stopped, resumed = models
    for model, part in ((whole, loads), (stopped, loads[:2]), (resumed, [])):
        model.routing_statistics = RoutingStatistics()
        for load in part:
            model.routing_statistics.add({'layer/load': load})
    checkpoint: dict[str, Any] = {}
    MoeStateHook().before_save_checkpoint(SimpleNamespace(model=stopped), checkpoint)
    MoeStateHook().after_load_checkpoint(SimpleNamespace(model=resumed, _resume=True), checkpoint)
    resumed.routing_statistics.add({'layer/load': loads[2]})
    found, expected = (model.routing_statistics.means() for model in (resumed, whole))
    assert found.keys() == {'layer/load'} and same(found, expected)
    checkpoint = {}  # of a validation that is cut off, which begins anew
    MoeStateHook().before_save_checkpoint(SimpleNamespace(model=stopped.eval()), checkpoint)
    assert checkpoint == {}


def smoe_runner(folder: Path, **options: Any) -> Runner:
    smoe = {'model.model_name': 'vit_tiny_smoe', 'train_cfg.max_epochs': 1}
    return Runner.from_cfg(config_of(folder, **smoe, **NO_VALIDATION, **options))


def lines(folder: Path) -> list[list[tuple[str, Any]]]:
    text = next(folder.glob('*/vis_data/scalars.json')).read_text()
    read = [json.loads(line).items() for line in text.splitlines()]
    return [[(k, v) for k, v in line if 'time' not in k] for line in read]


def scalars(file: Path) -> dict[str, list]:
    buffers = read_content(str(file))['message_hub']['log_scalars']
    assert {type(buffer) for buffer in buffers.values()} == {HistoryBuffer}
    arrays = {name: buffer.data for name, buffer in buffers.items() if 'time' not in name}
    return {n: [(a.dtype, a.tolist()) for a in both] for n, both in arrays.items()}


@pytest.mark.filterwarnings('ignore:Detected call of `scheduler.step')  # the first batch waits
def test_logs_and_checkpoints_are_those_of_mmengines_hook(tmp_path, monkeypatch):
    monkeypatch.setattr(step_values, 'READ_AT_ONCE', set())  # as on a device
    options = {'default_hooks.logger.interval': 4, 'default_hooks.record.type': 'RunRecordHook'}
    options['optim_wrapper.accumulative_counts'] = 2  # a norm at every second iteration
    theirs = {'default_hooks.runtime_info.type': 'RuntimeInfoHook'}
    for name, hook in (('ours', {}), ('theirs', theirs)):
        smoe_runner(tmp_path / name, **options, **hook).train()
    logged = lines(tmp_path / 'ours')
    assert logged == lines(tmp_path / 'theirs')
    assert {'grad_norm', 'blocks.1.mlp/importance_loss'} <= dict(logged[0]).keys()
    ours, theirs = (scalars(tmp_path / name / 'epoch_1.pth') for name in ('ours', 'theirs'))
    assert ours == theirs and len(ours['train/loss'][0][1]) == 10
    records = [json.loads((tmp_path / n / 'run.json').read_text()) for n in ('ours', 'theirs')]
    assert records[0]['first_losses'] == records[1]['first_losses']


class Spoil(Hook):
    """Makes a weight nan before an iteration, or what its gradient will be."""

    priority = 'LOW'

    def __init__(self, iteration: int, gradient: bool) -> None:
        self.iteration, self.gradient, self.begun = iteration, gradient, 0

    def before_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        self.begun = runner.iter + 1
        weight = runner.model.model.head.weight
        if self.begun == self.iteration and self.gradient:
            weight.register_hook(lambda gradient: gradient * torch.nan)
        elif self.begun == self.iteration:
            weight.data.fill_(torch.nan)


EACH_3 = {'default_hooks.checkpoint.by_epoch': False, 'default_hooks.checkpoint.interval': 3}
LOSS, WEIGHT = r'cross_entropy became nan', r'parameter \S+ became nan or infinite'


@cases(
    'options, gradient, message, noticed',
    ({'default_hooks.logger.interval': 6}, False, LOSS, 6),
    ({'default_hooks.logger.interval': 50, **EACH_3}, False, LOSS, 6),
    ({'default_hooks.logger.interval': 50}, False, LOSS, 8),  # LONGEST
    ({'default_hooks.logger.interval': 6}, True, WEIGHT, 6),
    ids=['line', 'checkpoint', 'longest', 'gradient'],
)
def test_a_later_look_names_the_iteration_and_saves_nothing(
    tmp_path, monkeypatch, options, gradient, message, noticed
):
    monkeypatch.setattr(step_values, 'READ_AT_ONCE', set())
    monkeypatch.setattr(step_values, 'LONGEST', 8)
    runner = smoe_runner(tmp_path / 'run', **options)
    runner.register_hook(spoil := Spoil(4, gradient))
    with pytest.raises(NonFiniteError, match=rf'^{message} at iteration 4[; ]'):
        runner.train()
    assert spoil.begun == noticed
    kept = ['iter_3.pth'] if options.keys() >= EACH_3.keys() else []
    assert [path.name for path in (tmp_path / 'run').glob('*.pth')] == kept
    for path in tmp_path.glob('run/*/vis_data/scalars.json'):
        assert 'NaN' not in path.read_text()


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_loss_that_is_not_finite_names_layer_component_and_iteration(value):
    losses = {'loss': value, 'a/vq_loss': 0.1, 'b/balance_loss': value, 'cross_entropy_loss': value}
    with pytest.raises(NonFiniteError, match=r'^b/balance became \w+ at iteration 120;'):
        check_losses(losses, 120)


@pytest.mark.parametrize('split', ['train', 'val', 'test'])
def test_data_sets_of_one_kind_count_classes_from_one_label_on(split):
    def run(trained: bool | None, now: bool | None, **other_data: str) -> None:
        hook, runner = ClassCountHook(), runner_for()
        seen, other = ({'classes': 'ab', 'reduce_zero_label': value} for value in (trained, now))
        runner.train_dataloader.dataset.metainfo = seen
        getattr(runner, f'{split}_dataloader').dataset.metainfo = other
        scenes = dict(type='Scenes', data_root='data/scenes')
        loaders = {'train': dict(type='RepeatDataset', dataset=scenes), split: scenes | other_data}
        runner.cfg = Config({f'{n}_dataloader': dict(dataset=d) for n, d in loaders.items()})
        meta = {'meta': {'dataset_meta': seen}}
        hook.after_load_checkpoint(SimpleNamespace(_resume=split == 'train'), meta)
        hook.before_test(runner) if split == 'test' else hook.before_train(runner)

    for value in (True, False):
        refused(rf'^{split}_dataloader\.dataset\.reduce_zero_label=', run, value, not value)
        run(value, value)
        run(None, value)  # of others, or of classification
        if split != 'train':
            run(value, not value, type='CamVid')  # whose files may be written otherwise
