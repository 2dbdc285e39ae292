from base64 import b64decode

import numpy as np
import torch

from vqmoe_vision.classification import Accuracy


def test_accuracy_by_hand() -> None:
    metric = Accuracy(topk=(1, 2))
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    metric.process([None, torch.tensor([0, 1, 2, 2])], list(logits))
    # first choices: right, wrong, wrong, right; among two: right, right, wrong, right
    assert metric.evaluate(4) == {'accuracy/top1': 50.0, 'accuracy/top2': 75.0}
    right = np.unpackbits(np.frombuffer(b64decode(metric.correct), np.uint8), count=4)
    assert right.tolist() == [1, 0, 0, 1]


def test_more_best_logits_than_classes() -> None:
    metric = Accuracy(topk=(1, 5))
    metric.process([None, torch.tensor([0, 1])], [torch.tensor([2.0, 1.0])] * 2)
    assert metric.evaluate(2) == {'accuracy/top1': 50.0, 'accuracy/top5': 100.0}


def test_images_that_only_pad_the_last_batch_do_not_count() -> None:
    metric = Accuracy(topk=(1,))
    metric.process([None, torch.tensor([0, 1])], [torch.tensor([1.0, 0.0])] * 2)
    assert metric.evaluate(1) == {'accuracy/top1': 100.0}
