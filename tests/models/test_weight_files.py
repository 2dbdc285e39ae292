"""Files that are damaged or of another kind are one line; what is beside others is followed."""

import json
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import timm
import torch
from mmengine.logging import HistoryBuffer
from safetensors.torch import save_file
from timm.data import IMAGENET_DEFAULT_MEAN
from timm.models import save_for_hf

from vqmoe_vision.engine.checkpoint import load_from_local, start_from
from vqmoe_vision.models.compat import refuse_values
from vqmoe_vision.models.create import create_model, create_saved
from vqmoe_vision.models.weights import network_of

from .. import cases, refused
from ..damaged import Call, flip
from .conftest import DENSE, TINY, dense, folder_of, make

OF_VIT = '{"architecture": "vit_tiny_patch16_224", '


def test_a_flipped_bit_is_found(tmp_path):
    model: Any = make('smoe')
    file = folder_of(tmp_path, model, safe=False) / 'pytorch_model.bin'
    values = model.state_dict()['blocks.0.mlp.fc1.weight'].numpy().tobytes()
    flip(file, file.read_bytes().index(values))
    named = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))
    for build in (
        lambda: timm.create_model(f'local-dir:{file.parent}', pretrained=True),
        lambda: make('smoe', **named),
        lambda: make('smoe', upcycle=f'local-dir:{file.parent}'),
        lambda: create_model('vit_tiny_smoe', checkpoint_path=str(file), **TINY),
    ):
        refused(r"pytorch_model\.bin' is damaged: .* does not match its checksum", build)


@cases(
    'content, message',
    ('{"architecture": "vit', r"config\.json' cannot be read"),
    ('{}', r'a folder with the config\.json of timm'),
    (OF_VIT + '"pretrained_cfg": {}, "model_args": {"depht": 3}}', "{'depht': 3}"),
)
def test_a_folder_whose_configuration_is_none(content, message, tmp_path):
    folder = folder_of(tmp_path, dense())
    (folder / 'config.json').write_text(content)
    refused(message, make, 'smoe', upcycle=f'local-dir:{folder}')


def test_a_hub_that_does_not_answer_is_not_asked_again(monkeypatch, tmp_path):
    monkeypatch.setattr('huggingface_hub.constants.ENDPOINT', 'http://127.0.0.1:9')
    named = 'vit_tiny_patch16_224.augreg_in21k_ft_in1k'
    for build in (
        lambda: make('smoe', upcycle=named, cache_dir=str(tmp_path)),
        lambda: create_model(named, {'method': 'smoe'}, pretrained=True, cache_dir=str(tmp_path)),
        lambda: create_saved('hf-hub:timm/nothing', cache_dir=str(tmp_path)),
    ):
        refused(r'http://127\.0\.0\.1:9 does not answer.* needs no network', build)


def test_parts_of_weights_are_refused(tmp_path):
    folder = folder_of(tmp_path, source := dense())
    state = source.state_dict()
    (folder / 'model.safetensors').unlink()
    # the head alone in the second, without which the rest would be taken for weights of features
    head = {name for name in state if name.startswith('head.')}
    for i, names in enumerate((state.keys() - head, head), 1):
        part = {name: state[name] for name in names}
        save_file(part, str(folder / f'model-0000{i}-of-00002.safetensors'))
    for build in (
        lambda: make('smoe', upcycle=f'local-dir:{folder}'),
        lambda: create_model(DENSE, **TINY, checkpoint_path=str(folder)),
        lambda: make('smoe', upcycle=str(folder / 'model-00001-of-00002.safetensors')),
        lambda: start_from(make('smoe'), str(folder)),
    ):
        refused(r"model-00001-of-00002\.safetensors'", build)


def test_of_several_files_none_is_chosen(tmp_path):
    folder = folder_of(tmp_path, dense())
    other = folder / 'a.safetensors'
    other.write_bytes((folder / 'model.safetensors').read_bytes())
    make('smoe', upcycle=f'local-dir:{folder}')
    (folder / 'model.safetensors').rename(folder / 'b.safetensors')
    build = lambda: make('smoe', upcycle=f'local-dir:{folder}')  # noqa: E731
    refused(r"weights in .*\['a\.safetensors', 'b\.safetensors'\] is not possible: one", build)
    other.unlink()
    build()


def test_a_file_of_numpy_is_read_by_timm_alone(tmp_path):
    path = str(tmp_path / 'a.npz')
    np.savez(path, cls=np.zeros(3))
    for read in ways(path).values():
        refused(r"'.*a\.npz' ", read)


@cases('content', 'no checkpoint', {'state_dict': {}, 'code': Call(print, 'harm')}, [1, 2])
def test_other_files_are_no_weights(content, tmp_path):
    path = tmp_path / 'a.pth'
    path.write_text(content) if isinstance(content, str) else torch.save(content, path)
    refused('is damaged, or holds more than weights', make, 'smoe', upcycle=str(path))


def ways(path: str) -> dict[str, Any]:
    """Of reading weights from a file."""
    return {
        'upcycle': lambda: make('smoe', upcycle=path),
        'checkpoint_path': lambda: create_model(DENSE, checkpoint_path=path, **TINY),
        'start_from': lambda: start_from(make('smoe'), path),
        'load_from': lambda: load_from_local(path, 'cpu'),
    }


@cases(
    'name, change',
    ('head.weight', lambda value: value.to_sparse()),
    ('head.weight', lambda value: value.to('meta')),
    ('norm.bias', lambda value: value * torch.nan),
    ('cls_token', lambda value: value.to(torch.int8)),
    ('blocks.0.mlp.fc2.weight', lambda value: value.to(torch.int8)),
    ('blocks.1.mlp.fc1.weight', lambda v: v.index_fill(0, torch.tensor([3]), torch.inf)),
)
def test_tensors_without_values(name, change, tmp_path):
    path, state = str(tmp_path / 'a.pth'), dense().state_dict()
    torch.save({**state, name: change(state[name])}, path)
    for way, read in ways(path).items():
        if way != 'load_from' or name == 'head.weight':  # mmengine asks for values alone
            refused(rf'^checkpoint .* {re.escape(name)}', read)


def test_a_buffer_may_be_infinite_where_it_is_built_so():
    mask = torch.tensor([0.0, -torch.inf])
    refuse_values({'mask': mask}, {'mask': mask}, 'a.pth')
    for initial, value in ((mask.isinf().float(), mask), (mask, mask * 0), (mask.to('meta'), mask)):
        state = {'mask': value}  # -inf * 0 is nan
        refused(r"'a\.pth' .* mask has", refuse_values, {'mask': initial}, state, 'a.pth')


@pytest.mark.parametrize('stated', [{}, {'mean': 0.1, 'std': 0.4}])
def test_what_is_beside_a_file_belongs_to_its_weights(stated, tmp_path):
    source = dense('deit_tiny_patch16_224')  # of mean 0.485, ours says 0.5
    file = folder_of(tmp_path, source) / 'model.safetensors'
    for place in (
        dict(upcycle=str(file), pretrained_cfg_overlay=stated),
        dict(upcycle=f'local-dir:{file.parent}', pretrained_cfg_overlay=stated),
        dict(pretrained=True, pretrained_cfg_overlay={'file': str(file), **stated}),
    ):
        model: Any = make('smoe', **place)
        expected = (0.1,) * 3 if stated else IMAGENET_DEFAULT_MEAN
        assert tuple(model.pretrained_cfg['mean']) == pytest.approx(expected)
        assert model.pretrained_cfg['architecture'] == 'vit_tiny_smoe'


@pytest.mark.parametrize('name', ['vit_tiny_smoe', 'moe_host', DENSE])
def test_other_weights_are_before_those_of_the_folder_that_builds_the_model(name, tmp_path):
    own = {'host': DENSE, 'method': 'smoe'} if name == 'moe_host' else {}
    model, other, file = timm.create_model(name, **own, **TINY), dense(), str(tmp_path / 'a.pth')
    save_for_hf(model, tmp_path / 'L', model_args={**own, **TINY}, safe_serialization=True)
    torch.save(other.state_dict(), file)
    again: Any = create_saved(f'local-dir:{tmp_path}/L', pretrained_cfg_overlay={'file': file})
    assert torch.equal(again.head.weight, other.head.weight)


def test_positions_of_another_grid_are_reported_as_resized(method, tmp_path):
    before, after = (32, 72), (48, 48)  # 4 x 9 and 6 x 6 patches
    source = dense(img_size=before)
    file = str(folder_of(tmp_path, source, img_size=before) / 'model.safetensors')
    for size in (before, after):
        model: Any = make(method, upcycle=file, img_size=size)
        names = {name for name in model.state_dict() if name.endswith('pos_embed')}
        assert set(model.weights_report.resized) == (names if size == after else set())
        assert torch.equal(model.pos_embed, source.pos_embed) == (size == before)


RUN = """
import sys, timm, torch, vqmoe_vision
from vqmoe_vision.models.create import create_model
sizes = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=10)
file, kept = sys.argv[1], set(torch.serialization.get_safe_globals())
pretrained = dict(pretrained=True, pretrained_cfg_overlay=dict(file=file))
for made in (
    timm.create_model('vit_tiny_smoe', upcycle=file, **sizes),
    timm.create_model('vit_tiny_smoe', **pretrained, **sizes),
    create_model('vit_tiny_patch16_224', **pretrained, **sizes),
):
    print(len(made.weights_report.loaded), made.pretrained_cfg['mean'][0])
assert set(torch.serialization.get_safe_globals()) == kept
print('mmengine' in sys.modules)
try:
    timm.create_model('vit_tiny_smoe', upcycle=sys.argv[2], **sizes)
except ValueError as error:
    print(error)
"""


def test_the_checkpoint_of_a_run_is_read_without_mmengine(tmp_path):
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    history.current()
    state = {f'model.{name}': value for name, value in dense().state_dict().items()}
    state['normalization'] = torch.tensor([[0.25] * 3, [0.5] * 3])
    log = {'log_scalars': {'loss': history}, 'runtime_info': {'top1': np.float32(1)}}
    file, other = (str(tmp_path / f'epoch_{i}.pth') for i in (1, 2))
    torch.save({'state_dict': state, 'message_hub': log, 'optimizer': {}, 'meta': {}}, file)
    harm = {'log': history, 'code': Call(print, 'harm')}
    torch.save({'state_dict': state, 'message_hub': harm}, other)
    command = [sys.executable, '-W', 'ignore', '-c', RUN, file, other]
    *made, known, said = subprocess.check_output(command, text=True).splitlines()
    assert known == 'False' and 'holds more than weights' in said
    number = len(dense().state_dict())
    assert made == [f'{number - 8} 0.25', f'{number - 8} 0.25', f'{number} 0.25']


def test_a_head_in_a_folder_is_that_of_its_classes(tmp_path):
    source = dense()
    folder = folder_of(tmp_path, source)
    config = json.loads((folder / 'config.json').read_text())
    config['pretrained_cfg'].update(label_offset=1, num_classes=10)
    (folder / 'config.json').write_text(json.dumps(config))
    given: dict[str, Any] = {'upcycle': f'local-dir:{folder}'}
    assert torch.equal(make('smoe', **given).head.weight, source.head.weight)
    message = r'pretrained_cfg\.label_offset=1 is not possible: 0, a head is that of its classes'
    refused(message, make, 'smoe', **given, pretrained_cfg_overlay={'label_offset': 1})


@pytest.mark.parametrize('prefix', ['model.', 'backbone.model.', 'module.', ''])
def test_checkpoint_path_takes_the_network_out_of_a_run(prefix, tmp_path):
    source, file = make('smoe'), str(tmp_path / 'epoch_1.pth')
    state = {f'{prefix}{name}': value for name, value in source.state_dict().items()}
    beside = {'normalization': torch.zeros(2, 3)} if 'model.' in prefix else {}
    torch.save({'state_dict': state | beside, 'meta': {}}, file)
    model = create_model('vit_tiny_smoe', checkpoint_path=file, **TINY)
    torch.testing.assert_close(model.state_dict(), source.state_dict(), rtol=0, atol=0)
    refused('of its weights$', create_model, 'vit_tiny_xmoe', checkpoint_path=file, **TINY)


@pytest.fixture
def saved_smoe(tmp_path):
    """A folder of timm, and a function that changes what its config.json says."""
    folder = folder_of(tmp_path, make('smoe'))
    content = json.loads((folder / 'config.json').read_text())

    def change(where: str, **given: Any) -> str:
        changed = content | {where: content[where] | given} if where else content | given
        (folder / 'config.json').write_text(json.dumps(changed))
        return f'local-dir:{folder}'

    return change


BUILDERS = (
    lambda source: timm.create_model(source, pretrained=True),
    create_saved,
    lambda source: make('smoe', upcycle=source),
)


@cases(
    'where, given, named',
    ('model_args', {'depth': 1_000_000}, 'depth'),
    ('model_args', {'num_experts': 10**9}, 'num_experts'),
    ('model_args', {'img_size': [32, 10**9]}, 'img_size'),
    ('', {'architecture': 'local-dir:/elsewhere'}, 'architecture|Unknown model'),
    ('', {'architecture': 'vit_of_nobody'}, 'architecture|Unknown model'),
)
def test_a_folder_asks_for_no_size_and_no_model_beyond_reason(where, given, named, saved_smoe):
    source = saved_smoe(where, **given)
    for build in BUILDERS:
        with pytest.raises((ValueError, RuntimeError), match=named):
            build(source)


@cases(
    'where, given',
    ('model_args', {'upcycle': 'OTHER'}),
    ('pretrained_cfg', {'file': 'OTHER', 'url': 'OTHER', 'state_dict': {}, 'hf_hub_id': 'a/b'}),
    ('pretrained_cfg', {'custom_load': True}),
)
def test_a_folder_names_no_other_weights(where, given, saved_smoe, tmp_path):
    other = tmp_path / 'other.pth'
    torch.save(dense().state_dict(), other)
    filled = {k: str(other) if v == 'OTHER' else v for k, v in given.items()}
    expected = timm.create_model(saved_smoe('', num_classes=10), pretrained=True).state_dict()
    source = saved_smoe(where, **filled)
    for build in BUILDERS[:2]:
        found = build(source).state_dict()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize('name', ['checkpoint_path', 'pretrained', 'upcycle'])
def test_a_folder_names_no_file_for_its_network(name, saved_smoe, tmp_path):
    source = saved_smoe('model_args', **{name: str(tmp_path / 'nowhere.pth')})
    network_of(source.removeprefix('local-dir:'))
    if name != 'pretrained':  # which timm itself refuses there
        create_saved(source)
