"""How auxiliary losses leave a model whose forward returns a plain tensor, and how state changes.

    with collect_losses(model, optimizer) as collected:
        loss = criterion(model(images), targets) + collected.total()
        loss.backward()
    optimizer.step()

A recorder keeps losses inside the `with` block only. State that learns without gradients never
changes in forward, but once, in `update_state`, when the block is left.

With torch.distributed losses are those of the batch of all ranks, see `losses.py`. Every rank has
to read them at the same places, or not at all before the end of the block.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .config import check, check_type
from .layer import MoeLayer, warn_once
from .losses import Loss, averaged_over_ranks
from .optimizer import check_optimizer
from .routing import perplexity

UNREAD = (
    'the losses of a collect_losses block were never read: add collected.total() to the loss, or '
    'auxiliary losses are not part of it'
)


class Collected:
    """What the layers of a model reported inside one `collect_losses` block.

    Args:
        layers: MoE layers by name.
    """

    def __init__(self, layers: dict[str, MoeLayer]) -> None:
        self._layers = layers
        self._closed: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None
        self._added: list[tuple[str, Loss, int]] = []
        # of each layer, and of what was added, what is averaged over ranks already
        self._averaged: dict[str, list[tuple[str, Tensor]]] = defaultdict(list)
        self._was_read = self._has_gradient = False

    @property
    def unread(self) -> bool:
        """Whether there are losses of a training step that nobody has read."""
        return not self._was_read and self._has_gradient

    def add(self, losses: Mapping[str, Tensor], num_samples: int) -> None:
        """Let other losses be averaged over ranks, and be part of the total.

        Args:
            losses: 0-dim means over the samples of this rank, by name.
            num_samples: How many these are; a rank that has fewer counts for less.
        """
        self._added.extend((name, loss, num_samples) for name, loss in losses.items())

    @property
    def losses(self) -> dict[str, Tensor]:
        """Weighted losses, 'blocks.1.mlp/balance' to 0-dim tensor, summed over forward passes.

        Those of `add` come last.
        """
        self._was_read = True
        return self._read_losses()

    def _read_losses(self) -> dict[str, Tensor]:
        if self._closed is not None:
            return self._closed[0]
        reported = {f'{name}/': layer.recorder.losses for name, layer in self._layers.items()}
        reported[''] = self._added
        new = [
            (place, name, loss, number)
            for place, entries in reported.items()
            for name, loss, number in entries[len(self._averaged[place]) :]
        ]
        values = averaged_over_ranks([(loss, number) for _, _, loss, number in new])
        for (place, name, *_), value in zip(new, values, strict=True):
            self._averaged[place].append((f'{place}{name}', value))
        found = defaultdict(list)
        for place in reported:
            for name, value in self._averaged[place]:
                found[name].append(value)
        return {name: _one(values, torch.sum) for name, values in found.items()}

    @property
    def stats(self) -> dict[str, Tensor]:
        """Statistics, 'blocks.1.mlp/load' to tensor, averaged over forward passes."""
        if self._closed is not None:
            return self._closed[1]
        found = defaultdict(list)
        for layer_name, layer in self._layers.items():
            for name, value in layer.recorder.stats:
                found[f'{layer_name}/{name}'].append(value)
        return {name: _one(values, torch.mean) for name, values in found.items()}

    def total(self) -> Tensor:
        """Sum of all losses: a 0-dim tensor to add to the task loss, zero without losses.

        Raises:
            RuntimeError: The block has been left, and the losses have lost their graph.
        """
        if self._closed is not None:
            raise RuntimeError('collected.total() has no gradient after its block: call it inside')
        losses = list(self.losses.values())
        return torch.stack(losses).sum() if losses else torch.zeros(())  # of any device

    def _close(self) -> None:
        """Keep values alone: a kept graph would keep a whole training step alive."""
        losses = self._read_losses()
        self._has_gradient = any(value.requires_grad for value in losses.values())
        detached = {name: value.detach() for name, value in losses.items()}
        self._closed = (detached, self.stats)
        self._averaged.clear()
        self._added.clear()

    def summary(self) -> dict[str, float]:
        """One number per layer and statistic, for a log; see `summarize`."""
        return summarize(self.stats)


def _one(values: list[Tensor], of_passes: Callable[..., Tensor]) -> Tensor:
    """Of one forward pass its value, of several what is made of them."""
    return values[0] if len(values) == 1 else of_passes(torch.stack(values), dim=0)


def moe_layers(model: nn.Module) -> dict[str, MoeLayer]:
    """MoE layers of a model by name, without the prefixes of DDP and torch.compile wrappers."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, MoeLayer):
            wrappers = 'module', '_orig_mod'
            name = '.'.join(part for part in name.split('.') if part not in wrappers)
            assert name not in found, 'two MoE layers with one name'
            found[name] = module
    return found


@contextmanager
def collect_losses(
    model: nn.Module, optimizer: Optimizer | None = None, update_state: bool = True
) -> Iterator[Collected]:
    """Collect the auxiliary losses of every forward pass of `model` inside the block.

    Args:
        model: A model, also wrapped by DDP or torch.compile, or one that contains it.
        optimizer: What steps after the block; looked at alone. None for a pass without a step.
        update_state: Change gradient-free state when the block is left without an error. With
            gradient checkpointing call backward() inside then. False leaves it to `update_state`.

    Yields:
        A `Collected`.

    Raises:
        ValueError: The optimizer would update all experts of a layer as one tensor.
        RuntimeError: A block is already open for the model.
    """
    if optimizer is not None:
        check_optimizer(optimizer, model)
    layers = moe_layers(model)
    if any(layer.recorder.active for layer in layers.values()):
        raise RuntimeError('collect_losses is already open for this model: blocks do not nest')
    collected = Collected(layers)
    previous = {layer.recorder.collected for layer in layers.values()} - {None}
    if any(block.unread for block in previous):
        warn_once(UNREAD)
    try:
        for layer in layers.values():
            layer.recorder.collected = collected
            if layer.apply_begin():
                layer.guard.state_changed()
            layer.recorder.active = True
        yield collected
        collected._close()
    except BaseException:
        for layer in layers.values():
            layer.observed = {}
        raise
    finally:
        for layer in layers.values():
            layer.recorder.stop()
    if update_state:
        _update(model)


def update_state(model: nn.Module) -> None:
    """Change the state that learns without gradients, from what the last blocks collected.

    With torch.distributed, by all ranks. Call it once per optimizer step, after backward(), where
    `collect_losses(..., update_state=False)` was used.
    """
    by_type = defaultdict(list)
    for layer in moe_layers(model).values():
        by_type[type(layer)].append(layer)
    for kind, layers in by_type.items():
        for layer, changed in zip(layers, kind.apply_updates(layers), strict=True):
            if changed:
                layer.guard.state_changed()


_update = update_state  # a name that the argument of `collect_losses` does not hide


def start_training(model: nn.Module, num_updates: int) -> None:
    """Tell the layers how long a training will be; a loop of your own needs it for StableMoE alone.

    Args:
        model: Any model.
        num_updates: How often `update_state` will be called, or a block that updates be left.

    Raises:
        ValueError: `num_updates` is no whole number, or below 1.
    """
    check_type('num_updates', int, num_updates)
    check(num_updates >= 1, 'num_updates', num_updates, 'at least 1')
    for layer in moe_layers(model).values():
        layer.start_training(num_updates)


def restart(model: nn.Module) -> list[str]:
    """Let every layer begin a new training from its weights; returns what changed, for a log."""
    notes = [layer.restart() for layer in moe_layers(model).values()]
    return [f'{count} layers {note}' for note, count in Counter(filter(None, notes)).items()]


def summarize(stats: Mapping[str, Tensor]) -> dict[str, float]:
    """Numbers of 0-dim tensors, and of shares (E,) or (M,), with one wait for their device."""
    if not stats:
        return {}
    summary: dict[str, float] = {}
    flat = torch.cat([value.reshape(-1) for value in stats.values()]).cpu().double()
    sizes = [value.numel() for value in stats.values()]
    for (name, value), numbers in zip(stats.items(), flat.split(sizes), strict=True):
        if value.ndim == 0:
            summary[name] = numbers.item()
            continue
        summary |= {
            f'{name}_min': numbers.min().item(),
            f'{name}_max': numbers.max().item(),
            f'{name}_unused': float((numbers == 0).sum()),
            f'{name}_perplexity': perplexity(numbers),
        }
    return summary


def describe(stats: Mapping[str, Tensor]) -> str:
    """The same in words, for a line of a log; scalars that are zero are left out."""
    numbers = summarize(stats)
    parts = []
    for name, value in stats.items():
        if value.ndim > 0:
            parts.append(
                f'{name} {numbers[f"{name}_min"]:.3f}..{numbers[f"{name}_max"]:.3f}'
                f' perplexity {numbers[f"{name}_perplexity"]:.2f}'
                f' unused {numbers[f"{name}_unused"]:.0f}/{value.numel()}'
            )
        elif numbers[name]:
            parts.append(f'{name} {numbers[name]:.3g}')
    return '  '.join(parts)
