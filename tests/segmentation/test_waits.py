import pytest
import torch
from mmengine.structures import PixelData
from mmseg.models.decode_heads import decode_head
from mmseg.models.losses import accuracy as theirs
from mmseg.structures import SegDataSample

from vqmoe_vision.segmentation.waits import accuracy


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
