import pytest
import torch
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

import vqmoe_vision.segmentation.precision as precision


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_losses_are_computed_in_float32_at_least(dtype: torch.dtype) -> None:
    head = MODELS.build(dict(type='FCNHead', in_channels=4, channels=4, num_classes=3))
    labels = PixelData(data=torch.randint(3, (1, 8, 8)))
    samples = [SegDataSample(gt_sem_seg=labels, metainfo=dict(img_shape=(8, 8)))]
    logits = (10 * torch.randn(1, 3, 8, 8)).to(dtype)
    exact = torch.promote_types(dtype, torch.float32)
    found = head.loss_by_feat(logits, samples)['loss_ce']
    assert found.dtype == exact
    assert torch.equal(found, precision._theirs(head, logits.to(exact), samples)['loss_ce'])
    if dtype is torch.bfloat16:  # which autocast treats operator by operator, as it did
        with torch.autocast('cpu', dtype):
            found, theirs = (
                f(head, logits, samples) for f in (type(head).loss_by_feat, precision._theirs)
            )
        assert torch.equal(found['loss_ce'], theirs['loss_ce'])
