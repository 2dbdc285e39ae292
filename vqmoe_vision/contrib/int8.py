"""Models in int8 for serving: weights once and for all, what they multiply in every call.

torchao converts `nn.Linear` alone, which experts become first. What decides stays float, as a token
that goes to another expert is a large error.
"""

from ast import literal_eval
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..models.convert import changeable_layers
from ..models.export import (
    SUFFIXES,
    Exportable,
    export_onnx,
    for_inference,
    quiet,
    save_program,
    target_of,
    write_whole,
)
from ..moe.collect import moe_layers
from ..moe.config import check
from ..moe.experts import StackedLinear
from ..moe.raw_patches import ImageReader

__all__ = ['experts_as_linear', 'export_int8', 'quantize_int8']


def experts_as_linear(model: nn.Module) -> nn.Module:
    """Hold every expert of every MoE layer in modules `nn.Linear`, in place.

    Parameters are new and have other names (`fc1.0.weight` for `fc1.weight`), so that weights are
    loaded before and optimizers made after it. Training is faster with stacked experts.

    Args:
        model: Any model with MoE layers, before it is distributed; it is returned.

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
        model: Any model in eval mode, float32 or bfloat16, on a CPU or CUDA; it is returned.

    Raises:
        ModuleNotFoundError: torchao, of the extra `export`, is missing.
        ValueError: The model trains, is wrapped, or has a dtype or device without a kernel.
    """
    check(not model.training, 'model.training', True, 'False: call model.eval() first')
    found = _layers(model)
    check(bool(found), 'model', type(model).__name__, 'one with linear layers in float')
    for layer in found.values():
        dtype, device = layer.weight.dtype, layer.weight.device
        valid = dtype in (torch.float32, torch.bfloat16)
        check(valid, 'dtype', dtype, 'float32 or bfloat16: convert it with model.float()')
        valid = device.type in ('cpu', 'cuda')
        check(valid, 'device', str(device), 'cpu or cuda: model.cpu() moves it')
    with quiet():
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
        from torchao.utils import should_reduce_range
    _separated(model)
    chosen = set(_layers(model))
    # processors without VNNI add products of int8 in 16 bits, which would overflow
    config = Int8DynamicActivationInt8WeightConfig(
        set_inductor_config=False,
        reduce_range=any(should_reduce_range(layer.weight.device) for layer in found.values()),
    )
    quantize_(model, config, lambda module, name: name in chosen)
    return model


def export_int8(
    model: nn.Module | Exportable,
    path: str | Path,
    batch: int | None = None,
    opset: int | None = None,
) -> Path:
    """Writes a model in int8 as a file: NAME.pt2 by torchao, NAME.onnx by onnxruntime.

    Args:
        model: As of `export_onnx`, in float32 on a CPU; it is left as it is.
        path: Of the file.
        batch: Images per call; None for any number.
        opset: Of ONNX; None for torch's default.

    Returns:
        The path.

    Raises:
        ModuleNotFoundError: A package of the extra `export` is missing.
        ValueError: As of `export_onnx`, `save_program` and `quantize_int8`.
    """
    target, exportable = target_of(path, *SUFFIXES), Exportable.of(model)
    network = for_inference(exportable.network)
    if target.suffix == '.pt2':
        return save_program(replace(exportable, network=quantize_int8(network)), target, batch)
    exportable = replace(exportable, network=_separated(network))
    with TemporaryDirectory() as folder:
        source = export_onnx(exportable, Path(folder) / target.name, batch, opset)
        with quiet():
            write_whole(target, lambda file: _quantize_onnx(source, file, network))
    return target


def _separated(model: nn.Module) -> nn.Module:
    return experts_as_linear(model) if moe_layers(model) else model


def _quantize_onnx(source: Path, file: Path, network: nn.Module) -> None:
    """Int8 for the products with the weights of linear layers."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    layers, nodes = _layers(network), onnx.load(source, load_external_data=False).graph.node
    # onnxruntime replaces a Gemm by a MatMul and an Add, before it looks at names
    suffixes = {'MatMul': '', 'Gemm': '_MatMul'}
    products = [node for node in nodes if node.op_type in suffixes]
    notes = [{entry.key: entry.value for entry in node.metadata_props} for node in products]
    # names of the modules whose calls became nodes, as torch's exporter notes them
    names = [literal_eval(each['pkg.torch.onnx.name_scopes'])[-2] for each in notes]
    chosen = [
        n.name + suffixes[n.op_type]
        for n, name in zip(products, names, strict=True)
        if name in layers
    ]
    assert chosen, 'no layer is in the graph'
    quantize_dynamic(
        source,
        file,
        per_channel=True,
        reduce_range=True,  # as above: a file does not know where it will run
        weight_type=QuantType.QInt8,
        nodes_to_quantize=chosen,
        use_external_data_format=len(list(source.parent.iterdir())) > 1,  # as in float
    )


def _layers(model: nn.Module) -> dict[str, nn.Linear | StackedLinear]:
    """What can become int8, by name."""
    deciding = {m for r in model.modules() if isinstance(r, ImageReader) for m in r.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | StackedLinear)
        and not isinstance(module, NonDynamicallyQuantizableLinear)
        and module not in deciding
        and type(module.weight) in (nn.Parameter, Tensor)  # weights in int8 are a type of torchao
    }
