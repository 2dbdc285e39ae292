"""One pass over a data set that looks at the routing of every layer of experts.

Legend: B images, N tokens per image, E experts, C channels, H, W height and width.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vqmoe_vision.models.layers import Transformer
from vqmoe_vision.models.normalization import Normalization
from vqmoe_vision.moe import moe_layers
from vqmoe_vision.moe.config import check

from .adapters import decisions
from .record import Grid, LayerRecord, grid_of
from .shifts import Shift, ShiftTally, in_colour
from .tally import (
    LayerSurvey,
    LayerTally,
    Seen,
    checked_labels,
    classes_of_tokens,
    image_patches,
)
from .verdicts import INFORMED


@dataclass(frozen=True)
class Example:
    """One picture and what every layer does with its patches."""

    name: str
    image: Tensor  # (3, H, W) in [0, 1]
    # by layer and name (rows, columns): of a decider the first expert, -1 for none, and codes, both
    # int64; the share of the continuous branch, and of each expert of SoftMoE its dispatch weights
    maps: dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Survey:
    """What was seen of a model's routing over a data set."""

    title: str  # says which model or checkpoint
    images: int  # how many were looked at
    classes: list[str] | None  # names by index, None without labels
    layers: dict[str, LayerSurvey]  # by name, such as 'blocks.1.mlp'
    examples: list[Example]  # the first pictures
    # by 'gaussian_noise 3' and 'blocks.1.mlp.router': share of tokens whose first expert changes
    shifts: dict[str, dict[str, float]]

    @property
    def verdicts(self) -> dict[str, list[str]]:
        """By layer: 'healthy', or what is wrong in words such as 'collapsed'."""
        return {name: layer.verdict for name, layer in self.layers.items()}

    @property
    def numbers(self) -> dict[str, dict[str, float]]:
        """By layer: its measures by name."""
        return {name: layer.numbers for name, layer in self.layers.items()}

    def save(self, path: str | Path) -> Path:
        """Writes `report.html` and `numbers.json` into a folder, and returns the page."""
        from .report import write_report  # the rest does without matplotlib

        return write_report([self], Path(path))[0]

    def content(self) -> dict[str, Any]:
        """All but pictures and samples, as JSON can hold it."""
        return {
            'title': self.title,
            'images': self.images,
            'classes': self.classes,
            'layers': {
                name: {
                    'num_experts': of.num_experts,
                    'verdict': of.verdict,
                    'numbers': of.numbers,
                    'load': {n: load.tolist() for n, load in of.load.items()},
                    'expert_by_class': {n: each.tolist() for n, each in of.expert_by_class.items()},
                    'similarity': {n: cosine.tolist() for n, cosine in of.similarity.items()},
                    'code_usage': None if of.codebook is None else of.codebook.usage.tolist(),
                }
                for name, of in self.layers.items()
            },
            'shifts': self.shifts,
        }


Batch = Tensor | tuple[Tensor, Tensor]
SIZE = 32  # of a batch of `analyze`


def survey(
    model: nn.Module,
    batches: Iterable[Batch],  # images, or these and labels, all as `analyze` takes them
    *,
    title: str,
    normalization: Normalization | None,  # of images, to look at them; None of texts (B, N)
    classes: Sequence[str] | None = None,  # by index; demanded with labels
    names: Sequence[str] = (),  # of the first images; others are called by their number
    num_examples: int = 4,  # of the first images, which a report shows
    shifts: Sequence[Shift] = (),  # changes of images, to see whose expert changes
    shifted_images: int = 100,  # how many of the first
    router: str = '*.gate',
    top_k: int = 2,
) -> Survey:
    """Looks at the routing of a model over a data set, in eval mode; it is left as it was."""
    tallies, examples, count, shifted = dict[str, LayerTally](), list[Example](), 0, None
    if shifts:
        if not isinstance(model, Transformer) or normalization is None:
            kind = type(model).__name__
            raise ValueError(f'shifts: {kind} is no VisionTransformer or Eva of timm')
        shifted = ShiftTally(model, normalization, shifts)
    for batch in batches:
        images, labels = (batch, None) if isinstance(batch, Tensor) else batch
        records, again = decisions(model, images, router, top_k), dict[str, LayerRecord]()
        if count < INFORMED:  # in another order, by which nothing may change
            again = decisions(model, images.flip(0), router, top_k)
        pixels = None if normalization is None else in_colour(normalization.pixels(images))
        labels, grids = checked_labels(images, labels, classes), dict[str, Grid | None]()
        for name, record in records.items():
            if name not in tallies:
                layer = moe_layers(model).get(name)
                tallies[name] = LayerTally(name, layer, len(classes or ()))
            tokens = record.inputs.shape[1]
            grid = grids[name] = grid_of(model, images, tokens) if record.placed else None
            patches = image_patches(pixels, grid) if grid and pixels is not None else None
            seconds = {n: e.flip(0) for n, e in again[name].firsts.items()} if again else {}
            of_tokens = classes_of_tokens(labels, grid, tokens)
            seen = Seen(len(images), count, of_tokens, grid, patches, seconds)
            tallies[name].add(record, seen)
        for i, own in enumerate(() if pixels is None else pixels[: max(num_examples - count, 0)]):
            called = names[count + i] if count + i < len(names) else f'image {count + i}'
            maps = {n: _maps(record, grids[n], i) for n, record in records.items()}
            if isinstance(model, Transformer):  # others have no patches that an image does not fill
                own = Grid.of_timm(model, own).filled(own)
            examples.append(Example(called, own.clone(), maps))
        if shifted is not None:
            shifted.add(images[: max(shifted_images - count, 0)])
        count += len(images)
    check(count > 0, 'batches', count, 'at least one image to look at')
    surveyed = {name: tally.survey() for name, tally in tallies.items()}
    changed = shifted.shares() if shifted is not None else {}
    return Survey(title, count, list(classes) if classes else None, surveyed, examples, changed)


def _maps(record: LayerRecord, grid: Grid | None, index: int) -> dict[str, Tensor]:
    """What a layer does with the patches of one image."""
    if grid is None:
        return {}
    tables = {**record.firsts, **{f'{name}: codes': codes for name, codes in record.codes.items()}}
    if record.gates is not None:
        tables['continuous share'] = record.gates[..., 0]
    if record.dispatch is not None:
        shares = record.dispatch.sum(dim=-1)  # of the largest of the image
        shares = shares / shares.amax(dim=(1, 2), keepdim=True)
        tables |= {f'expert {e}': share for e, share in enumerate(shares.unbind(dim=-1))}
    return {name: grid.of(of_tokens[index, None])[0].clone() for name, of_tokens in tables.items()}


def analyze(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    labels: Tensor | None = None,
    router: str = '*.gate',
    top_k: int = 2,
) -> Survey:
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
    if isinstance(model, nn.DataParallel):  # whose replicas would each tell of their own images
        model = model.module
    batches: list[Any] = list(images.split(SIZE)) if isinstance(images, Tensor) else list(images)
    count = sum(map(len, batches))
    check(count > 1, 'images', count, 'at least two, to compare them')
    classes, parts, timms = None, [*batches], getattr(model, 'pretrained_cfg', None) or {}
    if labels is not None:
        check(len(labels) == count, 'labels', len(labels), f'one per image, {count}')
        known = labels[labels != 255] if labels.ndim > 1 else labels
        check(known.numel() > 0, 'labels', 255, 'a class for some pixel')
        classes = [str(i) for i in range(int(known.max()) + 1)]
        of_parts = labels.split([len(batch) for batch in batches])
        parts = [*zip(batches, of_parts, strict=True)]
    visible = batches[0].ndim == 4 and batches[0].shape[1] in (1, 3)  # others are not drawn
    normalization = _normalization(timms, batches[0]) if visible else None
    return survey(
        model,
        parts,
        title=timms.get('architecture') or type(model).__name__,
        normalization=normalization,
        classes=classes,
        router=router,
        top_k=top_k,
    )


def _normalization(known: Mapping, images: Tensor) -> Normalization:
    """That of timm's models; of others whatever makes the darkest black and the brightest white."""
    channels = images.shape[1]
    if 'mean' in known and 'std' in known and len(known['mean']) == channels:
        return Normalization.of(known, channels=channels)
    low, high = torch.aminmax(images.detach().float())
    span = max((high - low).item(), 1e-12)
    return Normalization((-low.item() / span,) * channels, (1 / span,) * channels)
