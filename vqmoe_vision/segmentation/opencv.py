"""What OpenCV says of an image that a pipeline cannot take, for users."""

import traceback

import cv2
from mmcv.transforms import BaseTransform


def refused_image(name: str, error: cv2.error) -> ValueError:
    """An error that names the image, and the transform with OpenCV's reason."""
    text = getattr(error, 'err', None) or str(error)  # of arguments of a wrong type there is no err
    reason = ' '.join(line.lstrip('> ').rstrip() for line in text.splitlines())
    if getattr(error, 'func', None) == 'resize' and ('size' in reason or 'scale' in reason):
        return ValueError(f'{name} has a size that the pipeline cannot resize')
    frames = traceback.walk_tb(error.__traceback__)
    owners = [frame.f_locals.get('self') for frame, _ in frames]
    kinds = [type(owner).__name__ for owner in owners if isinstance(owner, BaseTransform)]
    where = kinds[-1] if kinds else 'the pipeline'
    return ValueError(f'{name} is nothing that {where} can change: OpenCV says {reason!r}')
