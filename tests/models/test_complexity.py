"""Counts by formula against torch's own counter and against counts by hand."""

import copy
from collections.abc import Iterator

import pytest
import timm
import torch
from timm.layers import set_fused_attn, use_fused_attn
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmark.ours import with_loops
from vqmoe_vision.models import complexity
from vqmoe_vision.moe.codebook_learning import SimVQCodebook
from vqmoe_vision.moe.collect import moe_layers


@pytest.fixture(autouse=True)
def _plain_attention() -> Iterator[None]:
    """The counter sees matrix products, not fused attention."""
    before = use_fused_attn()
    set_fused_attn(False)
    yield
    set_fused_attn(bool(before))


def counted_macs(model: nn.Module, images: Tensor) -> int:
    """Per image, with experts as plain loops, whose products torch's counter knows.

    Without the products of SimVQ's codes with its projection, done per batch.
    """
    plain = copy.deepcopy(model).eval()
    for name, layer in moe_layers(plain).items():
        plain.set_submodule(name, with_loops(layer))
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        plain(images)
    codebooks = [m for m in model.modules() if isinstance(m, SimVQCodebook)]
    per_batch = sum(book.num_codes * book.dim**2 for book in codebooks)
    per_image, rest = divmod(counter.get_total_flops() // 2 - per_batch, len(images))
    assert rest == 0
    return per_image


def test_macs_are_what_torch_counts(tiny_variant) -> None:
    model = tiny_variant()
    assert complexity(model).macs == counted_macs(model, torch.randn(2, 3, 32, 32))


def test_macs_follow_the_size_and_the_head(tiny) -> None:
    model = tiny(reg_tokens=2, qkv_bias=False)
    model.set_input_size(img_size=(24, 48))
    model.reset_classifier(0)
    assert complexity(model).macs == counted_macs(model, torch.randn(1, 3, 24, 48))


def test_a_dense_timm_model_counts_too() -> None:
    model = timm.create_model('vit_tiny_patch16_224', img_size=32)
    counts = complexity(model)
    assert counts.macs == counted_macs(model, torch.randn(1, 3, 32, 32))
    assert counts.params == counts.active_params == sum(p.numel() for p in model.parameters())


# Default tiny layers: expert of 32 x 128: 32 * 128 + 128 + 128 * 32 + 32 = 8352 parameters, eight
# of them in each of two MoE blocks. Idle experts per block:
@pytest.mark.parametrize(
    ('method', 'options', 'idle'),
    [
        ('smoe', {}, 6),
        ('smoe', {'top_k': 8}, 0),
        ('xmoe', {}, 7),
        ('stablemoe', {}, 7),
        ('stablemoe', {'preset': 'group'}, 6),
        ('softmoe', {}, 0),
        ('vqmoe', {}, 6),
        ('vqmoe', {'form': 'discrete'}, 7),
        ('vqmoe', {'num_experts': 1}, 0),
    ],
)
def test_active_parameters_leave_idle_experts_out(
    make_tiny, method: str, options: dict, idle: int
) -> None:
    model = make_tiny(method, **options)
    counts = complexity(model)
    assert counts.params == sum(p.numel() for p in model.parameters())
    assert counts.params - counts.active_params == 2 * idle * 8352


def test_known_answer_of_smoe(make_tiny) -> None:
    # 16 patches, 17 tokens, D = 32, H = 128, per image:
    #   stem        16 * (8 * 8 * 3) * 32          =   98 304
    #   attention   17 * 32 * (96 + 32) + 2 * 17^2 * 32 = 69 632 + 18 496 = 88 128, times 4
    #   dense mlp   17 * 2 * 32 * 128              =  139 264, times 2
    #   SMoE        17 * (8 * 32 + 2 * 2 * 32 * 128) = 17 * 16 640 = 282 880, times 2
    #   head        32 * 10                        =      320
    expected = 98_304 + 4 * 88_128 + 2 * 139_264 + 2 * 282_880 + 320
    assert expected == 1_295_424
    assert complexity(make_tiny('smoe')).macs == expected


def test_macs_of_vit_b_are_the_published_ones() -> None:
    # The ViT-B/16 at 224 has 86.6 M parameters and 17.6 GMACs (timm, torchvision: 17.56)
    counts = complexity(timm.create_model('vit_base_patch16_224', device='meta'))
    assert round(counts.params / 1e6, 1) == 86.6
    assert round(counts.macs / 1e9, 2) == 17.56


def test_printing_a_model_tells_its_cost(tiny) -> None:
    model = tiny()
    counts = complexity(model)
    text = str(model)
    assert f'{counts.params / 1e6:.2f}M parameters' in text
    assert f'{counts.active_params / 1e6:.2f}M active' in text
    assert f'{counts.macs / 1e9:.3f} GMACs per image' in text


def test_other_models_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r'model=Linear is not possible: a timm VisionTransformer'):
        complexity(nn.Linear(2, 2))
