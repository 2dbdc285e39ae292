import pytest
import torch
from mmengine.structures import PixelData
from mmseg.models.data_preprocessor import SegDataPreProcessor
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from vqmoe_vision.segmentation.preprocessor import CheckedPreProcessor, converts_channels


@pytest.mark.parametrize('converts', [True, False])
@pytest.mark.parametrize('training', [True, False])
def test_images_are_prepared_as_by_mmseg(converts: bool, training: bool) -> None:
    options = dict(mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0], bgr_to_rgb=converts)
    ours = MODELS.build(dict(type='CheckedPreProcessor', size=(8, 8), **options))
    assert type(ours) is CheckedPreProcessor and ours._non_blocking
    images = [torch.randint(256, (3, 6, 6), dtype=torch.uint8) for _ in range(2)]
    results = []
    for preprocessor in (ours, SegDataPreProcessor(size=(8, 8), **options)):
        samples = [SegDataSample(gt_sem_seg=PixelData(data=torch.ones(1, 6, 6))) for _ in images]
        data = {'inputs': list(images), 'data_samples': samples}
        results.append(preprocessor(data, training)['inputs'])
    assert torch.equal(*results)
    assert converts_channels(ours) is converts_channels(preprocessor) is converts
