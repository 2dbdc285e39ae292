"""A model that is already there gets experts where its MLPs are, or stays as it is."""

import pickle
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf

from vqmoe_vision import collect_losses
from vqmoe_vision.models import MoeVisionTransformer, convert_to_moe, to_discrete
from vqmoe_vision.models.compat import misfit_of
from vqmoe_vision.models.create import create_model
from vqmoe_vision.moe import METHODS

from .. import cases, refused
from . import conftest
from .conftest import DENSE, DINOV3, EXACT, MORE, TINY, check_complete, dense, make, shaken

# ways that read images, which most hosts refuse, on all; of the others each host has one in turn
WAYS = [way.values for way in EXACT]
READING = [(host, *way) for host in MORE for way in WAYS if METHODS[way[0]].read_patches]
ALL = [(host, *way) for host in (DENSE, DINOV3) for way in WAYS]
PLAIN = [way for way in WAYS if not METHODS[way[0]].read_patches]
ALL += [(host, *way) for host, way in zip(MORE, PLAIN, strict=False)]


@cases('host, method, options', *ALL, *READING)
def test_a_converted_model_answers_as_before_and_is_one_of_ours(host, method, options, images):
    model = dense(host)
    entry = METHODS[method]
    reads = entry.read_patches is not None and host not in (DENSE, conftest.GATED)
    if reads and (host != conftest.DISTILLED or entry.needs_features):
        message = f'(embed_layer|block_fn|model)=.* {method} (reads|looks at)'
        refused(message, convert_to_moe, model, method, **options)
        return
    source = {name: value.clone() for name, value in model.state_dict().items()}
    undecayed, expected = model.no_weight_decay(), model(images)
    report = convert_to_moe(model, method, **options)
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
    check_complete(report, model, source)
    ends = ('bias', 'norm.weight')
    biases = {n for n in model.state_dict() if '.experts.' in n and n.endswith(ends)}
    assert undecayed | biases <= model.no_weight_decay() <= {*model.state_dict(), *undecayed}
    assert f'{method}: ' in str(model)
    if host == DENSE:
        assert isinstance(model, MoeVisionTransformer)
        ours = make(method, **options)
        assert ours.no_weight_decay() == model.no_weight_decay()
        ours.load_state_dict(model.state_dict())
        torch.testing.assert_close(ours.eval()(images), model(images))
    model.train()
    with collect_losses(model) as collected:
        (model(images).sum() + collected.total()).backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if 'experts' in n)
    again = pickle.loads(pickle.dumps(model.eval()))
    assert torch.equal(again(images), model(images))


@pytest.mark.parametrize('host', [DENSE, DINOV3])
def test_patches_are_dropped_where_a_method_does_not_need_their_places(method, host, images):
    if METHODS[method].read_patches is not None and host != DENSE:
        pytest.skip('no Eva has it')
    model: Any = dense(host, patch_drop_rate=0.5)
    if make(method).blocks[1].mlp.permutation_equivariant:
        convert_to_moe(model, method)
        with collect_losses(model.train()):
            assert model(images).isfinite().all()
        return
    for build in (partial(make, patch_drop_rate=0.5), partial(convert_to_moe, model)):
        refused(r'patch_drop_rate=0\.5 is not possible: 0, ', build, method)


FULL = [
    {},
    {'preset': 'ema'},
    {'preset': 'official'},
    {'codebook': 'simvq', 'num_codes': 16, 'output_norm': True},
]


def full(**options: Any) -> Any:
    """A full model no tensor of which is as it started."""
    return shaken(make('vqmoe', **options))


@pytest.mark.parametrize('options', FULL)
def test_answers_are_those_of_the_gate_fixed_to_the_codes(options, images):
    # float64: products of other numbers of rows round differently, here in the sixteenth digit
    model, images = full(**options).double(), images.double()
    before = model.state_dict()
    for block in model.blocks[1::2]:  # softmax of (0, 1000) is (0, 1)
        state = {'weight': torch.zeros(2, 32), 'bias': torch.tensor([0.0, 1000.0])}
        block.mlp.gate.load_state_dict(state)
    expected = model(images)
    assert to_discrete(model) is model
    torch.testing.assert_close(model(images), expected, rtol=1e-11, atol=1e-11)
    gone = before.keys() - model.state_dict().keys()
    assert gone == {n for n in before if '.mlp.router.' in n or '.mlp.gate.' in n}


@pytest.mark.parametrize('options', FULL)
def test_a_full_file_goes_into_the_discrete_form_by_every_loading(options, images, tmp_path):
    source, path = full(**options), str(tmp_path / 'full.pth')
    state = source.state_dict()
    torch.save(state, path)
    unused = ('balance_weight', 'train_router')
    form = {k: v for k, v in options.items() if k not in unused} | {'form': 'discrete'}
    strict: Any = make('vqmoe', **form)
    assert misfit_of(strict, {f'module.{name}': value for name, value in state.items()}) == ''
    strict.load_state_dict(state)
    assert set(state) == set(source.state_dict())  # the caller's is as it was
    expected = to_discrete(source)(images)
    by_name = make('vqmoe', **form, pretrained=True, pretrained_cfg_overlay={'file': path})
    for model in (strict, make('vqmoe', **form, checkpoint_path=path), by_name):
        assert torch.equal(model.eval()(images), expected)


@pytest.mark.parametrize('said', [{}, {'form': 'full'}])
def test_a_discrete_model_learns_and_is_built_again(said, tmp_path, images):
    model = to_discrete(full(balance_weight=0.1, num_experts=4, **said))
    model.train()
    with collect_losses(model) as collected:
        (model(images).sum() + collected.total()).backward()
    assert all(name.endswith(('/vq', '/code_balance')) for name in collected.losses)
    assert all(p.grad is not None for name, p in model.named_parameters() if 'experts' in name)
    discrete: Any = model.eval()
    assert discrete.moe_config.form == 'discrete'
    save_for_hf(discrete, tmp_path / 'saved')
    again = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True).eval()
    assert torch.equal(again(images), discrete(images))


@pytest.mark.parametrize('host', [None, 'vit_tiny_patch16_224'])
def test_the_discrete_form_of_a_saved_full_model(host, tmp_path, images):
    options = {'preset': 'ema', 'balance_weight': 0.1, 'num_experts': 4}
    moe = {'method': 'vqmoe', **options} if host else options
    model: Any = create_model(host or 'vit_tiny_vqmoe', moe, **TINY)
    save_for_hf(model, tmp_path / 'full')
    folder = f'local-dir:{tmp_path / "full"}'
    given: Any = {'pretrained': True, 'form': 'discrete'}
    discrete: Any = timm.create_model(folder, **given).eval()
    assert torch.equal(discrete(images), to_discrete(model).eval()(images))
    message = r"balance_weight=0\.3 .* no effect with form='discrete'"
    refused(message, timm.create_model, folder, **given, balance_weight=0.3)
    assert 'balance_weight' not in discrete._model_args
