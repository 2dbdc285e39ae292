"""What has to change inside mmseg and mmengine, and nowhere else can be done; mmseg's metric.

`apply` does it, once: our tools call it for a config of mmseg, and so does our segmentor when it is
built. To import the package changes nothing.
"""

import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from mmengine.structures import BaseDataElement
from mmseg.evaluation import IoUMetric
from mmseg.models.decode_heads import decode_head as upstream
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import METRICS
from torch import Tensor

from vqmoe_vision.moe.config import check
from vqmoe_vision.moe.routing import widest

_theirs = BaseDecodeHead.loss_by_feat
_NAME = 'CheckedIoUMetric'
# What mmseg computes; it says so when it is asked for another, after the first validation.
_KINDS = ('mIoU', 'mDice', 'mFscore')


@cache
def apply() -> None:
    """Changes losses and the accuracy of mmseg, and pinned memory of mmengine."""
    BaseDecodeHead.loss_by_feat = loss_by_feat
    upstream.accuracy = accuracy  # of `loss_by_feat`
    BaseDataElement.pin_memory = pinned  # what a data loader asks for; mmengine's have none


def loss_by_feat(self: BaseDecodeHead, seg_logits: Tensor, batch_data_samples: Any) -> dict:
    """As mmseg's, of logits (B, C, H, W), in float32 where they are bfloat16 without autocast."""
    device = seg_logits.device.type
    if seg_logits.dtype in (torch.bfloat16, torch.float16) and (
        device == 'meta' or not torch.is_autocast_enabled(device)  # which takes float32 by itself
    ):
        seg_logits = seg_logits.float()
    return _theirs(self, seg_logits, batch_data_samples)


def accuracy(pred: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """As mmseg's, of logits (B, C, H, W) and classes (B, H, W), without a wait for the device."""
    labelled = target != ignore_index
    # of equal logits argmax may take another
    correct = (pred.topk(1, dim=1).indices.squeeze(1) == target) & labelled
    # mmseg's formula, and its rounding
    eps = torch.finfo(torch.float32).eps
    factor = (100.0 / (labelled.sum().to(widest(pred.device)) + eps)).float()
    return (correct.flatten().float().sum(0, keepdim=True) + eps) * factor


def pinned(self: BaseDataElement) -> BaseDataElement:
    """A copy in memory that a device reads while the program goes on."""
    copy = self.new()
    for name, value in self.items():
        if hasattr(value, 'pin_memory'):
            copy.set_data({name: value.pin_memory()})
    return copy


@METRICS.register_module()
class CheckedIoUMetric(IoUMetric):
    """mmseg's metric, which ignores options that it does not know.

    Args:
        *args: As mmseg's.
        **options: As mmseg's: `iou_metrics`, some of 'mIoU', 'mDice' and 'mFscore'; `format_only`,
            which writes predictions to `output_dir` and compares nothing, as of images without
            label maps; and others.

    Raises:
        ValueError: An option is unknown or impossible.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        # not those of its base, which it does not hand on
        known = inspect.signature(IoUMetric).parameters.keys() - {'kwargs'}
        # mmseg's own confusion_matrix.py passes it on, and the metric has always ignored it
        for name in options.keys() - known - {'keep_results'}:
            check(False, f'{_NAME}.{name}', options[name], f'it takes {", ".join(sorted(known))}')
        super().__init__(*args, **options)
        kinds = [self.metrics] if isinstance(self.metrics, str) else self.metrics
        possible = bool(kinds) and all(kind in _KINDS for kind in kinds)
        check(possible, f'{_NAME}.iou_metrics', kinds, f'some of {", ".join(_KINDS)}')
        written = bool(self.output_dir) or not self.format_only
        check(written, f'{_NAME}.output_dir', self.output_dir, 'a folder, with format_only=True')

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Takes a batch of mmseg's samples with predictions, and with label maps to compare."""
        labelled = self.format_only or all('gt_sem_seg' in sample for sample in data_samples)
        allowed = 'True beside output_dir=FOLDER, which writes predictions: there are no label maps'
        check(labelled, f'{_NAME}.format_only', self.format_only, allowed)
        super().process(data_batch, data_samples)

    @staticmethod
    def intersect_and_union(
        pred_label: Tensor, label: Tensor, num_classes: int, ignore_index: int
    ) -> tuple[Tensor, ...]:
        """As mmseg's, of (H, W), whose histograms `randomness.deterministic` refuses."""
        labelled = label != ignore_index
        predicted, label = pred_label[labelled], label[labelled]
        both, said, true = (
            c[(c >= 0) & (c < num_classes)].long().bincount(minlength=num_classes).float().cpu()
            for c in (predicted[predicted == label], predicted, label)
        )
        return both, said + true - both, said, true
