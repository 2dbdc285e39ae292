"""mmseg's metric: what it reports, and options that it would ignore or fail on at its end."""

from collections.abc import Sequence
from typing import Any

import torch
from mmseg.evaluation import IoUMetric
from mmseg.registry import METRICS

from vqmoe_vision.engine.class_arguments import arguments_of, check_arguments
from vqmoe_vision.engine.reported import names_of
from vqmoe_vision.moe.config import check

_NAME = 'IoUMetric'
# What mmseg computes; it says so when it is asked for another, after the first validation.
_KINDS = ('mIoU', 'mDice', 'mFscore')

# What mmseg's own confusion_matrix.py passes on, which the metric has always ignored.
_OF_TOOLS = frozenset({'keep_results'})


@METRICS.register_module(_NAME, force=True)
class CheckedIoUMetric(IoUMetric):
    """mmseg's metric, which ignores options that it does not know.

    It takes the name of mmseg's, so that every config that imports this package has it.

    Args:
        iou_metrics: One or several of 'mIoU', 'mDice' and 'mFscore'.
        format_only: Whether to write predictions and compare nothing, as of images without labels.
        output_dir: Folder for predictions; `format_only` needs it.
        **options: As mmseg's.

    Raises:
        ValueError: An option is unknown or impossible.
    """

    def __init__(
        self,
        iou_metrics: str | Sequence[str] = ('mIoU',),
        format_only: bool = False,
        output_dir: str | None = None,
        **options: Any,
    ) -> None:
        check_arguments(_NAME, options, arguments_of(IoUMetric).keys() | _OF_TOOLS)
        kinds = [iou_metrics] if isinstance(iou_metrics, str) else list(iou_metrics)
        possible = bool(kinds) and set(kinds) <= set(_KINDS)
        check(possible, f'{_NAME}.iou_metrics', kinds, f'some of {", ".join(_KINDS)}')
        allowed = 'a folder, for the predictions that format_only=True writes'
        check(bool(output_dir) or not format_only, f'{_NAME}.output_dir', output_dir, allowed)
        super().__init__(
            iou_metrics=kinds, format_only=format_only, output_dir=output_dir, **options
        )

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Takes a batch.

        Args:
            data_batch: Is not used.
            data_samples: mmseg's samples with predictions, and with label maps to compare.

        Raises:
            ValueError: There is nothing to compare with.
        """
        labelled = self.format_only or all('gt_sem_seg' in sample for sample in data_samples)
        allowed = (
            'the images have no label maps: format_only=True and output_dir=FOLDER of the '
            'evaluator write predictions instead, or give the data set data_prefix.seg_map_path '
            'and its pipeline LoadAnnotations'
        )
        check(labelled, f'{_NAME}.format_only', self.format_only, allowed)
        super().process(data_batch, data_samples)


@names_of.register(CheckedIoUMetric)
@names_of.register(IoUMetric)
def _names(metric: IoUMetric) -> list[str]:
    if metric.format_only:
        return []
    areas = [torch.zeros(1)] * 4  # of one class that no pixel has
    found = metric.total_area_to_metrics(*areas, metric.metrics)
    return [name if name == 'aAcc' else f'm{name}' for name in found]
