"""Counts by formula against torch's own counter and against counts by hand."""

from collections.abc import Iterator

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import set_fused_attn, use_fused_attn
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vqmoe_vision.models import complexity
from vqmoe_vision.moe import METHODS
from vqmoe_vision.moe.experts import StackedLinear
from vqmoe_vision.moe.kernels import Groups

from .. import cases, on_meta
from .conftest import SHALLOW, make


@pytest.fixture(autouse=True)
def _plain_attention() -> Iterator[None]:
    """The counter sees matrix products, not fused attention."""
    before = use_fused_attn()
    set_fused_attn(False)
    yield
    set_fused_attn(bool(before))


@pytest.fixture
def plain_loops(monkeypatch) -> None:
    """Experts one after the other, as products that torch's counter knows without our formula."""

    def forward(self: StackedLinear, rows: Tensor, plan: Groups, gelu: str | None = None) -> Tensor:
        rows = rows if gelu is None else F.gelu(rows, approximate=gelu)
        ends = plan.ends.tolist()
        groups = zip([0, *ends[:-1]], ends, self.weight, strict=True)
        return torch.cat([F.linear(rows[start:end], weight) for start, end, weight in groups])

    monkeypatch.setattr(StackedLinear, 'forward', forward)


def test_macs_are_what_torch_counts(tiny_variant, request):
    model = tiny_variant(**SHALLOW)
    if getattr(model.moe_config, 'eval_capacity_factor', None) is not None:
        pytest.skip('what a capacity drops depends on the images, and is counted')
    counts = complexity(model)
    request.getfixturevalue('plain_loops')
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.randn(1, 3, 32, 32))
    assert counts.macs == counter.get_total_flops() // 2


# Default tiny layers: expert of 32 x 128: 32 * 128 + 128 + 128 * 32 + 32 = 8352 parameters, eight
# of them in each of two MoE blocks.
EXPERT = 8352


@cases(
    'method, options, idle',
    ('smoe', {}, 6),
    ('smoe', {'top_k': 8}, 0),
    ('smoe', {'preset': 'shared'}, 6),
    ('smoe', {'num_shared_experts': 3}, 3),
    ('xmoe', {}, 7),
    ('softmoe', {}, 0),
    ('vqmoe', {}, 6),
    ('vqmoe', {'form': 'discrete'}, 7),
    ('vqmoe', {'num_experts': 1}, 0),
    # of 16 tokens each of eight experts takes two
    ('ecmoe', {'capacity_factor': 1.0, 'class_token': False, 'global_pool': 'avg'}, 7),
)
def test_known_numbers_of_idle_experts(method, options, idle):
    counts = complexity(make(method, **options))
    assert counts.params - counts.active_params == 2 * idle * EXPERT


@pytest.mark.parametrize('method', [n for n, m in METHODS.items() if 'matched' in m.config.PRESETS])
def test_matched_has_the_compute_of_two_experts_per_token(method):
    # 16 tokens, all of them patches; two MoE blocks, D = 32
    kwargs = {'preset': 'matched', 'class_token': False, 'global_pool': 'avg'}
    models = [make(method, expert_mlp_ratio=ratio, **kwargs) for ratio in (1.0, 2.0)]
    narrow, wide = (complexity(model).macs for model in models)
    # Only the experts grow: by 32 hidden units, of 32 products in and 32 out, for each row
    assert wide - narrow == 2 * (2 * 16) * 2 * 32 * 32


def test_known_answer_of_smoe():
    # 16 patches, 17 tokens, D = 32, H = 128, per image:
    #   stem        16 * (8 * 8 * 3) * 32          =   98 304
    #   attention   17 * 32 * (96 + 32) + 2 * 17^2 * 32 = 69 632 + 18 496 = 88 128, times 4
    #   dense mlp   17 * 2 * 32 * 128              =  139 264, times 2
    #   SMoE        17 * (8 * 32 + 2 * 2 * 32 * 128) = 17 * 16 640 = 282 880, times 2
    #   head        32 * 10                        =      320
    expected = 98_304 + 4 * 88_128 + 2 * 139_264 + 2 * 282_880 + 320
    assert expected == 1_295_424
    assert complexity(make('smoe')).macs == expected


@cases(
    'preset, experts',
    ('fine', 32),  # eight of a quarter of the width are as much as two
    ('shared', 7),  # the one that all tokens have is not chosen
)
def test_presets_of_equal_compute_differ_by_the_router_alone(preset, experts):
    # 17 tokens, D = 32: two routers of 32 products for each expert that can be chosen
    found, matched = (complexity(make('smoe', preset=p)).macs for p in (preset, 'matched'))
    assert found - matched == 2 * 17 * 32 * (experts - 8)


def test_macs_of_vit_b_are_the_published_ones():
    # The ViT-B/16 at 224 has 86.6 M parameters and 17.6 GMACs (timm, torchvision: 17.56)
    with on_meta():
        counts = complexity(timm.create_model('vit_base_patch16_224'))
    assert round(counts.params / 1e6, 1) == 86.6
    assert round(counts.macs / 1e9, 2) == 17.56
