"""Where mmseg would wait for the device in every training step, and what does the same without."""

import torch
from mmengine.structures import BaseDataElement
from mmseg.models.decode_heads import decode_head as upstream
from torch import Tensor


def accuracy(pred: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """As `mmseg.models.accuracy`, of logits (B, C, H, W) and classes (B, H, W)."""
    labelled = target != ignore_index
    best = pred.topk(1, dim=1).indices.squeeze(1)  # of equal logits argmax may take another
    correct = (best == target) & labelled
    # mmseg's formula, and its rounding
    eps = torch.finfo(torch.float32).eps
    factor = (100.0 / (labelled.sum().double() + eps)).float()
    return (correct.flatten().float().sum(0, keepdim=True) + eps) * factor


upstream.accuracy = accuracy  # of `BaseDecodeHead.loss_by_feat`


def _pinned(self: BaseDataElement) -> BaseDataElement:
    """A copy in memory that a device reads while the program goes on."""
    copy = self.new()
    for name, value in self.items():
        if hasattr(value, 'pin_memory'):
            copy.set_data({name: value.pin_memory()})
    return copy


BaseDataElement.pin_memory = _pinned  # what a data loader asks for; mmengine's have none
