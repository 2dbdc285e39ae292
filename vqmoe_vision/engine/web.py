"""A classifier with experts as a page for a browser, which shows its routing and switches experts.

Legend: C channels, H height, W width, N tokens of the image, L layers of E experts, P slots per
expert, M parts of layers that decide: routers, codebooks, slots.
"""

import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import astuple
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vqmoe_vision.models.export import Exportable, export_onnx, for_inference
from vqmoe_vision.models.layers import Transformer
from vqmoe_vision.moe import moe_layers
from vqmoe_vision.moe.codebooks import Quantized
from vqmoe_vision.moe.config import check
from vqmoe_vision.moe.layer import Decisions

RUNTIME = 'onnxruntime-web@1.30.0'
_FILES = ('ort.wasm.min.mjs', 'ort-wasm-simd-threaded.mjs', 'ort-wasm-simd-threaded.wasm')
_PAGE = Path(__file__).parent / 'templates/web.html'
Photo = tuple[Image.Image, str]  # and what is said of it


class SwitchedGraph(nn.Module):
    """An image (1, C, H, W) and switches (L, E) bool to logits, and experts (M, N) int32.

    Of each token it is the expert with the largest weight, -1 where none takes it.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.parts: dict[str, list[str]] = {}  # names of what decides, by layer, of the last pass

    def forward(self, image: Tensor, switches: Tensor) -> tuple[Tensor, Tensor]:
        """Run the network."""
        found: dict[str, dict[str, Tensor]] = {}
        with ExitStack() as stack:
            for (name, layer), on in zip(moe_layers(self.network).items(), switches, strict=True):
                found[name] = {}
                stack.enter_context(layer.switched(on))
                stack.callback(setattr, layer.recorder, 'watcher', None)
                layer.recorder.watcher = partial(_keep_weights, found[name], on)
            logits = self.network(image)
        self.parts = {name: list(parts) for name, parts in found.items()}
        every = torch.stack([each for parts in found.values() for each in parts.values()])
        weights, experts = every.max(dim=2)
        return logits, experts.where(weights > 0, -1).int()


def _keep_weights(
    kept: dict[str, Tensor], on: Tensor, decisions: Decisions, inputs: Tensor, _: Tensor
) -> None:
    """Of each part that decides the weights (N, E) of all experts, before gates."""
    num_tokens, num_experts = inputs.shape[1], on.shape[0]
    for part, decided in decisions.items():
        if isinstance(decided, Tensor):
            if part != 'combine':  # (1, N, E * P)
                continue
            table = decided[0].unflatten(1, (num_experts, -1)).sum(dim=2)
        elif isinstance(decided, Quantized):  # code j is of expert j mod E
            table = F.one_hot(decided.indices % num_experts, num_experts).float()
        else:
            chosen = decided.chosen()
            weights, tokens = chosen.weights, chosen.tokens
            weights = weights if chosen.kept is None else weights * chosen.kept
            if tokens is None:  # else of assignments, where a token has any number
                tokens = torch.arange(num_tokens)[:, None]
            places = (tokens * num_experts + chosen.indices).flatten()
            table = weights.new_zeros(num_tokens * num_experts)
            table = table.index_add(0, places, weights.flatten()).view(num_tokens, num_experts)
        kept[part] = table * on


def export_web(
    model: nn.Module | Exportable, folder: Path, title: str, photos: Iterable[Photo]
) -> Exportable:
    """Writes a page of a classifier, its model and what runs it; returns what became the graph."""
    if (npm := shutil.which('npm')) is None:
        raise ValueError(f'--web needs npm, of Node.js, for {RUNTIME}: apt-get install npm')
    exportable, chosen = Exportable.of(model), list(photos)
    network: Any = exportable.network
    layers, size = moe_layers(network), exportable.input_size
    known = {'mean', 'std'} <= exportable.about.keys() and size[0] == 3
    allowed = 'for a classifier with experts, of RGB images whose normalisation is known'
    check(isinstance(network, Transformer) and bool(layers) and known, '--web', title, allowed)
    graph = SwitchedGraph(for_inference(network))
    num_experts = next(iter(layers.values())).experts.num_experts
    switches = torch.ones(len(layers), num_experts, dtype=torch.bool)
    with torch.no_grad():
        graph(exportable.images(1), switches)
    about = {
        **exportable.about,
        'title': title,
        'size': size,
        'grid': network.patch_embed.grid_size,
        'prefix': network.num_prefix_tokens,
        'experts': num_experts,
        'layers': graph.parts,
        'photos': [text for _, text in chosen],
    }
    exportable = Exportable(graph, size, ('logits', 'experts'), about, {'switches': switches})
    export_onnx(exportable, folder / 'model.onnx', batch=1)
    (folder / 'about.json').write_text(json.dumps(about))
    for number, (photo, _) in enumerate(chosen):
        photo.save(folder / f'photo-{number}.png')
    shutil.copyfile(_PAGE, folder / 'index.html')
    with TemporaryDirectory() as scratch:
        command = [npm, 'pack', '--silent', '--prefer-offline', RUNTIME]
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
        told = ' '.join(done.stderr.split())[:200]
        check(done.returncode == 0, '--web', title, f'npm has to give {RUNTIME}: {told}')
        with tarfile.open(next(Path(scratch).glob('*.tgz'))) as archive:
            for name in _FILES:
                content: Any = archive.extractfile(f'package/dist/{name}')
                (folder / name).write_bytes(content.read())
    return exportable


def photos_of(source: Any) -> Iterator[Photo]:
    """A test image of each of eight classes; without a `Source` two photographs of scikit-learn."""
    if source is None:
        from sklearn.datasets import load_sample_image  # a second to import

        for name, author in (('china.jpg', 'danielbuechele'), ('flower.jpg', 'vultilion')):
            yield Image.fromarray(load_sample_image(name)), f'{name} by {author}, CC BY 2.0'
        return
    mean, std = (torch.tensor(n)[:, None, None] for n in astuple(source.normalization))
    seen: set[int] = set()
    for images, labels in source.drawn(256).batches(1):
        if (label := int(labels)) not in seen and len(seen) < 8:
            seen.add(label)
            pixels = (255 * (images[0] * std + mean)).round().clamp(0, 255).byte()
            yield Image.fromarray(pixels.movedim(0, 2).numpy()), str(source.classes[label])
