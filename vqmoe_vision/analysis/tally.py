"""What is counted and kept of one MoE layer over any number of images, in memory that stays flat.

Legend: B images, N tokens per image, T tokens, D width, E experts, K experts per token, C classes,
M codes, P slots per expert, S sampled tokens.
"""

from collections import defaultdict
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vqmoe_vision.models.layers import Transformer
from vqmoe_vision.moe.layer import MoeLayer
from vqmoe_vision.moe.routing import perplexities

from . import measures
from .record import LayerRecord, on_patches
from .surveyed import Codes, LayerSurvey, Patch

COMPARED_TOKENS = 256  # on which the answers of all experts are compared
MOST_TOKENS = 2000  # S, of a layer
MOST_PATCHES = 8  # of an expert


class Seen(NamedTuple):
    """A batch, as all layers see it."""

    model: Transformer
    images: Tensor  # (B, 3, H, W)
    patches: Tensor  # (B, rows, columns, 3, h, w) in [0, 1]
    classes: Tensor | None  # of every token, (B, N), -1 for none
    first_image: int  # its index in the data set


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

    def add(self, experts: Tensor, weights: Tensor, scores: Tensor, seen: Seen) -> None:
        """Take experts, their weights, and how sure each choice is, all (B, N, K)."""
        size = self.num_experts + 1  # index 0 is that of no expert
        first = F.one_hot(experts[..., 0] + 1, size)
        self.first += first.sum((0, 1))
        shape = (*experts.shape[:2], size)
        of_expert, weight = (
            torch.full(shape, nothing).scatter(-1, experts + 1, value)[..., 1:]
            for value, nothing in ((scores, -torch.inf), (weights, 0.0))
        )
        assigned = (experts.flatten() + 1).bincount(minlength=size)[1:]
        self._add(assigned, first[..., 1:], of_expert, weight, seen)

    def add_slots(self, dispatch: Tensor, combine: Tensor, seen: Seen) -> None:
        """Take a batch, both (B, N, E, P)."""
        shares = combine.sum(dim=-1)
        self._add(shares.sum((0, 1)), shares, shares, shares, seen)
        for name, found in {
            'mixed_tokens': perplexities(dispatch, dim=1),
            'mixed_slots': perplexities(combine.flatten(2), dim=2),
        }.items():
            self.mixed[name] += found.flatten(1).mean(dim=1).sum().item()

    def _add(
        self, assigned: Tensor, first: Tensor, scores: Tensor, weights: Tensor, seen: Seen
    ) -> None:
        self.assigned += assigned
        self.images += len(seen.images)
        if seen.classes is not None:
            classes = F.one_hot(seen.classes + 1, self.by_class.shape[1] + 1)[..., 1:]
            self.by_class += torch.einsum('bne,bnc->ec', first.double(), classes.double())
        scores, weights = (
            on_patches(seen.model, seen.images, value).flatten(0, 2).t()  # (E, patches)
            for value in (scores, weights)
        )
        places = scores.argsort(dim=1, descending=True, stable=True)[:, :MOST_PATCHES]
        images = seen.first_image + places // (seen.patches.shape[1] * seen.patches.shape[2])
        pixels = seen.patches.flatten(0, 2)[places]
        found = [scores.gather(1, places), weights.gather(1, places), images, pixels]
        both = zip(self._surest or [each[:, :0] for each in found], found, strict=True)
        found = [torch.cat(each, dim=1) for each in both]
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
        }
        if self.first.any():  # slots have no first expert
            numbers['unrouted'] = (self.first[0] / self.first.sum()).item()
            numbers['changed_by_chance'] = measures.chance_of_change(self.first)
        if self.by_class.any():
            numbers['mutual_information'] = measures.mutual_information(self.by_class)
            shared = measures.normalized_mutual_information(self.by_class)
            numbers['normalized_mutual_information'] = shared
        return numbers | {name: total / self.images for name, total in self.mixed.items()}


class LayerTally:
    """All that is counted of one layer."""

    def __init__(self, name: str, layer: MoeLayer, num_classes: int) -> None:
        self.name, self.layer = name, layer
        sizes = layer.experts.num_experts, num_classes
        self.experts: dict[str, ExpertTally] = defaultdict(lambda: ExpertTally(*sizes))
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
        tokens = record.inputs.flatten(0, 1)
        inputs, outputs = tokens.double(), record.outputs.flatten(0, 1).double()
        self.count, self.total = self.count + len(tokens), self.total + inputs.sum(dim=0)
        self.before, self.after = (
            self.before + inputs.t() @ inputs,
            self.after + outputs.t() @ outputs,
        )
        scores = dict(record.weights)
        for name, codes in record.codes.items():
            # the weight of a code's expert is 1, or the gate's: what is sure is a token near a code
            scores[name] = -self._add_codes(name, record.inputs, codes)[..., None]
        for name, experts in record.experts.items():
            self.experts[name].add(experts, record.weights[name], scores[name], seen)
        if record.dispatch is not None and record.combine is not None:
            self.experts['slots'].add_slots(record.dispatch, record.combine, seen)
        if record.gates is not None:
            self.gates += record.gates.double().sum((0, 1))
        codes = next(iter(record.codes.values()), torch.full(record.inputs.shape[:2], -1))
        keys = torch.cat([self._keys, torch.rand(len(tokens), generator=self._generator)])
        chosen = keys.argsort()[:MOST_TOKENS]
        self._keys = keys[chosen]
        self.tokens = torch.cat([self.tokens.view(-1, tokens.shape[1]), tokens])[chosen]
        self.indices = torch.cat([self.indices, codes.flatten()])[chosen]

    def _codebook(self) -> tuple[Any, Tensor]:
        codebook: Any = self.layer.get_submodule(self.codebook)
        return codebook, codebook.codes().detach().float().cpu()

    def _add_codes(self, name: str, tokens: Tensor, chosen: Tensor) -> Tensor:
        """Squared distances (B, N) of tokens to their codes, as both are compared."""
        self.codebook = name
        codebook, codes = self._codebook()
        self.usage = self.usage + chosen.flatten().bincount(minlength=len(codes)).double()
        quantized = codebook.as_long_as(tokens, codes[chosen])
        self.squared_distance += (tokens - quantized).square().sum(dim=-1).double().sum().item()
        return (codebook.compared(tokens) - codes[chosen]).square().sum(dim=-1)

    def survey(self) -> LayerSurvey:
        """Everything seen so far."""
        if not (self.before.isfinite().all() and self.after.isfinite().all()):
            raise ValueError(f'{self.name}: tokens are nan or infinite, the weights are of no use')
        experts = self.layer.experts
        outputs = measures.expert_outputs(experts, self.tokens[:COMPARED_TOKENS])
        similarity = {
            'weights': measures.weight_similarity(experts),
            'outputs': measures.output_similarity(outputs.float().cpu()),
        }
        numbers = {
            'effective_rank_before': measures.effective_rank(self.before),
            'effective_rank_after': measures.effective_rank(self.after),
            **{f'similarity_{n}': measures.mean_similarity(s) for n, s in similarity.items()},
        }
        if self.gates.any():
            numbers['gate_continuous'] = (self.gates[0] / self.gates.sum()).item()
        for name, tally in self.experts.items():
            numbers |= {f'{name}/{measure}': v for measure, v in tally.numbers().items()}
        by_class = {name: tally.by_class for name, tally in self.experts.items()}
        of_codes, codes = self._seen_codes()
        return LayerSurvey(
            num_experts=experts.num_experts,
            numbers=numbers | of_codes,
            load={name: tally.load.float() for name, tally in self.experts.items()},
            expert_by_class={name: counts for name, counts in by_class.items() if counts.any()},
            similarity={name: cosine.float() for name, cosine in similarity.items()},
            confident={name: tally.surest() for name, tally in self.experts.items()},
            codebook=codes,
        )

    def _seen_codes(self) -> tuple[dict[str, float], Codes | None]:
        """Measures of the codebook, errors relative to the tokens that came with its codes."""
        if not self.codebook:
            return {}, None
        energy = self.before.trace().item()  # `sum |x|^2`
        spread = energy - (self.total.square().sum() / self.count).item()  # `sum |x - mean|^2`
        error, around_mean = (
            measures.quantization_error(self.squared_distance, of) for of in (energy, spread)
        )
        numbers = {
            f'{self.codebook}/code_perplexity': measures.usage_perplexity(self.usage),
            f'{self.codebook}/dead_codes': float(measures.num_dead(self.usage)),
            f'{self.codebook}/quantization_error': error,
            f'{self.codebook}/quantization_error_around_mean': around_mean,
        }
        codebook, codes = self._codebook()
        tokens, usage = codebook.compared(self.tokens), self.usage / self.usage.sum()
        return numbers, Codes(codes, usage.float(), tokens, self.indices)
