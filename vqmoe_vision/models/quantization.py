"""Models in int8 for serving: weights once and for all, what they multiply in every call.

torch's and torchao's calls convert `nn.Linear` alone. Experts are stacked weights, so they become
such modules first. What decides stays float: routers, gates, codebooks and what reads images are no
`nn.Linear` that such calls convert, as a token that goes to another expert is a large error.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..moe.collect import moe_layers
from ..moe.config import check
from ..moe.experts import StackedLinear
from ..moe.image_reader import ImageReader
from .convert import changeable_layers

DTYPES = (torch.float32, torch.bfloat16)
DEVICES = ('cpu', 'cuda')


def experts_as_linear(model: nn.Module) -> nn.Module:
    """Hold every expert of every MoE layer in modules `nn.Linear`, in place.

    The answers stay, and an expert computes the rows that chose it, as before. Parameters are new
    and have other names (`fc1.weight` becomes `fc1.0.weight` and so on), so that weights are loaded
    before and optimizers made after it. Training is faster with stacked experts.

    Args:
        model: Any model with MoE layers, such as a classifier, a segmentor or a timm model, before
            it is distributed. Experts that are such modules already stay.

    Returns:
        The model.

    Raises:
        ValueError: There is no MoE layer, or the model is wrapped in `DistributedDataParallel`.
    """
    for layer in changeable_layers(model):
        layer.experts.separate()
    return model


def quantize_int8(model: nn.Module) -> nn.Module:
    """Int8 for every linear layer, those of the experts included, by torchao, in place.

    Weights have a scale per output, activations one per token that is found in every call. The
    stem, norms, the product of attention, and all that decides which expert computes stay float.

    Args:
        model: Any model in eval mode, in float32 or bfloat16, on a CPU or a CUDA device, with MoE
            layers or without. It is changed, or left as it is if it is refused.

    Returns:
        The model.

    Raises:
        ModuleNotFoundError: torchao, of the extra `export`, is missing.
        ValueError: The model trains, is wrapped, or has a dtype or device without a kernel.
    """
    if importlib.util.find_spec('torchao') is None:
        raise ModuleNotFoundError("int8 needs torchao: pip install 'vqmoe-vision[export]'")
    check(not model.training, 'model.training', True, 'False: call model.eval() first')
    found = _layers(model)
    check(bool(found), 'model', type(model).__name__, 'one with linear layers that are not int8 yet')
    for layer in found.values():
        dtype, device = layer.weight.dtype, layer.weight.device
        check(dtype in DTYPES, 'dtype', dtype, 'float32 or bfloat16: convert it with model.float()')
        allowed = 'cpu or cuda: move the model with model.cpu()'
        check(device.type in DEVICES, 'device', str(device), allowed)
    if moe_layers(model):
        experts_as_linear(model)
    _convert(model, device)
    return model


def _convert(model: nn.Module, device: torch.device) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    from torchao.utils import should_reduce_range

    chosen = set(_layers(model))
    # processors without VNNI add products of int8 in 16 bits, which would overflow
    reduce_range = should_reduce_range(device)
    config = Int8DynamicActivationInt8WeightConfig(
        set_inductor_config=False, reduce_range=reduce_range
    )
    quantize_(model, config, lambda module, name: name in chosen)


def _layers(model: nn.Module) -> dict[str, nn.Linear | StackedLinear]:
    """What can become int8, by name."""
    deciding = {m for r in model.modules() if isinstance(r, ImageReader) for m in r.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | StackedLinear)
        and not isinstance(module, NonDynamicallyQuantizableLinear)
        and module not in deciding
        and type(module.weight) in (nn.Parameter, Tensor)  # int8 is a type of its own
    }
