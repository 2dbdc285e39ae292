"""What every MoE layer of a model decides for every token, as plain tensors.

Legend: B images, N tokens per image (class and register tokens too), T = B * N, D width, E experts,
K experts per token, P slots per expert.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqmoe_vision.models.layers import Transformer
from vqmoe_vision.moe import collect_losses, moe_layers
from vqmoe_vision.moe.codebooks import Quantized
from vqmoe_vision.moe.config import check
from vqmoe_vision.moe.layer import Decisions, MoeLayer
from vqmoe_vision.moe.routing import Routing

PREFIX = 8  # the most tokens before patches that are guessed


@dataclass(frozen=True)
class LayerRecord:
    """One pass of one layer; all tensors are detached and on the CPU."""

    num_experts: int
    inputs: Tensor  # (B, N, D)
    outputs: Tensor | None  # (B, N, D), None where only the choice was watched
    # by decider, the module that chooses, such as 'router' or 'quantizer.codebook'
    experts: dict[str, Tensor] = field(default_factory=dict)  # (B, N, K), best first, -1 for none
    weights: dict[str, Tensor] = field(default_factory=dict)  # (B, N, K), gates included
    codes: dict[str, Tensor] = field(default_factory=dict)  # (B, N)
    gates: Tensor | None = None  # (B, N, 2), continuous and discrete
    dispatch: Tensor | None = None  # (B, N, E, P), sums to 1 over N
    combine: Tensor | None = None  # (B, N, E, P), sums to 1 over E and P
    num_codes: int = 0  # M of a codebook that is not this package's
    placed: bool = True  # whether tokens are in the order of patches
    shared: int = 0  # of E those, the last, that every token has

    @property
    def chosen(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Experts and weights by decider, without those that all tokens share."""
        found = {name: (experts, self.weights[name]) for name, experts in self.experts.items()}
        if self.shared:
            for name, (experts, weights) in found.items():
                own = experts < self.num_experts - self.shared  # these come first
                both = torch.where(own, experts, -1), torch.where(own, weights, 0)
                found[name] = both[0][..., : -self.shared], both[1][..., : -self.shared]
        return found

    @property
    def firsts(self) -> dict[str, Tensor]:
        """First experts (B, N) by decider, of slots those with the largest weight."""
        found = {name: experts[..., 0] for name, (experts, _) in self.chosen.items()}
        if self.combine is not None:
            found['slots'] = self.combine.sum(dim=-1).argmax(dim=-1)
        return found


@contextmanager
def record_layers(model: nn.Module) -> Iterator[dict[str, LayerRecord]]:
    """Records the last pass of each MoE layer, by its name, while a model runs."""
    layers = moe_layers(model)
    if not layers:
        raise ValueError(f'model: {type(model).__name__} is dense, it has no layer of experts')
    if any(layer.recorder.watcher is not None for layer in layers.values()):
        raise RuntimeError('record_layers is already open for this model: blocks do not nest')
    records: dict[str, LayerRecord] = {}

    def keep(name: str, layer: MoeLayer, *seen: Any) -> None:
        records[name] = _record(layer.experts.num_experts, *seen)

    for name, layer in layers.items():
        layer.recorder.watcher = partial(keep, name, layer)
    try:
        yield records
    finally:
        for layer in layers.values():
            layer.recorder.watcher = None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A block in which a model is in eval mode and without gradients; it is left as it was."""
    modes = {module: module.training for module in model.modules()}  # parts may be frozen in eval
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def recorded(model: nn.Module, images: Tensor) -> dict[str, LayerRecord]:
    """Runs a model in eval mode and returns what its layers decided; it is left as it was."""
    with evaluating(model), record_layers(model) as records:
        model(images.to(next(model.parameters(), images).device))
    return records


def decided(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Experts (B, N, K) by 'blocks.1.mlp.router' and the like, best first, -1 for none."""
    return {
        f'{layer}.{decider}': experts
        for layer, record in recorded(model, images).items()
        for decider, (experts, _) in record.chosen.items()
    }


class Grid(NamedTuple):
    """Rows and columns of patches, behind tokens that are of no place."""

    prefix: int
    rows: int
    columns: int
    patch: tuple[int, int]  # height and width in pixels

    @classmethod
    def of_timm(cls, model: Transformer, images: Tensor) -> 'Grid':
        """That of images (B, C, H, W) in a model of timm."""
        height, width = images.shape[-2:]
        rows, columns = model.patch_embed.dynamic_feat_size((height, width))
        return cls(model.num_prefix_tokens, rows, columns, tuple(model.patch_embed.patch_size))

    def filled(self, pixels: Tensor) -> Tensor:
        """Images (B, C, H, W) to the end of their last patches; what is missing is black."""
        height, width = self.rows * self.patch[0], self.columns * self.patch[1]
        return F.pad(pixels, (0, width - pixels.shape[-1], 0, height - pixels.shape[-2]))

    def of(self, of_tokens: Tensor) -> Tensor:
        """What is known of every token (B, N, ...) at its patch (B, rows, columns, ...)."""
        return of_tokens[:, self.prefix :].unflatten(1, (self.rows, self.columns))


def grid_of(model: nn.Module, images: Tensor, num_tokens: int) -> Grid | None:
    """That of timm's transformers; of others one of square patches, None if none fits."""
    if images.ndim != 4:
        return None
    height, width = images.shape[-2:]
    if isinstance(model, Transformer):
        grid = Grid.of_timm(model, images)
        return grid if num_tokens == grid.prefix + grid.rows * grid.columns else None
    for prefix in range(PREFIX + 1):
        rows = round(math.sqrt(max(num_tokens - prefix, 0) * height / width))
        columns = (num_tokens - prefix) // max(rows, 1)
        fits = rows * columns == num_tokens - prefix > prefix and rows * width == columns * height
        if fits and height % rows == 0:
            return Grid(prefix, rows, columns, (height // rows, width // columns))
    return None


def _record(num_experts: int, decisions: Decisions, inputs: Tensor, outputs: Tensor) -> LayerRecord:
    batch = inputs.shape[:2]  # B, N
    maps = {n: _plain(value) for n, value in decisions.items() if isinstance(value, Tensor)}
    gates = maps['gates'].view(*batch, 2) if 'gates' in maps else None
    experts, weights, codes, shared = {}, {}, {}, 0
    for name, decided in decisions.items():
        if isinstance(decided, Routing):
            found, shared = _by_token(decided, batch.numel()), decided.shared
            experts[name], weights[name] = (each.unflatten(0, batch) for each in found)
        elif isinstance(decided, Quantized):
            codes[name] = decided.indices.cpu().view(batch)
            experts[name] = codes[name][..., None] % num_experts  # code j is of expert j mod E
            weights[name] = torch.ones(experts[name].shape)
        if gates is not None and name in weights:
            weights[name] = weights[name] * gates[..., int(name in codes), None]
    slots = {
        n: maps[n].unflatten(-1, (num_experts, -1)) for n in ('dispatch', 'combine') if n in maps
    }
    of_layer = num_experts, _plain(inputs), _plain(outputs)
    return LayerRecord(*of_layer, experts, weights, codes, gates, shared=shared, **slots)


def _plain(value: Tensor) -> Tensor:
    return value.detach().float().cpu()


def _by_token(routing: Routing, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Experts and weights of each token, (T, K), best first, filled up with -1 and 0."""
    indices, weights = routing.indices.cpu(), _plain(routing.weights)
    if routing.tokens is None:
        if routing.kept is None:
            return indices, weights
        kept = routing.kept.cpu()
        order = (~kept).to(torch.int8).argsort(dim=1, stable=True)  # what is dropped comes last
        indices, weights = indices.masked_fill(~kept, -1), weights.masked_fill(~kept, 0)
        return indices.gather(1, order), weights.gather(1, order)
    # assignments by token, and by weight within a token: both sorts keep the order of equals
    of_token = routing.tokens.cpu()
    order = weights.argsort(descending=True, stable=True)
    order = order[of_token[order].argsort(stable=True)]
    tokens = of_token[order]
    counts = tokens.bincount(minlength=num_tokens)
    place = torch.arange(len(tokens)) - (counts.cumsum(0) - counts)[tokens]
    shape = (num_tokens, int(counts.max()))
    experts, by_token = torch.full(shape, -1), torch.zeros(shape)
    experts[tokens, place] = indices[order]
    by_token[tokens, place] = weights[order]
    return experts, by_token


def mean_statistics(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Averages what the MoE layers report over batches of images, in eval mode.

    Args:
        model: Holds the MoE layers; it is left as it was.
        batches: Images (B, C, H, W), normalised as in training.

    Returns:
        The statistics of `collect_losses` by their name: 'blocks.1.mlp/load' is the (E,) share of
        assignments per expert. An image counts the same whatever batch it is in.

    Raises:
        ValueError: If there is no batch.
    """
    sums: dict[str, Any] = defaultdict(int)
    count = 0
    with evaluating(model):
        for images in batches:
            with collect_losses(model, update_state=False) as collected:
                model(images)
            for name, value in collected.stats.items():
                sums[name] += value * len(images)
            count += len(images)
    check(count > 0, 'batches', count, 'at least one image to average over')
    return {name: value / count for name, value in sums.items()}


def token_experts(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Asks every router and every codebook of a model which experts each token goes to.

    Args:
        model: Holds the MoE layers; it runs in eval mode and is left as it was.
        images: (B, C, H, W), normalised as in training.

    Returns:
        By the name of the module that decides, such as 'blocks.1.mlp.router': (B, N, K) expert
        indices on the CPU, best first, -1 where a token has fewer than the others; N counts class
        and register tokens too.

    Raises:
        ValueError: If no layer sends tokens to experts. SoftMoE does not: each of its experts sees
            mixtures of all tokens.
    """
    found = decided(model, images)
    if not found:
        raise ValueError('model: has no router that sends tokens to experts')
    return found


def patch_experts(model: Transformer, images: Tensor) -> dict[str, Tensor]:
    """Maps the first choice of every patch, as a picture needs it.

    Args:
        model: Holds the MoE layers; it is left as it was.
        images: (B, C, H, W), normalised as in training.

    Returns:
        By the name of the module that decides: (B, rows, columns) expert indices, -1 for a patch
        that no expert takes.

    Raises:
        ValueError: If no layer sends tokens to experts.
    """
    grid, found = Grid.of_timm(model, images), token_experts(model, images)
    return {name: grid.of(experts[..., 0]) for name, experts in found.items()}
