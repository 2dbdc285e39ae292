import copy
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import mutual_info_score, normalized_mutual_info_score
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vqmoe_vision.analysis import measures, patch_experts, shifts
from vqmoe_vision.models.normalization import Normalization
from vqmoe_vision.moe import moe_layers
from vqmoe_vision.moe.experts import Experts
from vqmoe_vision.moe.layer import RoutedMlp
from vqmoe_vision.moe.routing import Router, Routing

from .. import cases
from .conftest import make

E = 4
ONE_TAKES_ALL = torch.tensor([0.0, 12.0, 0.0, 0.0])
EVEN = torch.full((E,), 3.0)


@pytest.mark.parametrize('experts', [2, 3, 8])
def test_measures_of_load_do_not_depend_on_numbering_or_amount_and_keep_their_range(experts):
    load = torch.randint(50, (experts,)).scatter(0, torch.tensor([0]), 7)
    ranges = {
        measures.load_entropy: (0, 1),
        measures.load_variation: (0, math.sqrt(experts - 1)),
        measures.num_dead: (0, experts - 1),
        measures.usage_perplexity: (1, experts),
    }
    for measure, (low, high) in ranges.items():
        value = measure(load)
        assert low - 1e-9 <= value <= high + 1e-9
        assert measure(load.flip(0)) == pytest.approx(value)
        assert measure(load / load.sum()) == pytest.approx(value, abs=1e-6)
        # the far ends: of a load E, 0, .. 0 the variance is ((E - 1)^2 + E - 1) / E = E - 1
        ends = {measure(torch.ones(experts)), measure(torch.eye(experts)[0])}
        assert sorted(ends) == pytest.approx([low, high], abs=1e-6)


@pytest.mark.parametrize('shape', [(2, 2), (5, 3), (3, 5)])
@pytest.mark.parametrize('most', [1, 3, 20])
def test_mutual_information_agrees_with_scikit_learn(shape, most):
    table = torch.randint(most + 1, shape)
    table[0, 0] = 1
    experts, labels = table.nonzero().t().repeat_interleave(table[table > 0], dim=1).numpy()
    expected = mutual_info_score(experts, labels)
    assert measures.mutual_information(table) == pytest.approx(expected, abs=1e-9)
    assert measures.mutual_information(table.t().flip(0)) == pytest.approx(expected, abs=1e-9)
    if (table.sum(0) > 0).sum() > 1 and (table.sum(1) > 0).sum() > 1:
        expected = normalized_mutual_info_score(experts, labels, average_method='min')
        assert measures.normalized_mutual_information(table) == pytest.approx(expected, abs=1e-9)


def test_effective_rank_is_that_of_the_singular_values_in_any_basis_and_length():
    tokens = torch.randn(40, 8) @ torch.randn(8, 8)
    shares = torch.linalg.svdvals(tokens.double())
    shares = shares / shares.sum()
    expected = math.exp(-(shares * shares.log()).sum())
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    for same in (tokens, tokens[torch.randperm(40)], tokens @ rotation, 7 * tokens):
        same = same.double()
        assert measures.effective_rank(same.t() @ same) == pytest.approx(expected, rel=1e-5)


def test_identical_experts_are_wholly_similar_and_others_are_not():
    tokens = torch.randn(9, 6)
    for similar in (True, False):
        experts = Experts(E, in_features=6, hidden_features=5)
        for p in experts.parameters():
            nn.init.normal_(p)
            p.data[:] = p.data[0].clone() if similar else p.data
        by_weights = measures.weight_similarity(experts)
        by_outputs = measures.output_similarity(measures.expert_outputs(experts, tokens))
        for similarity in (by_weights, by_outputs):
            torch.testing.assert_close(similarity.diagonal(), torch.ones(E).double())
            mean = measures.mean_similarity(similarity)
            assert mean == pytest.approx(1) if similar else abs(mean) < 0.5


def test_cosine_of_outputs_is_averaged_over_tokens():
    # expert 0 answers (1, 0) and (0, 2), expert 1 (3, 0) and (5, 0): cosines 1 and 0
    outputs = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 0.0], [5.0, 0.0]]])
    similarity = measures.output_similarity(outputs)
    assert similarity.tolist() == [[1, 0.5], [0.5, 1]]
    assert measures.mean_similarity(similarity) == 0.5


def test_changed_share_counts_tokens():
    before = torch.tensor([[0, 1, 2, -1]])
    assert measures.changed_share(before, before) == 0
    assert measures.changed_share(before, torch.tensor([[0, 2, 2, 3]])) == 0.5
    # renumbered experts route alike, and yet all seem to change
    assert measures.changed_share(before, (before + 1) % 4) == 1


def test_chance_of_change_is_the_change_of_a_routing_drawn_anew():
    assert measures.chance_of_change(ONE_TAKES_ALL) == 0
    assert measures.chance_of_change(EVEN) == pytest.approx(1 - 1 / E)
    # shares 1/2, 1/4, 1/4: 1 - 1/4 - 1/16 - 1/16
    assert measures.chance_of_change(torch.tensor([2.0, 1.0, 1.0])) == pytest.approx(0.625)


def test_parameters_approach_the_last_checkpoint():
    # at (1, 0), (1, 1), (0, 2): cosines with (0, 2) are 0, 1 / sqrt 2, 1;
    # distances are sqrt 5, sqrt 2, 0 of sqrt 5
    trajectory = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
    assert measures.similarity_to_last(trajectory).tolist() == pytest.approx([0, 0.5**0.5, 1])
    assert measures.distance_to_last(trajectory).tolist() == pytest.approx([1, 0.4**0.5, 0])
    assert measures.distance_to_last(torch.ones(3, 2)).tolist() == [0, 0, 0]


ROUTER = 'blocks.1.mlp.router'
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


def shares(model: nn.Module, pixels: Tensor, *changes: shifts.Shift, batch: int = 3) -> dict:
    tally = shifts.ShiftTally(model, NORMALIZATION, changes)
    for part in pixels.split(batch):
        tally.add(NORMALIZATION.normalized(part))
    return {name: of.get(ROUTER, of.get('blocks.0.router')) for name, of in tally.shares().items()}


def flat_patches(images: int) -> Tensor:
    """Every patch has one brightness, away from the borders between experts."""
    levels = (torch.randint(E, (images, 1, 4, 6)) + 0.5) / E
    return levels.repeat_interleave(8, -2).repeat_interleave(8, -1).expand(-1, 3, -1, -1)


def test_experts_by_content_follow_their_patches(by_content):
    pixels = flat_patches(3)
    found = shares(by_content, pixels, shifts.flip(), shifts.crop(), shifts.noise(0.01))
    assert found == {'flip': 0, 'crop': 0, 'noise 0.01': 0}
    # the class token is left out
    experts = patch_experts(by_content, NORMALIZATION.normalized(pixels))['blocks.0.router']
    assert torch.equal(experts, (E * pixels[:, 0, ::8, ::8]).long())


def test_collapsed_routing_is_perfectly_consistent_and_random_pixels_are_not(by_content):
    found = shares(by_content, torch.zeros(2, 3, 32, 48), shifts.flip(), shifts.noise(0.05))
    assert found == {'flip': 0, 'noise 0.05': 0}
    replaced = shifts.Shift('other', lambda pixels, first, patch: flat_patches(len(pixels)))
    # 2,400 patches of four experts: 3/4 change, std sqrt(3/16 / 2400) = 0.009, five of them
    found = shares(by_content, flat_patches(100), replaced, batch=50)
    assert found == {'other': pytest.approx(0.75, abs=0.045)}


@cases('shift', *shifts.all_shifts([3])[3:], shifts.noise(0.1), ids=lambda shift: shift.name)
def test_an_image_is_always_changed_alike_and_nothing_else_is(shift):
    pixels = torch.rand(3, 3, 40, 32)
    pixels[2] = pixels[1]
    kept = pixels.clone()
    state = np.random.get_state()[1].copy()
    changed = shift.change(pixels, 0, PATCH)
    assert (np.random.get_state()[1] == state).all()
    np.random.rand(3)
    torch.rand(3)
    assert torch.equal(changed[1:2], shift.change(pixels[1:2], 1, PATCH))  # in another batch
    assert changed.shape == pixels.shape
    assert not torch.equal(changed, pixels)
    assert 0 <= changed.min() <= changed.max() <= 1
    assert torch.equal(pixels, kept)


def test_corruptions_of_grey_images_are_grey_and_small_ones_are_refused():
    changed = shifts.corruption('frost', 1).change(torch.rand(2, 1, 32, 32), 0, PATCH)
    assert changed.shape == (2, 1, 32, 32)
    with pytest.raises(ValueError, match='images='):
        shifts.corruption('fog', 1).change(torch.rand(1, 3, 31, 40), 0, PATCH)


NAME = 'blocks.1.mlp'


def test_changes_between_checkpoints_are_counted_over_all_images():
    before, batches = make('smoe'), torch.rand(3, 3, 32, 32).split(2)
    after = copy.deepcopy(before)
    assert shifts.routing_changes(before, after, batches) == {ROUTER: 0}
    router = moe_layers(after)[NAME].router
    router.weight.data = router.weight.data.roll(1, dims=0)  # every expert has another number
    assert shifts.routing_changes(before, after, batches) == {ROUTER: 1}


def test_a_part_that_arrives_first_has_converged_first():
    # the router has its last weights at the second checkpoint of three, the experts are half way
    start = make('vqmoe', num_experts=2).state_dict()
    moved = {n: torch.randn_like(v) for n, v in start.items() if v.is_floating_point()}
    end = {n: v + moved.get(n, 0) for n, v in start.items()}
    middle = {n: v + moved.get(n, 0) * (1 if '.router.' in n else 0.5) for n, v in start.items()}
    found = shifts.convergence([start, middle, end], [NAME])
    assert found.keys() == {f'{NAME}.{part}' for part in ('router', 'quantizer', 'gate', 'experts')}
    assert found[f'{NAME}.router']['distance'] == pytest.approx([1, 0, 0], abs=1e-6)
    assert found[f'{NAME}.experts']['distance'] == pytest.approx([1, 0.5, 0], abs=1e-6)
    first, second, third = found[f'{NAME}.experts']['similarity']
    assert first < second < third == pytest.approx(1)
