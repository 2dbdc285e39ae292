"""`benchmark.py model`: whole networks, inference and training steps."""

import ast
import copy
import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from statistics import median
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from vqmoe_vision.models import Complexity, complexity
from vqmoe_vision.models.layers import Transformer
from vqmoe_vision.moe import collect_losses
from vqmoe_vision.moe.collect import moe_layers
from vqmoe_vision.moe.config import check

from .cells import DTYPES, Settings
from .contenders import autocast, needs
from .oracle import WrongResultError
from .ours import with_loops
from .report import network_table
from .timing import Clock, interleave, ratio

MODES = ('inference', 'training')
NUM_BATCHES = 4  # different images, cycled
NUM_CLASSES = 1000
MOST_CHECKED = 8  # images


@dataclass(frozen=True, kw_only=True)
class Comparison:
    models: tuple[str, ...]
    baseline: str = 'vit_small_patch16_224'
    batch: int = 8
    img_size: int = 224
    dtype: str = 'float32'
    amp: bool = False
    modes: tuple[str, ...] = MODES

    def __post_init__(self) -> None:
        check(self.batch >= 1, 'batch', self.batch, 'at least 1')
        check(self.dtype in DTYPES, 'dtype', self.dtype, f'one of {sorted(DTYPES)}')
        low = self.dtype in ('bfloat16', 'float16')
        check(low or not self.amp, 'amp', self.amp, 'autocast needs bfloat16 or float16')

    def __str__(self) -> str:
        amp = ' amp' if self.amp else ''
        return f'batch {self.batch}, {self.img_size} pixels, {self.dtype}{amp}'


def parse_model(spec: str) -> tuple[str, dict[str, Any]]:
    """Split 'name,key=value,...' into a timm name and keyword arguments."""
    name, *options = spec.split(',')
    check(timm.is_model(name), 'models', name, 'a timm model, perhaps one of this package')
    keywords: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition('=')
        check(bool(key and equals and value), 'models', spec, 'options are key=value after a comma')
        try:
            keywords[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            keywords[key] = value
    return name, keywords


class Network:
    """A model, its optimizer, and the images it sees."""

    def __init__(self, spec: str, comparison: Comparison, settings: Settings) -> None:
        name, options = parse_model(spec)
        torch.manual_seed(0)
        dtype = torch.float32 if comparison.amp else DTYPES[comparison.dtype]
        sizes = {'img_size': comparison.img_size, 'num_classes': NUM_CLASSES}
        model = timm.create_model(name, **{**sizes, **options}).to(settings.device, dtype)
        self.model = cast('Transformer', model)
        self.call: Callable[[Tensor], Tensor] = self.model
        self.name = spec
        # fused: four times as many parameters would otherwise be most of what is compared
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.comparison, self.settings = comparison, settings
        shape = (comparison.batch, 3, comparison.img_size, comparison.img_size)
        self.images = [
            # drawn on the CPU: the same on any device
            torch.randn(shape).to(settings.device, dtype)
            for _ in range(NUM_BATCHES)
        ]
        self.labels = torch.randint(NUM_CLASSES, (comparison.batch,)).to(settings.device)

    @cached_property
    def size(self) -> Complexity:
        """Parameters and work of the model; refuses one whose work cannot be counted."""
        return complexity(self.model)

    def compiled(self) -> 'Network':
        """The same weights through torch.compile: a card may not have room for two sets."""
        twin = copy.copy(self)
        twin.call = torch.compile(self.model, fullgraph=True)
        twin.name = f'{self.name}+compiled'
        return twin

    def autocast(self) -> AbstractContextManager:
        return autocast(self.comparison, self.settings)

    def infer(self, index: int) -> None:
        """A forward pass in eval mode without gradients."""
        with torch.no_grad(), self.autocast():
            self.call(self.images[index % NUM_BATCHES])

    def forward(self, index: int) -> Tensor:
        """A training step's forward pass: loss and auxiliary losses."""
        # what learns without gradients changes as the block is left, before backward: allowed
        # without gradient checkpointing, and the cost is the same
        with collect_losses(self.model) as collected:
            with self.autocast():
                logits = self.call(self.images[index % NUM_BATCHES])
            return F.cross_entropy(logits.float(), self.labels) + collected.total()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def train_step(self, index: int) -> None:
        self.forward(index).backward()
        self.update()


def run_networks(comparisons: Sequence[Comparison], settings: Settings) -> list[dict[str, Any]]:
    rows = []
    for comparison in comparisons:
        measured = measure_networks(comparison, settings)
        print(network_table(str(comparison), measured), flush=True)
        rows += measured
    return rows


def measure_networks(comparison: Comparison, settings: Settings) -> list[dict[str, Any]]:
    specs = dict.fromkeys([comparison.baseline, *comparison.models])
    gc.collect()  # the networks of earlier comparisons, or a large one finds no room on a card
    if settings.compiled:
        torch._dynamo.reset()  # or the graphs of earlier comparisons count against its limit
    networks = [Network(spec, comparison, settings) for spec in specs]
    for network in networks:
        _ = network.size  # before all is measured
        check_against_loops(network)
    if settings.compiled:
        networks += [network.compiled() for network in networks]
    rows = []
    for mode in comparison.modes:
        for network in networks:
            network.model.train(mode == 'training')
        rows += _measure_mode(mode, networks, comparison, settings)
    return rows


def check_against_loops(network: Network) -> None:
    """Compare logits and gradients of a network with those of plain loops, in float32."""
    # whatever is timed: rounded tokens of a deep layer go to other experts, as some of many do here
    found = copy.deepcopy(network.model).float().eval()
    plain = copy.deepcopy(found)
    for name, layer in moe_layers(plain).items():
        plain.set_submodule(name, with_loops(layer))
    images = network.images[0][:MOST_CHECKED].float()
    results = []
    for model in (found, plain):
        model(images).square().mean().backward()
        results.append(
            {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            | {'logits': model(images).detach()}
        )
    names = {name.replace('.experts.experts.', '.experts.'): name for name in results[1]}
    for name, value in results[0].items():
        exact = results[1][names[name]]
        # sums of thousands of float32 products in another order, through all blocks
        if not (value - exact).abs().max() <= 1e-3 * exact.abs().max() + 1e-6:
            raise WrongResultError(f'{network.name}: {name} differs from the plain loop; not timed')


def _measure_mode(
    mode: str, networks: Sequence[Network], comparison: Comparison, settings: Settings
) -> list[dict[str, Any]]:
    clock = Clock(settings.clock, settings.device)
    needed = {}
    for network in networks:  # alone, and compiled before anything is timed
        step = network.train_step if mode == 'training' else network.infer
        step(0)
        needed[network.name] = needs(partial(step, 1), settings)
    steps = {network.name: partial(_time, network, mode, clock) for network in networks}
    times = interleave(steps, settings.repeats)
    baseline = times[comparison.baseline]['step']
    return [
        _row(network, mode, times[network.name], baseline, needed[network.name])
        for network in networks
    ]


def _time(network: Network, mode: str, clock: Clock, index: int) -> dict[str, float]:
    losses: list[Tensor] = []
    clock.prepare()
    if mode == 'inference':
        return {'step': clock.time(lambda: network.infer(index))}
    parts = {
        'forward': clock.time(lambda: losses.append(network.forward(index))),
        'backward': clock.time(lambda: losses[0].backward()),
        'optimizer': clock.time(network.update),
    }
    return {**parts, 'step': sum(parts.values())}


def _row(
    network: Network,
    mode: str,
    times: dict[str, list[float]],
    baseline: list[float],
    needed: dict[str, float],
) -> dict[str, Any]:
    comparison = network.comparison
    model, size = network.model, network.size
    embed: Any = model.patch_embed
    tokens = embed.num_patches + model.num_prefix_tokens
    own = times['step']
    return {
        'contender': network.name,
        'batch': comparison.batch,
        'tokens': tokens,
        'dtype': comparison.dtype,
        'amp': comparison.amp,
        'mode': mode,
        'baseline': comparison.baseline,
        'median_ms': median(own),
        'min_ms': min(own),
        'times_ms': times,
        'parts_ms': {part: median(values) for part, values in times.items() if part != 'step'},
        'images_per_s': comparison.batch / median(own) * 1e3,
        'to_baseline': ratio(own, baseline),
        **needed,
        'params': size.params,
        'active_params': size.active_params,
        'macs': size.macs,
    }
