import json
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from sklearn.metrics import normalized_mutual_info_score
from torch import nn

from vqmoe_vision.analysis.measures import effective_rank
from vqmoe_vision.analysis.record import recorded
from vqmoe_vision.analysis.shifts import flip
from vqmoe_vision.analysis.survey import Survey, survey
from vqmoe_vision.analysis.tally import MOST_PATCHES, MOST_TOKENS
from vqmoe_vision.models.normalization import Normalization
from vqmoe_vision.moe import METHODS, moe_layers

from .. import cases, mostly_long, refused
from ..variants import VARIANTS
from .conftest import make

E, NAME, CLASSES = 4, 'blocks.1.mlp', ['a', 'b', 'c']
# the long suite has presets and trials, which test_record.py has too
EACH = mostly_long(VARIANTS, *METHODS)
AS_IT_IS = Normalization((0.0,) * 3, (1.0,) * 3)


def look(model: nn.Module, *batches, **options) -> Survey:
    return survey(model, batches, title='t', normalization=AS_IT_IS, **options)


@pytest.mark.parametrize('tiny_variant', EACH, indirect=True)
def test_every_method_can_be_looked_at(tiny_variant):
    batches = [(torch.rand(n, 3, 32, 32), torch.arange(n) % 3) for n in (3, 2)]
    seen = look(tiny_variant, *batches, classes=CLASSES, num_examples=4, shifts=[flip()])
    assert seen.images == 5 and seen.classes == CLASSES
    layer = seen.layers[NAME]
    assert layer.num_experts == E - getattr(tiny_variant.moe_config, 'num_shared_experts', 0)
    assert all(math.isfinite(value) for value in layer.numbers.values())
    assert layer.load.keys() == layer.expert_by_class.keys() == layer.confident.keys()
    for decider, load in layer.load.items():
        assert load.sum() == pytest.approx(1)
        # every token of every image but those that no expert takes, by class
        by_class = layer.expert_by_class[decider].sum(dim=0)
        if layer.numbers.get(f'{decider}/unrouted', 0) == 0:
            assert by_class.tolist() == pytest.approx([2 * 17, 2 * 17, 17])
        for patches, share in zip(layer.confident[decider], load, strict=True):
            assert len(patches) <= (MOST_PATCHES if share > 0 else 0)
            assert all(patch.pixels.shape == (3, 8, 8) for patch in patches)
    assert all(layer.similarity[kind].shape == (E, E) for kind in ('weights', 'outputs'))
    deciders = {f'{NAME}.{name}' for name in layer.load if name != 'slots'}
    assert set(seen.shifts['flip']) == deciders
    assert [example.name for example in seen.examples] == [f'image {i}' for i in range(4)]
    for example in seen.examples:
        maps = example.maps[NAME]
        assert maps.keys() >= layer.load.keys()
        assert ('expert 3' in maps) == ('slots' in layer.load)
        assert any(name.endswith(': codes') for name in maps) == (layer.codebook is not None)
        assert all(m.shape == (4, 4) for m in maps.values())
    assert json.loads(json.dumps(seen.content()))['layers'][NAME]['numbers'] == layer.numbers


@cases('options', {}, {'codebook': 'ema'}, {'codebook': 'ema', 'use_cosine_sim': True}, ids=str)
def test_the_numbers_are_those_of_the_record(options):
    model = make('vqmoe', num_codes=8, **options)
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        nn.init.normal_(moe_layers(model)[NAME].gate.weight)
        nn.init.normal_(moe_layers(model)[NAME].quantizer.codebook.embed)
    record = recorded(model, images)[NAME]
    layer = look(model, (images, torch.arange(3)), classes=CLASSES).layers[NAME]
    experts, codes = record.experts['router'].flatten(), record.codes['quantizer.codebook']
    assert torch.equal(layer.load['router'], experts.bincount(minlength=E) / 51)
    told = normalized_mutual_info_score(experts, torch.arange(51) // 17, average_method='min')
    shared = layer.numbers['router/normalized_mutual_information']
    assert shared == pytest.approx(told, abs=1e-6) and told > 0.01
    assert torch.equal(layer.codebook.usage, codes.flatten().bincount(minlength=8) / 51)
    nearest = torch.cdist(layer.codebook.tokens, layer.codebook.codes).argmin(dim=1)
    assert torch.equal(layer.codebook.indices, nearest)
    sampled = layer.codebook.tokens.norm(dim=1)
    of_length_one = options.get('use_cosine_sim', not options)
    assert torch.allclose(sampled, torch.ones(len(sampled))) == of_length_one
    book = moe_layers(model)[NAME].quantizer.codebook
    tokens = record.inputs.flatten(0, 1).double()
    quantized = book.as_long_as(tokens, layer.codebook.codes[codes.flatten()].double())
    distance = (tokens - quantized).square().sum().item()
    for name, mean in (('', 0), ('_around_mean', tokens.mean(dim=0))):
        value = layer.numbers[f'quantizer.codebook/quantization_error{name}']
        assert value == pytest.approx(distance / (tokens - mean).square().sum().item(), rel=1e-5)
    assert layer.numbers['gate_continuous'] == pytest.approx(record.gates[..., 0].mean().item())
    for name, side in (('before', record.inputs), ('after', record.outputs)):
        side = side.flatten(0, 1).double()
        rank = layer.numbers[f'effective_rank_{name}']
        assert rank == pytest.approx(effective_rank(side.T @ side), rel=1e-4)


def test_batches_change_nothing():
    model, images = make('vqmoe'), torch.rand(4, 3, 32, 32)
    labels = torch.tensor([0, 2, 1, 0])
    whole = look(model, (images, labels), classes=CLASSES)
    parts = look(model, *zip(images.split(1), labels.split(1), strict=True), classes=CLASSES)
    whole_layer, layer = whole.layers[NAME], parts.layers[NAME]
    assert layer.numbers == pytest.approx(whole_layer.numbers, rel=1e-4)
    for decider, patches in layer.confident.items():
        for ours, theirs in zip(patches, whole_layer.confident[decider], strict=True):
            assert [p.image for p in ours] == [p.image for p in theirs]
            assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(ours, theirs, strict=True))


def test_confident_patches_are_those_with_the_largest_weights():
    model, images = make('smoe', top_k=2), torch.rand(6, 3, 32, 32)
    record = recorded(model, images)[NAME]
    layer = look(model, *images.split(4)).layers[NAME]
    for expert in range(E):
        # prefix token left out; an expert takes a patch as its first or its second
        weights = torch.where(record.experts['router'] == expert, record.weights['router'], 0.0)
        weights = weights.sum(dim=-1)[:, 1:]
        best = weights.flatten().sort(descending=True)
        for rank, patch in enumerate(layer.confident['router'][expert]):
            assert patch.weight == pytest.approx(best.values[rank].item(), rel=1e-4)
            image, place = divmod(int(best.indices[rank]), 16)
            assert patch.image == image
            cut = F.unfold(images[image], 8, stride=8)[:, place].view(3, 8, 8)
            torch.testing.assert_close(patch.pixels, cut)
        expected = min(MOST_PATCHES, int((weights > 0).sum()))
        assert len(layer.confident['router'][expert]) == expected


def test_label_maps_count_patches_by_most_of_their_pixels():
    # upper half class 0, lower half class 2, except that the last patch is mostly ignored
    model, images = make('hashmoe'), torch.rand(2, 3, 32, 32)
    labels = torch.zeros(2, 32, 32, dtype=torch.long)
    labels[:, 16:] = 2
    labels[:, 24:, 25:] = 255
    layer = look(model, (images, labels), classes=CLASSES).layers[NAME]
    counts = layer.expert_by_class['router']
    assert counts.sum(dim=0).tolist() == [16, 0, 14]
    hash_ = moe_layers(model)[NAME].router.hash[1:17, 0]  # after the class token
    assert torch.equal(counts[:, 0], 2.0 * hash_[:8].bincount(minlength=E))


IMAGES = torch.rand(2, 3, 32, 32)


@cases(
    'batches, options, field',
    ([], {}, 'batches='),
    ([(IMAGES, torch.tensor([0, 1]))], {}, 'classes='),
    ([(IMAGES, torch.tensor([0, 3]))], {'classes': CLASSES}, 'labels='),
    ([(IMAGES, torch.tensor([0]))], {'classes': CLASSES}, 'labels='),
    ([IMAGES * torch.nan], {}, 'blocks.1.mlp: tokens are nan'),
)
def test_mistakes_are_refused(batches, options, field):
    refused(field, look, make('smoe'), *batches, **options)
    refused('dense', look, timm.create_model('vit_tiny_patch16_224', img_size=32, depth=1), IMAGES)


def test_memory_does_not_grow_with_images():
    model = make('vqmoe', num_experts=2)
    seen = look(model, *torch.rand(130, 3, 32, 32).split(26), num_examples=2)
    layer = seen.layers[NAME]
    assert len(layer.codebook.tokens) == MOST_TOKENS < 130 * 17
    pixels = [p.pixels for of in layer.confident.values() for taken in of for p in taken]
    assert 0 < len(pixels) <= 2 * 2 * MOST_PATCHES
    maps = [m for e in seen.examples for m in (e.image, *e.maps[NAME].values())]
    for kept in (*pixels, *maps):  # views would keep their whole batches
        assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()
