"""Accuracy, and the check that a data set has the classes that the model has."""

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS, METRICS
from mmengine.runner import Runner


@METRICS.register_module()
class Accuracy(BaseMetric):
    """Share of images, in percent, whose class is among the k best logits.

    Args:
        topk: The values of k; the result has a key `accuracy/top<k>` for each.
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
        ranked = torch.stack(list(data_samples)).topk(max(self.topk), dim=1).indices.cpu()
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


@HOOKS.register_module()
class ClassCountHook(Hook):
    """Compares the classes of the model and of the data sets before a run.

    Raises:
        ValueError: The model has another number of classes than a data set, or the training and
            validation sets have different classes.
    """

    def before_train(self, runner: Runner) -> None:
        """Checks the training set, and that validation numbers the classes in the same way."""
        self._check(runner, runner.train_dataloader)
        if runner.val_loop is not None:
            self._check(runner, runner.val_dataloader)
            seen, held_out = (
                loader.dataset.metainfo['classes']
                for loader in (runner.train_dataloader, runner.val_dataloader)
            )
            if seen != held_out:
                differ = sorted(set(seen) ^ set(held_out))
                raise ValueError(
                    'the training and validation sets have different classes: '
                    f'only one of them has {", ".join(differ[:5])}'
                )

    def before_test(self, runner: Runner) -> None:
        """Checks the test set."""
        self._check(runner, runner.test_dataloader)

    @staticmethod
    def _check(runner: Runner, loader: Any) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        classes = loader.dataset.metainfo['classes']
        if len(classes) != model.num_classes:
            raise ValueError(
                f'model.num_classes={model.num_classes}, but the data set has {len(classes)} '
                f'classes ({", ".join(classes[:3])}, ...)'
            )
