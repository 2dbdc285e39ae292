"""How consistently experts are chosen: what a changed image or a later checkpoint changes.

Experts are compared patch by patch, where the same patch can be found in both images; class and
register tokens are left out. All images are whole patches of pixels in 256 steps, before and after.

The corruptions are the fifteen common ones of ImageNet-C (Hendrycks and Dietterich, arXiv
1903.12261), by imagecorruptions-imaug (extra `analyze`).

Legend: B images, C channels, H height, W width, S checkpoints, P parameters.
"""

import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqmoe_vision.models.layers import Transformer
from vqmoe_vision.models.normalization import Normalization
from vqmoe_vision.moe import moe_layers
from vqmoe_vision.moe.config import check

from . import measures
from .record import Grid, decided

# As imagecorruptions lists them, which whoever makes tables of what was measured need not have.
CORRUPTIONS = (
    'gaussian_noise', 'shot_noise', 'impulse_noise', 'defocus_blur', 'glass_blur', 'motion_blur',
    'zoom_blur', 'snow', 'frost', 'fog', 'brightness', 'contrast', 'elastic_transform', 'pixelate',
    'jpeg_compression',
)  # fmt: skip


@dataclass(frozen=True)
class Shift:
    """A way to change images."""

    name: str  # with its severity: 'gaussian_noise 3'
    # pixels (B, C, H, W) in [0, 1], the index of the first image, and the size of a patch
    change: Callable[[Tensor, int, tuple[int, int]], Tensor]
    # maps (B, rows, columns) before and after, to what is the same patch in both
    align: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda before, after: (before, after)


def flip() -> Shift:
    """Left and right change places; every patch is compared with its mirror image."""
    return Shift(
        'flip',
        lambda pixels, first, patch: pixels.flip(-1),
        lambda before, after: (before, after.flip(-1)),
    )


def crop() -> Shift:
    """The upper row and the left column of patches are cut off, and the rest moves there."""

    def change(pixels: Tensor, first: int, patch: tuple[int, int]) -> Tensor:
        (h, w), (height, width) = patch, pixels.shape[-2:]
        check(height > h and width > w, 'crop', (height, width), f'more than a patch, {h}x{w}')
        return F.pad(pixels[..., h:, w:], (0, w, 0, h), mode='replicate')

    return Shift('crop', change, lambda before, after: (before[:, 1:, 1:], after[:, :-1, :-1]))


def noise(std: float) -> Shift:
    """Normal noise on every pixel; the weakest of ImageNet-C has a deviation of 0.08."""

    def change(pixels: Tensor, first: int, patch: tuple[int, int]) -> Tensor:
        # each its own, whatever batch it is in
        own = [torch.Generator().manual_seed(first + i) for i in range(len(pixels))]
        drawn = [torch.randn(pixels.shape[1:], generator=generator) for generator in own]
        return (pixels + std * torch.stack(drawn)).clamp(0, 1)

    return Shift(f'noise {std}', change)


class ShiftTally:
    """Counts changed experts over any number of images."""

    def __init__(
        self, model: Transformer, normalization: Normalization, shifts: Sequence[Shift]
    ) -> None:
        self._model, self._normalization, self._shifts = model, normalization, shifts
        self._changed = {shift.name: defaultdict[str, float](float) for shift in shifts}
        self._images = 0

    def add(self, images: Tensor) -> None:
        """Take further images."""
        if not self._shifts or not len(images):
            return
        patch = h, w = self._model.patch_embed.patch_size
        height, width = size = images.shape[-2:]
        check(height >= h and width >= w, 'images', tuple(size), f'at least a patch, {h}x{w}')
        whole = images[..., : height // h * h, : width // w * w]
        pixels = _in_256_steps(self._normalization.pixels(whole))
        before = self._first_experts(pixels)
        for shift in self._shifts:
            after = self._first_experts(_in_256_steps(shift.change(pixels, self._images, patch)))
            changed = self._changed[shift.name]
            for name, experts in before.items():
                share = measures.changed_share(*shift.align(experts, after[name]))
                changed[name] += share * len(images)
        self._images += len(images)

    def shares(self) -> dict[str, dict[str, float]]:
        """By shift and decider: the share of patches whose expert changes, all images alike."""
        return {
            shift: {name: total / self._images for name, total in changed.items()}
            for shift, changed in self._changed.items()
        }

    def _first_experts(self, pixels: Tensor) -> dict[str, Tensor]:
        images = self._normalization.normalized(pixels)
        grid, found = Grid.of_timm(self._model, images), decided(self._model, images)
        return {name: grid.of(experts[..., 0]) for name, experts in found.items()}


def in_colour(pixels: Tensor) -> Tensor:
    """Pixels (B, C, H, W) of one or three channels as (B, 3, H, W)."""
    channels = pixels.shape[1]
    check(channels in (1, 3), 'channels', channels, '1 or 3, or nobody can look at them')
    return pixels.expand(-1, 3, -1, -1)


def _in_256_steps(pixels: Tensor) -> Tensor:
    """As image files hold them, so that to be written there is no change by itself."""
    return (pixels * 255).round() / 255


def all_shifts(severities: Sequence[int] = (1, 3, 5)) -> list[Shift]:
    """Mirrored, moved by a patch, with noise that is hardly seen, and every corruption."""
    # half of the weakest noise of ImageNet-C
    corrupted = (corruption(name, s) for name in CORRUPTIONS for s in severities)
    return [flip(), crop(), noise(0.04), *corrupted]


def corruption(name: str, severity: int) -> Shift:
    """One corruption, drawn anew for each image, but always the same for the same image."""

    def change(pixels: Tensor, first: int, patch: tuple[int, int]) -> Tensor:
        bytes_ = (in_colour(pixels) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        changed = [_corrupted(each, name, severity, first + i) for i, each in enumerate(bytes_)]
        colour = torch.from_numpy(np.stack(changed)).permute(0, 3, 1, 2).float() / 255
        # a corruption of grey may come out in colour
        return colour if pixels.shape[1] == 3 else colour.mean(dim=1, keepdim=True)

    return Shift(f'{name} {severity}', change)


class Corruption:
    """Corrupts images of a test, always alike for the same pixels."""

    def __init__(self, shift: str) -> None:
        self.name, _, severity = shift.rpartition('_')
        valid = self.name in CORRUPTIONS and severity in [*'12345']
        check(valid, 'shift', shift, f"such as 'fog_3', 1 to 5, of {', '.join(CORRUPTIONS)}")
        self.severity = int(severity)
        # with numba: before the test begins and its workers start
        import imagecorruptions  # noqa: F401

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8, RGB, of at least 32 pixels; returns the same."""
        return _corrupted(image, self.name, self.severity, zlib.crc32(image.tobytes()))


def _corrupted(image: np.ndarray, name: str, severity: int, number: int) -> np.ndarray:
    from imagecorruptions import corrupt  # only those who ask for it wait for numba

    allowed = 'at least 32x32 pixels; leave the corruptions out'  # the library refuses less
    check(min(image.shape[:2]) >= 32, 'images', image.shape[:2], allowed)
    # by name too, or every kind of noise would be drawn alike
    seed = (zlib.crc32(name.encode()) + number) % 2**32
    # these do not draw from NumPy's global generator, which is left as it was
    options = {'seed': seed} if name in ('impulse_noise', 'glass_blur') else {}
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        image = np.ascontiguousarray(image)
        return corrupt(image, corruption_name=name, severity=severity, **options)
    finally:
        np.random.set_state(state)


@dataclass(frozen=True)
class Change:
    """How the routing of the same tokens differs between two checkpoints of a run."""

    before: str
    after: str
    shares: dict[str, float]  # of tokens with another first expert, by decider


def routing_changes(
    before: nn.Module, after: nn.Module, batches: Iterable[Tensor]
) -> dict[str, float]:
    """Share of tokens with another first expert later in one training, by decider."""
    changed: dict[str, float] = defaultdict(float)
    count = 0
    for images in batches:
        old, new = (decided(model, images) for model in (before, after))
        for name, experts in old.items():
            share = measures.changed_share(experts[..., 0], new[name][..., 0])
            changed[name] += share * len(images)
        count += len(images)
    check(count > 0, 'batches', count, 'at least one image to look at')
    return {name: total / count for name, total in changed.items()}


def layer_states(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what `convergence` looks at: parameters and buffers of layers with experts."""
    layers = tuple(f'{name}.' for name in moe_layers(model))
    return {
        name: value.detach().cpu().clone()
        for name, value in model.state_dict().items()
        if name.startswith(layers)
    }


def convergence(
    checkpoints: Sequence[Mapping[str, Tensor]], layers: Iterable[str]
) -> dict[str, dict[str, list[float]]]:
    """How near the parts of every layer are to what they will be: Theorem 4.1 as a measurement."""
    parts: dict[str, list[str]] = defaultdict(list)
    for layer in layers:
        for name, value in checkpoints[0].items():
            # counters and flags are no parameters
            if name.startswith(f'{layer}.') and value.is_floating_point():
                parts[f'{layer}.{name.removeprefix(f"{layer}.").split(".")[0]}'].append(name)
    found = {}  # 'blocks.1.mlp.router': a number for each checkpoint, oldest first
    for part, names in parts.items():
        values = [[s[n].detach().float().cpu().flatten() for n in names] for s in checkpoints]
        trajectory = torch.stack([*map(torch.cat, values)])
        found[part] = {
            'similarity': measures.similarity_to_last(trajectory).tolist(),
            'distance': measures.distance_to_last(trajectory).tolist(),
        }
    return found
