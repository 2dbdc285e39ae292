"""The part of a trained model that both tasks share: losses, and how images are normalised."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.logging import MessageHub, print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from vqmoe_vision.models.compat import StateDict, misfit_of, part_of
from vqmoe_vision.models.export import Exportable
from vqmoe_vision.models.normalization import KEY, Normalization, of_buffer
from vqmoe_vision.moe import Collected, collect_losses
from vqmoe_vision.moe.collect import moe_layers

from .routing import Batch, RoutingStatistics

_UNMOVED = (
    'this training has no MoeStateHook: what learns without gradients, as a codebook, stands still '
    'unless you call update_state(model.routed_model) after each step of the optimizer. The hook '
    'is in custom_hooks of configs/_base_/default_runtime.py, which a list in a config replaces: '
    'hooks of your own have names under default_hooks'
)


def unwrapped(runner: Runner) -> Any:
    """The model itself, inside what distributes it and what augments its tests."""
    model = runner.model
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def loss_entries(collected: Collected) -> dict[str, torch.Tensor]:
    """What the losses are in the dictionary that a model's `loss` returns."""
    return {
        name if 'loss' in name else f'{name}_loss': value
        for name, value in collected.losses.items()
    }


class MoeTrainingMixin:
    """Stands left of mmengine's `BaseModel` in the bases of a model that may hold MoE layers.

    Attributes:
        routing_statistics: Averages over every `collect` block; `MoeStateHook` reads and resets it.
        logged_statistics: Of training, since the last line of the log; `MoeLogProcessor` does so.
        recorded_statistics: Of training, since the last line of `routing.jsonl`, for
            `RoutingHistoryHook`; None without that hook.
        state_is_moved: Whether a `MoeStateHook` does so, or it was said that none does.
        normalization: (2, 3) float32 buffer, mean and standard deviation that images are normalised
            with, of pixels in [0, 1]; zeros until a training begins or weights are loaded.

    Args:
        *args: Passed on to the next base.
        **kwargs: Passed on to the next base.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.routing_statistics = RoutingStatistics()
        self.logged_statistics = RoutingStatistics()
        self.recorded_statistics: RoutingStatistics | None = None
        self.state_is_moved = False
        self.normalization: torch.Tensor
        self.register_buffer(KEY, torch.zeros(2, 3))  # type: ignore[attr-defined]

    @property
    def known_normalization(self) -> Normalization | None:
        """What `normalization` says; None if that is nothing yet."""
        return of_buffer(self.normalization)

    def normalize_as(self, normalization: Normalization) -> None:
        """Takes over how images are normalised, also for what timm saves of the model."""
        self.normalization.copy_(normalization.values())
        timms: Any = self.routed_model
        timms.pretrained_cfg.update(mean=normalization.mean, std=normalization.std)

    def normalize_inputs(self, datasets: Mapping[str, Any]) -> None:
        """Lets images of data sets, by field, be normalised as the weights want it.

        Raises:
            ValueError: The config states otherwise.
        """
        raise NotImplementedError

    def check_batches(self, loader: DataLoader) -> None:
        """Refuses batches of training that the model cannot take."""

    def test_preprocessing(self, dataset: ConfigDict) -> dict[str, Any]:
        """How images are prepared for tests, beside their normalisation.

        Returns:
            Entries of timm's `pretrained_cfg`: `input_size` (3, H, W), `crop_pct`, `crop_mode` and
            `interpolation`.

        Raises:
            ValueError: They cannot say it.
        """
        raise NotImplementedError

    def exportable(self, size: tuple[int, int] | None = None) -> Exportable:
        """What leaves PyTorch of the model, for images of (height, width); None is its own size.

        Raises:
            ValueError: It does not take images of this size.
        """
        raise NotImplementedError

    def _load_from_state_dict(
        self, state_dict: StateDict, prefix: str, metadata: Any, strict: bool,
        missing_keys: list[str], *others: list[str],
    ) -> None:  # fmt: skip
        """As torch's, which mmengine's loading calls too; a file of timm has no normalisation."""
        own = part_of(state_dict, prefix)
        renamed = self.in_own_names(own)
        if renamed.keys() != own.keys():
            for name in own:
                del state_dict[prefix + name]
            state_dict.update({prefix + name: value for name, value in renamed.items()})
        load = super()._load_from_state_dict  # type: ignore[misc]
        load(state_dict, prefix, metadata, strict, missing_keys, *others)
        if prefix + KEY in missing_keys:
            missing_keys.remove(prefix + KEY)
        if (known := self.known_normalization) is not None:
            self.normalize_as(known)

    def misfit(self, state_dict: StateDict) -> str:
        """As `misfit_of`; a file of timm has no normalisation."""
        model: Any = self
        own = {name.removeprefix('module.'): value for name, value in state_dict.items()}
        problem = misfit_of(model, self.in_own_names({KEY: self.normalization, **own}))
        inside = (f'{self._place()}.', KEY)
        if self._is_of_timm(state_dict) and not all(
            k.startswith(inside) for k in model.state_dict()
        ):
            return (
                f'{problem}; it is a file of timm, without what a run has beside the timm model: '
                'test the checkpoint, or the .pth that tools/publish.py makes of it'
            )
        return problem

    def in_own_names(self, state: StateDict) -> StateDict:
        """The state of a file of timm in the names of a run, whose own stays as it is."""
        if not self._is_of_timm(state):
            return state
        return {k if k == KEY else f'{self._place()}.{k}': value for k, value in state.items()}

    def _place(self) -> str:
        modules = self.named_modules()  # type: ignore[attr-defined]
        return next(name for name, module in modules if module is self.routed_model)

    def _is_of_timm(self, state: StateDict) -> bool:
        return not self.routed_model.state_dict().keys().isdisjoint(state)

    @property
    def routed_model(self) -> nn.Module:
        """The module whose MoE layers are trained; their names in the log are relative to it."""
        raise NotImplementedError

    @contextmanager
    def collect(self) -> Iterator[Collected]:
        """Collects losses and statistics of the forward passes inside the block.

        State stays as it is: `MoeStateHook` moves it after the optimizer's step. The losses lose
        their graph at the end of the block.
        """
        if self.training and not self.state_is_moved:  # type: ignore[attr-defined]
            self._tell_of_state()
        with collect_losses(self.routed_model, update_state=False) as collected:
            yield collected
        if not collected.stats:
            return
        batch = Batch(collected.stats)
        self.routing_statistics.add_batch(batch)
        if self.training:  # type: ignore[attr-defined]
            self.logged_statistics.add_batch(batch)
            if self.recorded_statistics is not None:
                self.recorded_statistics.add_batch(batch)

    def _tell_of_state(self) -> None:
        """Says once that nobody moves the state; a loop of one's own, without a runner, may."""
        if MessageHub.get_current_instance().get_info('loop_stage') != 'train':
            return
        self.state_is_moved = True
        if any(layer.moves_state() for layer in moe_layers(self.routed_model).values()):
            print_log(_UNMOVED, 'current', logging.WARNING)
