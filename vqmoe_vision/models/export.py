"""Models that leave PyTorch: `torch.export` programs and ONNX files of what a network predicts.

Legend: B images of C channels, H height, W width.
"""

import copy
import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from timm.layers import to_2tuple
from timm.models import FeatureInfo
from torch import Tensor, nn

from ..moe.config import check
from .complexity import has_plain_weights
from .quiet import quiet

SUFFIXES = ('.onnx', '.pt2')
# From the oldest that torch's exporter writes to the newest that torch 2.9 does.
OPSETS = (18, 23)
_PACKAGES = ('onnx', 'onnxscript', 'onnxruntime')
INPUT = 'images'
_NAMESPACES = ('aten', 'prims', 'export', 'higher_order')  # of torch's operators
_EXAMPLE_BATCH = 2  # of one image, torch would make a graph for one image


@dataclass(frozen=True)
class Exportable:
    """What becomes a graph, and in `about` what a user of the file has to know, as JSON."""

    network: nn.Module  # of images (B, C, H, W) float32
    input_size: tuple[int, int, int]  # C, H, W
    outputs: tuple[str, ...] = ('logits',)
    about: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: 'nn.Module | Exportable') -> 'Exportable':
        """That of a timm model: logits of images of the size it was built for, normalised."""
        if isinstance(model, Exportable):
            return model
        features = isinstance(getattr(model, 'feature_info', None), FeatureInfo)
        check(not features, 'features_only', True, 'False, or an Exportable of any outputs')
        config = getattr(model, 'pretrained_cfg', None) or {}
        channels, *size = config.get('input_size') or (3,)
        channels = getattr(model, 'in_chans', channels)  # the configuration is of its weights
        embed = getattr(model, 'patch_embed', None)
        if getattr(embed, 'img_size', None) is not None:
            size = list(to_2tuple(embed.img_size))  # type: ignore[union-attr]
            channels = embed.proj.in_channels  # type: ignore[union-attr]
        check(len(size) == 2, 'model', type(model).__name__, 'an Exportable, which has input_size')
        about: dict[str, Any] = {'channels': 'RGB'} if channels == 3 else {}
        # timm's default is one of three channels, whatever the model has
        values = {name: list(config.get(name) or []) for name in ('mean', 'std')}
        about |= {name: value for name, value in values.items() if len(value) == channels}
        classes = list(config.get('label_names') or [])
        if classes and len(classes) == getattr(model, 'num_classes', 0):  # not of another head
            about['classes'] = classes
        return cls(model, (channels, size[0], size[1]), about=about)

    def images(self, batch: int, seed: int = 0) -> Tensor:
        """Images of noise, (batch, C, H, W)."""
        return torch.randn(batch, *self.input_size, generator=torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def run(self, images: Tensor) -> list[Tensor]:
        """What PyTorch predicts, in eval mode, one tensor per output."""
        return as_list(for_inference(self.network)(images))


def require_packages() -> None:
    """Says in one line what writing and running ONNX files lacks."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        needed = f'ONNX files need {", ".join(missing)}'
        raise ModuleNotFoundError(f"{needed}: pip install '.[export]'")


def export_program(model: nn.Module | Exportable, batch: int | None = None) -> Any:
    """A model in eval mode as a program of torch's operators alone."""
    valid = batch is None or (type(batch) is int and batch >= 1)
    check(valid, 'batch', batch, 'at least 1, or None for any number of images')
    exportable = Exportable.of(model)
    for tensor in [*exportable.network.parameters(), *exportable.network.buffers()]:
        cpu, whole = tensor.device.type == 'cpu', not tensor.is_floating_point()
        check(cpu, 'device', str(tensor.device), 'cpu: move the model with model.cpu()')
        check(whole or tensor.dtype == torch.float32, 'dtype', tensor.dtype, 'float32')
    network = for_inference(exportable.network)
    images = exportable.images(_EXAMPLE_BATCH if batch is None else batch)
    dynamic = ({0: torch.export.Dim('batch')},) if batch is None else None
    with torch.no_grad(), quiet():
        program = torch.export.export(network, (images,), dynamic_shapes=dynamic)
        # operators of other packages are written in torch's: files load without them
        called = {node.target for node in program.graph.nodes if node.op == 'call_function'}
        foreign = {op for op in called if getattr(op, 'namespace', 'aten') not in _NAMESPACES}
        if foreign:
            # where packages put what their operators consist of
            from torch._inductor.decomposition import decompositions

            program = program.run_decompositions({op: decompositions[op] for op in foreign})
    return program


def export_onnx(
    model: nn.Module | Exportable,
    path: str | Path,
    batch: int | None = None,
    opset: int | None = None,
) -> Path:
    """Writes a model as an ONNX file, by torch's exporter."""
    target = target_of(path, '.onnx')
    first, last = OPSETS
    valid = opset is None or (type(opset) is int and first <= opset <= last)
    check(valid, 'opset', opset, f"{first} to {last}, or None for torch's default")
    require_packages()
    exportable = Exportable.of(model)
    network = exportable.network
    allowed = 'one in float, of which contrib.int8.export_int8 makes a file in int8'
    check(has_plain_weights(network), 'model', f'a quantized {type(network).__name__}', allowed)
    exported = export_program(exportable, batch)
    with quiet():
        program: Any = torch.onnx.export(
            exported,
            input_names=[INPUT],
            output_names=list(exportable.outputs),
            opset_version=opset,
            custom_translation_table=_translations(),
            verbose=False,
        )
    for name, value in exportable.about.items():
        program.model.metadata_props[name] = json.dumps(value)
    write_whole(target, program.save)  # large weights go into a file beside it
    return target


def save_program(
    model: nn.Module | Exportable,
    path: str | Path,
    batch: int | None = None,
) -> Path:
    """Writes the program of a model, which `torch.export.load` reads without this package."""
    target = target_of(path, '.pt2')
    exportable = Exportable.of(model)
    program = export_program(exportable, batch)
    extra = {'about.json': json.dumps(exportable.about)}
    with quiet():
        write_whole(target, lambda file: torch.export.save(program, file, extra_files=extra))
    return target


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Operators of our models that torch's exporter cannot write as ONNX by itself."""
    from onnxscript import opset18 as op

    def sort(x: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
        """ONNX's TopK puts the lower index first among equals, so that it is stable."""
        size = op.Reshape(op.Gather(op.Shape(x), op.Constant(value_int=dim)), [1])
        return op.TopK(x, size, axis=dim, largest=descending, sorted=True)

    def searchsorted(row: Any, values: Any, **options: Any) -> Any:
        """Of one sorted row (N,) and values (M,), from the left: how many are smaller."""
        assert not any(options.values())
        smaller = op.Less(op.Unsqueeze(row, [0]), op.Unsqueeze(values, [1]))
        return op.ReduceSum(op.Cast(smaller, to=7), [1], keepdims=0)  # 7: int64

    aten = torch.ops.aten
    return {aten.sort.stable: sort, aten.searchsorted.Tensor: searchsorted}


def for_inference(network: nn.Module) -> nn.Module:
    """A copy in eval mode that shares all tensors, so that nothing of the network changes."""
    tensors = [*network.parameters(), *network.buffers()]
    twin = copy.deepcopy(network, {id(tensor): tensor for tensor in tensors}).eval()
    for module in twin.modules():
        if hasattr(module, 'grad_checkpointing'):
            vars(module)['grad_checkpointing'] = False
    return twin


def as_list(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """What a network returned, one tensor per output."""
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def target_of(path: str | Path, *suffixes: str) -> Path:
    """A path with one of some endings."""
    target = Path(path)
    check(target.suffix in suffixes, 'path', str(path), f'a name in {" or ".join(suffixes)}')
    return target


def write_whole(target: Path, save: Callable[[Path], object]) -> None:
    """Writes a file, and what belongs to it, whole or not at all."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=target.parent, prefix=f'.{target.name}.') as scratch:
            save(Path(scratch) / target.name)
            # the graph comes last, when all that it names is there
            for file in sorted(Path(scratch).iterdir(), key=lambda file: file.name == target.name):
                os.replace(file, target.with_name(file.name))
    except OSError as error:
        raise ValueError(f'{str(target)!r} cannot be written: {error.strerror or error}') from error


Run = Callable[[Tensor], list[Tensor]]


def load_exported(path: str | Path, threads: int = 0) -> Run:
    """A file of this module as a function, from images (B, C, H, W) to its outputs."""
    target = target_of(path, *SUFFIXES)
    check(target.is_file(), 'path', str(path), 'a file that is there')
    if target.suffix == '.pt2':
        module = torch.export.load(target).module()
        return torch.no_grad()(lambda images: as_list(module(images)))
    require_packages()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(target, options, providers=['CPUExecutionProvider'])
    return lambda images: [
        torch.from_numpy(found) for found in session.run(None, {INPUT: images.numpy()})
    ]


@dataclass(frozen=True)
class Difference:
    """How far a file is from its model on some images."""

    output: str
    batch: int
    largest: float  # absolute; nan if there is one
    differing: int
    elements: int
    predictions: tuple[int, int] | None  # equal ones and all; None of labels

    def __str__(self) -> str:
        images = f'batch {self.batch}, {self.output}'
        if self.predictions is None:
            return f'{images}: {self.differing} of {self.elements} differ'
        equal = '{} of {} predictions equal'.format(*self.predictions)
        return f'{images}: {equal}, largest difference {self.largest:.2g}'


def differences(
    model: nn.Module | Exportable, run: Run, batches: Sequence[int] = (1, 4)
) -> list[Difference]:
    """Compares a function with the model that it was exported of, on images of noise."""
    exportable, found = Exportable.of(model), []
    for batch in batches:
        images = exportable.images(batch, seed=batch)
        pairs = zip(exportable.outputs, exportable.run(images), run(images), strict=True)
        for name, expected, got in pairs:
            largest = (got.double() - expected.double()).abs().max().item()
            unequal, equal = int((got != expected).sum()), None
            if expected.is_floating_point():
                same = got.argmax(1) == expected.argmax(1)
                equal = (int(same.sum()), same.numel())
            found.append(Difference(name, batch, largest, unequal, got.numel(), equal))
    return found
