"""A model as the folder that timm reads: weights, configuration, and what builds it again."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from timm.models.eva import Eva
from torch import nn

from ..moe import moe_layers
from ..moe.config import check
from .hosts import Transformer
from .moe_vit import SparseModel
from .upcycle import BEGINNING
from .weights import CONFIG, DIGEST, OF_TIMM, digest_of

# Arguments of timm's `create_model` that say where weights come from, or how to build for now.
_OF_THE_CALL = frozenset(
    {
        'pretrained', 'pretrained_cfg', 'pretrained_cfg_overlay', 'checkpoint_path', 'cache_dir',
        'scriptable', 'exportable', 'no_jit', 'device', 'dtype', *BEGINNING,
    }
)  # fmt: skip
# A model without a last norm: of timm's `VisionTransformer`, and of its `Eva`.
_NO_NORM = (
    {'final_norm': False},
    {'use_post_transformer_norm': False, 'use_fc_norm': False},
)
# Of timm's `pretrained_cfg` how images are prepared.
_PREPROCESSING = ('input_size', 'mean', 'std', 'crop_pct', 'crop_mode', 'interpolation')
# What belongs to the network; the rest is about the weights of others.
_OF_THE_NETWORK = ('architecture', 'first_conv', 'classifier', 'pool_size')


def record_arguments(model: Any, given: dict[str, Any]) -> None:
    """Keeps what a model was built from, where timm does not: 1.0.26 records nothing."""
    if not getattr(model, '_model_args', None):
        model._model_args = {k: v for k, v in given.items() if k not in _OF_THE_CALL}


def arguments_of(model: Any) -> dict[str, Any]:
    """The keyword arguments with which timm builds a model again, as it is now."""
    known = str((getattr(model, 'pretrained_cfg', None) or {}).get('architecture'))
    check(timm.is_model(known), 'model', type(model).__name__, 'one that timm builds by a name')
    args = {
        name: value
        for name, value in model._model_args.items()
        if name not in _OF_THE_CALL and not name.endswith(('drop_rate', 'drop_path_rate'))
    }
    if isinstance(model, Transformer):
        args.update(num_classes=model.num_classes, global_pool=model.global_pool)
        if len(model.blocks) < len(model.feature_info):
            args['depth'] = depth = len(model.blocks)
            if isinstance(model, SparseModel):
                args['moe_layers'] = left = [int(name.split('.')[1]) for name in moe_layers(model)]
                check(bool(left), 'out_indices', [depth - 1], 'not before all MoE layers')
        if isinstance(model.norm, nn.Identity) and isinstance(model.fc_norm, nn.Identity):
            args |= _NO_NORM[isinstance(model, Eva)]
    for name, value in args.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            check(False, name, value, 'numbers, names and lists, as of JSON')
    return args


def preprocessing_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """How images are prepared, of timm's `pretrained_cfg`, as `save` takes it."""
    return {name: config[name] for name in _PREPROCESSING if config.get(name) is not None}


def save(
    model: Any,
    folder: Path,
    preprocessing: dict[str, Any],
    label_names: Sequence[str] = (),
    license_id: str | None = None,
) -> dict[str, Any]:
    """Writes `model.safetensors` and `config.json` with its digest, and reads them back."""
    args = arguments_of(model)
    dynamic = args.get('dynamic_img_size') or args.get('strict_img_size') is False
    described = {name: model.pretrained_cfg.get(name) for name in _OF_THE_NETWORK}
    described |= {**preprocessing, 'num_classes': model.num_classes}
    described |= {'fixed_input_size': not dynamic} | ({'license': license_id} if license_id else {})
    model.pretrained_cfg = model.default_cfg = described
    names = {'label_names': list(label_names)} if label_names else {}
    save_for_hf(model, str(folder), names, args, safe_serialization=True)
    config = folder / CONFIG
    described = json.loads(config.read_text()) | {DIGEST: digest_of(folder / OF_TIMM[0])}
    config.write_text(f'{json.dumps(described, indent=2)}\n')
    _read_back(model, folder, preprocessing['input_size'])
    return args


@torch.no_grad()
def _read_back(model: nn.Module, folder: Path, input_size: Sequence[int]) -> None:
    """Compares tensors and answers, to the bit."""
    try:
        again = timm.create_model(f'local-dir:{folder}', pretrained=True)
        images = torch.rand(2, *input_size)
        torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
        answers, expected = again.eval()(images), model.eval()(images)
        torch.testing.assert_close(answers, expected, rtol=0, atol=0, msg='its answers differ')
    except Exception as error:  # a model that differs can fail in any way
        short = shorten(str(error), 200, placeholder=' ...')  # torch lists every key
        raise ValueError(
            f'timm does not build the model again from its arguments: {short}'
        ) from error
