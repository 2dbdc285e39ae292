"""Where the tokens of an image are, and of which class.

Legend: B images, N tokens per image, C channels, H, W height and width.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqmoe_vision.models.layers import Transformer
from vqmoe_vision.moe.config import check

IGNORED = 255  # the class of pixels that have none, as in mmsegmentation
PREFIX = 8  # the most tokens before patches that are guessed


class Grid(NamedTuple):
    """Rows and columns of patches, behind tokens that are of no place."""

    prefix: int
    rows: int
    columns: int
    patch: tuple[int, int]  # height and width in pixels

    def of(self, of_tokens: Tensor) -> Tensor:
        """What is known of every token (B, N, ...) at its patch (B, rows, columns, ...)."""
        return of_tokens[:, self.prefix :].unflatten(1, (self.rows, self.columns))


def grid_of(model: nn.Module, images: Tensor, num_tokens: int) -> Grid | None:
    """That of timm's transformers; of others one of square patches, None if none fits."""
    if images.ndim != 4:
        return None
    height, width = images.shape[-2:]
    if isinstance(model, Transformer):
        rows, columns = model.patch_embed.dynamic_feat_size((height, width))
        prefix, patch = model.num_prefix_tokens, tuple(model.patch_embed.patch_size)
        return Grid(prefix, rows, columns, patch) if num_tokens == prefix + rows * columns else None
    for prefix in range(PREFIX + 1):
        rows = round(math.sqrt(max(num_tokens - prefix, 0) * height / width))
        columns = (num_tokens - prefix) // max(rows, 1)
        fits = rows * columns == num_tokens - prefix > prefix and rows * width == columns * height
        if fits and height % rows == 0:
            return Grid(prefix, rows, columns, (height // rows, width // columns))
    return None


def image_patches(pixels: Tensor, patch: tuple[int, int]) -> Tensor:
    """Images (B, C, H, W) as patches (B, rows, columns, C, h, w); what is missing is black."""
    (height, width), (h, w) = pixels.shape[-2:], patch
    padded = F.pad(pixels, (0, -width % w, 0, -height % h))
    # (B, C, rows, h, columns, w)
    return padded.unflatten(-1, (-1, w)).unflatten(-3, (-1, h)).permute(0, 2, 4, 1, 3, 5)


def checked_labels(
    images: Tensor, labels: Tensor | None, classes: Sequence[str] | None
) -> Tensor | None:
    """Labels of images (B,) or of pixels (B, H, W) as int64 on the CPU."""
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
    return labels


def classes_of_tokens(labels: Tensor | None, grid: Grid | None, num_tokens: int) -> Tensor | None:
    """Class of every token (B, N), -1 for none: of its image, or of most pixels of its patch."""
    if labels is None:
        return None
    if labels.ndim == 1:
        return labels[:, None].expand(-1, num_tokens)
    if grid is None:
        raise ValueError(
            'labels: are per pixel, but where the tokens of this model lie is not known'
        )
    ignored = labels.masked_fill(labels == IGNORED, -1)[:, None]
    # padding is shifted so that what it adds, zeros, is the class of pixels that have none
    of_patch = image_patches(ignored + 1, grid.patch).flatten(3).mode(dim=-1).values - 1
    prefix = of_patch.new_full((len(labels), grid.prefix), -1)
    return torch.cat([prefix, of_patch.flatten(1)], dim=1)
