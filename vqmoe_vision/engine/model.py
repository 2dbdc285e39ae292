"""The part of a trained model that both tasks share: losses, routing, how images are normalised."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.dist import all_gather_object, all_reduce
from mmengine.logging import MessageHub, print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from vqmoe_vision.models.compat import StateDict, misfit_of, part_of
from vqmoe_vision.models.export import Exportable
from vqmoe_vision.models.normalization import KEY, Normalization, of_buffer
from vqmoe_vision.moe import Collected, collect_losses
from vqmoe_vision.moe.collect import describe, moe_layers, summarize

Layout = tuple[tuple[str, torch.Size], ...]  # names and shapes of statistics, in their order


class Batch:
    """The statistics of one batch as one tensor, so that many of them cost few operations."""

    def __init__(self, stats: dict[str, torch.Tensor]) -> None:
        self.layout: Layout = tuple((name, value.shape) for name, value in stats.items())
        parts = [value.detach().reshape(-1) for value in stats.values()]
        if len({part.dtype for part in parts}) > 1:
            parts = [part.double() for part in parts]  # the wider of two dtypes may not hold both
        flat = torch.cat(parts).double()
        owners = _owners(self.layout, flat.device)
        bad = flat.new_zeros(len(parts)).index_add_(0, owners, (~flat.isfinite()).double())
        self.finite = (bad == 0).double()  # (S,), of each statistic
        self.values = torch.where(self.finite[owners] == 1, flat, 0.0)  # (N,), of all in a row


@lru_cache(maxsize=8)
def _owners(layout: Layout, device: torch.device) -> torch.Tensor:
    """(N,) index of the statistic that each value belongs to; copying it there would wait."""
    sizes = [shape.numel() for _, shape in layout]
    return torch.cat([torch.full((n,), i, device=device) for i, n in enumerate(sizes)])


class RoutingStatistics:
    """Averages what MoE layers report over an epoch, a validation pass, or between two log lines.

    An expert is unused when nothing was assigned to it in all that time; an expert that one batch
    does not use is no such thing. Batches count alike, whatever their size; a value that is not
    finite is left out. Nothing is read from the device before somebody asks.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        # of each layout, the sums (N,) and counts (S,) of batches; a model has one, as a rule
        self._totals: dict[Layout, tuple[torch.Tensor, torch.Tensor]] = {}

    def state_dict(self) -> dict[str, dict[str, torch.Tensor]]:
        """What was added so far, for a checkpoint, on the CPU like all else in one."""
        return {
            part: {name: value.to('cpu', copy=True) for name, value in found.items()}
            for part, found in zip(('sums', 'counts'), self._by_name(), strict=True)
        }

    def load_state_dict(
        self, state: dict[str, dict[str, torch.Tensor]], device: torch.device
    ) -> None:
        """Goes on from what `state_dict` gave, on the device of what will be added."""
        self.reset()
        if sums := state['sums']:
            layout = tuple((name, value.shape) for name, value in sums.items())
            flat = torch.cat([value.reshape(-1).to(device) for value in sums.values()])
            counts = torch.stack([state['counts'][name].to(device) for name in sums])
            self._totals[layout] = flat, counts

    def add(self, stats: dict[str, torch.Tensor] | Batch) -> None:
        """Takes the statistics of one batch, as `Collected.stats`, or joined for several."""
        batch = stats if isinstance(stats, Batch) else Batch(stats)
        sums, counts = self._totals.get(batch.layout, (0.0, 0.0))
        self._totals[batch.layout] = sums + batch.values, counts + batch.finite

    def _by_name(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Sums in their shapes, and 0-dim counts."""
        all_sums: dict[str, torch.Tensor] = {}
        all_counts: dict[str, torch.Tensor] = {}
        for layout, (sums, counts) in self._totals.items():
            parts = sums.split([shape.numel() for _, shape in layout])
            for (name, shape), part, count in zip(layout, parts, counts, strict=True):
                all_sums[name] = all_sums.get(name, 0.0) + part.view(shape)
                all_counts[name] = all_counts.get(name, 0.0) + count
        return all_sums, all_counts

    def means(self) -> dict[str, torch.Tensor]:
        """Averages over everything added, on all ranks, by name; empty without MoE layers.

        Every rank has to ask. Ranks may have seen different statistics, or none.
        """
        own_sums, own_counts = self._by_name()
        of_ranks = all_gather_object({name: v.shape for name, v in own_sums.items()})
        shapes = {name: shape for of_rank in of_ranks for name, shape in of_rank.items()}
        if not shapes:
            return {}
        device = next((value.device for value in own_sums.values()), None)
        sums = [own_sums.get(n, torch.zeros(s, device=device)) for n, s in shapes.items()]
        counts = [own_counts.get(n, torch.zeros((), device=device)) for n in shapes]
        # one reduction for all
        flat = torch.cat([value.double().reshape(-1) for value in (*sums, *counts)])
        all_reduce(flat)
        *totals, seen = flat.split([*(value.numel() for value in sums), len(counts)])
        return {
            name: total.view(shape) / count.clamp(min=1)
            for (name, shape), total, count in zip(shapes.items(), totals, seen, strict=True)
        }

    def summary(self) -> dict[str, float]:
        """The averages as numbers: `<layer>/load_max` and so on, see `moe.collect.summarize`."""
        return summarize(self.means())


def lines_of(means: dict[str, torch.Tensor]) -> list[str]:
    """One line per layer: `blocks.1.mlp load 0.083..0.172 perplexity 7.71 unused 0/8`."""
    by_layer: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in means.items():
        layer, _, kind = name.rpartition('/')
        by_layer.setdefault(layer, {})[kind] = value
    return [f'{layer}  {describe(stats)}' for layer, stats in by_layer.items()]


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
        self.routing_statistics.add(batch)
        if self.training:  # type: ignore[attr-defined]
            self.logged_statistics.add(batch)
            if self.recorded_statistics is not None:
                self.recorded_statistics.add(batch)

    def _tell_of_state(self) -> None:
        """Says once that nobody moves the state; a loop of one's own, without a runner, may."""
        if MessageHub.get_current_instance().get_info('loop_stage') != 'train':
            return
        self.state_is_moved = True
        if any(layer.moves_state() for layer in moe_layers(self.routed_model).values()):
            print_log(_UNMOVED, 'current', logging.WARNING)
