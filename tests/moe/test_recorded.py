"""What the authors' own code answers, recorded as numbers, against ours.

Each file in `recorded` names its source. Inputs and weights have three decimals, so they are the
same in their code, which ran in float64, and in ours; answers are recorded to seven digits.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import vqmoe_vision
from vqmoe_vision.moe import losses
from vqmoe_vision.moe.codebooks.ema import CODEBOOKS
from vqmoe_vision.moe.losses import values_of

RECORDED = Path(__file__).parent / 'recorded'

# two images of 2 x 3 patches, tokens 8 wide, 4 experts of 4 hidden features
SIZES = dict(embed_dim=8, num_heads=2, depth=2, img_size=(8, 12), patch_size=4, in_chans=1)
SIZES |= dict(class_token=False, global_pool='avg', num_experts=4, expert_mlp_ratio=0.5)

# Of a tensor's largest number. Ours computes in float32, with rounding errors of 6e-8 in each of
# some dozens of operations: the deviations are below 9e-7, but for XMoE's balance loss 3e-6, as
# theirs adds 1e-6 to every load.
TOLERANCE = 5e-6


def records(kind: str) -> pytest.MarkDecorator:
    paths = sorted((RECORDED / kind).glob('*.json'))
    found = [json.loads(path.read_text()) for path in paths]
    return pytest.mark.parametrize('record', found, ids=[path.stem for path in paths])


def close(ours: Tensor, theirs: Any, what: str) -> None:
    expected = torch.tensor(theirs, dtype=ours.dtype)
    allowed = TOLERANCE * expected.abs().max().item()
    torch.testing.assert_close(ours, expected, rtol=0, atol=allowed, msg=lambda t: f'{what}: {t}')


def load(module: nn.Module, weights: dict[str, Any]) -> None:
    """Set what is recorded; what their code does not have stays at its start."""
    state = {name: torch.tensor(value) for name, value in weights.items()}
    assert not module.load_state_dict(state, strict=False).unexpected_keys


def check_gradients(module: nn.Module, tokens: Tensor, recorded: dict[str, Any]) -> None:
    """A name `a + b` is one weight of theirs that is two of ours."""
    parameters = dict(module.named_parameters(), tokens=tokens)
    for names, expected in recorded.items():
        ours = torch.stack([parameters[name].grad for name in names.split(' + ')]).sum(dim=0)
        close(ours, expected, f'gradient of {names}')


@records('layers')
def test_layer(record):
    model = timm.create_model(record['model'], **SIZES, **record['options'])
    model.train(record['training'])
    layer = model.blocks[1].mlp
    load(layer, record['weights'])
    if 'images' in record:
        model.patch_embed(torch.tensor(record['images'], dtype=torch.float32))
    seen = []
    if 'combine' in record:
        layer.router.register_forward_hook(lambda _module, _args, routing: seen.append(routing))
    tokens = torch.tensor(record['tokens']).requires_grad_()
    with vqmoe_vision.collect_losses(model) as collected:
        out = layer(tokens)
        objective = (out * torch.tensor(record['cotangent'])).sum() + collected.total()
        objective.backward()
    for routing in seen:
        weights = routing.weights if routing.kept is None else routing.weights * routing.kept
        combine = torch.zeros(tokens[..., 0].numel(), SIZES['num_experts'])
        close(combine.scatter(1, routing.indices, weights.detach()), record['combine'], 'combine')
    close(out.detach(), record['output'], 'output')
    ours = {name.removeprefix('blocks.1.mlp/'): value for name, value in collected.losses.items()}
    assert ours.keys() == record['losses'].keys()
    for name, expected in record['losses'].items():
        close(ours[name], expected, name)
    check_gradients(layer, tokens, record['gradients'])


@records('codebooks')
def test_codebook(record):
    tokens = torch.tensor(record['tokens']).requires_grad_()
    codebook = CODEBOOKS[record['codebook']](6, tokens.shape[1])
    load(codebook, record['weights'])
    quantized = codebook(tokens)
    quantized.loss.backward()
    assert quantized.indices.tolist() == record['indices']
    close(quantized.codes.detach(), record['codes'], 'codes')
    close(quantized.loss.detach(), record['loss'], 'loss')
    check_gradients(codebook, tokens, record['gradients'])
    if 'updated' in record:
        codebook.observe(tokens, quantized.indices)
        codebook.update()
        for name, expected in record['updated'].items():
            close(codebook.state_dict()[name], expected, f'updated {name}')


@records('losses')
def test_loss(record):
    arguments = {n: torch.tensor(v).requires_grad_() for n, v in record['arguments'].items()}
    loss = getattr(losses, record['function'])(**arguments, **record['options'])
    value = values_of({'': loss})['']
    value.backward()
    close(value.detach(), record['value'], 'value')
    for name, expected in record['gradients'].items():
        close(arguments[name].grad, expected, f'gradient of {name}')


@records('anchors')
def test_anchors(record):
    # many codes at one point draw an anchor each; the token they quantize to is the first code's
    num_codes = 4000
    tokens = torch.tensor(record['tokens'])
    codebook = CODEBOOKS['cvq'](num_codes, tokens.shape[1])
    load(codebook, {'embed': [record['code']] * num_codes})
    codebook.observe(tokens, codebook(tokens).indices)
    codebook.update()
    anchors = torch.cdist(codebook.codes()[1:], tokens).argmin(dim=1)
    shares = anchors.bincount(minlength=len(tokens)) / (num_codes - 1)
    # four standard deviations of a share of one half; softmax(-distance) is off by 0.33
    torch.testing.assert_close(shares, torch.tensor(record['probabilities']), rtol=0, atol=0.032)
