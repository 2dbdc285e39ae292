"""Losses of heads in float32, whatever their logits are, of all that take `BaseDecodeHead`'s.

In a model of bfloat16, or one that computes in it because its parameters travel so (`parallel`),
mmseg would compute softmax and losses in it too, with eight significant bits. Heads with losses of
their own, such as PIDNet's and DDRNet's, still do.
"""

from typing import Any

import torch
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from torch import Tensor

_LOW = (torch.bfloat16, torch.float16)
_theirs = BaseDecodeHead.loss_by_feat


def loss_by_feat(self: BaseDecodeHead, seg_logits: Tensor, batch_data_samples: Any) -> dict:
    """As mmseg's."""
    device = seg_logits.device.type
    chosen = device != 'meta' and torch.is_autocast_enabled(device)
    if seg_logits.dtype in _LOW and not chosen:
        seg_logits = seg_logits.float()
    losses: dict = _theirs(self, seg_logits, batch_data_samples)
    return losses


BaseDecodeHead.loss_by_feat = loss_by_feat
