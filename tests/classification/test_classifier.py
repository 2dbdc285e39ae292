import math
from typing import Any

import pytest
import torch
from mmengine.dataset import InfiniteSampler
from torch.utils.data import DataLoader

from vqmoe_vision.classification import Classifier
from vqmoe_vision.moe import METHODS, collect_losses

from .. import cases

DENSE = 'vit_tiny_patch16_224'
SMALL = dict(img_size=8, patch_size=4, embed_dim=12, depth=2, num_heads=3, num_classes=4)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(6, 3, 8, 8), torch.arange(6) % 4


@pytest.mark.parametrize('method', [None, *METHODS])
@pytest.mark.parametrize('grad_checkpointing', [False, True])
def test_loss_holds_every_auxiliary_loss_of_the_model(method, grad_checkpointing):
    moe = method and {'method': method, 'num_experts': 2}
    model = Classifier(DENSE, moe=moe, grad_checkpointing=grad_checkpointing, **SMALL)
    block, calls = model.model.blocks[1], list[int]()
    block.attn.register_forward_pre_hook(lambda *_: calls.append(1))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    entries = model(*batch(), mode='loss')
    auxiliary = {k for k in entries if 'loss' in k} - {'cross_entropy_loss'}
    assert all(key.startswith('blocks.1.mlp/') for key in auxiliary)
    assert bool(auxiliary) == getattr(block.mlp, 'needs_collecting', False)
    # without a router every expert has as much to do, and there is no load to report
    logged = model.logged_statistics.summary()
    assert ('blocks.1.mlp/load_max' in logged) == hasattr(block.mlp, 'router')
    total, _ = model.parse_losses(entries)
    parts = sum(entries[key] for key in auxiliary | {'cross_entropy_loss'})
    torch.testing.assert_close(total, parts)
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
    expected = torch.zeros(())
    timms = model.model
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
    ('img_size', dict(img_size=9)),
    ('model_name', dict(model_name='vit_tny')),
    *(('label_smoothing', dict(label_smoothing=n)) for n in (1.0, -0.1, math.nan, '1', True)),
)
def test_what_cannot_be_is_refused(field, options):
    with pytest.raises(ValueError, match=rf'^{field}='):
        Classifier(**{'model_name': DENSE, **SMALL, **options})
    with pytest.raises(ValueError, match=r"^checkpoint='a\.pth' "):
        Classifier('resnet18', num_classes=2, checkpoint='a.pth')


def loader(size: int, drop_last: bool = False, **kwargs: Any) -> DataLoader:
    return DataLoader(range(11), size, drop_last=drop_last, **kwargs)


def test_mixup_wants_even_batches():
    model = Classifier(DENSE, mixup={}, **SMALL)
    with pytest.raises(ValueError, match=r'^train_dataloader\.batch_size=5 '):
        model.check_batches(loader(5, drop_last=True))
    with pytest.raises(ValueError, match=r'^train_dataloader\.drop_last=False '):
        model.check_batches(loader(4))
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
