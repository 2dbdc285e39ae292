"""Accuracy of a classifier."""

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS


@METRICS.register_module()
class Accuracy(BaseMetric):
    """Share of images, in percent, whose class is among the k best logits.

    Args:
        topk: The values of k; the result has a key `accuracy/top<k>` for each. Of a k above the
            number of classes it is 100.
    """

    default_prefix = 'accuracy'

    def __init__(self, topk: Sequence[int] = (1, 5)) -> None:
        super().__init__()
        self.topk = tuple(topk)

    def process(self, data_batch: Any, data_samples: Sequence[torch.Tensor]) -> None:
        """Takes a batch.

        Args:
            data_batch: Images and targets (B,).
            data_samples: Logits (C,) of each image.
        """
        targets = data_batch[1]
        logits = torch.stack(list(data_samples))
        best = min(max(self.topk), logits.shape[1])
        ranked = logits.topk(best, dim=1).indices.cpu()
        hits = ranked == targets.cpu()[:, None]
        # one entry per image: mmengine cuts off those that pad the last batch of a rank
        self.results.extend([hits[i, :k].any().item() for k in self.topk] for i in range(len(hits)))

    def compute_metrics(self, results: list[list[bool]]) -> dict[str, float]:
        """The accuracies.

        Args:
            results: Per image, one entry per k.
        """
        columns = zip(*results, strict=True)
        return {
            f'top{k}': 100 * sum(column) / len(results)
            for k, column in zip(self.topk, columns, strict=True)
        }
