"""What is kept of any number of images in memory that does not grow: tokens, and patches.

Legend: B images, L patches per image in R rows, T tokens, D width, E experts, S sampled tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vqmoe_vision.models.hosts import Transformer
from vqmoe_vision.moe.config import check

from .surveyed import Patch

MOST_TOKENS = 2000  # S, of a layer
MOST_PATCHES = 8  # of an expert


class TokenMoments:
    """Sums over tokens from which their energy and their spectrum follow."""

    def __init__(self) -> None:
        self.count = 0
        self.total = torch.zeros(())  # (D,) float64
        self.gram = torch.zeros(())  # X^T X, (D, D) float64

    def add(self, tokens: Tensor) -> None:
        """Take further tokens (T, D)."""
        tokens = tokens.double()
        self.count += len(tokens)
        self.total = self.total + tokens.sum(dim=0)
        self.gram = self.gram + tokens.t() @ tokens

    @property
    def energy(self) -> float:
        """`sum |x|^2`."""
        return self.gram.trace().item()

    @property
    def energy_around_mean(self) -> float:
        """`sum |x - mean|^2`."""
        return self.energy - (self.total.square().sum() / self.count).item()


class TokenSample:
    """A uniform sample: the S tokens with the smallest of independent random keys."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._keys = torch.empty(0)
        self.tokens = torch.empty(0)
        self.indices = torch.empty(0, dtype=torch.int64)

    def add(self, tokens: Tensor, indices: Tensor) -> None:
        """Take further tokens (T, D) into consideration, and a number (T,) for each."""
        keys = torch.cat([self._keys, torch.rand(len(tokens), generator=self._generator)])
        chosen = keys.argsort()[:MOST_TOKENS]
        self._keys = keys[chosen]
        self.tokens = torch.cat([self.tokens.view(-1, tokens.shape[1]), tokens])[chosen]
        self.indices = torch.cat([self.indices, indices])[chosen]


def image_patches(model: Transformer, pixels: Tensor) -> Tensor:
    """Images (B, C, H, W) as patches (B, rows, columns, C, h, w); what is missing is black."""
    (height, width), (h, w) = pixels.shape[-2:], model.patch_embed.patch_size
    padded = F.pad(pixels, (0, -width % w, 0, -height % h))
    cut = padded.unflatten(-1, (-1, w)).unflatten(-3, (-1, h))  # (B, C, rows, h, columns, w)
    return cut.permute(0, 2, 4, 1, 3, 5)


def in_colour(pixels: Tensor) -> Tensor:
    """Pixels (B, C, H, W) of one or three channels as (B, 3, H, W)."""
    channels = pixels.shape[1]
    check(channels in (1, 3), 'channels', channels, '1 or 3, or nobody can look at them')
    return pixels.expand(-1, 3, -1, -1)


class ConfidentPatches:
    """The patches that each expert takes with the highest scores."""

    def __init__(self, num_experts: int) -> None:
        self._found: list[list[tuple[float, Patch]]] = [[] for _ in range(num_experts)]

    def add(self, scores: Tensor, weights: Tensor, patches: Tensor, first_image: int) -> None:
        """Take patches (B, rows, columns, 3, h, w), scores and weights (B, rows, columns, E)."""
        flat_scores, flat_weights = scores.flatten(0, 2), weights.flatten(0, 2)
        best = flat_scores.topk(min(MOST_PATCHES, len(flat_scores)), dim=0)

        def cut(place: int, expert: int) -> Patch:
            image, rest = divmod(place, patches.shape[1] * patches.shape[2])
            row, column = divmod(rest, patches.shape[2])
            pixels = patches[image, row, column].clone()  # a view would keep the whole batch
            return Patch(pixels, flat_weights[place, expert].item(), first_image + image)

        for expert, found in enumerate(self._found):
            new = zip(
                best.values[:, expert].tolist(), best.indices[:, expert].tolist(), strict=True
            )
            merged: list[tuple[float, Patch | int]] = [*found]
            merged += [(score, place) for score, place in new if score > -torch.inf]
            merged.sort(key=lambda scored: -scored[0])  # stable: the first of equals stays
            self._found[expert] = [
                (score, kept if isinstance(kept, Patch) else cut(kept, expert))
                for score, kept in merged[:MOST_PATCHES]
            ]

    def by_expert(self) -> list[list[Patch]]:
        """Patches of each expert, the most confident first."""
        return [[patch for _, patch in found] for found in self._found]
