"""What has to change inside mmseg and mmengine, and nowhere else can be done.

`apply` does it, once: our tools call it for a config of mmseg, and so does our segmentor when it is
built. To import the package changes nothing.
"""

from functools import cache
from typing import Any

import torch
from mmengine.structures import BaseDataElement
from mmseg.models.decode_heads import decode_head as upstream
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from torch import Tensor

_LOW = (torch.bfloat16, torch.float16)
_theirs = BaseDecodeHead.loss_by_feat


@cache
def apply() -> None:
    """Changes losses and the accuracy of mmseg, and pinned memory of mmengine."""
    BaseDecodeHead.loss_by_feat = loss_by_feat
    upstream.accuracy = accuracy  # of `loss_by_feat`
    BaseDataElement.pin_memory = pinned  # what a data loader asks for; mmengine's have none


def loss_by_feat(self: BaseDecodeHead, seg_logits: Tensor, batch_data_samples: Any) -> dict:
    """As mmseg's, of logits (B, C, H, W), in float32 where they are bfloat16 without autocast."""
    device = seg_logits.device.type
    chosen = device != 'meta' and torch.is_autocast_enabled(device)
    if seg_logits.dtype in _LOW and not chosen:  # autocast takes float32 by itself
        seg_logits = seg_logits.float()
    return _theirs(self, seg_logits, batch_data_samples)


def accuracy(pred: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """As mmseg's, of logits (B, C, H, W) and classes (B, H, W), without a wait for the device."""
    labelled = target != ignore_index
    best = pred.topk(1, dim=1).indices.squeeze(1)  # of equal logits argmax may take another
    correct = (best == target) & labelled
    # mmseg's formula, and its rounding
    eps = torch.finfo(torch.float32).eps
    factor = (100.0 / (labelled.sum().double() + eps)).float()
    return (correct.flatten().float().sum(0, keepdim=True) + eps) * factor


def pinned(self: BaseDataElement) -> BaseDataElement:
    """A copy in memory that a device reads while the program goes on."""
    copy = self.new()
    for name, value in self.items():
        if hasattr(value, 'pin_memory'):
            copy.set_data({name: value.pin_memory()})
    return copy
