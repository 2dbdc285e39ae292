import copy

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vqmoe_vision.analysis.shifts import (
    Shift,
    ShiftTally,
    convergence,
    corruption,
    corruptions,
    crop,
    flip,
    noise,
    routing_changes,
)
from vqmoe_vision.models.normalization import Normalization
from vqmoe_vision.moe import moe_layers
from vqmoe_vision.moe.experts import Experts
from vqmoe_vision.moe.layer import RoutedMlp
from vqmoe_vision.moe.routing import Router, Routing

E, ROUTER = 4, 'blocks.1.mlp.router'
NORMALIZATION = Normalization((0.5,) * 3, (0.5,) * 3)
PATCH = (8, 8)


class BrightnessRouter(Router):
    """Sends a token of brightness v in [0, 1] to expert floor(E v)."""

    def forward(self, x: Tensor) -> Routing:
        indices = (E * x[:, :1]).long().clamp(0, E - 1)
        return Routing(indices, torch.ones(indices.shape))


@pytest.fixture
def by_content() -> VisionTransformer:
    """Patches of 8 x 8 in images of 32 x 48, whose expert follows from their mean pixel alone."""
    sizes = dict(img_size=(32, 48), patch_size=8, embed_dim=2, depth=1, num_heads=1)
    model = VisionTransformer(**sizes, num_classes=0)
    for p in (model.pos_embed, model.cls_token):
        nn.init.zeros_(p)
    # of normalised pixels 2 v - 1
    nn.init.constant_(model.patch_embed.proj.weight, 0.5 / (3 * 64))
    nn.init.constant_(model.patch_embed.proj.bias, 0.5)
    model.blocks = nn.Sequential(RoutedMlp(BrightnessRouter(), Experts(E, 2, 2)))
    return model.eval()


def shares(model: nn.Module, pixels: Tensor, *shifts: Shift, batch: int = 3) -> dict:
    tally = ShiftTally(model, NORMALIZATION, shifts)
    for part in pixels.split(batch):
        tally.add(NORMALIZATION.normalized(part))
    return {name: of.get(ROUTER, of.get('blocks.0.router')) for name, of in tally.shares().items()}


def flat_patches(images: int) -> Tensor:
    """Every patch has one brightness, away from the borders between experts."""
    levels = (torch.randint(E, (images, 1, 4, 6)) + 0.5) / E
    return levels.repeat_interleave(8, -2).repeat_interleave(8, -1).expand(-1, 3, -1, -1)


def test_experts_by_content_follow_their_patches(by_content):
    found = shares(by_content, flat_patches(3), flip(), crop(), noise(0.01))
    assert found == {'flip': 0, 'crop': 0, 'noise 0.01': 0}


def test_collapsed_routing_is_perfectly_consistent_and_random_pixels_are_not(by_content):
    found = shares(by_content, torch.zeros(2, 3, 32, 48), flip(), noise(0.05))
    assert found == {'flip': 0, 'noise 0.05': 0}
    replaced = Shift('other', lambda pixels, first, patch: flat_patches(len(pixels)))
    # 2,400 patches of four experts: 3/4 change, std sqrt(3/16 / 2400) = 0.009, five of them
    share = shares(by_content, flat_patches(100), replaced, batch=50)['other']
    assert share == pytest.approx(0.75, abs=0.045)


@pytest.mark.parametrize('shift', [*corruptions([3]), noise(0.1)], ids=lambda shift: shift.name)
def test_an_image_is_always_changed_alike_and_nothing_else_is(shift):
    pixels = torch.rand(3, 3, 40, 32)
    pixels[2] = pixels[1]
    kept = pixels.clone()
    changed = shift.change(pixels, 0, PATCH)
    np.random.rand(3)
    torch.rand(3)
    assert torch.equal(changed[1:2], shift.change(pixels[1:2], 1, PATCH))  # in another batch
    assert changed.shape == pixels.shape
    assert not torch.equal(changed, pixels)
    assert 0 <= changed.min() <= changed.max() <= 1
    assert torch.equal(pixels, kept)


def test_corruptions_leave_numpys_generator_alone_and_differ_between_images():
    pixels = torch.rand(1, 3, 32, 32).expand(2, -1, -1, -1)
    for name in ('impulse_noise', 'glass_blur', 'snow'):
        state = np.random.get_state()[1].copy()
        changed = corruption(name, 3).change(pixels, 0, PATCH)
        assert (np.random.get_state()[1] == state).all()
        assert not torch.equal(changed[0], changed[1])


def test_corruptions_of_grey_images_are_grey_and_small_ones_are_refused():
    changed = corruption('frost', 1).change(torch.rand(2, 1, 32, 32), 0, PATCH)
    assert changed.shape == (2, 1, 32, 32)
    with pytest.raises(ValueError, match='images='):
        corruption('fog', 1).change(torch.rand(1, 3, 31, 40), 0, PATCH)


NAME = 'blocks.1.mlp'


def test_changes_between_checkpoints_are_counted_over_all_images(make_tiny):
    before = make_tiny('smoe')
    after = copy.deepcopy(before)
    images = torch.rand(3, 3, 32, 32)
    assert routing_changes(before, after, images.split(2)) == {f'{NAME}.router': 0}
    with torch.no_grad():
        router = moe_layers(after)[NAME].router
        router.weight.copy_(router.weight.roll(1, dims=0))  # every expert has another number
    assert routing_changes(before, after, images.split(2)) == {f'{NAME}.router': 1}


def test_a_part_that_arrives_first_has_converged_first(make_tiny):
    # the router has its last weights at the second checkpoint of three, the experts are half way
    start = make_tiny('vqmoe', num_experts=2).state_dict()
    moved = {n: torch.randn_like(v) for n, v in start.items() if v.is_floating_point()}
    end = {n: v + moved.get(n, 0) for n, v in start.items()}
    middle = {n: v + moved.get(n, 0) * (1 if '.router.' in n else 0.5) for n, v in start.items()}
    found = convergence([start, middle, end], [NAME])
    assert found.keys() == {f'{NAME}.{part}' for part in ('router', 'quantizer', 'gate', 'experts')}
    assert found[f'{NAME}.router']['distance'] == pytest.approx([1, 0, 0], abs=1e-6)
    assert found[f'{NAME}.experts']['distance'] == pytest.approx([1, 0.5, 0], abs=1e-6)
    first, second, third = found[f'{NAME}.experts']['similarity']
    assert first < second < third == pytest.approx(1)
