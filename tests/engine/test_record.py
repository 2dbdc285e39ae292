"""What a run says of itself covers the whole run, however often it was resumed."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.runner import Runner
from timm.models import create_model, save_for_hf
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vqmoe_vision.classification.datasets import class_folder
from vqmoe_vision.engine import RoutingStatistics
from vqmoe_vision.engine.hooks import lines_of
from vqmoe_vision.engine.record import described, read_history, starting_weights
from vqmoe_vision.models.moe_vit import complexity
from vqmoe_vision.moe import METHODS

from .. import mostly_long
from ..soak.kinds import same
from .tiny import TRANSFORM, config_of, resumed, trained, write_image

RECORD = {'default_hooks.record.type': 'RunRecordHook'}
ONCE = {**RECORD, 'train_cfg.max_epochs': 1}
ONLY_FIRST = {'default_hooks.record.only_first': True}


def record(folder: str | Path) -> dict[str, Any]:
    return json.loads((Path(folder) / 'run.json').read_text())


@pytest.fixture(scope='module')
def whole(tmp_path_factory) -> Runner:
    return trained(config_of(tmp_path_factory.mktemp('record') / 'whole', **RECORD))


def test_a_resumed_run_has_the_record_of_one_that_was_not_interrupted(whole, tmp_path):
    trained(config_of(tmp_path / 'parts', **ONCE))
    before = record(tmp_path / 'parts')
    assert len(before['first_losses']) == 10
    # its experts were made once, by what was the default then
    then = {**before['moe_options'], 'upcycling': {'drop': 0.5}}
    path = tmp_path / 'parts/epoch_1.pth'
    content = torch.load(path, weights_only=False)
    content['run_record']['begun']['moe_options'] = then
    torch.save(content, path)
    trained(resumed(tmp_path / 'parts', **RECORD))
    one, other = record(whole.work_dir), record(tmp_path / 'parts')
    for field in ('first_losses', 'held_out', 'training_loss', 'params', 'macs', 'commit'):
        assert one[field] == other[field], field
    assert len(one['first_losses']) == 20 and len(one['held_out']) == 2
    assert one['starting_weights'] == {}
    assert other['moe_options'] == then
    assert other['minutes'] > before['minutes'] and other['cpu_minutes'] > before['cpu_minutes']
    assert one['macs'] == complexity(whole.model.routed_model).macs
    assert (Path(whole.work_dir) / 'progress').read_text() == '20 20\n'


def test_the_first_losses_can_be_had_alone(whole, tmp_path):
    with pytest.raises(SystemExit) as end:
        trained(config_of(tmp_path / 'first', **RECORD, **ONLY_FIRST))
    assert end.value.code == 0
    found = record(tmp_path / 'first')
    assert len(found['training_loss']) == 20
    assert found['first_losses'] == record(whole.work_dir)['first_losses']


def test_a_run_is_not_resumed_with_other_defaults_or_data(tmp_path, monkeypatch):
    trained(config_of(tmp_path / 'parts', **ONCE))
    with pytest.raises(ValueError, match=r'data.val=.* is not possible: .* as when the run'):
        trained(resumed(tmp_path / 'parts', **RECORD, **{'val_dataloader.dataset.split': 'test'}))
    monkeypatch.setitem(METHODS['vqmoe'].config.__init__.__kwdefaults__, 'balance_weight', 0.3)
    with pytest.raises(ValueError, match=r'moe.balance_weight=0.3 is not possible: 0.01, as when'):
        trained(resumed(tmp_path / 'parts', **RECORD))


def folder(root: Path, names: list[str]) -> dict[str, Any]:
    for name in names:
        write_image(root / 'train' / name)
    return described(class_folder(str(root), 'train', TRANSFORM))


def test_folders_of_classes(tmp_path):
    names = ['cat/1.png', 'cat/2.png', 'dog/3.png']
    one = folder(tmp_path / 'one', names)
    assert one['samples'] == 3
    assert folder(tmp_path / 'elsewhere', names[::-1]) == one
    in_memory = class_folder(str(tmp_path / 'one'), 'train', TRANSFORM, in_memory=True)
    assert described(in_memory) == one
    others = names[:2], ['cat/1.png', 'dog/2.png', 'dog/3.png'], ['cat/1.png', 'cat/4.png']
    digests = {folder(tmp_path / str(n), other)['digest'] for n, other in enumerate(others)}
    assert len(digests | {one['digest']}) == 4


def written(path: Path, state: dict[str, Any], **more: Any) -> Path:
    torch.save({'state_dict': state, **more}, path)
    return path


def digest(path: Path) -> str:
    found = starting_weights(ConfigDict(type='Model', backbone={'checkpoint': str(path)}))
    assert list(found) == ['model.backbone.checkpoint']
    return found['model.backbone.checkpoint']


STATE = {'a': torch.arange(4.0), 'b': torch.tensor(3), 'c': torch.ones(2, dtype=torch.bfloat16)}


def test_the_digest_is_of_names_and_values(tmp_path):
    expected = digest(written(tmp_path / 'first.pth', STATE, meta={'time': 'Monday'}))
    turned = dict(reversed(STATE.items()))
    assert digest(written(tmp_path / 'later.pth', turned, meta={'time': 'Tuesday'})) == expected
    others = [{**STATE, name: value + 1} for name, value in STATE.items()]
    others.append({f'{name}s': value for name, value in STATE.items()})
    for a in (STATE['a'].view(torch.int32), STATE['a'].reshape(2, 2)):  # the same bytes
        others.append({**STATE, 'a': a})
    assert expected not in [digest(written(tmp_path / 'other.pth', other)) for other in others]


def test_weights_count_however_they_are_named(tmp_path):
    model = create_model('vit_tiny_patch16_224', depth=1, img_size=16)
    save_for_hf(model, str(tmp_path / 'timm'), safe_serialization=True)
    weights, bare = str(tmp_path / 'timm/model.safetensors'), tmp_path / 'bare'
    copy = str(written(tmp_path / 'weights.ckpt', model.state_dict()))
    bare.mkdir()
    torch.save(model.state_dict(), bare / 'pytorch_model.bin')
    places = dict(upcycle=f'local-dir:{tmp_path}/timm', checkpoint=copy, other=weights)
    places |= dict(teachers=(str(tmp_path / 'timm'), str(bare)), features='gone.pth')
    backbone = {'pretrained_cfg_overlay': {'file': copy}}
    config = ConfigDict(**places, backbone=backbone, text='x' * 5_000)
    found = starting_weights(config, copy)
    names = 'upcycle checkpoint backbone.pretrained_cfg_overlay.file teachers.0 teachers.1 other'
    assert found.keys() == {*(f'model.{name}' for name in names.split()), 'load_from'}
    assert len(set(found.values())) == 1  # the same values


def test_a_run_says_what_it_started_from_and_not_what_is_there_now(whole, tmp_path):
    source, folder = tmp_path / 'source.pth', tmp_path / 'run'
    shutil.copy(Path(whole.work_dir) / 'epoch_2.pth', source)
    expected, start = {'model.checkpoint': digest(source)}, {'model.checkpoint': str(source)}
    trained(resumed(folder, **ONCE, **start))  # of one that was killed before its first checkpoint
    assert record(folder)['starting_weights'] == expected
    assert record(folder)['moe_options']['num_experts'] > 0
    content = torch.load(source, weights_only=False)
    content['state_dict'] = {name: value + 1 for name, value in content['state_dict'].items()}
    torch.save(content, source)
    trained(resumed(folder, **RECORD, **start))
    assert record(folder)['starting_weights'] == expected != {'model.checkpoint': digest(source)}


def test_an_expert_that_one_batch_does_not_use_is_not_unused():
    statistics = RoutingStatistics()
    for load in ([1.0, 0.0, 0.0], [0.5, 0.5, 0.0]):
        statistics.add({'a/load': torch.tensor(load)})
    # means 0.75, 0.25, 0; entropy 0.75 ln(4 / 3) + 0.25 ln 4 = 0.5623, e^0.5623 = 1.7548
    assert statistics.summary() == {
        'a/load_min': 0.0,
        'a/load_max': 0.75,
        'a/load_unused': 1,
        'a/load_perplexity': pytest.approx(1.7548, abs=1e-4),
    }


def test_every_statistic_of_a_layer_is_averaged_and_reported():
    statistics = RoutingStatistics()
    share = torch.tensor([0.25, 0.75])
    statistics.add({'a/load': share, 'a/new': torch.tensor(0.5), 'a/none': torch.tensor(0.0)})
    statistics.add({'a/load': share, 'a/new': torch.tensor(1.0), 'b/load': share})
    assert statistics.summary()['a/new'] == 0.75
    assert statistics.summary()['b/load_max'] == 0.75
    perplexity = math.exp(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))
    load = f'load 0.250..0.750 perplexity {perplexity:.2f} unused 0/2'
    assert lines_of(statistics.means()) == [f'a  {load}  new 0.75', f'b  {load}']


def test_values_that_are_not_finite_are_left_out():
    statistics = RoutingStatistics()
    for error in (0.5, torch.inf, 1.0):
        statistics.add({'a/error': torch.tensor(error), 'a/bad': torch.tensor(torch.nan)})
    assert statistics.summary() == {'a/error': 0.75, 'a/bad': 0.0}


class NoDoubles(TorchDispatchMode):
    """Apple's MPS, of which nothing is computed here."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves(answer := func(*args, **(kwargs or {}))):
            doubles = isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64
            assert not (doubles and leaf.device.type == 'mps'), func
        return answer


def test_statistics_are_added_up_where_there_are_no_doubles():
    mode, device = FakeTensorMode(), torch.device('mps')
    load = FakeTensor(mode, torch.empty(3, device='meta'), device)
    statistics = RoutingStatistics()
    with mode, NoDoubles():
        for _ in range(2):
            statistics.add({'a/load': load})
        assert statistics.state_dict()['sums']['a/load'].shape == (3,)


# of 20 iterations a line after every third, so that a checkpoint after ten lies between two
HISTORY = {
    'default_hooks.routing_history.type': 'RoutingHistoryHook',
    'default_hooks.routing_history.records': 6,
}


def history(folder: str | Path) -> list[dict[str, Any]]:
    return read_history(Path(folder) / 'routing.jsonl')


@pytest.fixture(scope='module')
def kept_whole(tmp_path_factory) -> Runner:
    return trained(config_of(tmp_path_factory.mktemp('history') / 'whole', **HISTORY))


def test_a_line_holds_shares_and_changes(kept_whole):
    lines = history(kept_whole.work_dir)
    assert [line['iteration'] for line in lines] == [3, 6, 9, 12, 15, 18]
    for line in lines:
        (layer,) = line['layers'].values()
        assert sum(layer['load']) == pytest.approx(1, abs=1e-4)
        assert sum(layer['code_usage']) == pytest.approx(1, abs=1e-4)
        assert layer['change'].keys() == {'router', 'experts', 'gate', 'codebook'}
        assert all(change > 0 for change in layer['change'].values())
    (first,) = lines[0]['layers'].values()
    assert first['change']['gate'] == 1  # |w - 0| / |w|: it starts at zero


def test_a_resumed_run_has_the_history_of_one_that_was_not_interrupted(kept_whole, tmp_path):
    folder = tmp_path / 'parts'
    half = {**HISTORY, 'default_hooks.routing_history.records': 3, 'train_cfg.max_epochs': 1}
    trained(config_of(folder, **half))
    assert [line['iteration'] for line in history(folder)] == [3, 6, 9]
    with (folder / 'routing.jsonl').open('a') as file:  # work that a kill has lost, and half a line
        file.write('{"iteration": 11, "layers": {}}\n{"iterat')
    trained(resumed(folder, **HISTORY))
    assert history(folder) == history(kept_whole.work_dir)


# one that decides by features has to have them first
ALONE = [name for name, method in METHODS.items() if not method.needs_features]


@pytest.mark.parametrize('method', mostly_long(ALONE, 'vqmoe', 'smoe'))
def test_losses_and_weights_are_those_of_a_run_without(method, tmp_path):
    short = {'model.model_name': f'vit_tiny_{method}', 'train_dataloader.batch_size': 60}
    short |= {'train_cfg.max_epochs': 1, 'train_cfg.val_interval': 2}
    short |= {'model.moe.router_noise': 0.5} if method == 'smoe' else {}
    plain = trained(config_of(tmp_path / 'plain', **short))
    recorded = trained(config_of(tmp_path / 'recorded', **short, **HISTORY))
    assert not (tmp_path / 'plain' / 'routing.jsonl').exists()
    losses = (r.message_hub.get_scalar('train/loss').data[0] for r in (plain, recorded))
    one, other = (values.tolist() for values in losses)
    assert len(history(tmp_path / 'recorded')) == len(one) == 5 and one == other
    assert same(recorded.model.state_dict(), plain.model.state_dict())
    mlp = recorded.model.routed_model.blocks[1].mlp
    (layer,) = history(tmp_path / 'recorded')[0]['layers'].values()
    names = (name.removeprefix('quantizer.') for name, _ in mlp.named_parameters())
    trained_parts = {name.partition('.')[0] for name in names}
    assert trained_parts <= layer['change'].keys()
