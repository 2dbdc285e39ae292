import pytest
import torch
from mmengine.structures import PixelData
from mmseg.models.data_preprocessor import SegDataPreProcessor
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from vqmoe_vision.segmentation.batch import CheckedPreProcessor


@pytest.mark.parametrize('converts', [True, False])
@pytest.mark.parametrize('training', [True, False])
def test_images_are_prepared_as_by_mmseg(converts: bool, training: bool) -> None:
    options = dict(mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0], bgr_to_rgb=converts)
    ours = MODELS.build(dict(type='SegDataPreProcessor', size=(8, 8), **options))
    assert type(ours) is CheckedPreProcessor and ours._non_blocking
    images = [torch.randint(256, (3, 6, 6), dtype=torch.uint8) for _ in range(2)]
    results = []
    for preprocessor in (ours, SegDataPreProcessor(size=(8, 8), **options)):
        samples = [SegDataSample(gt_sem_seg=PixelData(data=torch.ones(1, 6, 6))) for _ in images]
        data = {'inputs': list(images), 'data_samples': samples}
        results.append(preprocessor(data, training)['inputs'])
    assert torch.equal(*results)
    assert ours._channel_conversion is converts


@pytest.mark.parametrize(
    ('first', 'second'), [((8, 9), (7, 9)), ((5, 10), (8, 8)), ((12, 9), (8, 9))]
)
def test_images_larger_than_the_batch(first: tuple[int, int], second: tuple[int, int]) -> None:
    preprocessor = CheckedPreProcessor(size=(8, 8))

    def batch(*shapes: tuple[int, int]) -> dict:
        samples = [SegDataSample(gt_sem_seg=PixelData(data=torch.ones(1, *s))) for s in shapes]
        return {'inputs': [torch.zeros(3, *s) for s in shapes], 'data_samples': samples}

    with pytest.raises(ValueError, match=r'data_preprocessor\.size=\(8, 8\) is .*crop_size'):
        preprocessor(batch(first, second), training=True)
    # as in mmseg, images of one size have one after it, and smaller ones are padded
    alike = (max(first[0], 8), max(first[1], 8))
    assert preprocessor(batch(first, first), training=True)['inputs'].shape[-2:] == alike
    assert preprocessor(batch((5, 8), (8, 3)), training=True)['inputs'].shape[-2:] == (8, 8)
