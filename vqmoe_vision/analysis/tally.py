"""What is counted of one MoE layer over any number of images.

Legend: B images, N tokens per image, T = B * N, D width, E experts, K experts per token,
C classes, M codes, P slots per expert.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vqmoe_vision.models.hosts import Transformer
from vqmoe_vision.moe.codebooks.codebook import Codebook
from vqmoe_vision.moe.layer import MoeLayer
from vqmoe_vision.moe.routing import perplexities

from . import measures
from .record import LayerRecord, on_patches
from .samples import ConfidentPatches, TokenMoments, TokenSample
from .surveyed import Codes, LayerSurvey

COMPARED_TOKENS = 256  # on which the answers of all experts are compared


@dataclass(frozen=True)
class Seen:
    """A batch, as all layers see it."""

    model: Transformer
    images: Tensor  # (B, 3, H, W)
    patches: Tensor  # (B, rows, columns, 3, h, w) in [0, 1]
    classes: Tensor | None  # of every token, (B, N), -1 for none
    first_image: int  # its index in the data set


class ExpertTally:
    """How one decider uses the experts."""

    def __init__(self, num_experts: int, num_classes: int) -> None:
        self.num_experts = num_experts
        self.assigned = torch.zeros(num_experts, dtype=torch.float64)
        self.by_class = torch.zeros(num_experts, num_classes, dtype=torch.float64)
        # of no expert, and of each
        self.first = torch.zeros(num_experts + 1, dtype=torch.float64)
        self.confident = ConfidentPatches(num_experts)

    def add(self, experts: Tensor, weights: Tensor, scores: Tensor, seen: Seen) -> None:
        """Take experts, their weights, and how sure each choice is, all (B, N, K)."""
        size = self.num_experts + 1  # index 0 is that of no expert
        first = nn.functional.one_hot(experts[..., 0] + 1, size)
        assigned = (experts.flatten() + 1).bincount(minlength=size)[1:]
        self.first += first.sum((0, 1))
        shape = (*experts.shape[:2], size)
        of_expert, weight = (
            torch.full(shape, nothing).scatter(-1, experts + 1, value)[..., 1:]
            for value, nothing in ((scores, -torch.inf), (weights, 0.0))
        )
        self._add(assigned, first[..., 1:], of_expert, weight, seen)

    def _add(
        self, assigned: Tensor, first: Tensor, scores: Tensor, weights: Tensor, seen: Seen
    ) -> None:
        self.assigned += assigned
        if seen.classes is not None:
            classes = nn.functional.one_hot(seen.classes + 1, self.by_class.shape[1] + 1)[..., 1:]
            self.by_class += torch.einsum('bne,bnc->ec', first.double(), classes.double())
        scores, weights = (on_patches(seen.model, seen.images, v) for v in (scores, weights))
        self.confident.add(scores, weights, seen.patches, seen.first_image)

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
            normalized = measures.normalized_mutual_information(self.by_class)
            numbers['normalized_mutual_information'] = normalized
        return numbers


class SlotTally(ExpertTally):
    """How the slots of SoftMoE use the experts: every token has a share of each."""

    def __init__(self, num_experts: int, num_classes: int) -> None:
        super().__init__(num_experts, num_classes)
        self.images = 0
        self.mixed = {'mixed_tokens': 0.0, 'mixed_slots': 0.0}

    def add_slots(self, dispatch: Tensor, combine: Tensor, seen: Seen) -> None:
        """Take a batch, both (B, N, E, P)."""
        shares = combine.sum(dim=-1)
        self._add(shares.sum((0, 1)), shares, shares, shares, seen)
        self.images += len(combine)
        for name, found in {
            'mixed_tokens': perplexities(dispatch, dim=1),
            'mixed_slots': perplexities(combine.flatten(2), dim=2),
        }.items():
            self.mixed[name] += found.flatten(1).mean(dim=1).sum().item()

    def numbers(self) -> dict[str, float]:
        """The measures by name."""
        means = {name: total / self.images for name, total in self.mixed.items()}
        return {**super().numbers(), **means}


class CodebookTally:
    """How tokens use a codebook."""

    def __init__(self, codebook: Codebook) -> None:
        self.codebook = codebook
        self.codes = codebook.codes().detach().float().cpu()
        self.usage = torch.zeros(len(self.codes), dtype=torch.float64)
        self.squared_distance = 0.0

    def add(self, tokens: Tensor, codes: Tensor) -> Tensor:
        """Take a batch; returns by how much each code is the nearest, a squared distance (B, N)."""
        self.usage += codes.flatten().bincount(minlength=len(self.usage))
        chosen = self.codes[codes]
        quantized = self.codebook.as_long_as(tokens, chosen)
        self.squared_distance += (tokens - quantized).square().sum(dim=-1).double().sum().item()
        return (self.codebook.compared(tokens) - chosen).square().sum(dim=-1)

    def numbers(self, moments: TokenMoments) -> dict[str, float]:
        """The measures by name, relative to the tokens that came with the codes."""
        error, around_mean = (
            measures.quantization_error(self.squared_distance, energy)
            for energy in (moments.energy, moments.energy_around_mean)
        )
        return {
            'code_perplexity': measures.usage_perplexity(self.usage),
            'dead_codes': float(measures.num_dead(self.usage)),
            'quantization_error': error,
            'quantization_error_around_mean': around_mean,
        }


class LayerTally:
    """All that is counted of one layer."""

    def __init__(self, name: str, layer: MoeLayer, num_classes: int) -> None:
        self.name, self.layer = name, layer
        self._sizes = layer.experts.num_experts, num_classes
        self.experts: dict[str, ExpertTally] = {}
        self.codebooks: dict[str, CodebookTally] = {}
        self.before, self.after = TokenMoments(), TokenMoments()
        self.sample = TokenSample()
        self.gates: Tensor | None = None

    def add(self, record: LayerRecord, seen: Seen) -> None:
        """Take a batch."""
        tokens = record.inputs.flatten(0, 1)
        self.before.add(tokens)
        self.after.add(record.outputs.flatten(0, 1))
        scores = dict(record.weights)
        for name, codes in record.codes.items():
            if name not in self.codebooks:
                codebook = self.layer.get_submodule(name)
                assert isinstance(codebook, Codebook)
                self.codebooks[name] = CodebookTally(codebook)
            # the weight of a code's expert is 1, or the gate's: what is sure is a token near a code
            scores[name] = -self.codebooks[name].add(record.inputs, codes)[..., None]
        for name, experts in record.experts.items():
            decider = self.experts.setdefault(name, ExpertTally(*self._sizes))
            decider.add(experts, record.weights[name], scores[name], seen)
        if record.dispatch is not None and record.combine is not None:
            slots = self.experts.setdefault('slots', SlotTally(*self._sizes))
            assert isinstance(slots, SlotTally)
            slots.add_slots(record.dispatch, record.combine, seen)
        if record.gates is not None:
            gates = record.gates.double().sum((0, 1))
            self.gates = gates if self.gates is None else self.gates + gates
        # a layer has one codebook, or none
        codes = next(iter(record.codes.values()), torch.full(record.inputs.shape[:2], -1))
        self.sample.add(tokens, codes.flatten())

    def survey(self) -> LayerSurvey:
        """Everything seen so far."""
        if not (self.before.gram.isfinite().all() and self.after.gram.isfinite().all()):
            raise ValueError(f'{self.name}: tokens are nan or infinite, the weights are of no use')
        similarity = self._similarity()
        numbers = {
            'effective_rank_before': measures.effective_rank(self.before.gram),
            'effective_rank_after': measures.effective_rank(self.after.gram),
            **{f'similarity_{n}': measures.mean_similarity(s) for n, s in similarity.items()},
        }
        if self.gates is not None:
            numbers['gate_continuous'] = (self.gates[0] / self.gates.sum()).item()
        for name, experts in self.experts.items():
            numbers |= {f'{name}/{measure}': v for measure, v in experts.numbers().items()}
        for name, codebook in self.codebooks.items():
            of_codebook = codebook.numbers(self.before)
            numbers |= {f'{name}/{measure}': v for measure, v in of_codebook.items()}
        by_class = {name: experts.by_class for name, experts in self.experts.items()}
        return LayerSurvey(
            num_experts=self.layer.experts.num_experts,
            numbers=numbers,
            load={name: experts.load.float() for name, experts in self.experts.items()},
            expert_by_class={name: counts for name, counts in by_class.items() if counts.any()},
            similarity={name: cosine.float() for name, cosine in similarity.items()},
            confident={name: e.confident.by_expert() for name, e in self.experts.items()},
            codebook=self._codes(),
        )

    def _similarity(self) -> dict[str, Tensor]:
        experts = self.layer.experts
        outputs = measures.expert_outputs(experts, self.sample.tokens[:COMPARED_TOKENS])
        return {
            'weights': measures.weight_similarity(experts),
            'outputs': measures.output_similarity(outputs.float().cpu()),
        }

    def _codes(self) -> Codes | None:
        for codebook in self.codebooks.values():
            usage = (codebook.usage / codebook.usage.sum()).float()
            tokens = codebook.codebook.compared(self.sample.tokens)
            return Codes(codebook.codes, usage, tokens, self.sample.indices)
        return None
