"""A picture of the routing at every validation of a training, for TensorBoard and its like."""

from collections import defaultdict
from typing import Any

import numpy as np
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmengine.visualization import LocalVisBackend
from torch import Tensor, nn

from vqmoe_vision.engine.model import unwrapped
from vqmoe_vision.models.normalization import Normalization
from vqmoe_vision.moe import moe_layers
from vqmoe_vision.moe.config import check

from .record import grid_of, recorded
from .source import images_of


@HOOKS.register_module()
class RoutingPictureHook(Hook):
    """Draws which expert takes which patch, of the same images at every validation.

    Above stand the images, and before them the colours of the experts, the first at the left; below
    is a row for all that decides. mmengine's `LocalVisBackend` alone gets no picture.

    Args:
        images: How many, at least 1.
    """

    # before EMAHook takes back the weights that were validated
    priority = 'ABOVE_NORMAL'

    def __init__(self, images: int = 4) -> None:
        check(images >= 1, 'images', images, 'at least 1')
        self.images = images
        self._shown: tuple[list[Tensor], Normalization] | None = None

    @master_only
    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Draws, where somebody looks."""
        model, backends = unwrapped(runner), runner.visualizer._vis_backends.values()
        network: Any = getattr(model, 'routed_model', nn.Identity())
        seen = self.images and not all(isinstance(each, LocalVisBackend) for each in backends)
        if not seen or not moe_layers(network):
            return
        try:
            if self._shown is None:
                source = model.source(runner.val_dataloader.dataset).drawn(self.images)
                self._shown = [*map(images_of, source.batches(self.images))], source.normalization
        except ValueError as error:  # a data set of somebody's own trains all the same
            runner.logger.info(f'no pictures of the routing: {error}')
            self.images = 0
        else:
            runner.visualizer.add_image('experts', picture(network, *self._shown), runner.iter)


def picture(model: nn.Module, batches: list[Tensor], normalization: Normalization) -> np.ndarray:
    """Normalised images, and who takes their patches, as a picture (H, W, 3) uint8."""
    from .pictures import as_canvas, expert_colours, label, tint_patches  # matplotlib is slow

    rows = defaultdict[str, list[Tensor]](list)
    for images in batches:
        pixels, records = normalization.pixels(images), recorded(model, images)
        number = max(record.num_experts for record in records.values())
        found = {n: grid_of(model, images, each.inputs.shape[1]) for n, each in records.items()}
        grids = {layer: grid for layer, grid in found.items() if grid is not None}
        for grid in grids.values():
            pixels = grid.filled(pixels)
        rows[''] += pixels
        for layer, grid in grids.items():
            for decider, first in records[layer].firsts.items():
                rows[f'{layer}.{decider}'] += tint_patches(pixels, grid.of(first), number)
    colours = expert_colours(number).t()[:, None]  # (3, 1, E)
    named = [[label(name) if name else colours, *drawn] for name, drawn in rows.items()]
    return (255 * as_canvas(named)).round().byte().movedim(0, -1).contiguous().numpy()
