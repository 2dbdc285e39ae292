from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.dataset import InfiniteSampler
from torch import nn
from torch.utils.data import DataLoader

from vqmoe_vision.classification import Classifier
from vqmoe_vision.engine.optim import LayerDecayOptimWrapperConstructor
from vqmoe_vision.moe import METHODS, collect_losses

SMALL = dict(
    img_size=8, patch_size=4, embed_dim=12, depth=2, num_heads=3, num_classes=4
)  # fmt: skip


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(6, 3, 8, 8), torch.arange(6) % 4


@pytest.mark.parametrize('method', METHODS)
def test_loss_holds_every_auxiliary_loss_of_the_model(method: str) -> None:
    model = Classifier(f'vit_tiny_{method}', num_experts=2, **SMALL)
    inputs, targets = batch()
    entries = model(inputs, targets, mode='loss')
    assert entries['cross_entropy_loss'].requires_grad
    auxiliary = {k for k in entries if 'loss' in k} - {'cross_entropy_loss'}
    assert all(key.startswith('blocks.1.mlp/') for key in auxiliary)
    layer = model.model.blocks[1].mlp
    assert bool(auxiliary) == layer.needs_collecting
    # without a router every expert has as much to do, and there is no load to report
    logged = model.logged_statistics.summary()
    assert ('blocks.1.mlp/load_max' in logged) == hasattr(layer, 'router')
    total, _ = model.parse_losses(entries)
    parts = sum(entries[key] for key in auxiliary | {'cross_entropy_loss'})
    torch.testing.assert_close(total, parts)


def test_dense_model_has_the_task_loss_only() -> None:
    entries = Classifier('vit_tiny_patch16_224', **SMALL)(*batch(), mode='loss')
    assert entries.keys() == {'cross_entropy_loss', 'top1'}


def test_auxiliary_losses_reach_the_router() -> None:
    model = Classifier('vit_tiny_smoe', num_experts=2, **SMALL)
    with torch.no_grad():
        model.model.head.weight.zero_()  # no gradient from the task below the head
    total, _ = model.parse_losses(model(*batch(), mode='loss'))
    total.backward()
    gradients = [p.grad for n, p in model.named_parameters() if '.router.' in n]
    assert any(g.abs().sum() > 0 for g in gradients)


def test_forward_leaves_state_alone() -> None:
    model = Classifier('vit_tiny_vqmoe', num_experts=2, **SMALL)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(*batch(), mode='loss')
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, before[name], rtol=0, atol=0)


@pytest.mark.parametrize('enable', [False, True])
def test_gradient_checkpointing_computes_blocks_again(enable: bool) -> None:
    model = Classifier('vit_tiny_vqmoe', num_experts=2, grad_checkpointing=enable, **SMALL)
    calls: list[int] = []
    model.model.blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
    total, _ = model.parse_losses(model(*batch(), mode='loss'))
    total.backward()
    assert len(calls) == 1 + enable


STREAM = {'weight': 0.5, 'blocks': [1]}


@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', *(f'vit_tiny_{m}' for m in METHODS)])
def test_loss_of_the_stream_is_its_mean_square(name: str) -> None:
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
    total, _ = model.parse_losses(entries)
    parts = [value for key, value in entries.items() if 'loss' in key]
    torch.testing.assert_close(total, sum(parts))


def test_gradients_of_the_loss_of_the_stream() -> None:
    """Only what writes to the stream below the norm has any."""
    model = Classifier('vit_tiny_patch16_224', stream_loss=STREAM, **SMALL)
    model(*batch(), mode='loss')['stream_loss'].backward()
    moved = {n.removeprefix('model.') for n, p in model.named_parameters() if p.grad is not None}
    assert 'patch_embed.proj.weight' in moved
    assert 'blocks.0.mlp.fc2.weight' in moved
    assert 'blocks.1.attn.proj.weight' in moved
    assert not any(n.startswith(('blocks.1.norm2', 'blocks.1.mlp', 'norm', 'head')) for n in moved)


@pytest.mark.parametrize('mode', ['tensor', 'predict'])
def test_only_training_watches_the_stream(mode: str) -> None:
    model = Classifier('vit_tiny_patch16_224', stream_loss=STREAM, **SMALL)
    model(*batch(), mode='loss')
    model(*batch(), mode=mode)
    assert not model.model.blocks[1].norm2._forward_pre_hooks


@pytest.mark.parametrize(
    ('name', 'change', 'message'),
    [
        ('vit_tiny_patch16_224', {'weight': 0.0}, r'stream_loss\.weight=0\.0 .* above 0'),
        ('vit_tiny_patch16_224', {'weight': float('nan')}, r'stream_loss\.weight=nan'),
        ('vit_tiny_patch16_224', {'weight': '1'}, r"stream_loss\.weight='1'"),
        ('vit_tiny_patch16_224', {'blocks': []}, r'stream_loss\.blocks=\[\] .* from 0 to 1'),
        ('vit_tiny_patch16_224', {'blocks': [2]}, r'stream_loss\.blocks=\[2\]'),
        ('vit_tiny_patch16_224', {'blocks': [-1]}, r'stream_loss\.blocks=\[-1\]'),
        ('vit_tiny_patch16_224', {'blocks': [1, 1]}, r'stream_loss\.blocks=\[1, 1\]'),
        ('vit_tiny_patch16_224', {'blocks': [True]}, r'stream_loss\.blocks=\[True\]'),
        ('vit_tiny_patch16_224', {'blocks': 1}, r'stream_loss\.blocks=1 '),
        ('vit_tiny_patch16_224', {'place': 1}, 'it takes weight and blocks, both'),
        ('resnet10t', {}, 'no blocks with a norm before the MLP'),
        ('vit_base_patch16_xp_224', {}, 'no blocks with a norm before the MLP'),
    ],
)
def test_an_impossible_loss_of_the_stream(name: str, change: dict, message: str) -> None:
    shape = {} if name == 'resnet10t' else SMALL
    with pytest.raises(ValueError, match=message):
        Classifier(name, **{'num_classes': 4, **shape}, stream_loss={**STREAM, **change})


def test_a_loss_of_the_stream_needs_blocks_that_are_stored() -> None:
    with pytest.raises(ValueError, match='grad_checkpointing loses the gradients'):
        Classifier('vit_tiny_vqmoe', stream_loss=STREAM, grad_checkpointing=True, **SMALL)


def test_predict_gives_logits_and_counts_routing() -> None:
    model = Classifier('vit_tiny_smoe', num_experts=2, **SMALL).eval()
    logits = model(batch()[0], mode='predict')
    assert logits.shape == (6, 4)
    assert 'blocks.1.mlp/load_unused' in model.routing_statistics.summary()


def test_mixup_trains_on_soft_targets() -> None:
    mixup = dict(mixup_alpha=0.8, cutmix_alpha=1.0)
    model = Classifier('vit_tiny_patch16_224', mixup=mixup, label_smoothing=0.1, **SMALL)
    assert model(*batch(), mode='loss').keys() == {'cross_entropy_loss'}


def loader(size: int, drop_last: bool = False, **kwargs: Any) -> DataLoader:
    return DataLoader(range(11), size, drop_last=drop_last, **kwargs)


def test_mixup_wants_even_batches() -> None:
    model = Classifier('vit_tiny_patch16_224', mixup={}, **SMALL)
    with pytest.raises(ValueError, match=r'^train_dataloader\.batch_size=5 '):
        model.check_batches(loader(5, drop_last=True))
    with pytest.raises(ValueError, match=r'^train_dataloader\.drop_last=False '):
        model.check_batches(loader(4))
    model.check_batches(loader(4, drop_last=True))
    model.check_batches(loader(4, sampler=InfiniteSampler(range(11))))  # has no last batch
    Classifier('vit_tiny_patch16_224', **SMALL).check_batches(loader(5))


@pytest.mark.parametrize('value', [1.0, 10, -0.1, float('nan'), '0.1', True])
@pytest.mark.parametrize('mixup', [None, {}])
def test_an_impossible_label_smoothing_is_refused(value: Any, mixup: dict | None) -> None:
    with pytest.raises(ValueError, match=r'^label_smoothing=.* is not possible: '):
        Classifier('vit_tiny_patch16_224', mixup=mixup, label_smoothing=value, **SMALL)


def test_label_smoothing_without_mixup() -> None:
    model = Classifier('vit_tiny_patch16_224', label_smoothing=0.2, **SMALL)
    with torch.no_grad():
        model.model.head.weight.zero_()
        model.model.head.bias.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    loss = model(torch.randn(2, 3, 8, 8), torch.tensor([0, 0]), mode='loss')
    # -log p: log(e + 3) - 1 for class 0, log(e + 3) else; 0.8 + 0.2/4 = 0.85 of it is on class 0
    expected = torch.log(torch.tensor(torch.e + 3)) - 0.85
    torch.testing.assert_close(loss['cross_entropy_loss'].detach(), expected)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'img_size': 9}, 'img_size=9 is not possible: a multiple of patch_size=4x4'),
        ({'num_heads': 5}, 'num_heads=5 is not possible: a divisor of embed_dim=12'),
        ({'num_experts': 2, 'top_k': 3}, 'top_k=3'),
    ],
)
def test_impossible_model(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Classifier('vit_tiny_smoe', **{**SMALL, **change})


def test_unknown_model() -> None:
    with pytest.raises(ValueError, match="model_name='vit_tny'"):
        Classifier('vit_tny', num_classes=2)


def test_unknown_mode() -> None:
    with pytest.raises(ValueError, match="mode='los'"):
        Classifier('vit_tiny_patch16_224', **SMALL)(*batch(), mode='los')


def test_init_weights_of_mmengine_changes_nothing() -> None:
    model = Classifier('vit_tiny_patch16_224', **SMALL)
    before = model.model.blocks[0].mlp.fc1.weight.detach().clone()
    model.init_weights()
    torch.testing.assert_close(model.model.blocks[0].mlp.fc1.weight.detach(), before)


def saved(model: nn.Module, path: Path) -> str:
    """A checkpoint as a run leaves it."""
    torch.save({'state_dict': model.state_dict()}, path)
    return str(path)


def test_starts_from_a_checkpoint_of_another_number_of_classes(tmp_path: Path) -> None:
    source = Classifier('vit_tiny_vqmoe', num_experts=2, **{**SMALL, 'num_classes': 7}).eval()
    path = saved(source, tmp_path / 'a.pth')
    model = Classifier('vit_tiny_vqmoe', num_experts=2, checkpoint=path, **SMALL).eval()
    fresh = Classifier('vit_tiny_vqmoe', num_experts=2, **SMALL)
    fresh.init_weights()
    inputs = batch()[0]
    expected = source.model.forward_features(inputs)
    assert not torch.equal(model.model.forward_features(inputs), expected)  # read in training only
    model.init_weights()
    torch.testing.assert_close(model.model.forward_features(inputs), expected, rtol=0, atol=0)
    assert torch.equal(model.model.head.weight, fresh.model.head.weight)


def test_starts_from_a_checkpoint_of_as_many_classes_with_its_head(tmp_path: Path) -> None:
    source = Classifier('vit_tiny_patch16_224', **SMALL).eval()
    path = saved(source, tmp_path / 'a.pth')
    model = Classifier('vit_tiny_patch16_224', checkpoint=path, **SMALL).eval()
    model.init_weights()
    inputs = batch()[0]
    torch.testing.assert_close(model(inputs), source(inputs), rtol=0, atol=0)


@pytest.mark.parametrize('way', ['checkpoint', 'upcycle'])
def test_starts_with_the_answers_of_a_dense_checkpoint(way: str, tmp_path: Path) -> None:
    source = Classifier('vit_tiny_patch16_224', **SMALL).eval()
    path = tmp_path / 'a.pth'
    if way == 'checkpoint':
        saved(source, path)
    else:
        torch.save(source.model.state_dict(), path)
    moe = dict(renormalize=True, num_experts=2)
    model = Classifier('vit_tiny_smoe', moe=moe, **{way: str(path)}, **SMALL).eval()
    torch.manual_seed(7)  # another start than the source had
    model.init_weights()
    inputs = batch()[0]
    torch.testing.assert_close(model(inputs), source(inputs), rtol=1e-5, atol=1e-5)


def test_checkpoint_of_a_model_that_is_no_vision_transformer() -> None:
    message = "checkpoint='a.pth' is not possible: None, resnet18 is not one of timm's"
    with pytest.raises(ValueError, match=message):
        Classifier('resnet18', num_classes=2, checkpoint='a.pth')


def test_learning_rates_shrink_by_layer_and_the_head_has_all_of_it() -> None:
    model = Classifier('vit_tiny_vqmoe', num_experts=2, **SMALL)
    build = LayerDecayOptimWrapperConstructor(
        {'optimizer': {'type': 'AdamW', 'lr': 1.0, 'weight_decay': 0.3}}, {'layer_decay': 0.5}
    )
    rate = {id(p): g['lr'] for g in build(model).optimizer.param_groups for p in g['params']}
    rates = {name: rate[id(parameter)] for name, parameter in model.named_parameters()}
    # timm's head is the last layer: it has all, and every layer below half of the one above
    assert rates['model.head.weight'] == 1.0
    assert rates['model.blocks.1.mlp.experts.fc1.weight'] == 0.5
    assert rates['model.blocks.0.attn.qkv.weight'] == 0.25
    assert rates['model.patch_embed.proj.weight'] == 0.125


def test_classes_of_a_name_are_not_those_of_a_training() -> None:
    model = Classifier('test_vit_dense', num_classes=10)
    assert 'label_names' in model.model.pretrained_cfg
    assert 'classes' not in model.exportable().about
