"""Losses of mmseg's heads in float32 where logits are bfloat16 without autocast.

Heads with losses of their own, such as PIDNet's and DDRNet's, compute them as before.
"""

from typing import Any

import torch
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from torch import Tensor

_LOW = (torch.bfloat16, torch.float16)
_theirs = BaseDecodeHead.loss_by_feat


def loss_by_feat(self: BaseDecodeHead, seg_logits: Tensor, batch_data_samples: Any) -> dict:
    """As mmseg's, of logits (B, C, H, W)."""
    device = seg_logits.device.type
    chosen = device != 'meta' and torch.is_autocast_enabled(device)
    if seg_logits.dtype in _LOW and not chosen:  # autocast takes float32 by itself
        seg_logits = seg_logits.float()
    losses: dict = _theirs(self, seg_logits, batch_data_samples)
    return losses


BaseDecodeHead.loss_by_feat = loss_by_feat
