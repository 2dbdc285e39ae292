"""What mmseg's metric reports."""

import torch
from mmseg.evaluation import IoUMetric

from vqmoe_vision.engine.reported import names_of


@names_of.register
def _names(metric: IoUMetric) -> list[str]:
    areas = [torch.zeros(1)] * 4  # of one class that no pixel has
    found = metric.total_area_to_metrics(*areas, metric.metrics)
    return [name if name == 'aAcc' else f'm{name}' for name in found]
