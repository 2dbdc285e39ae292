import pytest
import torch
from torch import Tensor, nn

import vqmoe_vision  # noqa: F401  registers the models
from vqmoe_vision import collect_losses
from vqmoe_vision.analysis import mean_statistics, measures, token_experts
from vqmoe_vision.analysis.record import LayerRecord, record_layers
from vqmoe_vision.moe import moe_layers
from vqmoe_vision.moe.experts import Experts
from vqmoe_vision.moe.layer import MoeLayer, RoutedMlp
from vqmoe_vision.moe.routing import Router, Routing

from .conftest import make

E, NAME = 4, 'blocks.1.mlp'


@torch.no_grad()
def answer(layer: MoeLayer, record: LayerRecord) -> Tensor:
    """The layer's answer, computed anew from nothing but what was recorded."""
    if record.dispatch is not None:
        norm = getattr(layer, 'token_norm', None)
        tokens = record.inputs if norm is None else norm(record.inputs)
        slots = torch.einsum('bnep,bnd->ebpd', record.dispatch, tokens)
        own = [
            measures.expert_outputs(layer.experts, of.flatten(0, 1))[e].view(of.shape)
            for e, of in enumerate(slots)
        ]
        return torch.einsum('bnep,ebpd->bnd', record.combine, torch.stack(own))
    total = torch.zeros_like(record.inputs).flatten(0, 1)
    for decider, experts in record.experts.items():
        inputs = record.inputs.flatten(0, 1)
        if decider in record.codes:  # what the experts of a codebook are fed
            inputs = layer.get_submodule(decider.rpartition('.')[0])(inputs, inputs)[0]
        outputs = measures.expert_outputs(layer.experts, inputs)
        if decider in record.codes and getattr(layer, 'output_norm', None) is not None:
            outputs = layer.output_norm(outputs)
        weights = record.weights[decider]
        both = experts.flatten(0, 1).t(), weights.flatten(0, 1).t()
        for chosen, weight in zip(*both, strict=True):
            taken = outputs[chosen.clamp(min=0), torch.arange(len(chosen))]
            total += taken * weight[:, None]
    return total.view(record.inputs.shape)


def test_what_is_recorded_is_all_that_the_answer_needs(tiny_variant):
    layer, given = moe_layers(tiny_variant)[NAME], []
    layer.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    if getattr(layer, 'gate', None) is not None:
        nn.init.normal_(layer.gate.weight)  # else both branches have the same weight
    for name, parameter in layer.named_parameters():
        if name.endswith('cluster_embed'):  # else a weight beside a large one underflows
            nn.init.normal_(parameter, std=0.02)
    with torch.no_grad(), record_layers(tiny_variant) as records:
        assert records == {}
        tiny_variant(torch.randn(3, 3, 32, 32))
    record = records[NAME]
    assert torch.equal(record.inputs, given[0]) and record.num_experts == E
    assert record.inputs.shape == record.outputs.shape == (3, 17, 16)
    torch.testing.assert_close(answer(layer, record), record.outputs, rtol=1e-4, atol=1e-6)
    for decider, experts in record.experts.items():
        assert isinstance(layer.get_submodule(decider), nn.Module)
        weights = record.weights[decider]
        assert experts.shape == weights.shape and experts.shape[:2] == (3, 17)
        assert torch.equal(experts == -1, weights == 0)
    if record.gates is not None:
        torch.testing.assert_close(record.gates.sum(-1), torch.ones(3, 17))
    if record.dispatch is not None:
        torch.testing.assert_close(record.dispatch.sum(1), torch.ones(record.dispatch[:, 0].shape))
        torch.testing.assert_close(record.combine.sum((2, 3)), torch.ones(3, 17))


def test_an_error_closes_the_block_and_blocks_do_not_nest():
    model = make('smoe')
    with pytest.raises(ZeroDivisionError), record_layers(model):
        raise ZeroDivisionError
    with record_layers(model) as records:
        with pytest.raises(RuntimeError, match='do not nest'), record_layers(model):
            pass
        model(torch.zeros(1, 3, 32, 32))
    assert records.keys() == {NAME}  # the refused one has closed nothing of the other


def test_dropped_assignments_have_no_expert_and_come_last():
    # token 0 keeps both, token 1 its second, token 2 none
    routing = Routing(
        torch.tensor([[0, 1], [1, 0], [1, 2]]),
        torch.tensor([[0.6, 0.3], [0.5, 0.4], [0.5, 0.2]]),
        kept=torch.tensor([[True, True], [False, True], [False, False]]),
    )
    router = Router()
    router.forward = lambda x: routing
    layer = RoutedMlp(router, Experts(3, in_features=2, hidden_features=2))
    with torch.no_grad(), record_layers(layer) as records:
        layer(torch.randn(1, 3, 2))
    assert records[''].experts['router'].tolist() == [[[0, 1], [0, -1], [-1, -1]]]
    expected = torch.tensor([[[0.6, 0.3], [0.4, 0.0], [0.0, 0.0]]])
    torch.testing.assert_close(records[''].weights['router'], expected)


def test_load_is_what_the_layer_reports(tiny_variant):
    collecting = collect_losses(tiny_variant, update_state=False)
    with torch.no_grad(), record_layers(tiny_variant) as records, collecting as collected:
        tiny_variant(torch.randn(3, 3, 32, 32))
    record = records[NAME]
    if not record.experts:
        assert f'{NAME}/load' not in collected.stats  # slots have none
        return
    of_experts = torch.zeros(E - record.shared)
    for experts, _ in record.chosen.values():
        of_experts += experts[experts >= 0].bincount(minlength=len(of_experts))
    if getattr(tiny_variant.moe_config, 'eval_capacity_factor', None) is not None:
        assert of_experts.sum() < record.experts['router'].numel()
        return
    torch.testing.assert_close(of_experts / of_experts.sum(), collected.stats[f'{NAME}/load'])


def test_looking_changes_nothing(tiny_variant):
    tiny_variant.train()
    images = torch.randn(2, 3, 32, 32)

    def step() -> list[Tensor]:
        torch.manual_seed(1)
        tiny_variant.zero_grad()
        with collect_losses(tiny_variant, update_state=False) as collected:
            loss = tiny_variant(images).square().sum() + collected.total()
            loss.backward()
        return [loss.detach(), *(p.grad for p in tiny_variant.parameters() if p.grad is not None)]

    expected = step()
    with record_layers(tiny_variant):
        looked_at = step()
    assert all(torch.equal(a, b) for a, b in zip(expected, looked_at, strict=True))


class BrightnessRouter(Router):
    """Sends a token of value v to expert v first, to expert v + 1 second."""

    def forward(self, x: Tensor) -> Routing:
        first = x[:, 0].long()
        indices = torch.stack([first, (first + 1) % 4], dim=1)
        return Routing(indices, torch.full(indices.shape, 0.5))


class Pixels(nn.Module):
    """A model whose tokens are the pixels of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = RoutedMlp(BrightnessRouter(), Experts(4, in_features=1, hidden_features=2))
        self.modes: list[bool] = []

    def forward(self, images: Tensor) -> Tensor:
        self.modes.append(self.training)
        return self.mlp(images.flatten(1).unsqueeze(-1))


def image(*rows: list[float]) -> Tensor:
    return torch.tensor([[rows]])


def test_every_image_counts_the_same_whatever_its_batch():
    # Pixels 0 0 0 1: experts 0, 1 three times and 1, 2 once: (3, 4, 1, 0) / 8. Pixels 2 2 2 2:
    # (0, 0, 4, 4) / 8. Two images of the first kind and one of the second:
    # (6, 8, 6, 4) / 24. A mean over batches instead of images would give (3, 4, 5, 4) / 16.
    first, second = image([0.0, 0.0], [0.0, 1.0]), image([2.0, 2.0], [2.0, 2.0])
    model = Pixels().train()
    model.mlp.eval()
    usage = mean_statistics(model, [torch.cat([first, first]), second])
    torch.testing.assert_close(usage['mlp/load'], torch.tensor([6.0, 8.0, 6.0, 4.0]) / 24)
    token_experts(model, first)
    assert model.modes == [False] * 3 and model.training and not model.mlp.training
