"""mmseg's metric: what it reports, and options that it would ignore or fail on at its end."""

import inspect
from collections.abc import Sequence
from typing import Any

from mmseg.evaluation import IoUMetric
from mmseg.registry import METRICS
from torch import Tensor

from vqmoe_vision.moe.config import check

_NAME = 'CheckedIoUMetric'
# What mmseg computes; it says so when it is asked for another, after the first validation.
_KINDS = ('mIoU', 'mDice', 'mFscore')
# What mmseg's own confusion_matrix.py passes on, which the metric has always ignored.
_OF_TOOLS = frozenset({'keep_results'})


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
        for name in options.keys() - known - _OF_TOOLS:
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
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As mmseg's, of (H, W), whose histograms `randomness.deterministic` refuses."""
        labelled = label != ignore_index
        predicted, label = pred_label[labelled], label[labelled]
        both = _area(predicted[predicted == label], num_classes)
        areas = _area(predicted, num_classes), _area(label, num_classes)
        return both, areas[0] + areas[1] - both, *areas


def _area(classes: Tensor, num_classes: int) -> Tensor:
    known = classes[(classes >= 0) & (classes < num_classes)]
    return known.long().bincount(minlength=num_classes).float().cpu()
