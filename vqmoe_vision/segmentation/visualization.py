"""Overlays for data sets whose images are not files too."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import mmcv
import numpy as np
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor


@HOOKS.register_module()
class OverlayHook(Hook):
    """Draws the predictions of a test over the images.

    mmseg's `SegVisualizationHook` reads every image from its file; a scene that is made on the fly
    has none.

    Args:
        draw: Whether to draw; `--show-dir` turns it on.
        show: Whether to open windows too; `--show` of mmseg's own tools/test.py turns it on.
        wait_time: Seconds for which a window stays open; 0 waits for a key.
    """

    def __init__(self, draw: bool = False, show: bool = False, wait_time: float = 0.0) -> None:
        self.draw, self.show, self.wait_time = draw, show, wait_time

    def after_test_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Sequence[Any] | None = None,
    ) -> None:
        """Hands the overlays of a batch to the visualizer."""
        if not self.draw:
            return
        assert outputs is not None
        inputs = data_batch['inputs']
        if not isinstance(inputs[0], Tensor):
            inputs = inputs[0]  # an augmented test: the first version of each image
        for tensor, sample in zip(inputs, outputs, strict=True):
            name = Path(sample.img_path).stem
            image = _image_of(sample, tensor.numpy())
            runner.visualizer.add_datasample(
                name,
                image,
                data_sample=sample,
                show=self.show,
                wait_time=self.wait_time,
                with_labels=False,
            )


def _image_of(sample: Any, tensor: np.ndarray) -> np.ndarray:
    """The image behind a sample, (H, W, 3) RGB, at the size of its prediction."""
    if Path(sample.img_path).is_file():
        return mmcv.imread(sample.img_path, channel_order='rgb')
    image = mmcv.bgr2rgb(np.ascontiguousarray(tensor.transpose(1, 2, 0)))
    height, width = sample.pred_sem_seg.shape
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
