"""Which networks of timm take experts, by name; and images of different sizes in one batch."""

import copy
import re
from collections import Counter
from typing import Any

import pytest
import timm
import torch
from timm.models.naflexvit import batch_patchify
from torch import Tensor

from vqmoe_vision import collect_losses
from vqmoe_vision.models import complexity, convert_to_moe
from vqmoe_vision.models.create import create_model
from vqmoe_vision.moe import METHODS, use_kernel
from vqmoe_vision.moe.layer import MoeLayer
from vqmoe_vision.moe.valid import ValidTokens

from .. import cases, on_meta
from ..variants import VARIANTS
from ..watch import Watch
from .conftest import GATED, MORE, NAFLEX, NORMED, SAM, TINY, check_complete, dense, make

TAKEN, NORM_FIRST, NO_MLP = '', "='GeGluMlp'", "mlp='NoneType'"
# of each module of timm how many names take experts, and how many do not, by what is said
NAMES: dict[str, dict[str, int]] = {
    'vision_transformer': {TAKEN: 156, NO_MLP: 7},
    'deit': {TAKEN: 16},
    'beit': {TAKEN: 7},
    'eva': {TAKEN: 65},
    'naflexvit': {TAKEN: 14},
    'vision_transformer_relpos': {TAKEN: 14},
    'vision_transformer_sam': {TAKEN: 4},
    'vision_transformer_hybrid': {TAKEN: 14},
    'vitamin': {NORM_FIRST: 13},
}


def answer(name: str) -> str:
    """What is said of a name that takes no experts; nothing of one that does."""
    with on_meta():
        model = timm.create_model(name)
    try:
        convert_to_moe(model, 'smoe')
    except ValueError as error:
        return str(error)
    return TAKEN


@pytest.mark.long
@pytest.mark.skipif(timm.__version__ != '1.0.31', reason='another timm has other names')
@pytest.mark.parametrize('module', NAMES)
def test_names_of_timm(module):
    said = [answer(name) for name in timm.list_models(module=module)]
    assert not any('\n' in line for line in said)
    kinds = [[k for k in (NORM_FIRST, NO_MLP) if re.search(k, line)] or [line] for line in said]
    assert Counter(kind for kind, *_ in kinds) == NAMES[module]


TAKING = """vit_base_mci_224 test_vit_relpos vit_base_patch16_siglip_224 eva02_tiny_patch14_224
    aimv2_large_patch14_224 beit3_base_patch16_224 vit_medium_patch16_rope_reg1_gap_256"""


@cases(
    'name, kind',
    *((name, TAKEN) for name in TAKING.split()),
    ('vitamin_small_224', NORM_FIRST),
    ('vit_base_patch16_xp_224', NO_MLP),
)
def test_a_name_of_timm(name, kind):
    said = answer(name)
    assert re.search(kind, said) and bool(said) == bool(kind)


# 85 units have two rows of 32 and a bias each, a column, and behind a norm its scale and shift; the
# second layer has 32 biases: 85 * (2 * 33 + 32) + 32, and 85 * 2
OF_MLP = {GATED: 8362, NORMED: 8532}


@pytest.mark.parametrize('host', [*MORE, 'naflexvit_base_patch16_map'])
def test_a_host_is_counted(host):
    model = dense(host)
    before, own = complexity(model), OF_MLP.get(host, 8352)
    convert_to_moe(model, 'smoe', num_experts=4, top_k=1)
    after = complexity(model)
    # an expert of 32 x 128 has 8352 parameters, and its router 4 x 32: two layers of four experts,
    # of which one is active
    assert after.params - before.params == 2 * (3 * own + 4 * 32)
    assert after.active_params - before.params == 2 * 4 * 32
    assert after.macs > before.macs > 0


@pytest.mark.parametrize('host', MORE)
def test_weights_of_a_host_by_name_give_its_answers(host, images):
    source = dense(host)
    given = {'pretrained': True, 'pretrained_cfg_overlay': {'state_dict': source.state_dict()}}
    model: Any = create_model(host, {'method': 'smoe', 'renormalize': True}, **TINY, **given)
    check_complete(model.weights_report, model, source.state_dict())
    torch.testing.assert_close(model.eval()(images), source(images), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings('ignore:.*(searchsorted|non-tuple):UserWarning')  # of timm itself
@pytest.mark.parametrize('host', [host for host in MORE if host not in (SAM, NAFLEX)])
def test_a_host_of_another_image_size(host):
    model = dense(host)
    sparse = copy.deepcopy(model)
    convert_to_moe(sparse, 'ecmoe', **METHODS['ecmoe'].config.EXACT_UPCYCLING['all'])
    images = torch.randn(2, 3, 64, 48)
    for each in (model, sparse):
        each.set_input_size((64, 48))
    torch.testing.assert_close(sparse(images), model(images), rtol=1e-5, atol=1e-5)
    # both experts take all tokens
    assert sparse.blocks[1].mlp.experts_per_token == 2


def batch(images: list[Tensor], length: int = 0) -> dict[str, Tensor]:
    """As timm collates images of any size, with noise as padding."""
    parts = [batch_patchify(image[None], (8, 8)) for image in images]
    most = max(length, *(part.shape[1] for part, _ in parts))
    found: dict[str, Any] = {
        'patches': torch.randn(len(images), most, 192),
        'patch_coord': torch.zeros(len(images), most, 2, dtype=torch.int64),
        'patch_valid': torch.zeros(len(images), most, dtype=torch.bool),
    }
    for i, (part, (rows, columns)) in enumerate(parts):
        number = rows * columns
        places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        for name, value in zip(found, (part[0], places, True), strict=True):
            found[name][i, :number] = value
    return found


def naflex(method: str, options: dict[str, Any], **host: Any) -> Any:
    model = dense(NAFLEX, pos_embed_grid_size=(4, 4), depth=2, class_token=True, **host)
    convert_to_moe(model, method, moe_layers='all', **options)
    return model


PADDED = [
    pytest.param(method, options, id=name)
    for name, (method, options) in VARIANTS.items()
    if METHODS[method].read_patches is None
]


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def trained(model: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """What a step of training gives, before the optimizer's."""
    model = copy.deepcopy(model).train()
    torch.manual_seed(0)  # of the router noise
    with collect_losses(model) as collected:
        out = model(inputs)
        (out.square().mean() + collected.total()).backward()
    told = {'losses': collected.losses, 'stats': collected.stats}
    return {'out': out, 'gradients': gradients(model), 'state': dict(model.named_buffers()), **told}


@pytest.mark.parametrize('method, options', PADDED)
def test_a_padded_batch_is_as_one_without_padding(method, options):
    model = naflex(method, options)
    images = list(torch.randn(4, 3, 32, 32))
    expected, found = (trained(model, batch(images, length)) for length in (16, 23))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    'method, options, rope',
    [
        *((*each.values, '') for each in PADDED if 'eval_capacity_factor' not in each.values[1]),
        *(('smoe', {}, rope) for rope in ('axial', 'mixed')),
    ],
)
def test_each_image_of_a_padded_batch_is_as_alone(method, options, rope):
    model = naflex(method, options, rope_type=rope)
    images = [torch.randn(3, *size) for size in ((32, 32), (8, 24), (40, 16))]
    answers = []
    for together in (True, False):
        one = copy.deepcopy(model)
        parts = [batch(images)] if together else [batch([image]) for image in images]
        out = torch.cat([one(part) for part in parts])
        out.square().sum().backward()
        answers.append((out, gradients(one)))
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-4)


def test_checkpointing_has_the_mask_of_its_pass(method):
    if METHODS[method].read_patches is not None:
        pytest.skip('no NaFlexVit has it')
    model = naflex(method, {})
    first, second = (batch(list(torch.randn(3, 3, 8 * n, 16)), 12) for n in (2, 5))
    found = []
    for checkpointing in (False, True):
        one = copy.deepcopy(model).train()
        one.set_grad_checkpointing(checkpointing)
        torch.manual_seed(0)
        with collect_losses(one) as collected:
            (one(first).sum() + one(second).sum() + collected.total()).backward()
        found.append(gradients(one))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize('method, options', PADDED)
def test_a_layer_that_is_told_what_is_there_reads_nothing_back(method, options):
    model: Any = make(method, **options, depth=1, moe_layers=[0]).to('meta', torch.bfloat16)
    layer = model.train().blocks[0].mlp
    mask, index = torch.ones(2, 9, dtype=torch.bool), torch.arange(11)
    layer.valid = ValidTokens(mask.to('meta'), index.to('meta'), (7, 4))
    tokens = torch.empty(2, 9, 32, device='meta', dtype=torch.bfloat16, requires_grad=True)
    with use_kernel('grouped_mm'), Watch(), collect_losses(model):
        layer(tokens).sum().backward()


def test_a_layer_that_knows_no_padding_refuses_it():
    class Own(MoeLayer):
        def run(self, x: Tensor) -> Tensor:
            return x

    layer = Own().eval()
    layer.valid = ValidTokens.of(torch.tensor([[True, False]]))
    with pytest.raises(NotImplementedError, match='Own takes no padded images'):
        layer(torch.zeros(1, 2, 3))
