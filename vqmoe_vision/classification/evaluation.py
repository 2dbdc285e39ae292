"""How good a classifier is, of all images and of the classes of a long tail.

Legend: B images, C classes.
"""

from base64 import b64encode
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS


@METRICS.register_module()
class Accuracy(BaseMetric):
    """Share of images, in percent, whose class is among the k best logits.

    Where training sees a long tail of classes, also shares of images whose class is the best: as
    mean over classes, `balanced`, and as means over the classes of each third by how often training
    sees them, `head`, `medium` and `tail`, see `thirds`.

    Args:
        topk: The values of k; the result has a key `accuracy/top<k>` for each. Of a k above the
            number of classes it is 100.
    """

    default_prefix = 'accuracy'
    correct = ''  # whether the best class is right: a bit per image, as base64

    def __init__(self, topk: Sequence[int] = (1, 5)) -> None:
        super().__init__()
        self.topk = tuple(topk)

    def process(self, data_batch: Any, data_samples: Sequence[torch.Tensor]) -> None:
        """Takes a batch: images and targets (B,), and logits (C,) of each image."""
        logits = torch.stack(list(data_samples))
        ranked = logits.topk(min(max(self.topk), logits.shape[1]), dim=1).indices.cpu()
        # one entry per image: mmengine cuts off those that pad the last batch of a rank
        self.results.extend(
            [target, *(target in best[:k] for k in (1, *self.topk))]
            for target, best in zip(data_batch[1].tolist(), ranked.tolist(), strict=True)
        )

    def compute_metrics(self, results: list[list[int]]) -> dict[str, float]:
        """The accuracies, of lists per image: its class, whether it is best, one entry per k."""
        targets, best, *columns = np.array(results).T
        self.correct = b64encode(np.packbits(best).tobytes()).decode()
        found = {
            f'top{k}': 100 * column.sum().item() / len(results)
            for k, column in zip(self.topk, columns, strict=True)
        }
        if counts := (self.dataset_meta or {}).get('train_counts'):
            of_class = {int(c): 100 * best[targets == c].mean() for c in np.unique(targets)}
            for name, classes in {'balanced': range(len(counts)), **thirds(counts)}.items():
                if tested := [of_class[c] for c in classes if c in of_class]:
                    found[name] = float(np.mean(tested))
        return found


def thirds(counts: Sequence[int]) -> dict[str, list[int]]:
    """Classes by how often training sees them: a third is the head, a third the tail."""
    order = sorted(range(len(counts)), key=lambda label: -counts[label])
    third, middle = round(len(order) / 3), len(order) - round(len(order) / 3)
    return {'head': order[:third], 'medium': order[third:middle], 'tail': order[middle:]}
