"""One pass over a data set that looks at the routing of every layer of experts.

Legend: B images, N tokens per image, E experts, C channels, H, W height and width.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vqmoe_vision.models.layers import Transformer
from vqmoe_vision.models.normalization import Normalization
from vqmoe_vision.moe import moe_layers
from vqmoe_vision.moe.config import check

from .adapters import decisions
from .places import Grid, checked_labels, classes_of_tokens, grid_of, image_patches
from .record import LayerRecord
from .shifts import Shift, ShiftTally, in_colour
from .tally import LayerSurvey, LayerTally, Seen, firsts
from .verdicts import INFORMED


@dataclass(frozen=True)
class Example:
    """One picture and what every layer does with its patches."""

    name: str
    image: Tensor  # (3, H, W) in [0, 1]
    # 'blocks.1.mlp.router': (rows, columns) int64, the first expert, -1 for none
    experts: dict[str, Tensor]
    codes: dict[str, Tensor]  # 'blocks.1.mlp.quantizer.codebook': (rows, columns) int64
    gates: dict[str, Tensor]  # 'blocks.1.mlp': (rows, columns), share of the continuous branch
    # 'blocks.1.mlp': (E, rows, columns), SoftMoE's dispatch weights, summed over slots of an expert
    slots: dict[str, Tensor]


@dataclass(frozen=True)
class Survey:
    """What was seen of a model over a data set."""

    title: str  # says which model or checkpoint
    images: int  # how many were looked at
    classes: list[str] | None  # names by index, None without labels
    layers: dict[str, LayerSurvey]  # by name, such as 'blocks.1.mlp'
    examples: list[Example]  # the first pictures
    # by 'gaussian_noise 3' and 'blocks.1.mlp.router': share of tokens whose first expert changes
    shifts: dict[str, dict[str, float]]

    def numbers(self) -> dict[str, Any]:
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


def survey(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    title: str,
    normalization: Normalization | None,
    classes: Sequence[str] | None = None,
    names: Sequence[str] = (),
    num_examples: int = 8,
    shifts: Sequence[Shift] = (),
    shifted_images: int = 100,
    router: str = '*.gate',
    top_k: int = 2,
) -> Survey:
    """Looks at the routing of a model over a data set.

    Args:
        model: Holds layers of experts, such as `routed_model` of what was trained, or anybody's; it
            runs in eval mode and is left as it was.
        batches: Images (B, C, H, W), normalised as in training; or pairs of these and labels,
            int64: a class per image (B,), or per pixel (B, H, W) with 255 for none.
        title: Says which model or checkpoint.
        normalization: Of the images, so that people can look at them; None of texts (B, N).
        classes: Names by index; demanded with labels.
        names: Of the first images; others are called by their number.
        num_examples: How many of the first images are kept with what every layer does with them.
        shifts: Ways to change images, to see whose expert changes; see `shifts`.
        shifted_images: How many of the first images are changed.
        router: Pattern of names of routers that are not this package's.
        top_k: How many experts these choose by their scores.

    Raises:
        ValueError: If the model is dense, there is no image, or labels or options do not fit.
    """
    tallies: dict[str, LayerTally] = {}
    shifted = None
    if shifts:
        if not isinstance(model, Transformer) or normalization is None:
            raise ValueError(
                f'shifts: {type(model).__name__} is no VisionTransformer or Eva of timm'
            )
        shifted = ShiftTally(model, normalization, shifts)
    examples: list[Example] = []
    count = 0
    for batch in batches:
        images, labels = (batch, None) if isinstance(batch, Tensor) else batch
        records, again = decisions(model, images, router, top_k), dict[str, LayerRecord]()
        if count < INFORMED:  # in another order, by which nothing may change
            again = decisions(model, images.flip(0), router, top_k)
        pixels = None if normalization is None else in_colour(normalization.pixels(images))
        labels = checked_labels(images, labels, classes)
        for name, record in records.items():
            if name not in tallies:
                layer = moe_layers(model).get(name)
                tallies[name] = LayerTally(name, layer, len(classes or ()))
            tokens = record.inputs.shape[1]
            grid = grid_of(model, images, tokens) if record.placed else None
            patches = image_patches(pixels, grid.patch) if grid and pixels is not None else None
            seconds = {n: e.flip(0) for n, e in firsts(again[name]).items()} if again else {}
            of_tokens = classes_of_tokens(labels, grid, tokens)
            seen = Seen(len(images), count, of_tokens, grid, patches, seconds)
            tallies[name].add(record, seen)
        for i, own in enumerate(() if pixels is None else pixels[: max(num_examples - count, 0)]):
            called = names[count + i] if count + i < len(names) else f'image {count + i}'
            examples.append(_example(model, images, i, own.clone(), called, records))
        if shifted is not None:
            shifted.add(images[: max(shifted_images - count, 0)])
        count += len(images)
    check(count > 0, 'batches', count, 'at least one image to look at')
    surveyed = {name: tally.survey() for name, tally in tallies.items()}
    changed = shifted.shares() if shifted is not None else {}
    return Survey(title, count, list(classes) if classes else None, surveyed, examples, changed)


def _example(
    model: nn.Module,
    images: Tensor,
    index: int,
    pixels: Tensor,
    name: str,
    records: dict[str, LayerRecord],
) -> Example:
    example = Example(name, pixels, {}, {}, {}, {})
    for layer, record in records.items():
        grid = grid_of(model, images, record.inputs.shape[1]) if record.placed else None
        if grid is None:
            continue

        def own(of_tokens: Tensor, grid: Grid = grid) -> Tensor:
            return grid.of(of_tokens[index : index + 1])[0].clone()

        for decider, experts in record.experts.items():
            example.experts[f'{layer}.{decider}'] = own(experts[..., 0])
        for decider, codes in record.codes.items():
            example.codes[f'{layer}.{decider}'] = own(codes)
        if record.gates is not None:
            example.gates[layer] = own(record.gates[..., 0])
        if record.dispatch is not None:
            example.slots[layer] = own(record.dispatch.sum(dim=-1)).movedim(-1, 0)
    return example
