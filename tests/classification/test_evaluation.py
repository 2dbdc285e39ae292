from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vqmoe_vision.classification import Accuracy, ClassCountHook


def test_accuracy_by_hand() -> None:
    metric = Accuracy(topk=(1, 2))
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    metric.process([None, torch.tensor([0, 1, 2, 2])], list(logits))
    # first choices: right, wrong, wrong, right; among two: right, right, wrong, right
    assert metric.evaluate(4) == {'accuracy/top1': 50.0, 'accuracy/top2': 75.0}


def test_images_that_only_pad_the_last_batch_do_not_count() -> None:
    metric = Accuracy(topk=(1,))
    metric.process([None, torch.tensor([0, 1])], [torch.tensor([1.0, 0.0])] * 2)
    assert metric.evaluate(1) == {'accuracy/top1': 100.0}


def runner(num_classes: int) -> Any:
    loader = SimpleNamespace(dataset=SimpleNamespace(metainfo={'classes': ('cat', 'dog')}))
    model = SimpleNamespace(num_classes=num_classes)
    return SimpleNamespace(
        model=model,
        train_dataloader=loader,
        val_dataloader=loader,
        test_dataloader=loader,
        val_loop=None,
    )


@pytest.mark.parametrize('stage', ['before_train', 'before_test'])
def test_class_count(stage: str) -> None:
    getattr(ClassCountHook(), stage)(runner(2))
    with pytest.raises(ValueError, match=r'num_classes=3.* has 2 classes \(cat, dog'):
        getattr(ClassCountHook(), stage)(runner(3))


def test_validation_set_with_other_classes() -> None:
    training = runner(2)
    training.val_loop = object()
    ClassCountHook().before_train(training)
    metainfo = {'classes': ('cat', 'owl')}
    training.val_dataloader = SimpleNamespace(dataset=SimpleNamespace(metainfo=metainfo))
    with pytest.raises(ValueError, match='only one of them has dog, owl'):
        ClassCountHook().before_train(training)
