"""A frozen network that looks at the whole image, for methods that decide by more than tokens.

It was fitted to features of images of one size: with loaded weights the network takes the size that
it had, whatever the model's is now.

Legend: B images, F features of an image, S images that it is fitted to.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import check
from .layer import warn_once
from .routing import full_precision

if TYPE_CHECKING:
    from typing_extensions import Self

_UNFITTED = (
    'training a model that reads images by a frozen network, and was not fitted to the training '
    'set: what it decides by is random; before the first step give the network its weights with '
    'vqmoe_vision.models.load_features(model, ...), unless the model starts from a dense one, and '
    'call vqmoe_vision.models.fit_reader(model, batches)'
)


@dataclass(frozen=True)
class Features:
    """Network from images (B, channels, height, width) to (B, F), of one `image_size`."""

    network: nn.Module  # `sizes`, numbers, are what decides `image_size`; has `resize(sizes)`
    width: int  # F


class ImageReader(nn.Module):
    """Base of what reads images for the layers of a model, once per pass for all of them."""

    fitted: Tensor  # () bool, for these weights
    sizes: Tensor  # of the network, int64
    lacks_weights = False  # whether a training begins without any for the network
    _fit_due = True  # what `fitted` says, as far as the host knows

    def __init__(self, features: Features, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.network = _frozen(features.network)
        self.network.eval()
        self.width = features.width
        self.register_buffer('fitted', torch.empty((), dtype=torch.bool, device=device))
        number = len(self.network.sizes)
        self.register_buffer('sizes', torch.empty(number, dtype=torch.int64, device=device))

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images that the network takes."""
        size: tuple[int, int] = self.network.image_size
        return size

    def train(self, mode: bool = True) -> Self:
        """As torch's, but for the network, which stays in eval mode."""
        super().train(mode)
        self.network.eval()
        return self

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features (B, F) float32 of normalised images, resized as a whole; without graph."""
        with full_precision(images):
            if images.shape[-2:] != self.image_size:
                images = F.interpolate(
                    images.float(), self.image_size, mode='bilinear', antialias=True
                )
            weight = next(self.network.buffers(), images)
            found: Tensor = self.network(images.to(weight.dtype))
        return found.float()

    def forward(self, images: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """What the layers find in `host.raw_patches`."""
        if self.training and self._fit_due and torch.is_grad_enabled():
            warn_once(_UNFITTED)
        return self.read(images, grid_size)

    @torch.no_grad()
    def fit(self, features: Tensor) -> str:
        """Take over what features (S, F) of a training set say; returns that in words."""
        found = self.take_over(features)
        self.fitted.fill_(True)
        self._fit_due = False
        return found

    @torch.no_grad()
    def void(self) -> None:
        """Forget that it was fitted: it was to other features."""
        self.fitted.fill_(False)
        self.sizes.copy_(torch.tensor(self.network.sizes))
        self._fit_due = True

    def read(self, images: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """What `forward` gives, without its warning."""
        raise NotImplementedError

    def init_weights(self) -> None:
        """Draw what `fit` replaces, and call `void`."""
        raise NotImplementedError

    def take_over(self, features: Tensor) -> str:
        """What `fit` does, before it knows that it was done."""
        raise NotImplementedError

    def network_for(self, state_dict: Mapping[str, Tensor]) -> Any:
        """The network that it will have once a state dict is loaded, with any weights."""
        numbers = self._sizes_in(state_dict.get('sizes'))
        if numbers is None or numbers == self.network.sizes:
            return self.network
        return _resized(copy.deepcopy(self.network), numbers)

    def expected(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a state dict has to have in order to be loaded, with any values."""
        own, network = self.state_dict(), self.network_for(state_dict).state_dict()
        own.update({f'network.{name}': value for name, value in network.items()})
        if 'sizes' not in state_dict and 'fitted' in state_dict:
            del own['sizes']  # as files of before it was kept
        return own

    def _sizes_in(self, given: Tensor | None) -> tuple[int, ...] | None:
        """Sizes of the network as a state dict says them, whose numbers may have been rounded."""
        own: tuple[int, ...] = self.network.sizes
        if given is None:
            return own
        if given.is_meta or given.shape != self.sizes.shape:
            return None
        if torch.equal(torch.tensor(own, device=given.device).to(given.dtype), given):
            return own
        numbers = [float(number) for number in given.tolist()]
        # up to which a type has every whole number
        most = 2 / torch.finfo(given.dtype).eps if given.is_floating_point() else math.inf
        whole = all(number.is_integer() and 0 < number <= most for number in numbers)
        allowed = f'whole numbers above 0 that {given.dtype} has exactly'
        check(whole, 'sizes', numbers, allowed)
        return tuple(map(int, numbers))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        given, fitted = (state_dict.get(f'{prefix}{name}') for name in ('sizes', 'fitted'))
        some = fitted if given is None else given
        numbers = None if some is None else self._sizes_in(given)
        if numbers is not None:
            _resized(self.network, numbers)  # before its weights come
            state_dict[f'{prefix}sizes'] = torch.tensor(numbers, device=some.device)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not self.fitted.is_meta:
            self._fit_due = not bool(self.fitted)


def image_reader(model: nn.Module) -> ImageReader | None:
    """What reads images in a model; None if nothing does."""
    return next((part for part in model.modules() if isinstance(part, ImageReader)), None)


def reader_of(model: nn.Module) -> ImageReader:
    """What reads images in a model."""
    reader = image_reader(model)
    check(reader is not None, 'model', type(model).__name__, 'a model that reads images')
    assert reader is not None
    return reader


@torch.no_grad()
def _resized(network: Any, sizes: tuple[int, ...]) -> Any:
    if sizes != network.sizes:
        network.resize(sizes)
        _frozen(network)
    return network


def _frozen(network: Any) -> Any:
    # a parameter that never gets a gradient is decayed, and data-parallel training waits for it
    for module in network.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                del module._parameters[name]
                module.register_buffer(name, parameter.detach())
    return network
