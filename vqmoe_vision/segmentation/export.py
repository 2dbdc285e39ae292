"""A segmentor as a graph: normalised images of one size to logits and label maps.

Legend: B images, H height, W width, C classes, N windows, which are one batch inside the graph.
"""

from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from mmseg.models import EncoderDecoder
from torch import Tensor, nn

from vqmoe_vision.moe.config import check

Window = tuple[slice, slice]


class SegmentorGraph(nn.Module):
    """What mmseg predicts of normalised images of one size, as tensors alone."""

    def __init__(self, segmentor: EncoderDecoder, size: tuple[int, int]) -> None:
        super().__init__()
        check(min(size) >= 1, 'size', size, 'two positive numbers of pixels, height and width')
        self.segmentor = segmentor
        self.size = size
        preprocessor: Any = segmentor.data_preprocessor
        # pixels that are added at the right and below, as mmseg's tests do
        config = getattr(preprocessor, 'test_cfg', None) or {}
        fixed, divisor = config.get('size'), config.get('size_divisor') or 1
        height, width = fixed or (-(-side // divisor) * divisor for side in size)
        right, below = self.padding = (width - size[1], height - size[0])
        check(min(self.padding) >= 0, 'size', size, f'at most {(height, width)}, of padded images')
        self.pad_value = float(getattr(preprocessor, 'pad_val', 0))
        self.windows = _windows(segmentor.test_cfg, (size[0] + below, size[1] + right))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images (B, 3, H, W) to logits (B, C, H, W) and labels (B, H, W) int64."""
        right, below = self.padding
        padded = F.pad(images, (0, right, 0, below), value=self.pad_value)
        cut = torch.stack([padded[:, :, rows, columns] for rows, columns in self.windows])
        shape = torch.Size([int(side) for side in cut.shape[3:]])
        meta = {'img_shape': shape, 'pad_shape': shape, 'ori_shape': shape}
        found = self.segmentor.encode_decode(cut.flatten(0, 1), [meta])
        logits = self._averaged(found, padded)[:, :, : self.size[0], : self.size[1]]
        if logits.shape[1] == 1:  # mmseg's head of two classes
            return logits, (logits.sigmoid() > self.segmentor.decode_head.threshold)[:, 0].long()
        return logits, logits.argmax(dim=1)

    def _averaged(self, logits: Tensor, padded: Tensor) -> Tensor:
        """Windows (N * B, C, h, w) put together: (B, C, H, W)."""
        if len(self.windows) == 1:
            return logits
        height, width = (int(side) for side in padded.shape[2:])
        total: Any = 0
        count = torch.zeros(height, width)
        each = logits.unflatten(0, (len(self.windows), -1))
        for index, (rows, columns) in enumerate(self.windows):
            sides = columns.start, width - columns.stop, rows.start, height - rows.stop
            total = total + F.pad(each[index], sides)
            count[rows, columns] += 1
        return total / count


def _windows(config: Any, size: tuple[int, int]) -> list[Window]:
    """Where mmseg puts its windows; of a segmentor that sees whole images one."""
    if config.mode != 'slide':
        return [(slice(0, size[0]), slice(0, size[1]))]
    rows, columns = (
        _places(side, window, stride)
        for side, window, stride in zip(size, config.crop_size, config.stride, strict=True)
    )
    return list(product(rows, columns))


def _places(side: int, window: int, stride: int) -> list[slice]:
    """As mmseg: the last window ends with the image; one that is larger than it is cut."""
    steps = max(side - window + stride - 1, 0) // stride + 1
    ends = [min(step * stride + window, side) for step in range(steps)]
    return [slice(max(end - window, 0), end) for end in ends]
