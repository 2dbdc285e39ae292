"""One pass over a data set that looks at the routing of every MoE layer, in memory that stays flat.

Legend: B images, N tokens per image, C channels, H height, W width, E experts, P slots per expert.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqmoe_vision.models.layers import Transformer
from vqmoe_vision.models.normalization import Normalization
from vqmoe_vision.moe import moe_layers
from vqmoe_vision.moe.config import check

from .record import LayerRecord, evaluating, on_patches, recorded
from .shifts import Shift, ShiftTally, in_colour
from .surveyed import Example, Survey
from .tally import LayerTally, Seen

IGNORED = 255  # the class of pixels that have none, as in mmsegmentation
Batch = Tensor | tuple[Tensor, Tensor]


def survey(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    title: str,
    normalization: Normalization,
    classes: Sequence[str] | None = None,
    names: Sequence[str] = (),
    num_examples: int = 8,
    shifts: Sequence[Shift] = (),
    shifted_images: int = 100,
) -> Survey:
    """Looks at the routing of a model over a data set.

    Args:
        model: A vision transformer of timm with MoE layers, such as `routed_model` of what was
            trained; it runs in eval mode and is left as it was.
        batches: Images (B, C, H, W), normalised as in training; or pairs of these and labels,
            int64: a class per image (B,), or per pixel (B, H, W) with 255 for none.
        title: Says which model or checkpoint.
        normalization: Of the images, so that people can look at them.
        classes: Names by index; demanded with labels.
        names: Of the first images; others are called by their number.
        num_examples: How many of the first images are kept with what every layer does with them.
        shifts: Ways to change images, to see whose expert changes; see `shifts` and `corruptions`.
        shifted_images: How many of the first images are changed.

    Raises:
        ValueError: If the model is dense or no vision transformer, there is no image, or labels do
            not fit.
    """
    layers, kind = moe_layers(model), type(model).__name__
    check(bool(layers), 'model', kind, 'one with layers of experts, this is dense')
    if not isinstance(model, Transformer):
        raise ValueError(f'model: {kind} is no VisionTransformer or Eva of timm')
    tallies = {name: LayerTally(name, each, len(classes or ())) for name, each in layers.items()}
    shifted = ShiftTally(model, normalization, shifts)
    examples: list[Example] = []
    count = 0
    with evaluating(model):
        for batch in batches:
            images, labels = (batch, None) if isinstance(batch, Tensor) else batch
            records = recorded(model, images)
            pixels = in_colour(normalization.pixels(images))
            of_tokens = _classes_of_tokens(model, images, labels, classes)
            seen = Seen(model, images, image_patches(model, pixels), of_tokens, count)
            for name, record in records.items():
                tallies[name].add(record, seen)
            for i in range(min(num_examples - count, len(images))):
                name = names[count + i] if count + i < len(names) else f'image {count + i}'
                examples.append(_example(model, images, i, pixels[i].clone(), name, records))
            shifted.add(images[: max(shifted_images - count, 0)])
            count += len(images)
        check(count > 0, 'batches', count, 'at least one image to look at')
        surveyed = {name: tally.survey() for name, tally in tallies.items()}
    return Survey(
        title, count, list(classes) if classes else None, surveyed, examples, shifted.shares()
    )


def _classes_of_tokens(
    model: Transformer, images: Tensor, labels: Tensor | None, classes: Sequence[str] | None
) -> Tensor | None:
    """Class of every token (B, N), -1 for none: of its image, or of most pixels of its patch."""
    if labels is None:
        return None
    check(bool(classes), 'classes', classes, 'names of the classes, as there are labels')
    allowed = [(len(images),), (len(images), *images.shape[-2:])]
    fits = tuple(labels.shape) in allowed and not labels.is_floating_point()
    given = f'{labels.dtype} {tuple(labels.shape)}'
    check(fits, 'labels', given, f'integers, one per image or per pixel, {allowed}')
    labels = labels.detach().cpu().long()
    of_image, most = labels.ndim == 1, len(classes or ()) - 1
    wrong = (labels < 0) | (labels > most) & (of_image | (labels != IGNORED))
    check(not wrong.any(), 'labels', labels[wrong][:1].tolist(), f'classes from 0 to {most}')
    if of_image:
        height, width = images.shape[-2:]
        rows, columns = model.patch_embed.dynamic_feat_size((height, width))
        return labels[:, None].expand(-1, model.num_prefix_tokens + rows * columns)
    ignored = labels.masked_fill(labels == IGNORED, -1)[:, None]
    # padding is shifted so that what it adds, zeros, is the class of pixels that have none
    of_patch = image_patches(model, ignored + 1).flatten(3).mode(dim=-1).values - 1
    prefix = of_patch.new_full((len(labels), model.num_prefix_tokens), -1)
    return torch.cat([prefix, of_patch.flatten(1)], dim=1)


def image_patches(model: Transformer, pixels: Tensor) -> Tensor:
    """Images (B, C, H, W) as patches (B, rows, columns, C, h, w); what is missing is black."""
    (height, width), (h, w) = pixels.shape[-2:], model.patch_embed.patch_size
    padded = F.pad(pixels, (0, -width % w, 0, -height % h))
    cut = padded.unflatten(-1, (-1, w)).unflatten(-3, (-1, h))  # (B, C, rows, h, columns, w)
    return cut.permute(0, 2, 4, 1, 3, 5)


def _example(
    model: Transformer,
    images: Tensor,
    index: int,
    pixels: Tensor,
    name: str,
    records: dict[str, LayerRecord],
) -> Example:
    def grid(of_tokens: Tensor) -> Tensor:
        return on_patches(model, images, of_tokens[index : index + 1])[0].clone()

    example = Example(name, pixels, {}, {}, {}, {})
    for layer, record in records.items():
        for decider, experts in record.experts.items():
            example.experts[f'{layer}.{decider}'] = grid(experts[..., 0])
        for decider, codes in record.codes.items():
            example.codes[f'{layer}.{decider}'] = grid(codes)
        if record.gates is not None:
            example.gates[layer] = grid(record.gates[..., 0])
        if record.dispatch is not None:
            example.slots[layer] = grid(record.dispatch.sum(dim=-1)).movedim(-1, 0)
    return example
