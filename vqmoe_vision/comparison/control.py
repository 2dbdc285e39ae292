"""A control with a known answer: which router finds which structure, where there is one to find.

Tokens are x = s a_k + z: a direction a_k for each cluster k, times the separation s, and nuisance z
of unit deviation at right angles to all of them. The label of a token is the argmax of M_k z', z'
being 16 channels of z. Each cluster has another matrix, and their mean is taken out, so that no
function that all clusters share serves.

Legend: B images, N tokens per image, D width, E experts, C clusters, L labels.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, count
from typing import Any, NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from timm.layers import Mlp
from timm.models.vision_transformer import init_weights_vit_timm
from torch import Tensor, nn

from vqmoe_vision.analysis.drawing import WIDTH as INCHES
from vqmoe_vision.analysis.drawing import styled
from vqmoe_vision.analysis.measures import mutual_information
from vqmoe_vision.analysis.record import evaluating, record_layers
from vqmoe_vision.engine.options import parse_options
from vqmoe_vision.moe import METHODS, collect_losses, moe_layers, start_training
from vqmoe_vision.moe.config import MoeConfig, check, did_you_mean
from vqmoe_vision.moe.experts import Experts
from vqmoe_vision.moe.host import Host, RawPatches
from vqmoe_vision.moe.image_reader import Features, ImageReader
from vqmoe_vision.moe.layer import MoeLayer, RoutedMlp
from vqmoe_vision.moe.routing import Router, Routing

from .curves import colour_of, marker_of
from .statistics import mean_and_deviation

WIDTH, INFORMATIVE = 64, 16  # channels of a token, and of the nuisance those that labels go by
PIXELS, GRID = 4, 4  # a token is a patch of 4 x 4 pixels and 4 channels, an image has 4 x 4 of them
IMAGES, TOKENS = 64, GRID**2  # of a batch, of an image
EXPERTS, HIDDEN = 8, 32
STEPS, LEARNING_RATE, TESTED = 400, 2e-3, 16  # the last is in batches
SEPARATIONS, SEEDS = (0.5, 1.0, 1.5, 2.0, 3.0), (1, 2, 3)
QUICK_SEPARATIONS, QUICK_SEEDS = (1.0, 3.0), (1,)
_MATCHED = {'preset': 'matched'}
_LINES = ('-', '--', ':', '-.', (0, (6, 2, 1, 2, 1, 2)), (0, (1, 4)))


@dataclass(frozen=True)
class Structure:
    """What there is to find in tokens."""

    separation: float = 3.0  # s, over the deviation of the nuisance
    clusters: int = 8
    imbalance: float = 1.0  # size of the largest cluster over that of the smallest
    correlation: float = 0.0  # cosine of the directions of two clusters
    alike: float = 0.0  # chance that a token is of the cluster of its image, not of one of its own
    nuisance: float = 1.0  # deviation of z in a channel
    labels: int = 4


class Batch(NamedTuple):
    """Tokens (B, N, D), and the cluster and label of each, (B, N) int64."""

    tokens: Tensor
    clusters: Tensor
    labels: Tensor


class Source:
    """Draws batches, the same at a seed for all rows, whatever these draw.

    Args:
        structure: Of the tokens.
        seed: Of everything.

    Attributes:
        directions: a_k, (C, D), of length one.
        others: Directions of the nuisance, (D - C, D), orthonormal.
        matrices: M_k, (C, L, 16).
    """

    def __init__(self, structure: Structure, seed: int) -> None:
        self.structure, clusters = structure, structure.clusters
        self.generator = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(self._normal(WIDTH, WIDTH))[0].t()
        cosines = torch.full((clusters, clusters), structure.correlation).fill_diagonal_(1)
        self.directions = torch.linalg.cholesky(cosines) @ basis[:clusters]
        self.others = basis[clusters:]
        matrices = self._normal(clusters, structure.labels, INFORMATIVE)
        self.matrices = matrices - matrices.mean(dim=0)
        self.sizes = structure.imbalance ** -torch.linspace(0, 1, clusters)

    def draw(self) -> Batch:
        """The next batch."""
        structure = self.structure
        of_token, of_image = self._clusters(TOKENS), self._clusters(1)
        alike = torch.rand(of_token.shape, generator=self.generator) < structure.alike
        clusters = torch.where(alike, of_image, of_token)
        nuisance = structure.nuisance * self._normal(IMAGES, TOKENS, len(self.others))
        tokens = structure.separation * self.directions[clusters] + nuisance @ self.others
        # what each cluster would answer, (B, N, C, L): cheaper than a matrix for each token
        answers = torch.einsum('bni,kli->bnkl', nuisance[..., :INFORMATIVE], self.matrices)
        labels = answers.argmax(dim=-1).gather(2, clusters[..., None]).squeeze(2)
        return Batch(tokens, clusters, labels)

    def _clusters(self, number: int) -> Tensor:
        drawn = self.sizes.multinomial(IMAGES * number, True, generator=self.generator)
        return drawn.view(IMAGES, number)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)


@dataclass(frozen=True)
class Row:
    """One layer that is trained and scored."""

    name: str
    title: str
    kind: str = 'control'  # or 'usual', as rows of comparisons have a method, or another 'form'
    method: str = ''  # key of METHODS
    options: Mapping[str, Any] = field(default_factory=dict)
    form: str = ''  # what it is called if it is no control

    @property
    def config(self) -> MoeConfig:
        """Options of its method in full."""
        kind = METHODS[self.method].config
        unknown = sorted(self.options.keys() - kind.option_names())
        check(not unknown, '--methods', self.name, f'{self.method} has no options {unknown}')
        return kind.from_options(**self.options)


@dataclass(frozen=True)
class Score:
    """What a row is worth at one separation and seed."""

    row: str
    separation: float
    seed: int
    accuracy: float  # in percent, on tokens that it has not seen
    information: float | None  # the largest of the deciders; None where nothing chooses for a token
    deciders: dict[str, float]  # mutual information of first expert and cluster, nats, by who chose


def all_rows() -> dict[str, Row]:
    """By name: every method in its usual form, its discrete one and its presets; and controls.

    A form that learns nothing of where tokens go is a control, 'position' if it goes by that.
    """
    found, controls = {'oracle': Row('oracle', _LAYERS['oracle'][0])}, {}
    for row in chain.from_iterable(map(_forms, METHODS)):
        if row.config.learns_routing:
            found[row.name] = row
            continue
        name, title = 'frozen', 'router frozen at random'
        if not _layer(row).permutation_equivariant:
            name, title = 'position', 'experts by position'
        if name not in controls:
            row = replace(row, name=name, title=title, kind='control')
        controls[row.name] = row
    return found | controls | {name: Row(name, title) for name, (title, _) in _LAYERS.items()}


def find_rows(names: Sequence[str]) -> list[Row]:
    """Rows by what a user calls them; all of them if there is no name.

    Args:
        names: Of rows, or of the forms behind them; options may follow, as in 'NAME top_k=1'.

    Raises:
        ValueError: There is no such row or option, or its value is impossible.
    """
    rows, found = all_rows(), dict[str, Row]()
    known = {row.form: row for row in rows.values() if row.form} | rows
    for text in names:
        name, *words = text.split() or ['']
        allowed = f'one of {", ".join(rows)}{did_you_mean(name, known)}'
        check(name in known, '--methods', name, allowed)
        row = known[name]
        if words:
            check(bool(row.method), '--methods', text, f'{name} has no options')
            row = replace(row, name=text, title=text, kind='form')
            row = replace(row, options={**row.options, **parse_options(words)})
            _layer(row)  # refuses what is impossible
        found[row.name] = row
    return list((found or rows).values())


def _forms(method: str) -> Iterator[Row]:
    presets = METHODS[method].config.PRESETS
    # modules of methods begin with the name and a colon
    title = (sys.modules[METHODS[method].build.__module__].__doc__ or method).partition(':')[0]
    usual = Row(method, title, 'usual', method, _MATCHED if 'matched' in presets else {}, method)
    discrete = {**usual.options, **_discrete(usual)}
    seen = [usual.config]
    yield usual
    for form, options in {'discrete': discrete, **{n: {'preset': n} for n in presets}}.items():
        name, kind = f'{method}_{form}', 'usual' if form == 'discrete' else 'form'
        row = Row(name, f'{title}, {form}', kind, method, options, name)
        if row.config not in seen:
            seen.append(row.config)
            yield row


def _discrete(row: Row) -> dict[str, Any]:
    """Options of the discrete form, as the layer says them; {} if it has none."""
    try:
        return _layer(row).to_discrete()
    except ValueError:
        return {}


def _layer(row: Row) -> MoeLayer:
    layer = Bed(row).layer
    assert isinstance(layer, MoeLayer)
    return layer


class Bed(nn.Module):
    """A layer where a transformer has it: between two norms, with a residual connection; a head.

    Args:
        row: Of which the layer is.
        labels: L.
    """

    def __init__(self, row: Row, labels: int = Structure.labels) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.head, self.raw_patches = nn.Linear(WIDTH, labels), RawPatches()
        self.reader: ImageReader | None = None
        if not row.method:
            self.layer = _LAYERS[row.name][1](self.raw_patches)
            return
        method, config = METHODS[row.method], row.config
        read: Any = method.reader(config, lambda: Features(_MeanToken(), WIDTH))
        self.raw_patches = RawPatches(read)
        self.reader = read if isinstance(read, ImageReader) else None
        ratio = HIDDEN / WIDTH if config.expert_mlp_ratio is None else config.expert_mlp_ratio
        experts = Experts(config.num_experts, WIDTH, int(ratio * WIDTH))
        host = Host(TOKENS, in_chans=WIDTH // PIXELS**2, raw_patches=self.raw_patches)
        self.layer = method.build(WIDTH, config, experts, host)

    def forward(self, batch: Batch) -> Tensor:
        """Scores of the labels, (B, N, L)."""
        if self.raw_patches.read is not None:
            self.raw_patches.show(as_images(batch.tokens), (GRID, GRID))
        else:  # where nobody but the oracle looks
            self.raw_patches.value = batch.clusters
        return self.head(self.norm2(batch.tokens + self.layer(self.norm1(batch.tokens))))


def as_images(tokens: Tensor) -> Tensor:
    """Images (B, channels, height, width) whose patches are the tokens (B, N, D)."""
    return F.fold(tokens.transpose(1, 2), GRID * PIXELS, PIXELS, stride=PIXELS)


class _MeanToken(nn.Module):
    """The frozen network of methods that need one: the mean of an image's tokens."""

    image_size = sizes = (GRID * PIXELS, GRID * PIXELS)

    def forward(self, images: Tensor) -> Tensor:
        return F.unfold(images, PIXELS, stride=PIXELS).mean(dim=2)


class _Told(Router):
    """Sends a token to the expert of its cluster, or to one that is drawn anew."""

    has_losses = False
    experts_per_token = 1

    def __init__(self, clusters: RawPatches, anew: bool) -> None:
        super().__init__()
        self.clusters, self.anew = clusters, anew

    def forward(self, x: Tensor) -> Routing:
        experts = self.clusters.current().flatten() % EXPERTS
        if self.anew:
            experts = torch.randint_like(experts, EXPERTS)
        return Routing(experts[:, None], torch.ones(len(x), 1))


def _told(clusters: RawPatches, anew: bool = False) -> nn.Module:
    return RoutedMlp(_Told(clusters, anew), Experts(EXPERTS, WIDTH, HIDDEN))


def _dense(_: RawPatches, experts: int) -> nn.Module:
    return Mlp(WIDTH, experts * HIDDEN).apply(init_weights_vit_timm)  # as experts start


# layers of no method: title, and what builds them
_LAYERS: dict[str, tuple[str, Callable[[RawPatches], nn.Module]]] = {
    'oracle': ('oracle: experts by cluster', _told),
    'random': ('experts drawn anew', partial(_told, anew=True)),
    'dense_2x': ('dense, compute of two', partial(_dense, experts=2)),
    'dense_1x': ('dense, compute of one', partial(_dense, experts=1)),
}


def score(row: Row, structure: Structure, seed: int, steps: int = STEPS) -> Score:
    """Trains a row as a user's own loop would, and tests it on tokens that it has not seen.

    Args:
        row: The row.
        structure: Of the tokens.
        seed: Of everything that is drawn; generators of the caller stay as they are.
        steps: Batches of training.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        source, model = Source(structure, seed), Bed(row, structure.labels)
        if model.reader is not None:
            seen = Source(structure, seed)  # what it is trained on
            images = torch.cat([as_images(seen.draw().tokens) for _ in range(TESTED)])
            model.reader.fit(model.reader.features(images))
        _train(model, source, steps)
        accuracy, deciders = _test(model, source)
    most = max(deciders.values(), default=None)
    return Score(row.name, structure.separation, seed, 100 * accuracy, most, deciders)


def _train(model: Bed, source: Source, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    start_training(model, steps)
    for _ in range(steps):
        batch = source.draw()
        optimizer.zero_grad()
        with collect_losses(model) as collected:
            loss = F.cross_entropy(model(batch).flatten(0, 1), batch.labels.flatten())
            (loss + collected.total()).backward()
        optimizer.step()
        schedule.step()


def _test(model: Bed, source: Source) -> tuple[float, dict[str, float]]:
    """Share of right labels, and what each decider tells of the cluster."""
    right, counts = 0.0, dict[str, Tensor]()
    for _ in range(TESTED):
        batch = source.draw()
        recording: Any = record_layers(model) if moe_layers(model) else nullcontext({})
        with evaluating(model), recording as records:
            right += (model(batch).argmax(dim=-1) == batch.labels).float().mean().item()
        for record in records.values():
            for name, experts in record.experts.items():
                # -1, of no expert, is the last row, which does not count
                size = record.num_experts + 1, source.structure.clusters
                met = counts.setdefault(name, torch.zeros(size))
                met.index_put_((experts[..., 0], batch.clusters), torch.ones(()), accumulate=True)
    return right / TESTED, {name: mutual_information(met[:-1]) for name, met in counts.items()}


def table_of(scores: Sequence[Score]) -> str:
    """In Markdown: accuracy in percent by separation, with its deviation over seeds, and nats."""
    separations = sorted({score.separation for score in scores})
    lines = []
    for row in dict.fromkeys(score.row for score in scores):
        at = {s: [x for x in scores if (x.row, x.separation) == (row, s)] for s in separations}
        deciders = list(at[separations[0]][0].deciders)
        line = {'row': f'{row} ({" / ".join(deciders)})' if len(deciders) > 1 else row}
        for s, own in at.items():
            mean, deviation = mean_and_deviation([x.accuracy for x in own])
            line[f's = {s:g}'] = f'{mean:.1f}' + (f' ± {deviation:.1f}' if len(own) > 1 else '')
        for s, own in at.items():
            means = [mean_and_deviation([x.deciders[name] for x in own])[0] for name in deciders]
            line[f'nats, s = {s:g}'] = ' / '.join(f'{mean:.2f}' for mean in means)
        lines.append(line)
    return pd.DataFrame(lines).to_markdown(index=False, disable_numparse=True)


@styled
def plot_control(rows: Sequence[Row], scores: Sequence[Score]) -> Figure:
    """Draws accuracy and information over separation, means over seeds.

    Args:
        rows: Forms that are not the usual ones are grey, unless there is nothing else.
        scores: Of these rows.
    """
    figure = Figure(figsize=(INCHES, 12), layout='constrained')
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    usual, places = any(row.kind == 'usual' for row in rows), defaultdict[str, Any](count)
    for row in rows:
        place = next(places[row.kind])
        style = {'color': colour_of(place), 'marker': marker_of(place), 'label': row.title}
        if row.kind == 'control':
            style = {'color': 'black', 'linestyle': _LINES[place % 6], 'label': row.title}
        elif row.kind == 'form' and usual:
            style = {'color': '0.8', 'zorder': 1, 'label': '' if place else 'other forms'}
        for axes, value in ((upper, 'accuracy'), (lower, 'information')):
            points = defaultdict(list)
            for one in scores:
                if one.row == row.name and getattr(one, value) is not None:
                    points[one.separation].append(getattr(one, value))
            if points:
                means = {s: mean_and_deviation(points[s])[0] for s in sorted(points)}
                axes.plot(means.keys(), means.values(), **style)
    structure, line = Structure(), dict[str, Any](color='0.5', linewidth=1)
    upper.axhline(100 / structure.labels, label='chance', **line)
    lower.axhline(math.log(structure.clusters), **line)
    upper.set(title='right labels of new tokens, %', ylim=(None, 100))
    lower.set(title='what the choice tells of the cluster, nats (line: all there is)')
    lower.set_xlabel('separation of clusters, over the deviation of the nuisance')
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    figure.legend(loc='outside lower center', ncols=2, frameon=False)
    return figure
