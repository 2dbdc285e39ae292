"""How auxiliary losses leave a model whose forward returns a plain tensor, and how state changes.

    with collect_losses(model) as collected:
        loss = criterion(model(images), targets) + collected.total()
        loss.backward()
    optimizer.step()

Layers compute their losses whenever they train and hand them to a recorder, which keeps them only
inside the `with` block. Nothing is stored outside it, so models stay deep-copyable, picklable and
compilable, and a loss is never counted twice when gradient checkpointing runs a layer again.

State that learns without gradients (an EMA codebook, StableMoE's stage) never changes in forward:
`update_state` changes it, once, when the block is left.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .routing import perplexity
from .scripting import StaysPython

_UNCOLLECTED = (
    'training without collect_losses(model): auxiliary losses are not part of the loss and '
    'codebooks do not learn'
)
_already_warned = False


def in_recomputation() -> bool:
    """Whether autograd's backward is running, as when gradient checkpointing repeats a layer."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class Recorder:
    """Keeps what a layer reports while a `collect_losses` block is open.

    Copies and pickles of a model start closed and empty.
    """

    def __init__(self) -> None:
        self.active = False
        self.losses: list[tuple[str, Tensor]] = []
        self.stats: list[tuple[str, Tensor]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {'active': False, 'losses': [], 'stats': []}

    def start(self) -> None:
        """Begin to keep."""
        self.active = True

    def stop(self) -> None:
        """Stop keeping, and forget."""
        self.active, self.losses, self.stats = False, [], []


class MoeLayer(StaysPython):
    """Base of every mixture-of-experts layer: tensor in, tensor of the same shape out.

    A subclass implements `compute`, reports with `record`, and, if it has state that learns without
    gradients, implements `apply_update`.
    """

    needs_collecting = True  # it has losses, or state that learns without gradients

    def __init__(self) -> None:
        super().__init__()
        self.recorder = Recorder()
        self._updated = False
        self._ran_without_grad = False

    def run(self, x: Tensor) -> Tensor:
        """Apply the layer; (B, N, D) -> (B, N, D).

        Raises:
            RuntimeError: If gradient checkpointing repeats the layer after its state changed, or
                repeats a pass that ran without gradients (`use_reentrant=True`).
        """
        if self.training and not torch.compiler.is_compiling():
            self._check_use()
        return self.compute(x)

    def compute(self, x: Tensor) -> Tensor:
        """The method itself; (B, N, D) -> (B, N, D)."""
        raise NotImplementedError

    def macs(self, num_tokens: int) -> int:
        """Multiply-accumulates for an image of `num_tokens` tokens, counted by formula."""
        raise NotImplementedError

    def idle_params(self) -> int:
        """Parameters of the experts that a token does not use."""
        raise NotImplementedError

    def record(self, losses: dict[str, Tensor], stats: dict[str, Tensor]) -> None:
        """Report weighted losses and detached statistics; kept only by an open block."""
        if self.recorder.active and not in_recomputation():
            self.recorder.losses.extend(losses.items())
            self.recorder.stats.extend(stats.items())

    def begin(self) -> None:
        """Get ready for the passes of a block, which opens now."""
        self._updated = self.apply_begin() or self._updated

    def apply_begin(self) -> bool:
        """Change state that is due before the next pass; returns whether it changed."""
        return False

    def update(self) -> None:
        """Apply what the last block collected for the state of this layer."""
        # an update with nothing to learn does not undo the one before
        self._updated = self.apply_update() or self._updated

    def apply_update(self) -> bool:
        """Change state that learns without gradients; returns whether it changed."""
        return False

    def discard(self) -> None:
        """Forget what the next update would learn from, as the block ended in an error."""

    def _check_use(self) -> None:
        if in_recomputation():
            if self._ran_without_grad:
                raise RuntimeError(
                    'gradient checkpointing with use_reentrant=True loses the auxiliary losses of '
                    'MoE layers: use use_reentrant=False'
                )
            if self._updated:
                raise RuntimeError(
                    'gradient checkpointing repeats a MoE layer whose state has already changed: '
                    'call backward() inside the collect_losses block'
                )
            return
        self._updated = False
        self._ran_without_grad = not torch.is_grad_enabled()
        global _already_warned
        unheard = self.needs_collecting and not self.recorder.active
        if unheard and not _already_warned and torch.is_grad_enabled():
            _already_warned = True
            warnings.warn(_UNCOLLECTED, stacklevel=2)


class Collected:
    """What the layers of a model reported inside one `collect_losses` block."""

    def __init__(self, layers: dict[str, MoeLayer], like: Tensor | None) -> None:
        self._layers = layers
        self._like = like
        self._closed: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None

    @property
    def losses(self) -> dict[str, Tensor]:
        """Weighted losses, 'blocks.1.mlp/balance' to 0-dim tensor, summed over forward passes."""
        if self._closed is not None:
            return self._closed[0]
        return {name: torch.stack(v).sum(0) for name, v in self._gather('losses').items()}

    @property
    def stats(self) -> dict[str, Tensor]:
        """Statistics, 'blocks.1.mlp/load' to tensor, averaged over forward passes."""
        if self._closed is not None:
            return self._closed[1]
        return {name: torch.stack(v).mean(0) for name, v in self._gather('stats').items()}

    def total(self) -> Tensor:
        """Sum of all losses: a 0-dim tensor to add to the task loss, zero without MoE layers.

        Raises:
            RuntimeError: If the block has been left, as the losses have lost their graph.
        """
        if self._closed is not None:
            raise RuntimeError('collected.total() has no gradient after its block: call it inside')
        losses = list(self.losses.values())
        if losses:
            return torch.stack(losses).sum()
        return torch.zeros((), device=None if self._like is None else self._like.device)

    def summary(self) -> dict[str, float]:
        """One number per layer and statistic, for a log.

        A share per expert or per code (`load`, `code_usage`) becomes its extremes, the number of
        members unused in this batch, and its perplexity.
        """
        stats = self.stats
        out: dict[str, float] = {}
        if not stats:
            return out
        # one wait for the device, not one per statistic
        flat = torch.cat([value.reshape(-1) for value in stats.values()]).cpu()
        sizes = [value.numel() for value in stats.values()]
        for (name, value), numbers in zip(stats.items(), flat.split(sizes), strict=True):
            if value.ndim == 0:
                out[name] = numbers.item()
            else:
                out.update(summarize_shares(name, numbers))
        return out

    def _gather(self, kind: str) -> dict[str, list[Tensor]]:
        found: dict[str, list[Tensor]] = defaultdict(list)
        for layer_name, layer in self._layers.items():
            for name, value in getattr(layer.recorder, kind):
                found[f'{layer_name}/{name}'].append(value)
        return found

    def _close(self) -> None:
        # losses lose their graph here, or a kept `Collected` would keep a whole step alive
        losses = {name: value.detach() for name, value in self.losses.items()}
        self._closed = (losses, self.stats)


def summarize_shares(name: str, shares: Tensor) -> dict[str, float]:
    """Extremes, number unused and perplexity of shares that sum to 1.

    Args:
        name: Prefix of the keys, such as 'blocks.1.mlp/load'.
        shares: (E,) or (M,).
    """
    values = shares.tolist()
    return {
        f'{name}_min': min(values),
        f'{name}_max': max(values),
        f'{name}_unused': float(sum(value == 0 for value in values)),
        f'{name}_perplexity': perplexity(shares),
    }


def moe_layers(model: nn.Module) -> dict[str, MoeLayer]:
    """MoE layers of a model by name, without the prefixes of DDP and torch.compile wrappers."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, MoeLayer):
            parts = [part for part in name.split('.') if part not in ('module', '_orig_mod')]
            assert '.'.join(parts) not in found, 'two MoE layers with one name'
            found['.'.join(parts)] = module
    return found


@contextmanager
def collect_losses(model: nn.Module, update_state: bool = True) -> Iterator[Collected]:
    """Collect the auxiliary losses of every forward pass of `model` inside the block.

    Args:
        model: A model, also one wrapped by DDP or torch.compile, or one that contains it.
        update_state: Change gradient-free state when the block is left without an error. With
            gradient checkpointing, backward() then belongs inside the block. A trainer that runs
            backward() later passes False and calls `update_state(model)` after it.

    Yields:
        A `Collected`.

    Raises:
        RuntimeError: If a block is already open for the model.
    """
    layers = moe_layers(model)
    if any(layer.recorder.active for layer in layers.values()):
        raise RuntimeError('collect_losses is already open for this model: blocks do not nest')
    collected = Collected(layers, next(model.parameters(), None))
    for layer in layers.values():
        layer.begin()
        layer.recorder.start()
    try:
        yield collected
        collected._close()
    except BaseException:
        for layer in layers.values():
            layer.discard()
        raise
    finally:
        for layer in layers.values():
            layer.recorder.stop()
    if update_state:
        for layer in layers.values():
            layer.update()


def update_state(model: nn.Module) -> None:
    """Change the state that learns without gradients, from what the last blocks collected.

    All-reduces over ranks where torch.distributed is initialised. Call it once per optimizer step,
    after backward(), if `collect_losses(..., update_state=False)` was used.
    """
    for layer in moe_layers(model).values():
        layer.update()
