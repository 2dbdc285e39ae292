"""How images of a batch get one size and go to the device, without a wait of mmseg."""

from collections.abc import Sequence
from typing import Any

from mmseg.models.data_preprocessor import SegDataPreProcessor
from mmseg.registry import MODELS
from torch import Tensor

from vqmoe_vision.moe.config import check


@MODELS.register_module()
class CheckedPreProcessor(SegDataPreProcessor):
    """mmseg's data preprocessor, which waits for no copy and says which images have no common size.

    Args:
        *args: As mmseg's.
        **kwargs: As mmseg's.
    """

    _channel_conversion: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._non_blocking = True

    def forward(self, data: dict, training: bool = False) -> dict[str, Any]:
        """As mmseg's.

        Args:
            data: `inputs`, a list of (3, H, W) images, and `data_samples`.
            training: Whether all images get one size, and are refused where several are left.
        """
        if training and self.size is not None:
            _check_sizes(data['inputs'], self.size)
        converts = self._channel_conversion
        data = self.cast_data(data)
        if converts:
            # mmseg indexes with a list, which is copied to the device
            data['inputs'] = [x.flip(0) if x.size(0) == 3 else x for x in data['inputs']]
        self._channel_conversion = False
        try:
            return super().forward(data, training)
        finally:
            self._channel_conversion = converts


def _check_sizes(images: Sequence[Tensor], size: Sequence[int]) -> None:
    """Images are padded to a size, and what is larger is left as it is."""
    shapes = {(max(x.shape[-2], size[-2]), max(x.shape[-1], size[-1])) for x in images}
    allowed = f'the crop_size of the training pipeline, whose images need {sorted(shapes)} here'
    check(len(shapes) == 1, 'data_preprocessor.size', tuple(size), allowed)
