"""Files that are damaged or of another kind are one line; what is beside others is followed."""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import IMAGENET_DEFAULT_MEAN
from timm.models import load_checkpoint, save_for_hf, vision_transformer

from vqmoe_vision.engine.checkpoint import load_from_local, start_from
from vqmoe_vision.models.create import create_model, create_saved

from .conftest import DENSE, TINY, dense, distance, make

OF_VIT = '{"architecture": "vit_tiny_patch16_224", '


def flip(path: Path, values: torch.Tensor) -> None:
    """Changes a bit of a tensor in a file, which torch would load."""
    content = path.read_bytes()
    at = content.index(values.numpy().tobytes())
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])


def folder_of(path: Path, model: Any, safe: bool = False) -> Path:
    save_for_hf(model, path / 'L', model_args=TINY, safe_serialization=safe)
    return path / 'L'


def refused(message: str, build: Any, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build(*args, **kwargs)
    assert '\n' not in str(caught.value)
    assert 'weights_only' not in str(caught.value)


@pytest.mark.parametrize('of_ours', [True, False])
def test_a_flipped_bit_in_a_folder_is_found(of_ours: bool, tmp_path: Path) -> None:
    model: Any = make('smoe') if of_ours else dense()
    folder = folder_of(tmp_path, model)
    flip(folder / 'pytorch_model.bin', model.state_dict()['blocks.0.mlp.fc1.weight'])
    message = r"pytorch_model\.bin' is damaged: .* does not match its checksum"
    if of_ours:
        refused(message, timm.create_model, f'local-dir:{folder}', pretrained=True)
    refused(message, make, 'smoe', upcycle=f'local-dir:{folder}')


@pytest.mark.parametrize('name', ['a.ckpt', 'a'])
def test_a_file_of_any_name_is_checked(name: str, tmp_path: Path) -> None:
    path, model = tmp_path / name, make('smoe')
    torch.save(model.state_dict(), path)
    flip(path, model.state_dict()['blocks.0.mlp.fc1.weight'])
    given = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
    refused('does not match its checksum', make, 'smoe', **given)
    named = ('vit_tiny_smoe', None)
    refused('does not match its checksum', create_model, *named, checkpoint_path=str(path), **TINY)


@pytest.mark.parametrize('name', ['vit_tiny_smoe', 'vit_tiny_patch16_224'])
def test_a_flipped_bit_behind_checkpoint_path_is_found(name: str, tmp_path: Path) -> None:
    path, model = tmp_path / 'a.pth', timm.create_model(name, **TINY)
    torch.save(model.state_dict(), path)
    sound = create_model(name, **TINY, checkpoint_path=str(path))
    assert torch.equal(sound.state_dict()['cls_token'], model.state_dict()['cls_token'])
    build = lambda: create_model(name, **TINY, checkpoint_path=str(path))  # noqa: E731
    flip(path, model.state_dict()['blocks.0.mlp.fc1.weight'])
    refused('does not match its checksum', build)
    path.write_text('this is no checkpoint')
    refused('is damaged, or holds more than weights and is not loaded', build)
    torch.save({'head.weight': torch.zeros(1)}, path)
    refused(r'checkpoint .* does not fit the model: missing keys: cls_token', build)
    path.unlink()
    refused(r"a\.pth' does not exist", build)


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('{"architecture": "vit', r"config\.json' cannot be read: Unterminated string"),
        ('[]', r'a folder with the config\.json of timm, which names the architecture'),
        ('{}', r'a folder with the config\.json of timm, which names the architecture'),
        (
            OF_VIT + '"pretrained_cfg": {}, "model_args": {"depht": 3}}',
            "is said to be of vit_tiny_patch16_224 with {'depht': 3}, which timm does not build",
        ),
    ],
)
def test_a_folder_whose_configuration_is_none(content: str, message: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, dense(), safe=True)
    (folder / 'config.json').write_text(content)
    refused(message, make, 'smoe', upcycle=f'local-dir:{folder}')


def test_a_folder_without_weights(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, dense(), safe=True)
    (folder / 'model.safetensors').unlink()
    refused('weights in folder .*L', make, 'smoe', upcycle=f'local-dir:{folder}')


@pytest.mark.parametrize('way', ['folder', 'pretrained', 'checkpoint_path', 'part', 'start_from'])
def test_parts_of_weights_are_refused(way: str, tmp_path: Path) -> None:
    source = make('smoe') if way == 'pretrained' else dense()
    folder = folder_of(tmp_path, source, safe=True)
    state = source.state_dict()
    (folder / 'model.safetensors').unlink()
    # the head alone in the second, without which the rest would be taken for weights of features
    head = {name for name in state if name.startswith('head.')}
    for i, names in enumerate((state.keys() - head, head), 1):
        part = {name: state[name] for name in names}
        save_file(part, str(folder / f'model-0000{i}-of-00002.safetensors'))
    build: dict[str, Any] = {
        'folder': lambda: make('smoe', upcycle=f'local-dir:{folder}'),
        'pretrained': lambda: timm.create_model(f'local-dir:{folder}', pretrained=True),
        'checkpoint_path': lambda: create_model(DENSE, **TINY, checkpoint_path=str(folder)),
        'part': lambda: make('smoe', upcycle=str(folder / 'model-00001-of-00002.safetensors')),
        'start_from': lambda: start_from(make('smoe'), str(folder)),
    }
    refused(r"model-00001-of-00002\.safetensors'", build[way])


def test_parts_beside_whole_weights_are_passed_over(tmp_path: Path) -> None:
    source = dense()
    folder = folder_of(tmp_path, source, safe=True)
    model = make('smoe', upcycle=f'local-dir:{folder}')
    first = dict(list(source.state_dict().items())[:3])
    save_file(first, str(folder / 'a-00001-of-00002.safetensors'))
    again = make('smoe', upcycle=f'local-dir:{folder}')
    assert torch.equal(again.head.weight, model.head.weight)


def test_one_part_of_one_is_whole(tmp_path: Path) -> None:
    file = tmp_path / 'model-00001-of-00001.safetensors'
    source = dense()
    save_file(source.state_dict(), str(file))
    assert torch.equal(make('smoe', upcycle=str(file)).head.weight, source.head.weight)


def test_of_several_files_none_is_chosen(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, dense(), safe=True)
    other = folder / 'a.safetensors'
    other.write_bytes((folder / 'model.safetensors').read_bytes())
    make('smoe', upcycle=f'local-dir:{folder}')
    (folder / 'model.safetensors').rename(folder / 'b.safetensors')
    build = lambda: make('smoe', upcycle=f'local-dir:{folder}')  # noqa: E731
    refused(r"weights in .*\['a\.safetensors', 'b\.safetensors'\] is not possible: one", build)
    other.unlink()
    build()


def of_jax(path: Path, width: int = 32, heads: int = 2) -> str:
    """Weights of `TINY` as the authors of ViT wrote them."""
    block, attention = 'Transformer/encoderblock_{}/', 'MultiHeadDotProductAttention_1/'
    per_head = (width, heads, width // heads)
    shapes: dict[str, tuple[int, ...]] = {
        'embedding/kernel': (8, 8, 3, width),
        'embedding/bias': (width,),
        'cls': (1, 1, width),
        'Transformer/posembed_input/pos_embedding': (1, 17, width),
        'Transformer/encoder_norm/scale': (width,),
        'Transformer/encoder_norm/bias': (width,),
        'head/kernel': (width, 10),
        'head/bias': (10,),
    }
    for name in (block.format(i) for i in range(TINY['depth'])):
        for norm in ('LayerNorm_0', 'LayerNorm_2'):
            shapes |= {f'{name}{norm}/{part}': (width,) for part in ('scale', 'bias')}
        for part in ('query', 'key', 'value'):
            shapes[f'{name}{attention}{part}/kernel'] = per_head
            shapes[f'{name}{attention}{part}/bias'] = per_head[1:]
        shapes[f'{name}{attention}out/kernel'] = (*per_head[1:], width)
        shapes[f'{name}{attention}out/bias'] = (width,)
        for layer, shape in (('Dense_0', (width, 4 * width)), ('Dense_1', (4 * width, width))):
            shapes[f'{name}MlpBlock_3/{layer}/kernel'] = shape
            shapes[f'{name}MlpBlock_3/{layer}/bias'] = shape[1:]
    np.savez(path, **{name: torch.randn(shape).numpy() for name, shape in shapes.items()})
    return str(path)


def test_a_file_of_numpy_is_for_dense_models(method: str, tmp_path: Path) -> None:
    path = of_jax(tmp_path / 'a.npz')
    model: Any = make(method)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    overlay = dict(pretrained=True, pretrained_cfg_overlay=dict(file=path))
    host = dict(host=DENSE, method=method, **TINY)
    for build in (
        lambda: make(method, checkpoint_path=path),
        lambda: make(method, upcycle=path),
        lambda: make(method, **overlay),
        lambda: timm.create_model('moe_host', **host, checkpoint_path=path),
        lambda: timm.create_model('moe_host', **host, **overlay),
        lambda: start_from(model, path),
        lambda: load_checkpoint(model, path),
        lambda: model.load_pretrained(path),
    ):
        refused(r"a\.npz' is .*of NumPy", build)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    # what is said to work
    source: Any = create_model(DENSE, checkpoint_path=path, **TINY)
    torch.save(source.state_dict(), tmp_path / 'a.pth')
    made: Any = make(method, upcycle=str(tmp_path / 'a.pth'))
    assert torch.equal(made.head.weight, source.head.weight)


class Harm:
    """What runs when it is read."""

    def __reduce__(self) -> Any:
        return print, ('harm',)


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('kind', ['text', 'code', 'list'])
def test_other_files_are_no_weights(kind: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f'a{suffix}'
    if kind == 'text':
        path.write_text('this is no checkpoint')
    else:
        torch.save({'state_dict': {}, 'code': Harm()} if kind == 'code' else [1, 2], path)
    said = 'is damaged, or holds more than weights and is not loaded'
    message = rf"checkpoint '.*a\{suffix}' {said}"
    refused(message, make, 'smoe', upcycle=str(path))


NO_MEMORY = [MemoryError(), torch.OutOfMemoryError(), RuntimeError("can't allocate memory")]


@pytest.mark.parametrize('error', NO_MEMORY, ids=lambda error: type(error).__name__)
def test_a_lack_of_memory_says_nothing_of_a_file(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise error

    path = str(tmp_path / 'a.pth')
    torch.save(dense().state_dict(), path)
    for module, name in ((vision_transformer, 'checkpoint_filter_fn'), (torch, 'load')):
        with monkeypatch.context() as patch, pytest.raises(type(error)) as caught:
            patch.setattr(module, name, fails)
            make('smoe', upcycle=path)
        assert caught.value is error


EVA: dict[str, Any] = dict(use_abs_pos_emb=True)


@pytest.mark.parametrize(('host', 'options'), [(DENSE, {}), ('vit_small_patch16_dinov3', EVA)])
@pytest.mark.parametrize('moe', [None, {'method': 'smoe'}])
def test_what_timms_filter_cannot_read_is_not_called_damaged(
    host: str, options: dict[str, Any], moe: dict | None, tmp_path: Path
) -> None:
    path, source = str(tmp_path / 'a.pth'), dense(host, **options)
    prefix = source.num_prefix_tokens
    # a file of DINOv2 by its mask token; ten positions are of no square, which timm takes them for
    other = {'mask_token': torch.zeros(1, 32), 'pos_embed': torch.zeros(1, prefix + 10, 32)}
    torch.save({**source.state_dict(), **other}, path)
    message = "does not fit the model: timm's filter could not read its .*: RuntimeErr"
    given = dict(pretrained=True, pretrained_cfg_overlay=dict(file=path))
    refused(message, create_model, host, moe, **TINY, **options, **given)
    refused(message, start_from, create_model(host, moe, **TINY, **options), path)


@pytest.mark.parametrize('error', [KeyError('pos_embed'), TypeError('one\ntwo'), AssertionError()])
@pytest.mark.parametrize('way', ['upcycle', 'folder', 'pretrained'])
def test_the_words_of_timms_filter_are_passed_on(
    error: Exception, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise error

    folder = folder_of(tmp_path, dense(), safe=True)
    file = str(folder / 'model.safetensors')
    place: dict[str, Any] = {'upcycle': file if way == 'upcycle' else f'local-dir:{folder}'}
    if way == 'pretrained':
        place = {'pretrained': True, 'pretrained_cfg_overlay': {'file': file}}
    monkeypatch.setattr(vision_transformer, 'checkpoint_filter_fn', fails)
    said = {KeyError: "KeyError: 'pos_embed'", TypeError: 'TypeError: one', AssertionError: '.*or'}
    refused(f'filter could not .*: {said[type(error)]}$', make, 'smoe', **place)


@pytest.mark.parametrize(
    ('name', 'change', 'message'),
    [
        ('norm.bias', lambda value: value * torch.nan, r'is damaged: norm\.bias has values nan'),
        (
            'blocks.1.mlp.fc1.weight',
            lambda value: value.index_fill(0, torch.tensor([3]), torch.inf),
            r'is damaged: blocks\.1\.mlp\.fc1\.weight has values nan or infinite',
        ),
        ('pos_embed', lambda value: value / 0, r'is damaged: pos_embed has values nan or infinite'),
        (
            'blocks.1.mlp.fc2.weight',
            lambda value: value.to(torch.int8),
            r'blocks\.1\.mlp\.fc2\.weight is of torch\.int8, the model has real numbers there',
        ),
        (
            'cls_token',
            lambda value: value.to(torch.int8),
            r'cls_token is of torch\.int8, the model has real numbers there',
        ),
    ],
)
def test_values_that_are_no_weights(name: str, change: Any, message: str, tmp_path: Path) -> None:
    state, path = dense().state_dict(), str(tmp_path / 'a.pth')
    torch.save({**state, name: change(state[name])}, path)
    refused(message, make, 'smoe', upcycle=path)


@pytest.mark.parametrize('way', ['upcycle', 'checkpoint_path', 'start_from', 'load_from'])
@pytest.mark.parametrize(
    'change', [lambda v: v.to_sparse(), lambda v: v.to('meta')], ids=['sparse', 'meta']
)
def test_tensors_without_values_in_a_file_are_one_line(
    way: str, change: Any, tmp_path: Path
) -> None:
    path, name = str(tmp_path / 'a.pth'), 'head.weight'
    state = (dense() if way == 'upcycle' else make('smoe')).state_dict()
    torch.save({**state, name: change(state[name])}, path)
    ways: dict[str, Any] = {
        'upcycle': lambda: make('smoe', upcycle=path),
        'checkpoint_path': lambda: create_model('vit_tiny_smoe', checkpoint_path=path, **TINY),
        'start_from': lambda: start_from(make('smoe'), path),
        'load_from': lambda: load_from_local(path, 'cpu'),
    }
    with pytest.raises(ValueError, match=r'^checkpoint .*a\.pth. has no values for head') as caught:
        ways[way]()
    assert '\n' not in str(caught.value)


def test_a_file_of_nothing_is_called_empty(tmp_path: Path) -> None:
    torch.save({}, tmp_path / 'a.pth')
    for name in (DENSE, 'vit_tiny_smoe'):
        with pytest.raises(ValueError, match=r"a\.pth' has no key of the model: it has none"):
            start_from(timm.create_model(name, **TINY), str(tmp_path / 'a.pth'))


def test_what_the_model_has_no_place_for_may_be_anything(tmp_path: Path) -> None:
    state, path = dense().state_dict(), str(tmp_path / 'a.pth')
    other = {'head.weight': torch.full((3, 32), torch.nan), 'head.bias': torch.zeros(3)}
    torch.save({**state, **other}, path)
    model: Any = make('smoe', upcycle=path)
    assert model.weights_report.outside == ('head.weight', 'head.bias')


def test_no_weights_go_where_there_is_no_memory(tmp_path: Path) -> None:
    path = str(tmp_path / 'a.pth')
    torch.save(dense().state_dict(), path)
    message = r"device='meta' is not possible: one with memory for the weights of '.*a\.pth'"
    with torch.device('meta'):
        refused(message, make, 'smoe', upcycle=path)
    refused(message, make, 'smoe', upcycle=path, device='meta')


@pytest.mark.parametrize('way', ['upcycle', 'overlay', 'folder', 'stated'])
def test_what_is_beside_a_file_belongs_to_its_weights(
    way: str, tmp_path: Path, images: torch.Tensor
) -> None:
    source = dense('deit_tiny_patch16_224')  # of mean 0.485, ours says 0.5
    file = folder_of(tmp_path, source, safe=True) / 'model.safetensors'
    place: dict[str, Any] = {'upcycle': str(file)}
    if way == 'folder':
        place = {'upcycle': f'local-dir:{file.parent}'}
    elif way == 'overlay':
        place = {'pretrained': True, 'pretrained_cfg_overlay': {'file': str(file)}}
    elif way == 'stated':
        place['pretrained_cfg_overlay'] = {'mean': (0.1, 0.2, 0.3), 'std': (0.4, 0.5, 0.6)}
    model: Any = make('smoe', **place, renormalize=True).eval()
    expected = (0.1, 0.2, 0.3) if way == 'stated' else IMAGENET_DEFAULT_MEAN
    assert tuple(model.pretrained_cfg['mean']) == pytest.approx(expected)
    assert model.pretrained_cfg['architecture'] == 'vit_tiny_smoe'
    torch.testing.assert_close(model(images), source(images), rtol=1e-5, atol=1e-5)


def test_a_file_is_before_a_folder_that_says_what_it_does_not(tmp_path: Path) -> None:
    in_folder = dense('deit_tiny_patch16_224')
    folder, file, other = folder_of(tmp_path, in_folder, safe=True), tmp_path / 'a.pth', dense()
    torch.save(other.state_dict(), file)
    overlay = {'file': str(file)}
    model: Any = make('smoe', upcycle=f'local-dir:{folder}', pretrained_cfg_overlay=overlay)
    assert torch.equal(model.head.weight, other.head.weight)
    assert tuple(model.pretrained_cfg['mean']) == pytest.approx(IMAGENET_DEFAULT_MEAN)


@pytest.mark.parametrize(
    ('name', 'way'),
    [
        *product(('vit_tiny_smoe', 'moe_host', DENSE), ('file', 'state_dict')),
        ('vit_tiny_smoe', 'upcycle'),
    ],
)
def test_other_weights_are_before_those_of_the_folder_that_builds_the_model(
    name: str, way: str, tmp_path: Path
) -> None:
    own = {'host': DENSE, 'method': 'smoe'} if name == 'moe_host' else {}
    model, other, file = timm.create_model(name, **own, **TINY), dense(), tmp_path / 'a.pth'
    save_for_hf(model, tmp_path / 'L', model_args={**own, **TINY}, safe_serialization=True)
    torch.save(other.state_dict(), file)
    source = f'local-dir:{tmp_path / "L"}'
    if way == 'upcycle':
        again: Any = timm.create_model(source, upcycle=str(file))
    else:
        place = {way: other.state_dict() if way == 'state_dict' else str(file)}
        again = create_saved(source, pretrained_cfg_overlay=place)
    assert torch.equal(again.head.weight, other.head.weight)


def test_a_checkpoint_of_a_host_is_before_what_its_configuration_names(tmp_path: Path) -> None:
    file, theirs = tmp_path / 'a.pth', dense()
    torch.save(theirs.state_dict(), file)
    overlay = {'state_dict': dense().state_dict()}
    given = dict(checkpoint_path=str(file), pretrained_cfg_overlay=overlay)
    model: Any = create_model(DENSE, {'method': 'smoe'}, **TINY, **given)
    assert torch.equal(model.head.weight, theirs.head.weight)


def test_a_configuration_of_another_library_says_nothing(tmp_path: Path) -> None:
    save_file(dense().state_dict(), str(tmp_path / 'model.safetensors'))
    (tmp_path / 'config.json').write_text('{"architectures": ["ViTModel"]}')
    model: Any = make('smoe', upcycle=str(tmp_path / 'model.safetensors'))
    assert model.pretrained_cfg['mean'][0] == 0.5


@pytest.mark.parametrize('stated', [True, False])
def test_what_a_run_has_kept_is_followed(stated: bool, tmp_path: Path) -> None:
    path = str(tmp_path / 'run.pth')
    state = {f'model.{name}': value for name, value in dense().state_dict().items()}
    kept = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    torch.save({'state_dict': {**state, 'normalization': kept}}, path)
    given = {'mean': (0.7,) * 3, 'std': (0.8,) * 3} if stated else {}
    model: Any = make('smoe', upcycle=path, pretrained_cfg_overlay=given)
    mean = (0.7,) * 3 if stated else (0.1, 0.2, 0.3)
    assert tuple(model.pretrained_cfg['mean']) == pytest.approx(mean)
    assert make('smoe').pretrained_cfg['mean'][0] == 0.5  # that of the name stays


def test_positions_of_an_oblong_image_are_resized(tmp_path: Path) -> None:
    source = dense(img_size=(16, 64))
    args = {**TINY, 'img_size': (16, 64)}
    save_for_hf(source, tmp_path / 'L', model_args=args, safe_serialization=True)
    file = str(tmp_path / 'L' / 'model.safetensors')
    found: Any = make('smoe', upcycle=file)
    expected: Any = make('smoe', upcycle=f'local-dir:{tmp_path / "L"}')
    assert torch.equal(found.pos_embed, expected.pos_embed)
    # 2 x 8 positions, as many as the model's 4 x 4, stay where they are without a size
    assert distance(found.pos_embed, source.pos_embed) > 0.1


@pytest.mark.parametrize(
    ('before', 'after', 'known'),
    [
        ((32, 72), (48, 48), True),  # 4 x 9 and 6 x 6 patches
        ((48, 48), (32, 72), True),
        ((32, 72), (48, 48), False),
        ((32, 72), (32, 72), True),
    ],
)
def test_positions_of_another_grid_are_reported_as_resized(
    before: tuple[int, int], after: tuple[int, int], known: bool, method: str, tmp_path: Path
) -> None:
    source = dense(img_size=before)
    args = {**TINY, 'img_size': before}
    save_for_hf(source, tmp_path / 'L', model_args=args, safe_serialization=True)
    file = tmp_path / 'L' / 'model.safetensors'
    if not known:
        file = file.rename(tmp_path / 'bare.safetensors')
    model: Any = make(method, upcycle=str(file), img_size=after)
    report = model.weights_report
    # what reads images has positions too
    names = {name for name in model.state_dict() if name.endswith('pos_embed')}
    resized = known and before != after
    assert set(report.resized) == (names if resized else set())
    assert ('pos_embed' in report.loaded) != resized
    line = 'pos_embed resized from another grid of as many positions, (1, 37, 32)'
    assert (line in report.lines()) == resized
    assert torch.equal(model.pos_embed, source.pos_embed) != resized
