"""What is changed inside mmseg and mmengine, against what it was."""

import pytest
import torch
from mmengine.structures import PixelData
from mmseg.models.decode_heads import decode_head
from mmseg.models.losses import accuracy as theirs
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from vqmoe_vision.segmentation import mmseg_patches
from vqmoe_vision.segmentation.mmseg_patches import accuracy


@pytest.fixture(autouse=True)
def _patched() -> None:
    mmseg_patches.apply()


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])  # the second has equal logits
@pytest.mark.parametrize('void', [0.0, 0.3, 1.0])
@pytest.mark.parametrize('ignored', [255, 1])  # which may be a class
def test_accuracy_is_mmsegs_to_the_bit(void: float, ignored: int, dtype: torch.dtype) -> None:
    assert decode_head.accuracy is accuracy
    logits = torch.randn(3, 5, 37, 41).to(dtype)
    labels = torch.randint(5, (3, 37, 41))
    labels[torch.rand(labels.shape) < void] = ignored
    expected = theirs(logits, labels, ignore_index=ignored)
    assert torch.equal(accuracy(logits, labels, ignore_index=ignored), expected)


def test_every_tensor_of_a_sample_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda tensor: tensor + 1)  # needs a device
    sample = SegDataSample(
        metainfo={'img_shape': (2, 2)}, gt_sem_seg=PixelData(data=torch.zeros(1, 2, 2))
    )
    pinned = sample.pin_memory()
    assert pinned.img_shape == (2, 2) and pinned.gt_sem_seg.data.eq(1).all()
    assert sample.gt_sem_seg.data.eq(0).all()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_losses_are_computed_in_float32_at_least(dtype: torch.dtype) -> None:
    head = MODELS.build(dict(type='FCNHead', in_channels=4, channels=4, num_classes=3))
    labels = PixelData(data=torch.randint(3, (1, 8, 8)))
    samples = [SegDataSample(gt_sem_seg=labels, metainfo=dict(img_shape=(8, 8)))]
    logits = (10 * torch.randn(1, 3, 8, 8)).to(dtype)
    exact = torch.promote_types(dtype, torch.float32)
    found = head.loss_by_feat(logits, samples)['loss_ce']
    assert found.dtype == exact
    assert torch.equal(found, mmseg_patches._theirs(head, logits.to(exact), samples)['loss_ce'])
    if dtype is torch.bfloat16:  # which autocast treats operator by operator, as it did
        with torch.autocast('cpu', dtype):
            found, theirs = (
                f(head, logits, samples) for f in (type(head).loss_by_feat, mmseg_patches._theirs)
            )
        assert torch.equal(found['loss_ce'], theirs['loss_ce'])
