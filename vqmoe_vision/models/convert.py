"""A model that is already there: a dense one made sparse, or a full one made discrete."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import timm
from timm.models import get_arch_name, model_entrypoint, register_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..moe import moe_layers as layers_of
from ..moe.config import check
from ..moe.layer import MoeLayer
from ..moe.methods import METHODS
from ..moe.raw_patches import READER
from .fitting import Report
from .hosts import check_host
from .layers import MOE_HOST, MOE_LAYERS, check_method, moe_options, put_layers
from .moe_vit import SparseModel
from .upcycle import Upcycling, read_upcycling
from .vit_moe import build

__all__: list[str] = []  # register_model adds the entry point


@register_model
def moe_host(pretrained: bool = False, host: Any = None, method: Any = None, **kwargs: Any) -> Any:
    """A vision transformer of timm with MoE layers, as converted models and configs name it."""
    known = isinstance(host, str) and timm.is_model(host) and get_arch_name(host) != MOE_HOST
    check(known, 'host', host, "the name of one of timm's vision transformers")
    check_method(method)
    check(not kwargs.get('upcycle'), 'upcycle', kwargs.get('upcycle'), 'None: use pretrained')
    return build(partial(_fresh, host), MOE_HOST, method, pretrained, known_as=host, **kwargs)


def _fresh(host: str, method: str, upcycling: Any = None, **kwargs: Any) -> nn.Module:
    """Experts are drawn as routers are: for weights that come later."""
    how = read_upcycling(upcycling)
    options = {name: kwargs.pop(name) for name in moe_options(method) & kwargs.keys()}
    model = model_entrypoint(host)(pretrained=False, **kwargs)
    _put_layers(model, method, how, None, **options)
    return model


def convert_to_moe(
    model: nn.Module,
    method: str,
    *,
    moe_layers: str | Sequence[int] = MOE_LAYERS,
    upcycling: Upcycling | dict | None = None,
    **options: Any,
) -> Report:
    """Make a dense vision transformer a sparse one in place, with experts made of its MLPs.

    Convert before an optimizer takes the parameters. Experts are frozen where the parameters that
    they are made of were; routers and codebooks are new, and train.

    Args:
        model: One of timm's `HOSTS`, such as `VisionTransformer`, `Eva` (DINOv3), `Beit` or
            `NaFlexVit`, whose blocks have an `Mlp`, `GluMlp` or `SwiGLU`. It is changed, or left
            as it is if anything is refused.
        method: Key of `METHODS`.
        moe_layers: Which blocks become MoE, see `resolve_moe_layers`.
        upcycling: How experts are made, see `Upcycling`; None for equal copies.
        **options: Of the method.

    Returns:
        What became of each tensor.

    Raises:
        ValueError: A value is impossible, or the model or a block is of another kind.
        TypeError: The method has no such option.
    """
    how = read_upcycling(upcycling)
    copied = _put_layers(model, method, how, how, moe_layers, **options)
    made: Any = model
    # what was there before is all but what the new layers and a reader of images have
    new, names = (READER, *(f'{name}.' for name in layers_of(model))), list(model.state_dict())
    made.weights_report = report = Report(
        loaded=tuple(name for name in names if not name.startswith(new)),
        copied=copied,
        initialised=tuple(k for k in names if k.startswith(new) and k not in copied),
    )
    config = getattr(model, 'pretrained_cfg', None) or {}
    if config.get('architecture'):  # timm has built it by name, and builds it again
        sparse = {'method': method, 'moe_layers': moe_layers, **options}
        made._model_args = {**made._model_args, 'host': config['architecture'], **sparse}
        made.pretrained_cfg = made.default_cfg = {**config, 'architecture': MOE_HOST}
    return report


def _put_layers(
    model: Any,
    method: str,
    stated: Upcycling,
    how: Upcycling | None,
    moe_layers: str | Sequence[int] = MOE_LAYERS,
    **options: Any,
) -> dict[str, str]:
    """As `put_layers`; the model is one of ours from then on."""
    check_method(method)
    kind = check_host(model)
    config = METHODS[method].config.from_options(**options)
    # what the model was becomes what reads its images
    copied = put_layers(model, method, config, moe_layers, partial(copy.deepcopy, model), how)
    given = model.__dict__.pop('_model_args', {})  # a property of the class to be would hide it
    model.__class__ = kind
    model.describe(method, config, stated)
    model._model_args = given
    return copied


def changeable_layers(model: nn.Module) -> list[MoeLayer]:
    """The MoE layers of a model whose parameters are about to change, or go."""
    layers = list(layers_of(model).values())
    check(len(layers) > 0, 'model', type(model).__name__, 'a model with MoE layers')
    wrapped = any(isinstance(module, DistributedDataParallel) for module in model.modules())
    check(not wrapped, 'model', 'DistributedDataParallel', 'one that is not wrapped yet')
    return layers


def to_discrete(model: nn.Module) -> nn.Module:
    """Keep the discrete branch of every MoE layer alone: for fine-tuning and serving.

    The answers are those of the full model whose gates give the discrete branch all the weight.
    Call it before an optimizer takes the parameters.

    Args:
        model: Any model whose MoE layers have both branches, before it is distributed. It is
            changed in place and returned, or left as it is if a layer refuses.

    Raises:
        ValueError: A layer has no discrete branch, or as `changeable_layers`.
    """
    layers = changeable_layers(model)
    for layer in layers:
        kind = type(layer).__name__
        check(layer.has_discrete, 'layer', kind, 'one that has a discrete branch to keep')
    # nothing is refused from here on
    changed: dict = {}
    for layer in layers:
        changed |= layer.to_discrete()
    for module in model.modules():
        if isinstance(module, SparseModel):
            module.moe_config = replace(module.moe_config, **changed)
            module._model_args = {**module._model_args, **changed}
    return model
