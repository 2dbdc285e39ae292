"""What a survey looks at: images as a model takes them, one by one, and their classes.

Legend: B images, H, W height and width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.config import Config
from torch import Tensor

from vqmoe_vision.engine.model import scope_of
from vqmoe_vision.models.normalization import Normalization

_SUFFIXES = {'.bmp', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp'}


class Sample(NamedTuple):
    """One image."""

    image: Tensor  # (3, H, W), normalised as in training
    label: Tensor | None  # (), or (H, W) with 255 for none


@dataclass(frozen=True)
class Source:
    """Images that are read when they are asked for."""

    found: Sequence  # entries of a data set, or files, which have no classes
    read: Callable[[Any], Sample]
    normalization: Normalization
    classes: list[str] | None = None
    chosen: Sequence[int] = ()  # of what was found; all if there is none

    def drawn(self, count: int) -> 'Source':
        """At most `count`, drawn the same every time: the first files would be of one class."""
        own = torch.Generator().manual_seed(0)
        return replace(self, chosen=torch.randperm(len(self.found), generator=own)[:count].tolist())

    @property
    def _places(self) -> Sequence[int]:
        return self.chosen or range(len(self.found))

    @property
    def names(self) -> list[str]:
        """What the images are called."""
        return [f'image {i}' if self.classes else self.found[i].name for i in self._places]

    def batches(self, batch_size: int) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
        """Neighbours of one size together, as `survey` takes them."""
        for start in range(0, len(self._places), batch_size):
            found = (self.read(self.found[i]) for i in self._places[start : start + batch_size])
            for _, group in groupby(found, key=lambda sample: sample.image.shape):
                images, labels = zip(*group, strict=True)
                batch = torch.stack(images)
                yield batch if self.classes is None else (batch, torch.stack(labels))


def images_of(batch: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """The images of a batch of `Source.batches`, with or without labels."""
    return batch if isinstance(batch, Tensor) else batch[0]


def source_of(model: Any, config: Config, count: int, folder: str | None = None) -> Source:
    """Images of a config's test, at most `count` and always the same."""
    with scope_of(config):
        return model.source(config.test_dataloader.dataset, folder).drawn(count)


def image_files(folder: str | Path) -> list[Path]:
    """The image files in a folder and the folders in it, by name."""
    if not Path(folder).is_dir():
        raise ValueError(f'images: {folder} is not a folder')
    files = sorted(p for p in Path(folder).rglob('*') if p.suffix.lower() in _SUFFIXES)
    if not files:
        raise ValueError(f'images: {folder} holds no image ({", ".join(sorted(_SUFFIXES))})')
    return files
