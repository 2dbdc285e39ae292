import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from mmengine.structures import PixelData
from mmseg.models.data_preprocessor import SegDataPreProcessor
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from vqmoe_vision.segmentation.preprocessor import CheckedPreProcessor


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
    assert ours._channel_conversion is converts


# what is smaller than 8 is padded to it, and what is larger is left
@pytest.mark.parametrize('size', [(8, 8), (4, 12)])
@given(shapes=st.lists(st.tuples(st.integers(2, 14), st.integers(2, 14)), min_size=1, max_size=3))
def test_images_that_mmseg_cannot_stack(
    shapes: list[tuple[int, int]], size: tuple[int, int]
) -> None:
    def batch() -> dict:
        samples = [SegDataSample(gt_sem_seg=PixelData(data=torch.ones(1, *s))) for s in shapes]
        return {'inputs': [torch.zeros(3, *s) for s in shapes], 'data_samples': samples}

    ours = CheckedPreProcessor(size=size)
    try:
        expected = SegDataPreProcessor(size=size)(batch(), training=True)['inputs'].shape
    except RuntimeError:
        with pytest.raises(ValueError, match=rf'size=\({size[0]}, {size[1]}\) is .*crop_size'):
            ours(batch(), training=True)
    else:
        assert ours(batch(), training=True)['inputs'].shape == expected
