"""A control with a known answer: which router finds which structure, where there is one to find.

Tokens are x = s a_k + z: a direction a_k for each cluster k, times the separation s, and nuisance z
of unit deviation at right angles to all of them. The label of a token is the argmax of M_k z', z'
being 16 channels of z. Each cluster has another matrix, and their mean is taken out, so that no
function that all clusters share serves. `GENERATORS` names other numbers, sizes and positions of
clusters. `scenes.py` has the same of images.

Legend: B images, N tokens per image, D width, C clusters, L labels.
"""

import math
from collections import ChainMap, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, count
from typing import Any, ClassVar

import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from timm.layers import Mlp
from timm.models.vision_transformer import init_weights_vit_timm
from torch import Tensor, nn

from vqmoe_vision.analysis.measures import mutual_information
from vqmoe_vision.analysis.pictures import styled
from vqmoe_vision.analysis.record import evaluating, record_layers
from vqmoe_vision.moe import METHODS, collect_losses, moe_layers, start_training
from vqmoe_vision.moe.config import MoeConfig
from vqmoe_vision.moe.experts import Experts
from vqmoe_vision.moe.layer import RoutedMlp
from vqmoe_vision.moe.methods import Method
from vqmoe_vision.moe.raw_patches import Host, ImageReader, RawPatches
from vqmoe_vision.moe.routing import Router, Routing

from .figures import colour_of, marker_of
from .spec import choose

WIDTH, INFORMATIVE = 64, 16  # channels of a token, and of the nuisance those that labels go by
CLUSTERS, LABELS = 8, 4
PIXELS, GRID = 4, 4  # a token is a patch of 4 x 4 pixels and 4 channels, an image has 4 x 4 of them
IMAGES, TOKENS = 64, GRID**2  # of a batch, of an image
HIDDEN = 32  # of an expert
STEPS, LEARNING_RATE, TESTED = 400, 2e-3, 16  # the last is in batches
SEPARATIONS, SEEDS = ((0.5, 1.0, 1.5, 2.0, 3.0), (1.0, 3.0)), ((1, 2, 3), (1,))  # and quick ones


@dataclass(frozen=True)
class Clusters:
    """Number, sizes and positions of the clusters of tokens.

    Args:
        number: C.
        size_ratio: Number of tokens of a cluster over that of the cluster before it.
        cosine: Cosine between the directions of any two clusters, in [0, 1).
        noise: Standard deviation of tokens along the directions of clusters; that of the nuisance
            is 1.
    """

    number: int = CLUSTERS
    size_ratio: float = 1.0
    cosine: float = 0.0
    noise: float = 0.0


GENERATORS = {
    'clusters_8': Clusters(),
    'clusters_16': Clusters(16),
    'clusters_5': Clusters(5),
    'cosine_0.5': Clusters(cosine=0.5),
    'sizes_0.75': Clusters(size_ratio=0.75),
    # drawn by `random.Random(83)` to judge defaults that were chosen on those above
    'drawn_1': Clusters(19, 0.7, 0.1, 0.2),
    'drawn_2': Clusters(5, 0.9, 0.1, 0.2),
    'drawn_3': Clusters(5, 0.7, 0.1, 0.2),
    'drawn_4': Clusters(10, 0.7, 0.5, 0.4),
    'drawn_5': Clusters(11, 0.7, 0.6, 0.0),
    'drawn_6': Clusters(4, 1.0, 0.6, 0.2),
}


class Source:
    """Draws batches of a structure, the same for all rows, whatever these draw.

    The separation s is over the deviation of the nuisance, the seed of everything that is drawn.
    """

    labels, layout = LABELS, Clusters()

    def __init__(self, separation: float, seed: int, layout: Clusters | None = None) -> None:
        self.separation, self.generator = separation, torch.Generator().manual_seed(seed)
        self.normal = partial(torch.randn, generator=self.generator)
        self.layout = layout or self.layout
        self.lay_out()

    def lay_out(self) -> None:
        """Draw what holds for all batches."""
        number, cosine = self.layout.number, self.layout.cosine
        basis = torch.linalg.qr(self.normal(WIDTH, WIDTH))[0].t()
        # (C, D), and (D - C, D) or, where all clusters share a direction, (D - C - 1, D)
        self.directions, self.others = basis[:number], basis[number + (cosine > 0) :]
        if cosine > 0:
            shared_direction = math.sqrt(cosine) * basis[number]
            self.directions = math.sqrt(1 - cosine) * self.directions + shared_direction
        self.sizes = self.layout.size_ratio ** torch.arange(number)  # (C,), up to a factor
        matrices = self.normal(number, LABELS, INFORMATIVE)
        self.matrices = matrices - matrices.mean(dim=0)

    def hold_out(self) -> None:
        """From now on draw what nobody was trained on, as each batch is by itself."""

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, N, D), and the cluster and the label of each, (B, N) int64."""
        draw = partial(self.sizes.multinomial, replacement=True, generator=self.generator)
        clusters = draw(IMAGES * TOKENS).view(IMAGES, TOKENS)
        # not used since all tokens of an image are of clusters of their own, but scores are of it
        draw(IMAGES), torch.rand(clusters.shape, generator=self.generator)
        nuisance = self.normal(IMAGES, TOKENS, len(self.others))
        tokens = self.separation * self.directions[clusters] + nuisance @ self.others
        if self.layout.noise > 0:
            noise = self.normal(IMAGES, TOKENS, len(self.directions))
            tokens = tokens + self.layout.noise * noise @ self.directions
        # what each cluster would answer, (B, N, C, L): cheaper than a matrix for each token
        answers = torch.einsum('bni,kli->bnkl', nuisance[..., :INFORMATIVE], self.matrices)
        return tokens, clusters, answers.argmax(dim=-1).gather(2, clusters[..., None]).squeeze(2)


@dataclass(frozen=True)
class Row:
    """One layer that is trained and scored."""

    name: str
    method: str  # key of METHODS, or of what else there is
    options: Mapping[str, Any] = field(default_factory=dict)
    kind: str = 'control'  # or 'usual', the form that rows of comparisons have, or another 'form'

    @property
    def config(self) -> MoeConfig:
        """Options of its method in full."""
        return _TABLE[self.method].config.from_options(**self.options)


def all_rows() -> dict[str, Row]:
    """By name: every method in its usual form, its discrete one and its presets; and controls."""
    found, controls = {'oracle': Row('oracle', 'oracle')}, dict[str, Row]()
    for row in chain.from_iterable(map(_forms, METHODS)):
        if row.config.learns_routing:
            found[row.name] = row
            continue
        name = 'frozen' if Bed(row).layer.permutation_equivariant else 'position'
        first = name not in controls
        row = replace(row, name=name if first else row.name, kind='control' if first else 'form')
        controls[row.name] = row
    return found | controls | {name: Row(name, name) for name in _CONTROLS}


def find_rows(names: Sequence[str]) -> list[Row]:
    """Rows by their names; all of them if there is no name."""
    rows = all_rows()
    return [rows[name] for name in choose('--methods', names or None, rows)]


def _forms(method: str) -> Iterator[Row]:
    presets = METHODS[method].config.PRESETS
    usual = {'preset': 'matched'} if 'matched' in presets else {}
    first = Row(method, method, usual, 'usual')
    forms = {name: {'preset': name} for name in presets}
    with suppress(ValueError):  # of a layer without such a form
        forms = {'discrete': {**usual, **Bed(first).layer.to_discrete()}} | forms
    seen = [first.config]
    yield first
    for form, options in forms.items():
        row = Row(f'{method}_{form}', method, options, 'usual' if form == 'discrete' else 'form')
        if row.config not in seen:
            seen.append(row.config)
            yield row


class Bed(nn.Module):
    """A layer where a transformer has it: between two norms, with a residual connection; a head."""

    width, hidden, pixels = WIDTH, HIDDEN, PIXELS
    options: ClassVar[Mapping[str, Any]] = {}  # of every method

    def __init__(self, row: Row) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, LABELS)
        self.layer = next(self.layers(row))

    def layers(self, row: Row) -> Iterator[Any]:
        """As many as are asked for, and first what reads images for them."""
        method = _TABLE[row.method]
        config = method.config.from_options(**{**self.options, **row.options})
        self.reader: Any = method.reader(config, partial(_MeanToken, self.pixels))
        self.raw_patches = RawPatches(self.reader)
        host = Host(TOKENS, in_chans=WIDTH // self.pixels**2, raw_patches=self.raw_patches)
        # as if a dense MLP had the ratio that timm's have
        hidden, recompute = int(self.hidden * (config.expert_mlp_ratio or 4) / 4), config.recompute
        while True:
            experts = Experts(config.num_experts, self.width, hidden, recompute=recompute)
            yield method.build(self.width, config, experts, host)

    def look(self, tokens: Tensor, clusters: Tensor) -> None:
        """Show the layers what some decide by; clusters (B, N) are for the oracle alone."""
        if self.reader is None:
            self.raw_patches.value = clusters
        else:
            self.raw_patches.show(as_images(tokens, self.pixels), (GRID, GRID))

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Scores (B, N, L) of tokens (B, N, D) and their clusters (B, N)."""
        self.look(*batch)
        tokens = batch[0]
        return self.head(self.norm2(tokens + self.layer(self.norm1(tokens))))


def as_images(tokens: Tensor, pixels: int = PIXELS) -> Tensor:
    """Images (B, channels, height, width) whose patches are the tokens (B, N, D)."""
    return F.fold(tokens.transpose(1, 2), GRID * pixels, pixels, stride=pixels)


class _MeanToken(nn.Module):
    """The frozen network of methods that need one: an image's tokens, and their mean."""

    num_features, num_prefix_tokens, grid_size = WIDTH, 0, (GRID, GRID)

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.pixels, self.image_size = pixels, (GRID * pixels, GRID * pixels)
        self.sizes = self.image_size

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_features(images).mean(dim=1)

    def forward_features(self, images: Tensor) -> Tensor:
        return F.unfold(images, self.pixels, stride=self.pixels).transpose(1, 2)


class _Told(Router):
    """Sends a token to the expert of its cluster, or to one that is drawn anew."""

    has_losses = False
    experts_per_token = 1

    def __init__(self, clusters: RawPatches, num_experts: int, anew: bool) -> None:
        super().__init__()
        self.clusters, self.num_experts, self.anew = clusters, num_experts, anew

    def forward(self, x: Tensor) -> Routing:
        experts = self.clusters.current().flatten() % self.num_experts
        if self.anew:
            experts = torch.randint_like(experts, self.num_experts)
        return Routing(experts[:, None], torch.ones(len(x), 1))


def _told(dim: int, config: Any, experts: Experts, host: Host, anew: bool = False) -> RoutedMlp:
    return RoutedMlp(_Told(host.raw_patches, config.num_experts, anew), experts)


def _dense(times: int, dim: int, config: Any, experts: Experts, host: Host) -> Any:
    # starts as experts do
    return Mlp(dim, times * experts.fc1.out_features).apply(init_weights_vit_timm)


_CONTROLS = {
    'oracle': Method(MoeConfig, _told),
    'random': Method(MoeConfig, partial(_told, anew=True)),
    'dense_2x': Method(MoeConfig, partial(_dense, 2)),
    'dense_1x': Method(MoeConfig, partial(_dense, 1)),
}
_TABLE = ChainMap(METHODS, _CONTROLS)


@dataclass(frozen=True)
class Structure:
    """What is planted, and how long a row is trained to find it; quick ones come last."""

    source: type[Source] = Source
    bed: type[Bed] = Bed
    separations: Sequence[Sequence[float]] = SEPARATIONS
    seeds: Sequence[Sequence[int]] = SEEDS
    steps: int = STEPS
    layout: Clusters | None = None  # None is that of the source


PLANTED = Structure()


def trained(
    row: Row, separation: float, seed: int, steps: int = 0, of: Structure = PLANTED
) -> tuple[Source, Bed]:
    """A row after training as a user's own loop would, and the source of what it has not seen."""
    torch.manual_seed(seed)
    source, model, steps = of.source(separation, seed, of.layout), of.bed(row), steps or of.steps
    if isinstance(model.reader, ImageReader):
        seen = of.source(separation, seed, of.layout)  # what it is trained on
        images = torch.cat([as_images(seen.draw()[0], model.pixels) for _ in range(TESTED)])
        model.reader.fit(model.reader.features(images))
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    start_training(model, steps)
    for _ in range(steps):
        tokens, clusters, labels = source.draw()
        optimizer.zero_grad()
        with collect_losses(model) as collected:
            loss = F.cross_entropy(model((tokens, clusters)).flatten(0, 1), labels.flatten())
            (loss + collected.total()).backward()
        optimizer.step()
        schedule.step()
    source.hold_out()
    return source, model


def score(
    row: Row, separation: float, seed: int, steps: int = 0, of: Structure = PLANTED
) -> dict[str, Any]:
    """Trains a row, and tests it on tokens that it has not seen.

    Accuracy is in percent. Deciders have the mutual information of first expert and cluster in
    nats, by who chose, and of several layers the largest; the information is the largest of all,
    None where nothing chooses for a token.
    """
    right, counts, deciders = 0.0, dict[tuple[str, str], Tensor](), dict[str, float]()
    with torch.random.fork_rng(devices=[]):
        source, model = trained(row, separation, seed, steps, of)
        for _ in range(TESTED):
            tokens, clusters, labels = source.draw()
            recording: Any = record_layers(model) if moe_layers(model) else nullcontext({})
            with evaluating(model), recording as records:
                right += (model((tokens, clusters)).argmax(-1) == labels).float().mean().item()
            for layer, record in records.items():
                for name, (experts, _) in record.chosen.items():
                    # -1, of no expert, is the last row, which does not count
                    met = torch.zeros(record.num_experts + 1, source.layout.number)
                    met = counts.setdefault((layer, name), met)
                    met.index_put_((experts[..., 0], clusters), torch.ones(()), True)
    for (_, name), met in counts.items():
        deciders[name] = max(deciders.get(name, 0.0), mutual_information(met[:-1]))
    return {
        'row': row.name,
        'separation': separation,
        'seed': seed,
        'accuracy': 100 * right / TESTED,
        'information': max(deciders.values(), default=None),
        'deciders': deciders,
    }


def table_of(scores: Sequence[Mapping[str, Any]]) -> str:
    """In Markdown: accuracy in percent by separation, with its deviation over seeds, and nats.

    Several generators have a line each.
    """
    lines = []
    frame = pd.DataFrame(scores)
    has_several = 'generator' in frame and frame.generator.nunique() > 1
    columns = ['generator', 'row'] if has_several else ['row']
    for names, of_row in frame.groupby(columns, sort=False):
        deciders = ' / '.join(of_row.deciders.iloc[0])
        accuracy = dict(zip(columns, names, strict=True))
        if ' / ' in deciders:
            accuracy['row'] += f' ({deciders})'
        nats: dict[str, str] = {}
        for s, at in of_row.groupby('separation'):
            deviation = f' ± {at.accuracy.std():.1f}' if len(at) > 1 else ''
            accuracy[f's = {s:g}'] = f'{at.accuracy.mean():.1f}{deviation}'
            means = pd.DataFrame([*at.deciders]).mean()
            nats[f'nats, s = {s:g}'] = ' / '.join(f'{mean:.2f}' for mean in means)
        lines.append(accuracy | nats)
    return pd.DataFrame(lines).to_markdown(index=False, disable_numparse=True)


@styled
def plot_control(scores: Sequence[Mapping[str, Any]], of: Structure = PLANTED) -> Figure:
    """Draw accuracy and information over separation, means over seeds and generators.

    A row that is no usual form is grey.
    """
    frame = pd.DataFrame(scores).astype({'information': float})
    means = frame.groupby(['row', 'separation'])[['accuracy', 'information']].mean()
    figure = Figure(figsize=(8.6, 12))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    rows, places = all_rows(), defaultdict[str, Any](count)
    lines = '-', '--', ':', '-.', (0, (6, 2, 1, 2, 1, 2)), (0, (1, 4))
    for name in dict.fromkeys(frame.row):
        place, style = next(places[kind := rows[name].kind]), dict[str, Any](label=name)
        if kind == 'control':
            style |= {'color': 'black', 'linestyle': lines[place % 6]}
        elif kind == 'form':
            style |= {'color': '0.8', 'label': '_', 'zorder': 1}
        else:  # the eighth colour is grey
            style |= {'color': colour_of(place + place // 7), 'marker': marker_of(place)}
        for axes, number in ((upper, 'accuracy'), (lower, 'information')):
            axes.plot(means.loc[name].index, means.loc[name][number], **style)
    upper.axhline(100 / of.source.labels, label='chance', color='0.5', linewidth=1)
    num_clusters = (of.layout or of.source.layout).number
    lower.axhline(math.log(num_clusters), color='0.5', linewidth=1)
    upper.set(
        title='right labels of new tokens, % (grey: other forms)', ylim=(80 / of.source.labels, 100)
    )
    lower.set(
        title='what a choice tells of the cluster, nats (line: all there is)',
        xlabel='separation of clusters, over the deviation of the nuisance',
        xticks=frame.separation.unique(),
    )
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    shown = upper.get_legend_handles_labels()
    figure.legend(*shown, loc='outside lower center', ncols=2, frameon=False)
    return figure
