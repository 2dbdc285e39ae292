"""Models that leave this package: folders of timm, `torch.export` programs and ONNX files.

Legend: B images of C channels, H height, W width.
"""

import copy
import fcntl
import importlib.util
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any

import timm
import torch
from timm.models import FeatureInfo, get_model_input_config, save_for_hf
from timm.models.eva import Eva
from torch import Tensor, nn

from ..moe import moe_layers
from ..moe.config import check
from .layers import Transformer
from .moe_vit import SparseModel
from .weights import CONFIG, DIGEST, OF_TIMM, digest_of

SUFFIXES = ('.onnx', '.pt2')
_PACKAGES = ('onnx', 'onnxscript', 'onnxruntime')
INPUT = 'images'
_NAMESPACES = ('aten', 'prims', 'export', 'higher_order')  # of torch's operators


# A model without a last norm: of timm's `VisionTransformer`, and of its `Eva`.
_NO_NORM = ({'final_norm': False}, {'use_post_transformer_norm': False, 'use_fc_norm': False})
# Of timm's `pretrained_cfg` how images are prepared.
_PREPROCESSING = ('input_size', 'mean', 'std', 'crop_pct', 'crop_mode', 'interpolation')
# What belongs to the network; the rest is about the weights of others.
_OF_THE_NETWORK = ('architecture', 'classifier', 'pool_size')


@dataclass(frozen=True)
class Exportable:
    """What becomes a graph, and in `about` what a user of the file has to know, as JSON."""

    network: nn.Module  # of images (B, C, H, W) float32
    input_size: tuple[int, int, int]  # C, H, W
    outputs: tuple[str, ...] = ('logits',)
    about: dict = field(default_factory=dict)
    beside: dict[str, Tensor] = field(default_factory=dict)  # other inputs by name, of fixed shapes

    @classmethod
    def of(cls, model: 'nn.Module | Exportable') -> 'Exportable':
        """That of a timm model: logits of images of the size it was built for, normalised."""
        if isinstance(model, Exportable):
            return model
        features = isinstance(getattr(model, 'feature_info', None), FeatureInfo)
        check(not features, 'features_only', True, 'False, or an Exportable of any outputs')
        config: Any = getattr(model, 'pretrained_cfg', None)  # of its weights
        check(bool(config), 'model', type(model).__name__, 'an Exportable, which has input_size')
        input_size = get_model_input_config(model)['input_size']
        channels = input_size[0]
        about: dict = {'channels': 'RGB'} if channels == 3 else {}
        # timm's default is one of three channels, whatever the model has
        values = {name: list(config.get(name) or []) for name in ('mean', 'std')}
        about |= {name: value for name, value in values.items() if len(value) == channels}
        classes = list(config.get('label_names') or [])
        if classes and len(classes) == getattr(model, 'num_classes', 0):  # not of another head
            about['classes'] = classes
        return cls(model, input_size, about=about)

    def images(self, batch: int, seed: int = 0) -> Tensor:
        """Images of noise, (batch, C, H, W)."""
        return torch.randn(batch, *self.input_size, generator=torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def run(self, images: Tensor) -> list[Tensor]:
        """What PyTorch predicts, in eval mode, one tensor per output."""
        return as_list(for_inference(self.network)(images, *self.beside.values()))


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings of what is deprecated in them, and without their log below errors."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', DeprecationWarning)
            warnings.simplefilter('ignore', FutureWarning)
            yield
    finally:
        logging.disable(before)


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
        check(tensor.device.type == 'cpu', 'device', str(tensor.device), 'cpu: use model.cpu()')
        real = tensor.is_floating_point()
        check(not real or tensor.dtype == torch.float32, 'dtype', tensor.dtype, 'float32')
    network = for_inference(exportable.network)
    # of one image, torch would make a graph for one image
    images = exportable.images(2 if batch is None else batch)
    fixed = (None,) * len(exportable.beside)
    dynamic = ({0: torch.export.Dim('batch')}, *fixed) if batch is None else None
    with torch.no_grad(), quiet():
        program = torch.export.export(
            network, (images, *exportable.beside.values()), dynamic_shapes=dynamic
        )
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
    first, last = 18, 23  # from torch's exporter's oldest to the newest of its oldest release here
    valid = opset is None or (type(opset) is int and first <= opset <= last)
    check(valid, 'opset', opset, f"{first} to {last}, or None for torch's default")
    require_packages()
    exportable = Exportable.of(model)
    network = exportable.network
    allowed = 'one in float, of which contrib.int8.export_int8 makes a file in int8'
    weights = [part.weight for part in network.modules() if isinstance(part, nn.Linear)]
    plain = all(type(weight) in (nn.Parameter, Tensor) for weight in weights)
    check(plain, 'model', f'a quantized {type(network).__name__}', allowed)
    exported = export_program(exportable, batch)
    with quiet():
        program: Any = torch.onnx.export(
            exported,
            input_names=[INPUT, *exportable.beside],
            output_names=list(exportable.outputs),
            opset_version=opset,
            custom_translation_table=_translations(),
            verbose=False,
        )
    for name, value in exportable.about.items():
        program.model.metadata_props[name] = json.dumps(value)
    write_whole(target, program.save)  # large weights go into a file beside it
    return target


def save_program(model: nn.Module | Exportable, path: str | Path, batch: int | None = None) -> Path:
    """Writes the program of a model, which `torch.export.load` reads without this package."""
    target = target_of(path, '.pt2')
    exportable = Exportable.of(model)
    program = export_program(exportable, batch)
    extra = {'about.json': json.dumps(exportable.about)}
    with quiet():
        write_whole(target, lambda file: torch.export.save(program, file, extra_files=extra))
    return target


def _translations() -> dict[Callable, Callable]:
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


@contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside a target, if need be the one that a killed call has left."""
    folder = target.with_name(f'.{target.name}.writing')
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)  # a link would be followed elsewhere
    with ExitStack() as stack:
        stack.callback(os.close, descriptor)
        with suppress(OSError):  # of a file system without locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the process ends
            except BlockingIOError:
                check(False, 'out', str(target), 'one that no other process writes now')
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        for path in folder.iterdir():
            path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path)
        yield folder


def write_whole(target: Path, save: Callable[[Path], object]) -> None:
    """Writes a file, and what belongs to it, whole or not at all."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with scratch_beside(target) as scratch:
            save(scratch / target.name)
            # the graph comes last, when all that it names is there
            for file in sorted(scratch.iterdir(), key=lambda file: file.name == target.name):
                os.replace(file, target.with_name(file.name))
    except OSError as error:
        raise ValueError(f'{str(target)!r} cannot be written: {error.strerror or error}') from error


Run = Callable[..., list[Tensor]]


def load_exported(path: str | Path, threads: int = 0) -> Run:
    """A file as a function, from images (B, C, H, W) and what it takes beside to its outputs."""
    target = target_of(path, *SUFFIXES)
    check(target.is_file(), 'path', str(path), 'a file that is there')
    if target.suffix == '.pt2':
        module = torch.export.load(target).module()
        return torch.no_grad()(lambda *inputs: as_list(module(*inputs)))
    require_packages()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(target, options, providers=['CPUExecutionProvider'])
    names = [each.name for each in session.get_inputs()]
    return lambda *inputs: [
        torch.from_numpy(found)
        for found in session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})
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
        found_by_file = run(images, *exportable.beside.values())
        pairs = zip(exportable.outputs, exportable.run(images), found_by_file, strict=True)
        for name, expected, got in pairs:
            largest = (got.double() - expected.double()).abs().max().item()
            unequal, equal = int((got != expected).sum()), None
            if expected.is_floating_point():
                same = got.argmax(1) == expected.argmax(1)
                equal = (int(same.sum()), same.numel())
            found.append(Difference(name, batch, largest, unequal, got.numel(), equal))
    return found


def preprocessing_of(config: Mapping) -> dict:
    """How images are prepared, of timm's `pretrained_cfg`, as `save` takes it."""
    return {name: config[name] for name in _PREPROCESSING if config.get(name) is not None}


def save(
    model: Any,
    folder: Path,
    preprocessing: dict,
    label_names: Sequence[str] = (),
    license_id: str | None = None,
) -> dict:
    """Writes `model.safetensors` and `config.json` with its digest, and reads them back."""
    described = {name: model.pretrained_cfg.get(name) for name in _OF_THE_NETWORK}
    model.pretrained_cfg = model.default_cfg = {**described, **preprocessing, 'license': license_id}
    names = {'label_names': list(label_names)} if label_names else {}
    save_for_hf(model, str(folder), names, _changed(model), safe_serialization=True)
    config = folder / CONFIG
    described = json.loads(config.read_text()) | {DIGEST: digest_of(folder / OF_TIMM[0])}
    # timm reads that of the root, and transformers gives both to timm
    described['model_args'].pop('num_classes', None)
    config.write_text(f'{json.dumps(described, indent=2)}\n')
    _read_back(model, folder, preprocessing['input_size'])
    return described['model_args']


def _changed(model: Any) -> dict:
    """Arguments that build a model as it is now, in the place of those that timm has recorded."""
    args: dict = {}
    if isinstance(model, Transformer):
        if len(model.blocks) < len(model.feature_info):
            args['depth'] = depth = len(model.blocks)
            if isinstance(model, SparseModel):
                args['moe_layers'] = left = [int(name.split('.')[1]) for name in moe_layers(model)]
                check(bool(left), 'out_indices', [depth - 1], 'not before all MoE layers')
        if isinstance(model.norm, nn.Identity) and isinstance(model.fc_norm, nn.Identity):
            args |= _NO_NORM[isinstance(model, Eva)]
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
