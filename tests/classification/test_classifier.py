import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from mmengine.dataset import InfiniteSampler
from torch.utils.data import DataLoader

from vqmoe_vision.classification import Classifier
from vqmoe_vision.moe import METHODS, collect_losses

from .. import cases, refused
from ..models.conftest import DENSE, DINOV3, pairs, shaken
from ..runs import total_of

SMALL = dict(img_size=8, patch_size=4, embed_dim=12, depth=2, num_heads=3, num_classes=4)


def batch(number: int = 6, side: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(number, 3, side, side), torch.arange(number) % 4


@pytest.mark.parametrize('method', [None, *METHODS])
@pytest.mark.parametrize('grad_checkpointing', [False, True])
def test_loss_holds_every_auxiliary_loss_of_the_model(method, grad_checkpointing):
    moe = method and {'method': method, 'num_experts': 2}
    model = Classifier(DENSE, moe=moe, grad_checkpointing=grad_checkpointing, **SMALL)
    block, calls = model.model.blocks[1], list[int]()
    block.attn.register_forward_pre_hook(lambda *_: calls.append(1))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    entries = model(*batch(), mode='loss')
    total = total_of(model, entries, 'cross_entropy_loss', block.mlp)
    for name, buffer in model.named_buffers():  # state moves after the step
        torch.testing.assert_close(buffer, before[name], rtol=0, atol=0)
    total.backward()
    assert len(calls) == 1 + grad_checkpointing
    logits = model.eval()(batch()[0], mode='predict')
    assert logits.shape == (6, 4)
    seen = model.routing_statistics.summary()
    assert ('blocks.1.mlp/load_unused' in seen) == hasattr(block.mlp, 'router')


STREAM = {'weight': 0.5, 'blocks': [1]}


@pytest.mark.parametrize('name', [DENSE, *(f'vit_tiny_{m}' for m in METHODS)])
def test_loss_of_the_stream_is_its_mean_square(name):
    model = Classifier(name, stream_loss={'weight': 0.5, 'blocks': [1, 0]}, **SMALL)
    inputs, targets = batch()
    entries = model(inputs, targets, mode='loss')
    # the stream before an MLP is what the block is given and what its attention adds
    expected, timms = torch.zeros(()), model.model
    with collect_losses(model, update_state=False):
        tokens = timms._pos_embed(timms.patch_embed(inputs))
        for block in timms.blocks:
            stream = tokens + block.attn(block.norm1(tokens))
            expected = expected + 0.5 * (stream**2).sum() / stream.numel()
            tokens = stream + block.mlp(block.norm2(stream))
    torch.testing.assert_close(entries['stream_loss'], expected)
    assert not timms.blocks[1].norm2._forward_pre_hooks  # only training watches


WRONG: list[tuple[str, Any]] = [
    *((r'stream_loss\.weight', {'weight': wrong}) for wrong in (0.0, math.nan, '1')),
    *((r'stream_loss\.blocks', {'blocks': x}) for x in ([], [2], [-1], [1, 1], [True], 1)),
    ('stream_loss', {'place': 1}),
]


@cases(
    'field, options',
    *((rf'model\.{field}', dict(stream_loss={**STREAM, **wrong})) for field, wrong in WRONG),
    (r'model\.stream_loss', dict(stream_loss=STREAM, model_name='vit_base_patch16_xp_224')),
    (r'model\.stream_loss', dict(stream_loss=STREAM, grad_checkpointing=True)),
    *(('label_smoothing', dict(label_smoothing=n)) for n in (1.0, -0.1, math.nan, '1', True)),
)
def test_what_cannot_be_is_refused(field, options):
    refused(rf'^{field}=', Classifier, **{'model_name': DENSE, **SMALL, **options})
    refused(r"^checkpoint='a\.pth' ", Classifier, 'resnet18', num_classes=2, checkpoint='a.pth')


def loader(size: int, drop_last: bool = False, **kwargs: Any) -> DataLoader:
    return DataLoader(range(11), size, drop_last=drop_last, **kwargs)


def test_mixup_wants_even_batches():
    model = Classifier(DENSE, mixup={}, **SMALL)
    refused(r'^train_dataloader\.batch_size=5 ', model.check_batches, loader(5, drop_last=True))
    refused(r'^train_dataloader\.drop_last=False ', model.check_batches, loader(4))
    model.check_batches(loader(4, drop_last=True))
    model.check_batches(loader(4, sampler=InfiniteSampler(range(11))))  # has no last batch
    Classifier(DENSE, **SMALL).check_batches(loader(5))


def test_label_smoothing_without_mixup():
    model = Classifier(DENSE, label_smoothing=0.2, **SMALL)
    with torch.no_grad():
        model.model.head.weight.zero_()
        model.model.head.bias.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    loss = model(torch.randn(2, 3, 8, 8), torch.tensor([0, 0]), mode='loss')
    # -log p: log(e + 3) - 1 for class 0, log(e + 3) else; 0.8 + 0.2/4 = 0.85 of it is on class 0
    expected = torch.log(torch.tensor(torch.e + 3)) - 0.85
    torch.testing.assert_close(loss['cross_entropy_loss'].detach(), expected)


def test_classes_of_a_name_are_not_those_of_a_training():
    model = Classifier('test_vit_dense', num_classes=10)
    assert 'label_names' in model.model.pretrained_cfg
    assert 'classes' not in model.exportable().about


SIZES: Any = dict(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=4)
HOSTS = (DENSE, 'deit3_small_patch16_224', DINOV3)
PAIRS = pairs(*HOSTS)


def build(host: str, method: str | None = None, **kwargs: Any) -> Any:
    """A classifier of a host; `moe` in `kwargs` has options of the method."""
    moe = {**kwargs.pop('moe', {}), 'method': method} if method else None
    return Classifier(host, moe=moe, **{**SIZES, **kwargs})


def saved(host: str, path: Path, **kwargs: Any) -> Any:
    """A dense model of timm, no tensor of which is as it started, and its file."""
    model = shaken(timm.create_model(host, **{**SIZES, **kwargs}))
    torch.save(model.state_dict(), path)
    return model


def start(way: str, path: str) -> dict[str, Any]:
    if way == 'pretrained':
        return dict(pretrained=True, pretrained_cfg_overlay=dict(file=path, num_classes=4))
    return {way: path}


@pytest.mark.parametrize('name, gate', [('GluMlp', 'last'), ('SwiGLU', 'separate')])
def test_a_config_names_gated_experts(name, gate):
    ours, dense = (build(host, mlp_layer=name) for host in ('vit_tiny_smoe', DENSE))
    assert ours.model.blocks[1].mlp.experts.gate == gate
    # fresh values of what is shared are those of the dense model of the seed, gates too
    for model in (ours, dense):
        model.init_weights()
        assert type(model.model.blocks[0].mlp).__name__ == name
    states = [model.model.blocks[0].state_dict() for model in (ours, dense)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.parametrize('way', ['pretrained', 'checkpoint_path', 'upcycle'])
def test_a_training_starts_from_one_place(way, tmp_path):
    path = str(tmp_path / 'dense.pth')
    saved(HOSTS[0], tmp_path / 'dense.pth')
    host = HOSTS[0] if way != 'upcycle' else 'vit_tiny_smoe'
    model = build(host, checkpoint=path, **start(way, path))
    refused(f'^{way}=.* is not possible: .* with checkpoint=.*dense', model.init_weights)


def test_files_of_dinov3s_authors_are_understood(tmp_path):
    source = saved(DINOV3, tmp_path / 'timm.pth', num_classes=0)
    theirs = {'reg_token': 'storage_tokens', 'gamma_1': 'ls1.gamma', 'gamma_2': 'ls2.gamma'}
    state = source.state_dict()
    for ours, name in theirs.items():
        state = {key.replace(ours, name): value for key, value in state.items()}
    extra = {'mask_token': torch.zeros(1, 32), 'rope_embed.periods': torch.ones(8)}
    torch.save({**state, **extra}, tmp_path / 'theirs.pth')
    model = build(DINOV3, checkpoint=str(tmp_path / 'theirs.pth')).eval()
    model.init_weights()
    images = batch(4, 16)[0]
    found, expected = model.model.forward_features(images), source.forward_features(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@cases(
    'host, method, options',
    *((*pair, how) for pair in PAIRS for how in METHODS[pair[1]].config.EXACT_UPCYCLING.values()),
)
@pytest.mark.parametrize('way', ['checkpoint', 'pretrained', 'checkpoint_path'])
def test_it_begins_with_the_answers_of_dense_weights(host, method, options, way, tmp_path):
    source = saved(host, tmp_path / 'dense.pth')
    model = build(host, method, moe=options, **start(way, str(tmp_path / 'dense.pth'))).eval()
    torch.manual_seed(7)  # another start than the source had
    model.init_weights()
    images = batch(4, 16)[0]
    torch.testing.assert_close(model(images), source(images), rtol=1e-5, atol=1e-5)
    report = model.model.weights_report
    assert report.copied['blocks.1.mlp.experts.fc1.weight'] == 'blocks.1.mlp.fc1.weight'


def test_gradients_of_the_loss_of_the_stream() -> None:
    """Only what writes to the stream below the norm has any."""
    model = Classifier('vit_tiny_patch16_224', stream_loss=STREAM, **SMALL)
    model(*batch(), mode='loss')['stream_loss'].backward()
    moved = {n.removeprefix('model.') for n, p in model.named_parameters() if p.grad is not None}
    expected = {'patch_embed.proj.weight', 'blocks.0.mlp.fc2.weight', 'blocks.1.attn.proj.weight'}
    assert expected <= moved
    assert not any(n.startswith(('blocks.1.norm2', 'blocks.1.mlp', 'norm', 'head')) for n in moved)
