"""Pictures of predictions, also for data sets whose images are not files."""

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import mmcv
import numpy as np
from mmengine import fileio
from mmengine.runner import Runner
from mmseg.engine.hooks import SegVisualizationHook
from mmseg.registry import HOOKS, VISUALIZERS
from mmseg.visualization import SegLocalVisualizer
from torch import Tensor

from .transforms import LoadImage, image_loader, in_bgr


@VISUALIZERS.register_module()
class OverlayVisualizer(SegLocalVisualizer):
    """mmseg's visualizer, which can also be built from a config that gives it no name.

    mmseg's browse_dataset.py needs that. A name in the config would be that of every run of a
    process, and mmengine would hand the visualizer of the first run to the others.
    """

    @classmethod
    def get_instance(cls, name: str = 'visualizer', **kwargs: Any) -> Any:
        """The visualizer of that name, which is made once; mmengine's Runner gives the run's."""
        return super().get_instance(name, **kwargs)

    def add_datasample(self, name: str, image: np.ndarray, *args: Any, **kwargs: Any) -> None:
        """As mmseg's, also for an image in another order of memory, as browse_dataset.py has it."""
        super().add_datasample(name, np.ascontiguousarray(image), *args, **kwargs)


@HOOKS.register_module()
class OverlayHook(SegVisualizationHook):
    """mmseg's `SegVisualizationHook`, which also draws images that are made and not read.

    Of a test every prediction, of validation the first one of every `interval`-th iteration,
    counted as in mmseg from the iteration of the training. Images of equal names in a test, from
    different folders, are numbered as they come: `frame_0.png`, `frame_1.png`.

    Args:
        *args: As mmseg's.
        **kwargs: As mmseg's: `draw`, which `--show-dir` turns on, `interval`, iterations of
            validation between two pictures, and `backend_args` where the pipeline names none.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():  # most runs draw nothing, which is no news
            warnings.filterwarnings('ignore', 'The draw is False')
            super().__init__(*args, **kwargs)
        self._drawn: Counter[str] = Counter()
        self._load = LoadImage(backend_args=self.backend_args)

    def before_test(self, runner: Runner) -> None:
        """A test begins to number its pictures, and reads their images as it does."""
        self._drawn.clear()
        self.before_val(runner, 'test_dataloader')

    def before_val(self, runner: Runner, loader: str = 'val_dataloader') -> None:
        """Reads images as the validation does."""
        if self.draw and isinstance(config := runner.cfg.get(loader), dict):
            self._load = image_loader(config['dataset'], backend_args=self.backend_args)

    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Draws the first prediction of a batch, where it is its turn."""
        step = runner.iter + batch_idx
        if self.draw and not step % self.interval:
            self._draw(data_batch['inputs'][0], outputs[0], 'val_', step)

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Draws every prediction of a batch."""
        if not self.draw:
            return
        inputs = data_batch['inputs']
        if not isinstance(inputs[0], Tensor):
            inputs = inputs[0]  # an augmented test: the first version of each image
        for tensor, sample in zip(inputs, outputs, strict=True):
            stem = Path(sample.img_path).stem
            self._draw(tensor, sample, '', self._drawn[stem])
            self._drawn[stem] += 1

    def _draw(self, tensor: Tensor, sample: Any, prefix: str, step: int) -> None:
        self._visualizer.add_datasample(
            prefix + Path(sample.img_path).stem,
            self._image_of(tensor.numpy(), sample),
            data_sample=sample,
            show=self.show,
            wait_time=self.wait_time,
            step=step,
            with_labels=False,
        )

    def _image_of(self, tensor: np.ndarray, sample: Any) -> np.ndarray:
        """The image behind a sample, (H, W, 3) RGB, at the size of its prediction."""
        if fileio.exists(sample.img_path, backend_args=self._load.backend_args):
            # turned as the prediction is, which depends on the label map
            pixels = in_bgr(self._load.read(sample.img_path, sample.get('seg_map_path')))
        else:
            height, width = sample.pred_sem_seg.shape
            pixels = cv2.resize(tensor.transpose(1, 2, 0), (width, height))
        return mmcv.bgr2rgb(np.ascontiguousarray(pixels))
