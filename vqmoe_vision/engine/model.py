"""What models of both tasks share: weights, losses, routing, and how images are normalised.

Normalisation follows the weights: a model keeps what it is fed with as a buffer, so that its
checkpoints say it to whoever loads them.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.dist import all_gather_object
from mmengine.logging import MessageHub, print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from mmengine.runner.checkpoint import load_state_dict
from timm.data import resolve_model_data_config
from torch import nn
from torch.utils.data import DataLoader

from vqmoe_vision.models.compat import (
    StateDict,
    compare,
    misfit_of,
    network_of_run,
    part_of,
    refuse_values,
)
from vqmoe_vision.models.create import share_start, without_weights
from vqmoe_vision.models.normalization import KEY, Normalization, of_buffer, stated_normalization
from vqmoe_vision.models.weights import check_one_source, describe, network_of, source_of
from vqmoe_vision.moe import Collected, collect_losses, restart
from vqmoe_vision.moe.collect import moe_layers, summarize
from vqmoe_vision.moe.config import check
from vqmoe_vision.moe.raw_patches import image_reader
from vqmoe_vision.moe.routing import widest

from .checkpoint import existing, log_notes, read_content, read_state, start_from

Layout = tuple[tuple[str, torch.Size], ...]  # names and shapes of statistics, in their order


class Batch:
    """The statistics of one batch as one tensor, so that to add them costs few operations."""

    def __init__(self, stats: dict[str, torch.Tensor]) -> None:
        self.layout: Layout = tuple((name, value.shape) for name, value in stats.items())
        parts = [v.detach().to(widest(v.device)).reshape(-1) for v in stats.values()]
        finite = torch.stack([part.sum() for part in parts]).isfinite()  # (S,), of each statistic
        self.finite = finite.to(parts[0].dtype)
        sound = zip(finite, parts, strict=True)
        self.values = torch.cat([torch.where(ok, part, 0.0) for ok, part in sound])  # (N,)


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
        """Sums in their shapes and 0-dim counts of this rank by name, on the CPU."""
        sums: Any = Counter()
        counts: Any = Counter()
        for layout, (values, finite) in self._totals.items():
            names, shapes = zip(*layout, strict=True)
            parts = values.cpu().split([shape.numel() for shape in shapes])
            sums.update(dict(zip(names, map(torch.Tensor.view, parts, shapes), strict=True)))
            counts.update(dict(zip(names, finite.cpu(), strict=True)))
        return {'sums': dict(sums), 'counts': dict(counts)}

    def load_state_dict(
        self, state: dict[str, dict[str, torch.Tensor]], device: torch.device
    ) -> None:
        """Goes on from what `state_dict` gave, on the device of what will be added."""
        self.reset()
        if sums := state['sums']:
            layout = tuple((name, value.shape) for name, value in sums.items())
            kind = device, widest(device)
            flat = torch.cat([value.reshape(-1) for value in sums.values()])
            counts = torch.stack([state['counts'][name] for name in sums])
            self._totals[layout] = flat.to(*kind), counts.to(*kind)

    def add(self, stats: dict[str, torch.Tensor] | Batch) -> None:
        """Takes the statistics of one batch, as `Collected.stats`, or joined for several."""
        batch = stats if isinstance(stats, Batch) else Batch(stats)
        sums, counts = self._totals.get(batch.layout, (0.0, 0.0))
        self._totals[batch.layout] = sums + batch.values, counts + batch.finite

    def means(self) -> dict[str, torch.Tensor]:
        """Averages over everything added, on all ranks, by name; empty without MoE layers.

        Every rank has to ask. Ranks may have seen different statistics, or none.
        """
        sums: Any = Counter()
        counts: Any = Counter()
        for of_rank in all_gather_object(self.state_dict()):
            sums.update(of_rank['sums'])
            counts.update(of_rank['counts'])
        return {name: value / counts[name].clamp(min=1) for name, value in sums.items()}

    def summary(self) -> dict[str, float]:
        """The averages as numbers: `<layer>/load_max` and so on, see `moe.collect.summarize`."""
        return summarize(self.means())


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

    A model has `normalize_inputs(datasets)`, which lets images of data sets, by field, be
    normalised as the weights want it; `test_preprocessing(dataset)`, how else a test prepares them,
    entries of timm's `pretrained_cfg`; `exportable(size)`, what leaves PyTorch of it; and
    `predictions`, the class that writes what it says of images.

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

    def check_batches(self, loader: DataLoader) -> None:
        """Refuses batches of training that the model cannot take."""

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
        kinds = {name.partition('.')[0] for name in own}, {*dict(model.named_children())}
        for part, kind in (('model', 'classifier'), ('backbone', 'segmentor')):
            if part in kinds[0] - kinds[1]:
                return f'it looks like the checkpoint of a {kind}'
        return misfit_of(model, self.in_own_names({KEY: self.normalization, **own}))

    def check_state_dict(self, state_dict: StateDict, path: str) -> None:
        """Refuse weights of other names, shapes or kinds of numbers, and those that are none."""
        model: Any = self
        if problem := self.misfit(state_dict):
            raise ValueError(f'checkpoint {path!r} does not fit the config: {problem}')
        weights = {name.removeprefix('module.'): value for name, value in state_dict.items()}
        refuse_values(model.state_dict(), self.in_own_names(weights), path)

    def in_own_names(self, state: StateDict) -> StateDict:
        """The state of a file of timm in the names of a run, whose own stays as it is."""
        if self.routed_model.state_dict().keys().isdisjoint(state):
            return state
        modules = self.named_modules()  # type: ignore[attr-defined]
        place = next(name for name, module in modules if module is self.routed_model)
        return {k if k == KEY else f'{place}.{k}': value for k, value in state.items()}

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
        training = self.training  # type: ignore[attr-defined]
        if (  # a loop of one's own, without a runner, may move it
            training
            and not self.state_is_moved
            and MessageHub.get_current_instance().get_info('loop_stage') == 'train'
        ):
            self.state_is_moved = True  # or it was said once that nobody does
            if any(layer.moves_state() for layer in moe_layers(self.routed_model).values()):
                print_log(_UNMOVED, 'current', logging.WARNING)
        with collect_losses(self.routed_model, update_state=False) as collected:
            yield collected
        if not collected.stats:
            return
        batch = Batch(collected.stats)
        self.routing_statistics.add(batch)
        if training:
            self.logged_statistics.add(batch)
            if self.recorded_statistics is not None:
                self.recorded_statistics.add(batch)


def weights_normalization(
    model: Any, checkpoint: str | None, arguments: dict[str, Any]
) -> Normalization | None:
    """How images were normalised for the weights that a training starts from; logs it."""
    checkpoint = checkpoint or arguments.get('checkpoint_path')
    source, overlay = 'pretrained_cfg_overlay', arguments.get('pretrained_cfg_overlay') or {}
    found = stated_normalization(overlay, f'{source}.')
    if has_weights(checkpoint, arguments):
        source = checkpoint or arguments.get('upcycle') or source_of(model.pretrained_cfg)
        if found is None:
            found = read_normalization(checkpoint) if checkpoint else _of_timms(model, arguments)
    elif found is None:
        return None
    told = 'how images were normalised for it is not known, they are as the config says'
    if found is not None:
        told = f'images are normalised with {in_words(found)}'
    print_log(f'{source}: {told}', logger='current')
    return found


def has_weights(checkpoint: str | None, arguments: dict[str, Any]) -> bool:
    """Whether a training starts from weights."""
    given = map(arguments.get, ('upcycle', 'pretrained', 'checkpoint_path'))
    return checkpoint is not None or any(given)


def _of_timms(model: Any, arguments: dict[str, Any]) -> Normalization | None:
    """Of weights that timm has loaded, whose configuration it keeps beside the model."""
    given, upcycle = arguments.get('pretrained_cfg'), arguments.get('upcycle')
    stated = given if isinstance(given, dict) and not upcycle else {}
    # what it leaves out timm fills with the numbers of ImageNet, of any weights
    if {'mean', 'std'} <= stated.keys():
        return Normalization.of(stated)
    if (report := getattr(model, 'weights_report', None)) is not None and report.normalization:
        return report.normalization
    # a model of this package without weights of its own has no configuration of any
    own = not (upcycle or stated) and model.pretrained_cfg.get('tag') != 'untrained'
    return Normalization.of(resolve_model_data_config(model)) if own else None


def read_normalization(path: str) -> Normalization | None:
    """How images were normalised in the run that has left a file, or its folder for timm."""
    config = describe(path).config
    if {'mean', 'std'} <= config.keys():
        return Normalization.of(config)
    content = None if path.endswith('.safetensors') else read_content(path, verify=False)
    state = content.get('state_dict') if isinstance(content, dict) else None
    return of_buffer(state.get(KEY)) if isinstance(state, dict) else None


def must_change(
    found: Normalization,
    weights: Normalization,
    stated: Iterable[str],
    field: str,
    white: float = 1.0,
    owner: str = 'the weights',
) -> bool:
    """Whether images have to be normalised otherwise than they are; what a config states stays."""
    differing = found.differing(weights)
    if set(stated) & set(differing):
        told = (
            f'{field} states {in_words(found, white)}, which count, and contradict {owner}, '
            f'whose images had {in_words(weights, white)}'
        )
        print_log(told, 'current', logging.WARNING)
        return False
    if differing:
        print_log(f'{field}: {in_words(weights, white)}, as {owner} had them', logger='current')
    return bool(differing)


def in_words(normalization: Normalization, white: float = 1.0) -> str:
    """Mean and standard deviation for a message."""
    numbers = normalization.mean, normalization.std
    return 'mean [{}] and std [{}]'.format(
        *(','.join(f'{value * white:.6g}' for value in values) for values in numbers)
    )


# Of a model where the timm model may be: of a segmentation, and of what augments a test.
_PARTS = ('backbone', 'module')


def scope_of(config: Config) -> AbstractContextManager:
    """A block in which names of a config mean what they mean in its runs."""
    return DefaultScope.overwrite_default_scope(config.get('default_scope', 'mmengine'))


def without_sources(model: dict[str, Any]) -> ConfigDict:
    """The model of a config whose weights are those of its run."""
    inner = {n: without_sources(model[n]) for n in _PARTS if isinstance(model.get(n), dict)}
    changed = {**model, **inner}
    if isinstance(changed.get('model_name'), str):  # or what builds it says what is wrong
        changed = without_weights(changed)
        changed |= {'features': None} if changed.get('features') else {}
    return ConfigDict(changed)


def check_model(config: Config) -> None:
    """Builds a config's model without memory for it: a mistake shows before anything is there."""
    # of a segmentor the backbone alone, which has the options
    model = config.model.get('module', config.model)
    with scope_of(config), torch.device('meta'):
        MODELS.build(without_sources(model.get('backbone', model)))


def load_trained(config: Config, checkpoint: str, device: str | None = None) -> Any:
    """Builds the model of a config with the weights of a checkpoint, ready to predict."""
    checkpoint = existing(checkpoint)
    with scope_of(config):
        model = MODELS.build(without_sources(config.model))
    state = read_state(checkpoint)
    if (known := read_normalization(checkpoint)) is not None:
        state.setdefault(KEY, known.values())  # a folder of timm has it beside its weights
    check_experts(model.routed_model, checkpoint)
    model.check_state_dict(state, checkpoint)
    load_state_dict(model, state, strict=True)
    return model.to(device or ('cuda' if torch.cuda.is_available() else 'cpu')).eval()


def start_model(
    model: Any, arguments: dict[str, Any], checkpoint: str | None, features: str | None
) -> Normalization | None:
    """Starts a new training: as every row does at this seed, or from weights."""
    check_one_source({**arguments, 'checkpoint': checkpoint})
    share_start(model, seed=torch.initial_seed(), **arguments)
    if (report := getattr(model, 'weights_report', None)) is not None:
        path = arguments.get('checkpoint_path') or source_of(model.pretrained_cfg)
        log_notes(report.lines(), path)
    if checkpoint is not None:
        start_from(model, checkpoint)
    for note in restart(model):
        print_log(note, logger='current')
    weights = weights_normalization(model, checkpoint, arguments)
    if (reader := image_reader(model)) is not None:
        return reader.before_start(features, has_weights(checkpoint, arguments), weights)
    check(features is None, 'features', features, 'None, the model decides by no such features')
    return weights


def check_experts(model: nn.Module, path: str, content: Any = None, resumes: bool = False) -> None:
    """Refuses weights of another method, and logs which options of the experts were others.

    A run that resumes goes on with the same options.
    """
    network = network_of(path) if content is None else describe(path).network(path)
    for line in compare(model, network or network_of_run(content), path):
        if resumes:
            raise ValueError(f'--resume {path}: {line}')
        print_log(f'{path}: {line}', 'current', logging.WARNING)
