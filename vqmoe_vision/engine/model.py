"""The part of a trained model that both tasks share: auxiliary losses in, non-finite losses out."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.logging import MessageHub
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import Runner
from torch import nn

from vqmoe_vision.moe import Collected, collect_losses

from .routing import RoutingStatistics


class NonFiniteError(FloatingPointError):
    """A loss or a parameter is nan or infinite; training cannot go on from here."""


def unwrapped(runner: Runner) -> Any:
    """The model itself, inside what distributes it and what augments its tests."""
    model = runner.model
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def loss_entries(collected: Collected) -> dict[str, torch.Tensor]:
    """What the MoE layers add to the dictionary that a model's `loss` returns.

    mmengine sums every entry with "loss" in its key, so `blocks.1.mlp/balance` becomes
    `blocks.1.mlp/balance_loss`. Statistics are no entries: `MoeLogProcessor` fetches them when a
    line is due.

    Args:
        collected: The losses (already weighted) of one forward pass.

    Returns:
        0-dim tensors by name.
    """
    return {f'{name}_loss': value for name, value in collected.losses.items()}


class MoeTrainingMixin:
    """Stands left of mmengine's `BaseModel` in the bases of a model that may hold MoE layers.

    Attributes:
        routing_statistics: Averages over every `collect` block; `MoeStateHook` reads and resets it.
        logged_statistics: Of training, since the last line of the log; `MoeLogProcessor` does so.
        recorded_statistics: Shares of training, since the last line of `routing.jsonl`, for
            `RoutingHistoryHook`; None without that hook.

    Args:
        *args: Passed on to the next base.
        **kwargs: Passed on to the next base.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.routing_statistics = RoutingStatistics()
        self.logged_statistics = RoutingStatistics()
        self.recorded_statistics: RoutingStatistics | None = None

    @property
    def routed_model(self) -> nn.Module:
        """The module whose MoE layers are trained; their names in the log are relative to it."""
        raise NotImplementedError

    @contextmanager
    def collect(self) -> Iterator[Collected]:
        """Collects losses and statistics of the forward passes inside the block.

        State stays as it is: `MoeStateHook` moves it after the optimizer's step. Read the losses
        inside the block; they lose their graph at its end.

        Yields:
            What the MoE layers report.
        """
        with collect_losses(self.routed_model, update_state=False) as collected:
            yield collected
        self.routing_statistics.add(collected.stats)
        if self.training:  # type: ignore[attr-defined]
            self.logged_statistics.add(collected.stats)
            if self.recorded_statistics is not None:
                shares = {name: value for name, value in collected.stats.items() if value.ndim}
                self.recorded_statistics.add(shares)

    def parse_losses(
        self, losses: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """As mmengine's, but stops before the optimizer steps on a loss that is not finite.

        Here, and not in a hook, because hooks run when the weights have been updated.

        Args:
            losses: 0-dim tensors by name; those with "loss" in the name are summed.

        Returns:
            The total loss, and everything to log.

        Raises:
            NonFiniteError: The total is nan or infinite; names the first component that is.
        """
        total, log_vars = super().parse_losses(losses)  # type: ignore[misc]
        if not torch.isfinite(total):
            raise NonFiniteError(_describe(log_vars))
        return total, log_vars


def _describe(log_vars: dict[str, Any]) -> str:
    """One line: which component is not finite, and when."""
    bad = {
        name.removesuffix('_loss'): value.item()
        for name, value in log_vars.items()
        if name != 'loss' and 'loss' in name and not torch.isfinite(value)
    }
    # MoE layers come before the task's loss and in the order of the network: the first is the
    # nearest to the cause. Finite parts can still overflow in the sum.
    name, value = next(iter(bad.items())) if bad else ('loss', log_vars['loss'].item())
    iteration = MessageHub.get_current_instance().runtime_info.get('iter', 0) + 1
    others = f' (as did {", ".join(list(bad)[1:])})' if len(bad) > 1 else ''
    return f'{name} became {value} at iteration {iteration}{others}; training has stopped'
