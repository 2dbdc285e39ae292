"""Files of exported models: run, and compared with their model.

Legend: B images of C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..moe.config import check
from .export import INPUT, SUFFIXES, Exportable, as_list, require_packages, target_of

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
