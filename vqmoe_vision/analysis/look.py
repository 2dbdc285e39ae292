"""One call that looks at the routing of any model."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vqmoe_vision.models.normalization import Normalization
from vqmoe_vision.moe.config import check

from .survey import Survey, survey

BATCH = 32


@dataclass(frozen=True)
class Analysis:
    """What was seen of a model's routing."""

    survey: Survey

    @property
    def verdicts(self) -> dict[str, list[str]]:
        """By layer: 'healthy', or what is wrong in words such as 'collapsed'."""
        return {name: layer.verdict for name, layer in self.survey.layers.items()}

    @property
    def numbers(self) -> dict[str, dict[str, float]]:
        """By layer: its measures by name."""
        return {name: layer.numbers for name, layer in self.survey.layers.items()}

    def save(self, path: str | Path) -> Path:
        """Writes `report.html` and `numbers.json` into a folder, and returns the page."""
        from .report import write_report  # the rest does without matplotlib

        return write_report([self.survey], Path(path))[0]


def analyze(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    labels: Tensor | None = None,
    router: str = '*.gate',
    top_k: int = 2,
) -> Analysis:
    """Says what is wrong with the routing of any mixture of experts, by one look at images.

    Reads this package's layers, experts of transformers, soft-moe-pytorch, st-moe-pytorch,
    codebooks of vector-quantize-pytorch, and any router that answers with a score per expert.

    Args:
        model: It runs in eval mode and is left as it was.
        images: (B, C, H, W) as the model takes them, token ids (B, N), or batches of these.
        labels: int64, a class per image (B,), or per pixel (B, H, W) with 255 for none.
        router: Pattern of the names of routers that no library above has.
        top_k: How many experts such a router chooses by its scores.

    Raises:
        ValueError: If no layer of experts is found, there are no two images, or labels or options
            do not fit.
    """
    batches: list[Any] = list(images.split(BATCH)) if isinstance(images, Tensor) else list(images)
    count = sum(map(len, batches))
    check(count > 1, 'images', count, 'at least two, to compare them')
    classes, parts, timms = None, [*batches], getattr(model, 'pretrained_cfg', None) or {}
    if labels is not None:
        check(len(labels) == count, 'labels', len(labels), f'one per image, {count}')
        known = labels[labels != 255] if labels.ndim > 1 else labels
        classes = [str(i) for i in range(int(known.max()) + 1)]
        of_parts = labels.split([len(batch) for batch in batches])
        parts = [*zip(batches, of_parts, strict=True)]
    visible = batches[0].ndim == 4 and batches[0].shape[1] in (1, 3)  # others are not drawn
    normalization = _normalization(timms, batches[0]) if visible else None
    seen = survey(
        model,
        parts,
        title=timms.get('architecture') or type(model).__name__,
        normalization=normalization,
        classes=classes,
        router=router,
        top_k=top_k,
    )
    return Analysis(seen)


def _normalization(known: Mapping, images: Tensor) -> Normalization:
    """That of timm's models; of others whatever makes the darkest black and the brightest white."""
    channels = images.shape[1]
    if 'mean' in known and 'std' in known and len(known['mean']) == channels:
        return Normalization.of(known, channels=channels)
    low, high = torch.aminmax(images.detach().float())
    span = max((high - low).item(), 1e-12)
    return Normalization((-low.item() / span,) * channels, (1 / span,) * channels)
