"""What is wrong with a layer: by hand, planted, and in layers that this package did not build."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vqmoe_vision.analysis import analyze, verdicts
from vqmoe_vision.analysis.adapters import decisions
from vqmoe_vision.analysis.verdicts import bits_of_choice, bits_of_load

from .. import cases, refused
from .planted import DEFECTS, METHODS, healthy, planted

B, N, E = 64, 16, 4
IMAGE, PLACE = torch.arange(B)[:, None].expand(B, N) % E, torch.arange(N).expand(B, N) % E


def noise(seed: int) -> Tensor:
    return torch.randint(E, (B, N), generator=torch.Generator().manual_seed(seed))


@cases(
    'first, again, image, position, neither',
    (IMAGE, IMAGE, 2, 0, 0),
    (PLACE, PLACE, 0, 2, 0),
    (noise(1), noise(2), 0, 0, 2),
    (noise(1), noise(1), 2, 0, 0),  # what another pass repeats is of the image
    (torch.zeros(B, N), torch.zeros(B, N), 0, 0, 0),
    # half without an expert: H = 1/2 + 1/2 log2 8 = 2, of which 1 is left where a place is known
    (torch.where(IMAGE > 1, PLACE, -1), torch.where(IMAGE > 1, PLACE, -1), 1, 1, 0),
)
def test_bits_by_hand(first, again, image, position, neither):
    bits = bits_of_choice(first, again, E)
    expected = {'image_bits': image, 'position_bits': position, 'noise_bits': neither}
    # chance has (E - 1)(N - 1) / 2T / ln 2 = 0.03 bits of a place, which are taken off
    assert bits == pytest.approx(expected, abs=0.06)
    # what chance gives as well is none at all
    assert (bits['image_bits'] == 0) == (image == 0)
    assert (bits['position_bits'] == 0) == (position == 0)


def test_one_decision_per_image():
    # of 64 images in four groups the image decides all, of two chance decides as much
    chosen, expected = torch.arange(B)[:, None] % E, {'position_bits': 0, 'noise_bits': 0}
    assert bits_of_choice(chosen, chosen, E) == pytest.approx({'image_bits': 2, **expected})
    assert bits_of_choice(chosen[:2], chosen[:2], E) == {}
    # that two tokens share an expert is seen by chance, with 4 experts and p = 1/4; of 64 it is not
    same = torch.zeros(B, 1)
    assert bits_of_choice(same[:2], same[:2], E) == {}
    assert bits_of_choice(same, same, E)['image_bits'] == 0
    # four images that differ: had another pass repeated them, chance would repeat them as well
    assert bits_of_choice(chosen[:4], torch.zeros(4, 1), E) == {}
    drawn = noise(1)[:, :1]
    assert bits_of_choice(drawn, noise(2)[:, :1], E)['image_bits'] == 0


def test_load_by_hand():
    # H(0.9, 0.1) = 0.469 of log2 4 = 2 bits
    bits, expected = bits_of_load(torch.tensor([90.0, 10, 0, 0]), 100), {'dead_by_chance': 0}
    assert bits == pytest.approx({'load_bits': 0.469, 'unused_bits': 1.531, **expected}, abs=1e-3)
    # two experts per token, the same two for all: nothing is left of log2 4 / 2 = 1 bit
    bits = bits_of_load(torch.tensor([50.0, 50, 0, 0]), 50)
    assert bits == pytest.approx({'load_bits': 0, 'unused_bits': 1, 'dead_by_chance': 0})
    # an even load lacks no more than chance does
    assert bits_of_load(torch.tensor([26.0, 24, 25, 25]), 100)['unused_bits'] == 0
    # of 100 codes 10 tokens leave at least 90 empty, and 10 or more wherever chance repeats one
    assert 90 < bits_of_load(torch.ones(100) * 0.1, 10)['dead_by_chance'] < 100


@cases(
    'defect, strength',
    *(('collapse', 0), ('dead codes', 0), *product(DEFECTS, [2])),
    *(pytest.param(defect, 3, marks=pytest.mark.long) for defect in DEFECTS),
)
def test_a_planted_defect_is_named(defect, strength):
    (words,) = planted(defect, strength, seed=0).verdicts.values()
    assert DEFECTS[defect] in words if strength else words == ['healthy']


@pytest.mark.parametrize('method', METHODS)
def test_no_alarm_where_nothing_is_planted(method):
    assert [*healthy(method, seed=0, steps=60).verdicts.values()] == [['healthy']]


class Host(nn.Module):
    """Patches of images, and a layer of somebody."""

    def __init__(self, layer: nn.Module, token_first: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.layer, self.token_first = nn.Conv2d(3, 16, 8, 8), layer, token_first

    def forward(self, images: Tensor) -> Any:
        tokens = self.patches(images).flatten(2).mT
        return self.layer(tokens.transpose(0, 1) if self.token_first else tokens)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.gate = nn.Linear(16, E)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x)


IMAGES = torch.rand(6, 3, 32, 32)


def test_a_router_by_its_name():
    model = Host(Own()).train()
    scores = model(IMAGES)
    (record,) = decisions(model, IMAGES).values()
    best = scores.softmax(dim=-1).topk(2)
    assert torch.equal(record.experts['router'], best.indices)
    assert torch.equal(record.weights['router'], best.values)
    assert model.training and not model.layer.gate._forward_hooks
    seen = analyze(model, IMAGES, torch.arange(6) % 3)
    assert seen.verdicts.keys() == seen.numbers.keys() == {'layer'}
    load = best.indices.flatten().bincount(minlength=E) / best.indices.numel()
    assert torch.equal(seen.layers['layer'].load['router'], load)
    assert seen.examples[0].maps['layer']['router'].shape == (4, 4)
    assert analyze(nn.DataParallel(model), IMAGES).numbers == analyze(model, IMAGES).numbers
    # tokens before images is the same
    (other,) = decisions(Host(Own(), token_first=True), IMAGES).values()
    assert torch.equal(other.experts['router'], best.indices)


def test_experts_of_transformers():
    transformers = pytest.importorskip('transformers', reason='pip install .[bench]')
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2)
    heads = dict(num_attention_heads=2, num_key_value_heads=2, num_local_experts=E)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads)).eval()
    texts = torch.randint(50, (8, 12))
    scores = model(texts, output_router_logits=True).router_logits
    records = decisions(model, texts)
    for record, logits in zip(records.values(), scores, strict=True):
        best = logits.softmax(dim=-1).topk(2).indices.view(8, 12, 2)
        assert torch.equal(record.experts['router'], best)
    words = analyze(model, texts).verdicts
    assert [*words] == [*records] == ['model.layers.0.mlp', 'model.layers.1.mlp']
    with torch.no_grad():  # routers without weights choose the same two experts everywhere
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()
    expected = [verdicts.COLLAPSED, verdicts.IGNORES]
    assert [*analyze(model, texts).verdicts.values()] == [expected] * 2


def test_slots_of_soft_moe_pytorch():
    library = pytest.importorskip('soft_moe_pytorch', reason='pip install .[bench]')
    layer = library.SoftMoE(16, num_experts=E, num_slots=2)
    model = Host(layer)
    (record,) = decisions(model, IMAGES).values()
    # its answer, from the weights that were read
    slots = torch.einsum('bnd,bnep->bepd', layer.norm(record.inputs), record.dispatch)
    expected = torch.einsum('bepd,bnep->bnd', layer.experts(slots), record.combine)
    torch.testing.assert_close(model(IMAGES), expected)
    assert [*analyze(model, IMAGES).layers['layer'].load] == ['slots']


def test_gates_of_st_moe_pytorch():
    library = pytest.importorskip('st_moe_pytorch', reason='pip install .[bench]')
    layer = library.MoE(16, num_experts=E, threshold_eval=0.0)  # the second is never left out
    model = Host(layer).eval()
    (record,) = decisions(model, IMAGES).values()
    _, combine, *_ = layer.gate(record.inputs)
    rebuilt = torch.zeros(*record.inputs.shape[:2], E + 1)
    rebuilt.scatter_(-1, record.experts['router'] % (E + 1), record.weights['router'])
    torch.testing.assert_close(rebuilt[..., :E], combine.sum(dim=-1))
    assert [*analyze(model, IMAGES).verdicts] == ['layer']


@cases(
    'model, options, said',
    (Host(Own()), {'top_k': 5}, 'top_k=5'),
    (Host(Own()), {'router': '*.none'}, 'dense'),
    (Host(Own()), {'labels': torch.tensor([0])}, 'labels=1'),
    (Host(Own()), {'labels': torch.full((6, 32, 32), 255)}, 'labels=255'),
)
def test_mistakes_are_refused(model, options, said):
    refused(said, analyze, model, IMAGES, **options)
    refused('images=1', analyze, model, IMAGES[:1])


def test_the_first_screen_names_what_is_wrong(tmp_path):
    model = Host(Own())
    with torch.no_grad():
        model.layer.gate.weight.zero_()
    seen = analyze(model, [IMAGES[:4], IMAGES[4:]], top_k=1)
    page = seen.save(tmp_path).read_text()
    first = page[: page.index('<nav')]
    assert all(word in first for word in seen.verdicts['layer'])
    assert seen.verdicts['layer'] == [verdicts.COLLAPSED, verdicts.IGNORES]
    # photographs, and their patches, in the layer too beside the surest of one expert
    assert first.count('<img') == 3 * 4 + 1
    assert seen.numbers['layer']['router/unused_bits'] == pytest.approx(2)
