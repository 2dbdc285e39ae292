"""What is counted of a layer while images pass, in memory that stays flat.

Legend: B images, N tokens per image, T tokens, D width, E experts, K experts per token, C classes
(of images channels), H, W height and width, M codes, P slots per expert, S sampled tokens.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vqmoe_vision.moe.config import check
from vqmoe_vision.moe.layer import MoeLayer
from vqmoe_vision.moe.routing import perplexities

from . import measures, verdicts
from .record import Grid, LayerRecord


class Patch(NamedTuple):
    """One patch that an expert took."""

    pixels: Tensor  # (3, h, w) in [0, 1]
    weight: float  # the combine weight of the expert for this patch
    image: int  # its index in the data set


@dataclass(frozen=True)
class Codes:
    """A codebook and some of the tokens around its codes."""

    codes: Tensor  # (M, D)
    usage: Tensor  # (M,), share of tokens per code, sums to 1
    tokens: Tensor  # (S, D), a sample of all tokens, as they are compared with the codes
    indices: Tensor  # (S,) int64, the codes of the sampled tokens


@dataclass(frozen=True)
class LayerSurvey:
    """What was seen of one MoE layer.

    A decider is what chooses experts in a layer, by its module name inside the layer: 'router',
    'quantizer.codebook'. SoftMoE has none, but slots.
    """

    num_experts: int  # E
    numbers: dict[str, float]  # measures by name, such as 'router/load_entropy'
    load: dict[str, Tensor]  # by decider, or 'slots': (E,), sums to 1
    # by decider: (E, C), how many tokens of a class an expert took as their first; {} if unlabelled
    expert_by_class: dict[str, Tensor]
    similarity: dict[str, Tensor]  # 'weights' and 'outputs': (E, E), cosine of the experts
    confident: dict[str, list[list[Patch]]]  # by decider and expert, the largest weights first
    codebook: Codes | None  # None where the layer has none

    @property
    def verdict(self) -> list[str]:
        """What is wrong with the layer, in words, or that it is healthy."""
        return verdicts.verdict(self.numbers)


IGNORED = 255  # the class of pixels that have none, as in mmsegmentation
COMPARED_TOKENS = 256  # on which the answers of all experts are compared
MOST_TOKENS = 2000  # S, of a layer
MOST_PATCHES = 8  # of an expert


class Seen(NamedTuple):
    """A batch, as all layers see it."""

    images: int  # B
    first_image: int  # its index in the data set
    classes: Tensor | None  # of every token, (B, N), -1 for none
    grid: Grid | None  # None where tokens have no known place
    patches: Tensor | None  # (B, rows, columns, 3, h, w) in [0, 1]
    again: Mapping[str, Tensor]  # first experts (B, N) by decider, of another pass over the same


class ExpertTally:
    """How one decider uses the experts, or the slots of SoftMoE: a token has a share of each."""

    def __init__(self, num_experts: int, num_classes: int) -> None:
        self.num_experts = num_experts
        self.assigned = torch.zeros(num_experts, dtype=torch.float64)
        self.by_class = torch.zeros(num_experts, num_classes, dtype=torch.float64)
        # of no expert, and of each
        self.first = torch.zeros(num_experts + 1, dtype=torch.float64)
        self.images = 0
        self.mixed: dict[str, float] = defaultdict(float)  # of slots, summed over images
        # of the surest patches, at most `MOST_PATCHES` of each expert: score, weight, image, pixels
        self._surest: list[Tensor] = []
        # first experts in two passes over some images, (B, N) each, and the number of all tokens
        self._twice: list[tuple[Tensor, Tensor]] = []
        self.tokens = 0

    def add(self, experts: Tensor, weights: Tensor, scores: Tensor, seen: Seen) -> None:
        """Take experts, their weights, and how sure each choice is, all (B, N, K)."""
        size = self.num_experts + 1  # index 0 is that of no expert
        first = F.one_hot(experts[..., 0] + 1, size)
        self.first += first.sum((0, 1))
        of_expert, weight = (
            torch.full(first.shape, nothing).scatter(-1, experts + 1, value)[..., 1:]
            for value, nothing in ((scores, -torch.inf), (weights, 0.0))
        )
        assigned = (experts.flatten() + 1).bincount(minlength=size)[1:]
        self._add(assigned, first[..., 1:], of_expert, weight, seen)

    def compare(self, first: Tensor, again: Tensor) -> None:
        """Take first experts (B, N) of two passes over a batch, of as many tokens as the first."""
        if not self._twice or self._twice[0][0].shape[1] == first.shape[1]:
            self._twice.append((first.short(), again.short()))

    def add_slots(self, dispatch: Tensor, combine: Tensor, seen: Seen) -> None:
        """Take a batch, both (B, N, E, P)."""
        shares = combine.sum(dim=-1)
        self._add(shares.sum((0, 1)), shares, shares, shares, seen)
        found = perplexities(dispatch, dim=1).flatten(1), perplexities(combine.flatten(2), dim=2)
        for name, of_images in zip(('mixed_tokens', 'mixed_slots'), found, strict=True):
            self.mixed[name] += of_images.mean(dim=1).sum().item()

    def _add(
        self, assigned: Tensor, first: Tensor, scores: Tensor, weights: Tensor, seen: Seen
    ) -> None:
        self.assigned += assigned
        self.images, self.tokens = self.images + seen.images, self.tokens + first[..., 0].numel()
        if seen.classes is not None:
            classes = F.one_hot(seen.classes + 1, self.by_class.shape[1] + 1)[..., 1:]
            self.by_class += torch.einsum('bne,bnc->ec', first.double(), classes.double())
        if seen.grid is None or seen.patches is None:
            return
        scores, weights = (
            seen.grid.of(value).flatten(0, 2).t()  # (E, patches)
            for value in (scores, weights)
        )
        places = scores.argsort(dim=1, descending=True, stable=True)[:, :MOST_PATCHES]
        images = seen.first_image + places // (seen.patches.shape[1] * seen.patches.shape[2])
        pixels = seen.patches.flatten(0, 2)[places]
        found = [scores.gather(1, places), weights.gather(1, places), images, pixels]
        if self._surest:
            found = [torch.cat(each, dim=1) for each in zip(self._surest, found, strict=True)]
        best = found[0].argsort(dim=1, descending=True, stable=True)[:, :MOST_PATCHES]
        self._surest = [values[torch.arange(self.num_experts)[:, None], best] for values in found]

    def surest(self) -> list[list[Patch]]:
        """The patches that each expert takes with the highest scores, these first."""
        return [
            [
                Patch(pixels.clone(), weight.item(), int(image))
                for score, weight, image, pixels in zip(*of_expert, strict=True)
                if score > -torch.inf
            ]
            for of_expert in zip(*self._surest, strict=True)
        ]

    @property
    def load(self) -> Tensor:
        """Share of assignments per expert, (E,), sums to 1 unless there are none."""
        return self.assigned / self.assigned.sum().clamp(min=1)

    def numbers(self) -> dict[str, float]:
        """The measures by name."""
        numbers = {
            'load_entropy': measures.load_entropy(self.load),
            'load_variation': measures.load_variation(self.load),
            'dead_experts': float(measures.num_dead(self.load)),
            **verdicts.bits_of_load(self.assigned, self.tokens),
        }
        if self.first.any():  # slots have no first expert
            numbers['unrouted'] = (self.first[0] / self.first.sum()).item()
            numbers['changed_by_chance'] = measures.chance_of_change(self.first)
        if self.by_class.any():
            for measure in (measures.mutual_information, measures.normalized_mutual_information):
                numbers[measure.__name__] = measure(self.by_class)
        twice = [torch.cat(each)[: verdicts.INFORMED] for each in zip(*self._twice, strict=True)]
        if twice and len(twice[0]) > 1 and self.num_experts > 1:  # else there is no choice to tell
            numbers |= verdicts.bits_of_choice(twice[0], twice[1], self.num_experts)
        return numbers | {name: total / self.images for name, total in self.mixed.items()}


class LayerTally:
    """All that is counted of one layer."""

    def __init__(self, name: str, layer: MoeLayer | None, num_classes: int) -> None:
        self.name, self.layer, self.num_experts = name, layer, 0  # no layer if it is not ours
        self.experts: dict[str, ExpertTally] = defaultdict(
            lambda: ExpertTally(self.num_experts, num_classes)
        )
        self.count, self.total = 0, torch.zeros(())  # of tokens, and their sum (D,), float64
        # X^T X of the tokens and of the answers, (D, D) float64
        self.before, self.after = torch.zeros(()), torch.zeros(())
        # a uniform sample: the S tokens with the smallest of random keys, and a code of each
        self._generator = torch.Generator().manual_seed(0)
        self._keys, self.tokens = torch.empty(0), torch.empty(0)
        self.indices = torch.empty(0, dtype=torch.int64)
        self.gates = torch.zeros(2, dtype=torch.float64)
        # of the codebook, if the layer has one
        self.codebook, self.usage, self.squared_distance = '', torch.zeros(()), 0.0

    def add(self, record: LayerRecord, seen: Seen) -> None:
        """Take a batch."""
        self.num_experts = record.num_experts - record.shared
        tokens, chosen_experts = record.inputs.flatten(0, 1), record.chosen
        inputs = tokens.double()
        self.count, self.total = self.count + len(tokens), self.total + inputs.sum(dim=0)
        self.before = self.before + inputs.t() @ inputs
        if record.outputs is not None:
            outputs = record.outputs.flatten(0, 1).double()
            self.after = self.after + outputs.t() @ outputs
        # the weight of a code's expert is 1, or the gate's: what is sure is a token near a code
        scores = {name: weights for name, (_, weights) in chosen_experts.items()}
        for name, codes in record.codes.items():
            if self.layer is None:
                self.codebook, used = name, codes.flatten().bincount(minlength=record.num_codes)
                self.usage = self.usage + used.double()
            else:
                scores[name] = -self._add_codes(name, record.inputs, codes)[..., None]
        for name, (experts, weights) in chosen_experts.items():
            self.experts[name].add(experts, weights, scores[name], seen)
        if record.dispatch is not None and record.combine is not None:
            self.experts['slots'].add_slots(record.dispatch, record.combine, seen)
        for name, first in record.firsts.items() if seen.again else ():
            self.experts[name].compare(first, seen.again[name])
        if record.gates is not None:
            self.gates += record.gates.double().sum((0, 1))
        codes = next(iter(record.codes.values()), torch.full(record.inputs.shape[:2], -1))
        keys = torch.cat([self._keys, torch.rand(len(tokens), generator=self._generator)])
        chosen = keys.argsort()[:MOST_TOKENS]
        self._keys = keys[chosen]
        self.tokens = torch.cat([self.tokens.view(-1, tokens.shape[1]), tokens])[chosen]
        self.indices = torch.cat([self.indices, codes.flatten()])[chosen]

    def _codebook(self) -> tuple[Any, Tensor]:
        assert self.layer is not None
        codebook: Any = self.layer.get_submodule(self.codebook)
        return codebook, codebook.codes().detach().float().cpu()

    def _add_codes(self, name: str, tokens: Tensor, chosen: Tensor) -> Tensor:
        """Squared distances (B, N) of tokens to their codes, as both are compared."""
        self.codebook = name
        codebook, codes = self._codebook()
        self.usage = self.usage + chosen.flatten().bincount(minlength=len(codes)).double()
        quantized = codebook.as_long_as(tokens, codes[chosen])
        self.squared_distance += (tokens - quantized).square().sum(dim=-1).double().sum().item()
        return (codebook.compared(tokens).detach() - codes[chosen]).square().sum(dim=-1)

    def survey(self) -> LayerSurvey:
        """Everything seen so far."""
        if not (self.before + self.after).isfinite().all():
            raise ValueError(f'{self.name}: tokens are nan or infinite, the weights are of no use')
        numbers, similarity = {'effective_rank_before': measures.effective_rank(self.before)}, {}
        if self.after.any():
            numbers['effective_rank_after'] = measures.effective_rank(self.after)
        if self.layer is not None:
            experts = self.layer.experts
            outputs = measures.expert_outputs(experts, self.tokens[:COMPARED_TOKENS])
            similarity = {
                'weights': measures.weight_similarity(experts),
                'outputs': measures.output_similarity(outputs.float().cpu()),
            }
        numbers |= {f'similarity_{n}': measures.mean_similarity(s) for n, s in similarity.items()}
        if self.gates.any():
            numbers['gate_continuous'] = (self.gates[0] / self.gates.sum()).item()
        for name, tally in self.experts.items():
            numbers |= {f'{name}/{measure}': v for measure, v in tally.numbers().items()}
        codes, of_codes = None, {}
        if self.codebook:
            chance = verdicts.bits_of_load(self.usage, self.count)['dead_by_chance']
            of_codes = {
                'code_perplexity': measures.usage_perplexity(self.usage),
                'dead_codes': float(measures.num_dead(self.usage)),
                'dead_codes_by_chance': chance,
            }
        if self.codebook and self.layer is not None:
            # errors are relative to the tokens that came with its codes
            distance, energy = self.squared_distance, self.before.trace().item()  # `sum |x|^2`
            spread = energy - (self.total.square().sum() / self.count).item()  # around their mean
            for name, whole in (('', energy), ('_around_mean', spread)):
                error = measures.quantization_error(distance, whole)
                of_codes[f'quantization_error{name}'] = error
            codebook, own = self._codebook()
            usage = (self.usage / self.usage.sum()).float()
            codes = Codes(own, usage, codebook.compared(self.tokens).detach(), self.indices)
        numbers |= {f'{self.codebook}/{name}': value for name, value in of_codes.items()}
        return LayerSurvey(
            self.num_experts,
            numbers,
            {name: tally.load.float() for name, tally in self.experts.items()},
            {n: tally.by_class for n, tally in self.experts.items() if tally.by_class.any()},
            {name: cosine.float() for name, cosine in similarity.items()},
            {name: tally.surest() for name, tally in self.experts.items()},
            codes,
        )


def image_patches(pixels: Tensor, grid: Grid) -> Tensor:
    """Images (B, C, H, W) as patches (B, rows, columns, C, h, w); what is missing is black."""
    # (B, C, rows, h, columns, w)
    of_rows = grid.filled(pixels).unflatten(-1, (grid.columns, -1)).unflatten(-3, (grid.rows, -1))
    return of_rows.permute(0, 2, 4, 1, 3, 5)


def checked_labels(
    images: Tensor, labels: Tensor | None, classes: Sequence[str] | None
) -> Tensor | None:
    """Labels of images (B,) or of pixels (B, H, W) as int64 on the CPU."""
    if labels is None:
        return None
    check(bool(classes), 'classes', classes, 'names of the classes, as there are labels')
    allowed = [(len(images),), (len(images), *images.shape[-2:])]
    fits = tuple(labels.shape) in allowed and not labels.is_floating_point()
    given = f'{labels.dtype} {tuple(labels.shape)}'
    check(fits, 'labels', given, f'integers, one per image or per pixel, {allowed}')
    labels = labels.detach().cpu().long()
    of_image, most = labels.ndim == 1, len(classes or ()) - 1
    wrong = (labels < 0) | (labels > most) & (of_image | (labels != IGNORED))
    check(not wrong.any(), 'labels', labels[wrong][:1].tolist(), f'classes from 0 to {most}')
    return labels


def classes_of_tokens(labels: Tensor | None, grid: Grid | None, num_tokens: int) -> Tensor | None:
    """Class of every token (B, N), -1 for none: of its image, or of most pixels of its patch."""
    if labels is None:
        return None
    if labels.ndim == 1:
        return labels[:, None].expand(-1, num_tokens)
    if grid is None:
        raise ValueError(
            'labels: are per pixel, but where the tokens of this model lie is not known'
        )
    ignored = labels.masked_fill(labels == IGNORED, -1)[:, None]
    # padding is shifted so that what it adds, zeros, is the class of pixels that have none
    of_patch = image_patches(ignored + 1, grid).flatten(3).mode(dim=-1).values - 1
    prefix = of_patch.new_full((len(labels), grid.prefix), -1)
    return torch.cat([prefix, of_patch.flatten(1)], dim=1)
