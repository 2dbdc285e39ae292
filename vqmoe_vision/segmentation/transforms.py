"""Augmentation with albumentations."""

import inspect
import os
from typing import Any

import mmcv
import torch
from mmcv.transforms import BaseTransform
from mmseg.registry import TRANSFORMS

from vqmoe_vision.moe.config import check

from .loading import IGNORE


@TRANSFORMS.register_module()
class Albumentations(BaseTransform):
    """Runs albumentations on an image and its label map.

    Images are handed over as RGB and come back as BGR. Pixels that a geometric transform brings in
    from outside, and objects that `MaskDropout` takes out, are ignored in the label map
    (`fill_mask=255`), where albumentations would call them class 0. Other dropouts keep the labels
    under their holes. Random numbers come from torch's generator, which differs between workers
    and is set by the run's seed; albumentations' own would be the same in every worker.

    Args:
        transforms: Each a `type` from albumentations and its arguments; `transforms` in one of
            them, such as `OneOf`, is a list of the same kind.

    Raises:
        ValueError: albumentations does not know a type, would ignore an argument, or gives class 0
            to pixels from outside whatever it is told.
    """

    def __init__(self, transforms: list[dict[str, Any]]) -> None:
        # or its import asks pypi.org for a newer version
        os.environ.setdefault('NO_ALBUMENTATIONS_UPDATE', '1')
        import albumentations

        self.compose = albumentations.Compose([_build(config) for config in transforms])

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Changes `img` (H, W, 3), `gt_seg_map` (H, W) where there is one, and the sizes."""
        kind = str(results['img'].dtype)
        check(kind == 'uint8', "results['img'].dtype", kind, 'uint8, without to_float32=True')
        self.compose.set_random_seed(int(torch.randint(2**31, ())))
        inputs = {'image': mmcv.bgr2rgb(results['img'])}
        if 'gt_seg_map' in results:
            inputs['mask'] = results['gt_seg_map']
        outputs = self.compose(**inputs)
        results['img'] = mmcv.rgb2bgr(outputs['image'])
        if 'gt_seg_map' in results:
            results['gt_seg_map'] = outputs['mask']
        results['img_shape'] = results['pad_shape'] = results['img'].shape[:2]
        return results


def _build(config: dict[str, Any]) -> Any:
    import albumentations

    arguments = dict(config)
    name = arguments.pop('type')
    kind = getattr(albumentations, name, None)
    if kind is None:
        raise ValueError(f'type={name!r} is not in albumentations {albumentations.__version__}')
    # its pixels from outside have class 0, whatever it is told
    check(name != 'GridElasticDeform', 'type', name, 'another, such as ElasticTransform')
    known = inspect.signature(kind).parameters
    for argument in arguments:
        if argument not in known:
            raise ValueError(f'{name}.{argument} is not possible; it has {", ".join(known)}')
    # None keeps the labels under the holes of a dropout; all else would fill with class 0
    if 'fill_mask' in known and known['fill_mask'].default is not None:
        arguments.setdefault('fill_mask', IGNORE)
    if 'transforms' in arguments:
        arguments['transforms'] = [_build(inner) for inner in arguments['transforms']]
    transform = kind(**arguments)
    if 'fill_mask' not in known and getattr(transform, 'fill_mask', None) is not None:
        transform.fill_mask = None  # of a dropout that gives nobody the choice
    return transform
