"""What has to change inside mmseg and mmengine, and nowhere else can be done.

`apply` does it, once: our tools call it for a config of mmseg, and so does our segmentor when it is
built. To import the package changes nothing.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from mmengine.analysis import complexity_analysis as counted
from mmengine.analysis.jit_handles import generic_activation_jit, get_shape
from mmengine.structures import BaseDataElement
from mmseg.models.decode_heads import decode_head as upstream
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from torch import Tensor

_LOW = (torch.bfloat16, torch.float16)
_theirs = BaseDecodeHead.loss_by_feat


@cache
def apply() -> None:
    """Changes losses, the accuracy and pinned memory of mmseg, and mmengine's count of products."""
    BaseDecodeHead.loss_by_feat = loss_by_feat
    upstream.accuracy = accuracy  # of `loss_by_feat`
    BaseDataElement.pin_memory = pinned  # what a data loader asks for; mmengine's have none
    # of get_flops.py; mmengine counts operators that it does not know as nothing
    products = {
        'vqmoe_vision::grouped_linear': _experts,
        'aten::scaled_dot_product_attention': _attention,
    }
    counted._DEFAULT_SUPPORTED_FLOP_OPS.update(products)
    kept = {name: generic_activation_jit() for name in products}
    counted._DEFAULT_SUPPORTED_ACT_OPS.update(kept)


def loss_by_feat(self: BaseDecodeHead, seg_logits: Tensor, batch_data_samples: Any) -> dict:
    """As mmseg's, of logits (B, C, H, W), in float32 where they are bfloat16 without autocast."""
    device = seg_logits.device.type
    chosen = device != 'meta' and torch.is_autocast_enabled(device)
    if seg_logits.dtype in _LOW and not chosen:  # autocast takes float32 by itself
        seg_logits = seg_logits.float()
    losses: dict = _theirs(self, seg_logits, batch_data_samples)
    return losses


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


def _experts(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """Of (R, in) rows by weights (E, out, in): each row meets one expert."""
    (num_rows, in_features), (_, out_features, _) = map(get_shape, inputs[:2])
    return num_rows * in_features * out_features


def _attention(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """Of queries (..., N, D), keys (..., M, D) and values (..., M, V): scores and their sums."""
    query, key, value = map(get_shape, inputs[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
