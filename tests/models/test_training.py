"""Training: losses, gradients, optimizers, checkpoints of weights."""

import copy
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import group_parameters, load_checkpoint
from timm.models.vision_transformer import checkpoint_filter_fn
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from torch import Tensor, nn

from vqmoe_vision import collect_losses
from vqmoe_vision.moe import start_training

TARGETS = torch.arange(4)
# Checkpointing repeats the very same operations, so nothing may differ but the order in which
# gradients of two passes are added.
SAME = {'rtol': 1e-6, 'atol': 1e-7}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def accumulated(model: nn.Module, batches: list[Tensor]) -> dict[str, object]:
    """Loss, gradients, state and records after all forward passes and then one backward."""
    model.train()
    torch.manual_seed(1)  # router noise and drop path
    with collect_losses(model) as collected:
        loss = sum(F.cross_entropy(model(images), TARGETS) for images in batches)
        loss = loss + collected.total()
        loss.backward()
    return {
        'loss': loss.detach(),
        'gradients': gradients(model),
        'state': dict(model.named_buffers()),
        'losses': collected.losses,
        'stats': collected.stats,
    }


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


def test_a_default_dtype_is_that_of_a_model_that_was_cast(tiny, default_dtype: torch.dtype) -> None:
    model, images = tiny(), torch.randn(4, 3, 32, 32)
    before = copy.deepcopy(model.state_dict())
    found = accumulated(model, [images])
    torch.set_default_dtype(torch.float32)
    cast = tiny().to(default_dtype)
    cast.load_state_dict(before)
    expected = accumulated(cast, [images])
    for name in ('loss', 'gradients', 'losses'):
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    ('kwargs', 'passes'),
    [({}, 1), ({'init_values': 0.1, 'drop_path_rate': 0.3, 'proj_drop_rate': 0.1}, 2)],
    ids=['one pass', 'LayerScale, DropPath, two passes'],
)
def test_gradient_checkpointing_changes_nothing(tiny_variant, kwargs: dict, passes: int) -> None:
    batches = [torch.randn(4, 3, 32, 32) for _ in range(passes)]
    plain = tiny_variant(depth=2, **kwargs)
    repeated = copy.deepcopy(plain)
    repeated.set_grad_checkpointing()
    expected = accumulated(plain, batches)
    torch.testing.assert_close(accumulated(repeated, batches), expected, **SAME)
    # and once more, now that codebooks have started
    plain.zero_grad()
    repeated.zero_grad()
    expected = accumulated(plain, batches)
    torch.testing.assert_close(accumulated(repeated, batches), expected, **SAME)


def test_channels_last_changes_nothing(tiny_variant) -> None:
    plain = tiny_variant(depth=2)
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    assert last.patch_embed.proj.weight.is_contiguous(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 32, 32)
    expected = accumulated(plain, [images])
    found = accumulated(last, [images.contiguous(memory_format=torch.channels_last)])
    # the convolution of the stem adds up in another order
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_task_of_timm_trains_with_the_losses(tiny, train_step, images: Tensor) -> None:
    model = tiny(depth=2)
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    expected = train_step(twin, None, images, TARGETS)
    task = ClassificationTask(model.train(), nn.CrossEntropyLoss(), verbose=False)
    torch.manual_seed(1)
    with collect_losses(task) as collected:
        result = task(images, TARGETS)
        loss = result['loss'] + collected.total()
        loss.backward()
    assert result['output'].shape == (4, 10)
    torch.testing.assert_close(loss.detach(), expected, rtol=0, atol=0)
    torch.testing.assert_close(gradients(model), gradients(twin), rtol=0, atol=0)
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=0)


def test_gradient_checkpointing_repeats_every_moe_layer(tiny, images: Tensor) -> None:
    model = tiny(init_values=0.1)
    calls = []
    model.blocks[1].mlp.register_forward_hook(lambda *args: calls.append(1))
    model.set_grad_checkpointing()
    accumulated(model, [images])
    assert len(calls) == 2
    model.set_grad_checkpointing(False)
    accumulated(model, [images])
    assert len(calls) == 3


@pytest.mark.parametrize(
    ('method', 'options'),
    [
        ('vqmoe', {}),
        ('vqmoe', {'form': 'discrete'}),
        ('vqmoe', {'codebook': 'cvq'}),
        ('stablemoe', {'stage1_steps': 1}),
    ],
)
def test_backward_outside_the_block_is_an_error_in_a_block_of_timm(
    make_tiny, images: Tensor, method: str, options: dict
) -> None:
    """Nothing behind the experts keeps a tensor there, so that the repeated pass ends early."""
    model = make_tiny(method, **options).train()
    model.set_grad_checkpointing()
    with collect_losses(model) as collected:
        loss = model(images).square().mean() + collected.total()
    if method == 'stablemoe':
        with collect_losses(model):  # its stage ends when the next block opens
            pass
    with pytest.raises(RuntimeError, match=r'call backward\(\) inside the collect_losses block'):
        loss.backward()


def test_features_under_checkpointing(tiny, images: Tensor) -> None:
    model = tiny().eval()
    expected = model.forward_intermediates(images, indices=[1, 3])
    model.set_grad_checkpointing()
    torch.testing.assert_close(
        model.forward_intermediates(images, indices=[1, 3]), expected, rtol=0, atol=0
    )


def test_two_passes_in_one_block_add_their_losses(tiny) -> None:
    model = tiny().train()
    first, second = torch.randn(2, 4, 3, 32, 32)
    totals = []
    for batches in ([first], [second], [first, second]):
        torch.manual_seed(1)
        with collect_losses(model, update_state=False) as collected:
            for images in batches:
                torch.manual_seed(2)
                model(images)
            totals.append(collected.total())
    torch.testing.assert_close(totals[0] + totals[1], totals[2])


def test_stages_blocks_and_head_are_separate_groups(tiny) -> None:
    model = tiny()
    groups = group_parameters(model, model.group_matcher(coarse=False))
    grouped = [name for names in groups.values() for name in names]
    assert sorted(grouped) == sorted(name for name, _ in model.named_parameters())
    by_name = {name: group for group, names in groups.items() for name in names}
    for i in range(4):
        of_block = {g for name, g in by_name.items() if name.startswith(f'blocks.{i}.')}
        assert len(of_block) == 1
    assert len(groups) >= 6  # stem, four blocks, norm and head
    assert 1 < len(group_parameters(model, model.group_matcher(coarse=True))) <= len(groups)


def test_layer_decay_reaches_the_experts(tiny) -> None:
    model = tiny()
    optimizer = create_optimizer_v2(model, opt='adamw', lr=1.0, weight_decay=0.1, layer_decay=0.5)
    scale = {
        id(p): group.get('lr_scale', 1.0)
        for group in optimizer.param_groups
        for p in group['params']
    }
    named = dict(model.named_parameters())
    assert scale.keys() == {id(p) for p in named.values()}
    for i in range(4):
        of_block = {scale[id(p)] for n, p in named.items() if n.startswith(f'blocks.{i}.')}
        # the head has 1, the last block as norm before it, every block below half of the next
        assert of_block == {scale[id(named['blocks.3.norm1.weight'])] / 2 ** (3 - i)}


def decayed(model: nn.Module, **options) -> set[str]:
    optimizer = create_optimizer_v2(model, opt='adamw', weight_decay=0.1, **options)
    with_decay = [g['params'] for g in optimizer.param_groups if g['weight_decay'] > 0]
    ids = {id(p) for params in with_decay for p in params}
    return {name for name, p in model.named_parameters() if id(p) in ids}


def test_names_without_weight_decay_exist(tiny_variant) -> None:
    model = tiny_variant()
    timms = {
        'pos_embed',
        'cls_token',
        'dist_token',
        'reg_token',
    }  # whether the model has them or not
    own = model.no_weight_decay() - timms
    assert own <= {name for name, _ in model.named_parameters()}


def test_what_weight_decay_touches_in_a_moe_layer(tiny_variant) -> None:
    model = tiny_variant(depth=2)
    prefix = 'blocks.1.mlp.'
    touched = {n.removeprefix(prefix) for n in decayed(model) if n.startswith(prefix)}
    # Matrices, and no bias though experts stack theirs to matrices; what else is left alone is
    # named by its module, see the examples below.
    layer = model.blocks[1].mlp
    named = {n.removeprefix(prefix) for n in model.no_weight_decay() if n.startswith(prefix)}
    may_be_touched = {n for n, p in layer.named_parameters() if p.ndim > 1 and 'bias' not in n}
    assert {'experts.fc1.weight', 'experts.fc2.weight'} <= touched <= may_be_touched - named


def test_layer_decay_decays_no_more_than_plain_groups_do(tiny_variant) -> None:
    # timm knows a bias by its single dimension there, and those of experts have two
    model = tiny_variant(depth=2)
    assert decayed(model, layer_decay=0.8) == decayed(model)


@pytest.mark.parametrize(
    ('method', 'options', 'name'),
    [
        ('smoe', {}, 'experts.fc1.bias'),
        ('smoe', {'router_bias': True}, 'router.bias'),
        ('xmoe', {}, 'router.log_temperature'),
        ('xmoe', {}, 'router.expert_embed'),
        ('stablemoe', {}, 'router.expert_embed'),
        ('stablemoe', {}, 'router.distilled.expert_embed'),
        ('softmoe', {}, 'slot_embed'),
        ('softmoe', {}, 'scale'),
        ('softmoe', {'slot_norm': 'rms'}, 'slot_gain'),
        ('vqmoe', {'codebook': 'plain'}, 'quantizer.codebook.embed'),
        ('vqmoe', {'codebook': 'cvq'}, 'quantizer.codebook.embed'),
        ('vqmoe', {'codebook': 'simvq'}, 'quantizer.codebook.project.weight'),
    ],
)
def test_what_weight_decay_leaves_alone(make_tiny, method: str, options: dict, name: str) -> None:
    model = make_tiny(method, depth=2, **options)
    full_name = f'blocks.1.mlp.{name}'
    assert full_name in dict(model.named_parameters())
    assert full_name not in decayed(model)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, step, steps: range) -> None:
    for i in steps:
        torch.manual_seed(i)
        images, targets = torch.randn(4, 3, 32, 32), torch.randint(10, (4,))
        step(model, optimizer, images, targets)


def test_a_resumed_run_equals_an_uninterrupted_one(tiny_variant, train_step) -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = tiny_variant()
        start_training(model, 30)  # StableMoE freezes its router after three: in the second part
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3)

    model, optimizer = start()
    train(model, optimizer, train_step, range(2))
    file = io.BytesIO()
    torch.save({'model': model.state_dict(), 'optimizer': optimizer.state_dict()}, file)
    train(model, optimizer, train_step, range(2, 5))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, optimizer = start()
    resumed.load_state_dict(saved['model'])
    optimizer.load_state_dict(saved['optimizer'])
    train(resumed, optimizer, train_step, range(2, 5))
    torch.testing.assert_close(resumed.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_the_stage_of_stablemoe_is_in_the_checkpoint(make_tiny, train_step, images) -> None:
    model = make_tiny('stablemoe', stage1_steps=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    flags = []
    for _ in range(3):
        train_step(model, optimizer, images, TARGETS)
        flags.append(bool(model.blocks[3].mlp.router.distilled.frozen))
    assert flags == [False, False, True]
    twin = make_tiny('stablemoe', stage1_steps=2)
    twin.load_state_dict(model.state_dict())
    assert bool(twin.blocks[3].mlp.router.distilled.frozen)
    with collect_losses(twin.train()) as collected:
        twin(images)
        assert collected.total() == 0  # stage 2 has no losses


def test_a_codebook_learned_without_gradients_is_in_the_checkpoint(
    make_tiny, train_step, images: Tensor
) -> None:
    model = make_tiny('vqmoe')
    train_step(model, None, images, TARGETS)
    codebook = model.blocks[1].mlp.quantizer.codebook
    assert bool(codebook.started)
    twin = make_tiny('vqmoe')
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin.blocks[1].mlp.quantizer.codebook.embed, codebook.embed)


# SoftMoE has a fixed number of slots, which has to be said when the size of the image changes
SLOTS = {'softmoe': {'slots_per_expert': 2}}


@pytest.fixture
def checkpoint(make_tiny, method: str, tmp_path: Path) -> tuple[dict[str, Tensor], Path]:
    model = make_tiny(method, **SLOTS.get(method, {}))
    nn.init.normal_(model.pos_embed)
    path = tmp_path / 'weights.pth'
    torch.save(model.state_dict(), path)
    return model.state_dict(), path


def expect_loaded(model: nn.Module, saved: dict[str, Tensor]) -> None:
    """All of `saved`, the position embeddings resampled from 4 x 4 to 8 x 8."""
    state = model.state_dict()
    for name, value in saved.items():
        if not name.endswith('pos_embed'):  # what reads images has one too
            assert torch.equal(state[name], value), name
    assert state['pos_embed'].shape == (1, 65, 32)
    assert torch.equal(state['pos_embed'][:, 0], saved['pos_embed'][:, 0])
    grid = saved['pos_embed'][:, 1:].view(1, 4, 4, 32).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, (8, 8), mode='bicubic', antialias=True)
    torch.testing.assert_close(
        state['pos_embed'][:, 1:], expected.flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-5
    )


def test_position_embeddings_are_resized_by_load_checkpoint(make_tiny, method, checkpoint) -> None:
    saved, path = checkpoint
    model = make_tiny(method, img_size=64, **SLOTS.get(method, {}))
    load_checkpoint(model, str(path), filter_fn=checkpoint_filter_fn)
    expect_loaded(model, saved)


def test_position_embeddings_are_resized_by_create_model(make_tiny, method, checkpoint) -> None:
    saved, path = checkpoint
    model = make_tiny(
        method,
        img_size=64,
        pretrained=True,
        pretrained_cfg_overlay={'file': str(path), 'num_classes': 10},
        **SLOTS.get(method, {}),
    )
    expect_loaded(model, saved)


def test_a_checkpoint_of_the_same_size_loads_through_create_model(
    make_tiny, method, checkpoint
) -> None:
    saved, path = checkpoint
    model = make_tiny(method, checkpoint_path=str(path), **SLOTS.get(method, {}))
    torch.testing.assert_close(dict(model.state_dict()), dict(saved), rtol=0, atol=0)


def test_weights_of_a_dense_model_fit_outside_the_experts(tiny) -> None:
    dense = timm.create_model(
        'vit_tiny_patch16_224',
        **{'img_size': 32, 'patch_size': 8, 'embed_dim': 32, 'depth': 4, 'num_heads': 2},
        num_classes=10,
    )
    missing, unexpected = tiny().load_state_dict(dense.state_dict(), strict=False)
    own = ('blocks.1.mlp.', 'blocks.3.mlp.', 'patch_embed.reader.')
    assert all(name.startswith(own) for name in missing)
    # fc1 and fc2, weight and bias, of the two MLPs that became MoE
    assert len(unexpected) == 8


def test_a_few_steps_reduce_the_loss(tiny_variant, train_step) -> None:
    model = tiny_variant(depth=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    images, targets = torch.randn(8, 3, 32, 32), torch.arange(8)
    losses = []
    for _ in range(2):
        losses.append(F.cross_entropy(model.eval()(images), targets).item())
        for _ in range(12):
            train_step(model, optimizer, images, targets)
    # eight images are learned by heart; chance is ln 10 = 2.3; slowest is the 'official' preset,
    # whose router does not learn
    assert losses[1] < 0.75 * losses[0]
