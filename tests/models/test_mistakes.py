"""What a user may get wrong: one line that names the field, and nothing has changed."""

import math
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.layers import RmsNorm
from timm.models.vision_transformer import ParallelScalingBlock
from torch import nn

from vqmoe_vision.models import complexity, convert_to_moe, export, to_discrete
from vqmoe_vision.models.create import create_model
from vqmoe_vision.models.export import Exportable, export_onnx, export_program, save_program
from vqmoe_vision.moe import METHODS

from .. import cases, needs_onnx, refused
from ..groups import alone
from .conftest import DENSE, TINY, dense, make

# Of models with VQMoE, one wrong value for each argument.
WRONG: dict[str, Any] = dict(
    num_experts=0, preset='nonsense', form='both', codebook='fsq', num_codes=12, code_share=1.5,
    expert_input='x', expert_mlp_ratio=0, img_size=33, weight_init='skip',
    patch_drop_rate=1.0, drop_path_rate=2, global_pool='mean',
    num_classes=2.5, qkv_bias='no', mlp_ratio=0.01, scale_mlp_norm=1, mlp_layer='SwiGLU',
)  # fmt: skip
SPARSE, RESNET, SMOE = 'vit_tiny_smoe', 'resnet18', {'method': 'smoe'}
SMALL: dict[str, Any] = dict(TINY, depth=2)


@cases(
    'name, moe, given, named',
    (DENSE, {}, {}, r'moe\.method=None'),
    (DENSE, {'method': 'vqmoo'}, {}, r"moe\.method='vqmoo' .* vqmoe"),
    (DENSE, {'method': 'smoe', 'foo': 1}, {}, r'moe\.foo=1'),
    (DENSE, {'method': 'smoe'}, {'extra_mlps': 1}, 'extra_mlps=1'),
    (DENSE, None, {'extra_mlps': 1.5}, r'extra_mlps=1\.5'),
    (RESNET, None, {'extra_mlps': 2}, 'extra_mlps=2'),
    (SPARSE, 'None ', {}, "moe='None '"),
    (SPARSE, {'method': 'vqmoe'}, {}, r"moe\.method='vqmoe'"),
    (SPARSE, {'num_experts': 8}, {'num_experts': 2}, 'num_experts=2'),
    ('vit_tiny_vqmoe', {'top_k': 2}, {}, r'moe\.top_k=2'),
    ('vit_tiny_vqmo', None, {}, r'model_name=.* did you mean vit_tiny_vqmoe\?$'),
    ('xyz', None, {}, r"model_name='xyz' .*timm\.list_models\(\)"),
    ('moe_host', None, {'host': DENSE, 'method': 'smoe'}, "model_name='moe_host'"),
    (DENSE, {'method': 'vqmoe'}, {'method': 'smoe'}, "method='smoe'"),
    (DENSE, None, {'mlp_ratio': math.inf}, 'mlp_ratio=inf'),
    (DENSE, None, {'mlp_layer': ['SwiGLU']}, 'mlp_layer='),
    ('deit_tiny_patch16_224', None, {'img_size': 33}, 'img_size=33'),
    (DENSE, None, {'upcycle': 'a.pth'}, "'upcycle'"),
    (SPARSE, None, {'num_expert': 4}, "'num_expert'; .* did you mean num_experts"),
    (SPARSE, None, {'drop_pth_rate': 0.1}, "'drop_pth_rate'; .* did you mean drop_path_rate"),
    ('vit_tiny_softmoe', None, {'top_k': 2}, "'top_k', which smoe, .* have; .* slots_per_expert"),
    (SPARSE, None, {'upcycle': 'a', 'checkpoint_path': 'b'}, "upcycle='a' .* checkpoint_path='b'"),
    (DENSE, {'method': 'smoe'}, dict(pretrained=True, checkpoint_path='b'), 'pretrained=True'),
    (DENSE, SMOE, {'checkpoint_path': 'b', 'pretrained_cfg_overlay': {'file': 'a'}}, "='a' .* 'b'"),
    ('vit_small_patch16_18x2_224', None, {'pretrained': True}, 'pretrained=True .* no weights'),
    (DENSE, None, {'pretrained': 1}, 'pretrained=1'),
    (SPARSE, None, {'pretrained': True}, 'pretrained=True .*upcycle='),
)
def test_create_model(name, moe, given, named):
    given = ({} if name == RESNET else TINY) | given
    refused(named, create_model, name, moe, error=(TypeError, ValueError), **given)


@pytest.mark.parametrize('name', WRONG)
def test_a_wrong_value_is_named(name):
    refused(f'^{name}=.* is not possible', make, 'vqmoe', **{name: WRONG[name]})


@cases('at', 'every0', 'every5', 'last3', 'first2', [4], [-1], [], 1, [True])
def test_blocks_that_are_not_there(at):
    refused(r'^moe_layers=.* depth=4', make, 'vqmoe', moe_layers=at)


def test_an_option_of_another_method_is_a_type_error(method):
    options = {name for other in METHODS.values() for name in other.config.option_names()}
    for option in options - METHODS[method].config.option_names():
        refused(f"'{option}'", make, method, error=TypeError, device='meta', **{option: 1})


class Doubled(nn.Linear):
    """The tensors of a linear layer, and another answer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def changed(part: str, value: Any) -> Any:
    """A dense model with another part in the MLP of block 1."""
    model = dense()
    setattr(model.blocks[1].mlp, part, value)
    return model


def undrawn(name: str) -> Any:
    with torch.device('meta'):
        return timm.create_model(name)


@cases(
    'build, options, named',
    (partial(undrawn, 'vitamin_small_224'), {}, r"blocks\.1\.mlp='GeGluMlp' .* GluMlp or SwiGLU"),
    (partial(dense, 'eva02_tiny_patch14_224'), dict(recompute='gelu'), "recompute='gelu'.* gate"),
    (partial(dense, block_fn=ParallelScalingBlock), {}, r'blocks\.1\.mlp='),
    (partial(dense, scale_mlp_norm=True, norm_layer=RmsNorm), {}, r'blocks\.1\.mlp\.norm='),
    (partial(changed, 'fc1', Doubled(32, 128)), {}, r"blocks\.1\.mlp\.fc1='Doubled'"),
    (partial(changed, 'drop1', nn.Dropout(0.5)), {}, r'blocks\.1\.mlp drop='),
    (partial(changed, 'drop2', nn.AlphaDropout(0.1)), {}, r'blocks\.1\.mlp\.drop2='),
    (partial(changed, 'act', nn.PReLU(17)), {}, r"blocks\.1\.mlp .*'act\.weight': \(17,\)"),
    (partial(nn.Linear, 2, 2), {}, "model='Linear'"),
    (dense, dict(top_k=9), 'top_k=9'),
    (dense, dict(expert_mlp_ratio=2.0), r'upcycling\.split=True cuts it'),
    (dense, dict(slots_per_expert=2), "'slots_per_expert'"),
    (dense, dict(upcycling={'noize': 1}), "'noize'"),
    (dense, dict(upcycling={'drop': 2.0}), r'upcycling\.drop=2\.0'),
    (dense, dict(upcycling={'split': True}), r'upcycling\.split=True'),
)
def test_what_cannot_be_converted_stays_as_it_is(build, options, named):
    model = build()
    kinds = [type(module) for module in model.modules()]
    refused(named, convert_to_moe, model, 'smoe', error=(TypeError, ValueError), **options)
    assert [type(module) for module in model.modules()] == kinds


@cases(
    'options, named',
    ({}, 'host=None'),
    ({'host': 'moe_host'}, "host='moe_host'"),
    ({'host': DENSE}, 'method=None'),
    ({'host': SPARSE, 'method': 'smoe'}, "model='MoeVisionTransformer'"),
    ({'host': RESNET, 'method': 'smoe'}, "model='ResNet'"),
    ({'host': DENSE, 'method': 'smoe', 'upcycle': 'a.pth'}, "upcycle='a.pth'"),
)
def test_hosts(options, named):
    refused(f'^{named}', timm.create_model, 'moe_host', **options)


def test_a_model_that_has_no_discrete_form_stays_as_it_is():
    full = make('vqmoe')
    with alone():
        wrapped = nn.parallel.DistributedDataParallel(full)
    for model in (nn.ModuleList([full, make('smoe')]), wrapped, dense(), make('softmoe')):
        refused(r'^(model|layer)=', to_discrete, model)
    assert full.moe_config.form == 'full' and 'blocks.1.mlp.gate.weight' in full.state_dict()


def test_what_is_not_counted():
    refused(r'^model=', complexity, nn.Linear(2, 2))


def test_what_is_not_saved(tmp_path):
    built: Any = create_model(SPARSE, norm_layer=partial(nn.LayerNorm, eps=1e-5), **TINY)
    short: Any = create_model(SPARSE, {'moe_layers': [3]}, **TINY)
    short.prune_intermediate_layers([1])
    size = {'input_size': (3, 32, 32)}
    for model, named in ((built, 'norm_layer'), (short, r'out_indices=\[1\]')):
        refused(named, export.save, model, tmp_path, size)


def plain(**options: Any) -> Any:
    return export_onnx(Exportable(nn.Linear(2, 2), (1, 2, 2)), **{'path': 'a.onnx', **options})


EXPORTED: dict[str, Any] = {
    'batch=0': partial(plain, batch=0),
    'opset=17': partial(plain, opset=17),
    "path='model.pb'": partial(plain, path='model.pb'),
    "'/proc/none/a.onnx' cannot be written": partial(plain, path='/proc/none/a.onnx'),
    'dtype=torch.bfloat16': lambda: export_program(make('smoe', **SMALL).bfloat16()),
    "device='meta'": lambda: export_program(make('smoe', **SMALL, device='meta')),
    'features_only=True': lambda: save_program(make('smoe', features_only=True, depth=2), 'a.pt2'),
    "path='a.pt2'": partial(export.load_exported, 'a.pt2'),
}


@pytest.mark.parametrize('named', EXPORTED)
def test_what_is_not_exported(named, tmp_path, monkeypatch):
    needs_onnx()
    monkeypatch.chdir(tmp_path)
    refused(f'^{named}', EXPORTED[named])
    assert not list(tmp_path.iterdir())
