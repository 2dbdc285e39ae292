import random
import zipfile
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import timm
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import checkpoint as upstream
from mmengine.runner.checkpoint import _load_checkpoint
from mmengine.utils import dl_utils
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import save_for_hf

from vqmoe_vision.engine import checkpoint
from vqmoe_vision.engine import model as model_module
from vqmoe_vision.engine.checkpoint import read_content, read_state, start_from
from vqmoe_vision.engine.model import read_normalization, start_model, weights_normalization
from vqmoe_vision.models.compat import STATED
from vqmoe_vision.models.create import create_model
from vqmoe_vision.models.normalization import Normalization
from vqmoe_vision.models.weights import network_of

from .. import cases, refused
from ..damaged import Call
from ..models.test_origin import left_by_timm

SIZES: Any = dict(img_size=32, patch_size=8, embed_dim=12, depth=2, num_heads=3, num_classes=7)


def test_weights_and_log_are_read_as_data(tmp_path):
    hub = {'log': HistoryBuffer([1.0, 3.0], [1, 1]), 'mIoU': np.float32(0.5), 'iter': np.int64(2)}
    torch.save({'state_dict': {'w': torch.ones(2)}, 'message_hub': hub}, tmp_path / 'a.pth')
    for _ in range(2):  # some mmengine takes its own list back after each checkpoint
        _load_checkpoint(str(tmp_path / 'a.pth'), map_location='cpu')
        read = torch.load(tmp_path / 'a.pth', weights_only=True)
        assert read['state_dict']['w'].tolist() == [1, 1]
        assert read['message_hub']['log'].statistics('mean') == 2  # (1 + 3) / 2
        assert read['message_hub']['mIoU'] == hub['mIoU'] and read['message_hub']['iter'] == 2


@pytest.mark.parametrize('variable', ['', 'FORCE_NO_WEIGHTS_ONLY', 'FORCE_WEIGHTS_ONLY', 'both'])
def test_no_loader_of_mmengine_runs_code(variable, tmp_path, monkeypatch):
    for name in ('FORCE_NO_WEIGHTS_ONLY', 'FORCE_WEIGHTS_ONLY'):
        if variable in (name, 'both'):
            monkeypatch.setenv(f'TORCH_{name}_LOAD', '1')
    hub = tmp_path / 'hub'  # where torch.hub keeps downloads, so that nothing is downloaded
    monkeypatch.setenv('TORCH_HOME', str(hub))
    monkeypatch.setenv('MMENGINE_HOME', str(tmp_path))
    (hub / 'hub/checkpoints').mkdir(parents=True)
    (tmp_path / 'open_mmlab.json').write_text('{"theirs": "a.pth"}')
    file, address = str(tmp_path / 'a.pth'), 'https://example.org/a.pth'
    readers = [partial(_load_checkpoint, n) for n in (file, address, 'open-mmlab://theirs')]
    readers += [partial(read_state, file), partial(upstream.load_from_http, address)]
    readers += [partial(module.load_url, address) for module in (upstream, dl_utils)]
    if hasattr(upstream, '_safe_torch_load'):  # of onedl, for every store
        readers.append(partial(upstream._safe_torch_load, file))
    reaches = Call(getattr, Call(getattr, HistoryBuffer, 'mean'), '__globals__')
    for content in (Call(open, str(tmp_path / 'ran'), 'w'), reaches, torch.ones(2)):
        for path in (file, hub / 'hub/checkpoints/a.pth'):
            torch.save({'w': content}, path)
        for read in readers:
            if isinstance(content, torch.Tensor):
                assert torch.equal(read()['w'], content)
            else:
                with pytest.raises(Exception, match=r'holds more|[Ww]eights only'):
                    read()
    assert not (tmp_path / 'ran').exists()


def test_threads_that_read_at_once_do_not_disturb_each_other(tmp_path):
    torch.save({'w': torch.ones(2)}, tmp_path / 'a.pth')
    with ThreadPoolExecutor(4) as pool:
        for read in pool.map(read_state, 200 * [str(tmp_path / 'a.pth')]):
            assert read['w'].tolist() == [1, 1]


def test_a_log_changes_no_other_log(tmp_path):
    hostile = HistoryBuffer([1.0], [1])  # the first of a process fills the table
    methods = dict(HistoryBuffer._statistics_methods)
    theirs = dict.fromkeys(('mean', 'theirs'), HistoryBuffer.max)
    with patch.dict(HistoryBuffer._statistics_methods, theirs):
        torch.save({'log': hostile}, tmp_path / 'a.pth')
    read = _load_checkpoint(str(tmp_path / 'a.pth'))['log']
    assert HistoryBuffer._statistics_methods == methods
    assert type(read) is HistoryBuffer  # as mmengine writes it again
    assert 'statistics_methods' not in read.__dict__
    assert HistoryBuffer([1.0, 3.0], [1, 1]).statistics('mean') == 2  # (1 + 3) / 2


@cases('config', "model = dict(type='A')\n", "__import__('os').system('true')\n", 'a = (\n', 7)
def test_no_text_of_a_config_is_seen(config, tmp_path):
    meta = {'iter': 3, 'cfg': config, 'config': config}
    # mmengine's inferencers prefer the one of the message hub
    hub = {'runtime_info': {'iter': 3, 'cfg': config}}
    torch.save({'meta': meta, 'message_hub': hub, 'state_dict': {}}, tmp_path / 'a.pth')
    read = _load_checkpoint(str(tmp_path / 'a.pth'))
    assert read['meta'] == {'iter': 3} and read['message_hub'] == {'runtime_info': {'iter': 3}}


def test_no_text_of_a_config_hides_in_another_container(tmp_path):
    """In a record of numpy, which has names too, or behind a method that a file brings."""
    names = Call(np.dtype, [('runtime_info', [('cfg', 'U5')]), ('cfg', 'U5')])
    scalar = np.float32(0).__reduce__()[0]
    info = Call(scalar, names, 2 * 'x = 1'.encode('utf-32-le'))
    torch.save({'x': info}, tmp_path / 'a.pth')
    read = _load_checkpoint(str(tmp_path / 'a.pth'))['x']
    assert read['cfg'] == read['runtime_info']['cfg'] == 'x = 1'  # as a dictionary's
    own = OrderedDict(meta={'cfg': 'x = 1', 'config': 'x = 1'}, state_dict={'w': torch.ones(2)})
    own.get = own.pop = set  # type: ignore[method-assign, assignment]
    for content in ({'message_hub': info, 'meta': info}, own):
        torch.save(content, tmp_path / 'a.pth')
        read = _load_checkpoint(str(tmp_path / 'a.pth'))
        assert type(read) is dict and read['meta'] == {}
        assert read.get('message_hub', {}) == {}
    torch.save(info, tmp_path / 'a.pth')
    refused('is a void and no dictionary', _load_checkpoint, str(tmp_path / 'a.pth'))


def test_a_flipped_bit_is_found_or_changes_nothing(tmp_path):
    path, content = tmp_path / 'a.pth', {'state_dict': {'w': torch.arange(500.0)}}
    torch.save(content, path)
    sound, draw, found = path.read_bytes(), random.Random(0), 0
    weights = sound.index(torch.arange(500.0).numpy().tobytes())
    for number in range(200):
        place = draw.randrange(len(sound)) if number % 2 else weights + draw.randrange(2000)
        spoilt = bytearray(sound)
        spoilt[place] ^= 1 << draw.randrange(8)
        path.write_bytes(spoilt)
        try:
            torch.testing.assert_close(_load_checkpoint(str(path)), content, rtol=0, atol=0)
        except ValueError as error:
            assert str(error).startswith(f'checkpoint {str(path)!r} is damaged')
            found += 1
    assert found >= 100


def test_damage_is_found_where_torch_does_not_look(tmp_path):
    path, values = tmp_path / 'a.pth', torch.arange(500.0)
    torch.save({'w': values}, path)
    sound = path.read_bytes()
    # marked as a folder in the central directory: torch leaves the memory of its tensor as it was
    entry = sound.rindex(b'PK\x01\x02', 0, sound.rindex(b'data/0')) + 38
    value = sound.index(values.numpy().tobytes()) + 7
    # torch reads on to the end; zipfile looks less far
    for place, bit, more in ((entry, 0x10, 0), (value, 1, 65_540), (value, 1, 65_550)):
        content = bytearray(sound)
        content[place] ^= bit
        path.write_bytes(content + bytes(more))
        refused('is damaged', read_state, str(path))


@pytest.mark.parametrize('level', [0, 9])
def test_compressed_entries_are_read_as_they_were_written(level, tmp_path):
    content = {'state_dict': {'w': torch.arange(5000.0)}, 'meta': {STATED: {'img_size': [8, 8]}}}
    torch.save(content, tmp_path / 'stored.pth')
    path = tmp_path / 'deflated.pth'
    with (
        zipfile.ZipFile(tmp_path / 'stored.pth') as stored,
        zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED, compresslevel=level) as deflated,
    ):
        for name in stored.namelist():
            deflated.writestr(name, stored.read(name))
    torch.testing.assert_close(read_content(str(path)), content, rtol=0, atol=0)
    network = network_of(str(path))
    assert network is not None and network.img_size == (8, 8)


def tiny(name: str, **kwargs: Any) -> Any:
    return timm.create_model(name, **{**SIZES, **kwargs}).eval()


def built_by(field: str, path: str) -> dict[str, Any]:
    """Arguments by which a model has weights once it is built; none if they come later."""
    if field == 'file':
        return dict(pretrained=True, pretrained_cfg_overlay={'file': path})
    return {field: path} if field in ('upcycle', 'checkpoint_path') else {}


@pytest.mark.parametrize('averages', [None, 'state_dict_ema', 'model_ema'])
@pytest.mark.parametrize('field', ['load_from', 'checkpoint', 'checkpoint_path', 'upcycle', 'file'])
def test_a_checkpoint_of_timms_script_is_read_by_every_way(field, averages, tmp_path):
    source = tiny('vit_tiny_smoe')
    path = left_by_timm(source, tmp_path, 'vit_tiny_smoe', model_kwargs={})
    if averages is not None:  # which count, before the weights of the last step
        content = torch.load(path, weights_only=False)
        last = {name: value + 1 for name, value in content['state_dict'].items()}
        torch.save({**content, averages: content['state_dict'], 'state_dict': last}, path)
    model = tiny('vit_tiny_smoe', **built_by(field, path))
    if field == 'load_from':
        model.load_state_dict(_load_checkpoint(path, map_location='cpu')['state_dict'])
    elif field == 'checkpoint':
        start_from(model, path)
    torch.testing.assert_close(model.state_dict(), source.state_dict(), rtol=0, atol=0)
    arguments = built_by(field, path) or {'checkpoint_path': path}
    assert weights_normalization(model, None, arguments) is None


@pytest.mark.parametrize('field', ['checkpoint', 'checkpoint_path', 'upcycle', 'file'])
def test_layers_begin_a_new_training_and_the_log_says_so(field, tmp_path, monkeypatch):
    lines: list[str] = []
    for module in (checkpoint, model_module):
        monkeypatch.setattr(module, 'print_log', lambda line, logger: lines.append(line))
    finished = tiny('vit_tiny_stablemoe', num_experts=2)
    distilled = finished.blocks[1].mlp.router.distilled
    distilled.freeze(torch.tensor(True))
    with torch.no_grad():
        distilled.project.mul_(-1)  # the parameter behind the frozen copy means nothing
    path = str(tmp_path / 'finished.pth')
    torch.save(finished.state_dict(), path)
    arguments = {**SIZES, 'num_experts': 2, **built_by(field, path)}
    model: Any = create_model('vit_tiny_stablemoe', **arguments).eval()
    loaded = model.blocks[1].mlp.router.distilled
    assert loaded.frozen == (field != 'checkpoint')  # who builds a model to use it gets it as it is
    named = path if field == 'checkpoint' else None
    start_model(model, {'model_name': 'vit_tiny_stablemoe', **arguments}, named, features=None)
    assert not loaded.frozen and loaded.steps == 0
    # what the frozen router had learned is where learning begins
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(model(images), finished(images))
    assert '1 layers that were frozen learn to route again, in a first stage' in lines


SMALL: dict[str, Any] = dict(img_size=8, patch_size=4, embed_dim=12, depth=2, num_heads=3)
DEIT, AUGREG = 'deit_tiny_patch16_224', 'vit_tiny_patch16_224'
IMAGENET = Normalization(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
GREY = Normalization((0.5,) * 3, (0.5,) * 3)


def run_file(folder: Path, **state: torch.Tensor) -> str:
    config = 'model = dict(data_preprocessor=dict(mean=[127.5] * 3, std=[127.5] * 3))'
    torch.save({'state_dict': state, 'meta': {'cfg': config}}, folder / 'run.pth')
    return str(folder / 'run.pth')


@cases(
    'name, arguments, expected',
    ('vit_tiny_smoe', {}, None),
    (AUGREG, {}, None),  # its configuration is there, weights are not
    ('vit_tiny_smoe', {'upcycle': 'local-dir:{}/hub'}, IMAGENET),
    ('vit_tiny_smoe', {'upcycle': '{}/bare.pth'}, None),
    ('vit_tiny_smoe', {'pretrained': True, 'file': '{}/hub/model.safetensors'}, IMAGENET),
    (AUGREG, {'checkpoint_path': '{}/hub/model.safetensors'}, IMAGENET),
    ('vit_tiny_smoe', {'pretrained': True, 'file': '{}/bare.pth', **vars(GREY)}, GREY),
    (DEIT, {'pretrained': True, 'file': '{}/bare.pth'}, IMAGENET),
    (AUGREG, {'pretrained': True, 'cfg': '{}/bare.pth', **vars(GREY)}, GREY),
    ('vit_tiny_smoe', {'pretrained': True, 'cfg': '{}/hub/model.safetensors'}, IMAGENET),
)
def test_weights_that_timm_loads(name, arguments, expected, tmp_path):
    model = timm.create_model(DEIT, **SMALL)
    torch.save(model.state_dict(), tmp_path / 'bare.pth')
    save_for_hf(model, tmp_path / 'hub', safe_serialization=True)
    placed = {k: v.format(tmp_path) if isinstance(v, str) else v for k, v in arguments.items()}
    said = {k: placed.pop(k) for k in ('file', 'cfg', 'mean', 'std') if k in placed}
    if 'cfg' in said:
        placed['pretrained_cfg'] = {'file': said.pop('cfg'), **said}
    elif said:
        placed['pretrained_cfg_overlay'] = said
    model = create_model(name, **{**SMALL, 'num_classes': 1000}, **placed)
    assert weights_normalization(model, None, placed) == expected


@cases('way, stated', ('upcycle', {}), ('file', {}), ('file', vars(GREY)))
def test_timm_loads_a_checkpoint_of_a_run(way, stated, tmp_path):
    state = timm.create_model(AUGREG, **SMALL).state_dict()
    kept = {f'model.{name}': value for name, value in state.items()}
    path = run_file(tmp_path, normalization=IMAGENET.values(), **kept)
    arguments = built_by(way, path)
    arguments.get('pretrained_cfg_overlay', {}).update(stated)
    model = create_model('vit_tiny_smoe', **SMALL, **arguments)
    found = weights_normalization(model, None, arguments)
    assert found is not None
    assert not found.differing(GREY if stated else IMAGENET)


def test_it_is_what_the_model_kept(tmp_path):
    assert read_normalization(run_file(tmp_path, normalization=GREY.values())) == GREY
    # of a model that was saved before a training, and of a run of mmseg
    assert read_normalization(run_file(tmp_path, normalization=torch.zeros(2, 3))) is None
    assert read_normalization(run_file(tmp_path)) is None
