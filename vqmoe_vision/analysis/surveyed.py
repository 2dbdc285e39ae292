"""What was seen of the routing of a model over a data set: numbers, samples and examples.

Legend: E experts, C classes of the data set, M codes, D width, S sampled tokens.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor


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


@dataclass(frozen=True)
class Example:
    """One picture and what every layer does with its patches."""

    name: str
    image: Tensor  # (3, H, W) in [0, 1]
    # 'blocks.1.mlp.router': (rows, columns) int64, the first expert, -1 for none
    experts: dict[str, Tensor]
    codes: dict[str, Tensor]  # 'blocks.1.mlp.quantizer.codebook': (rows, columns) int64
    gates: dict[str, Tensor]  # 'blocks.1.mlp': (rows, columns), share of the continuous branch
    # 'blocks.1.mlp': (E, rows, columns), SoftMoE's dispatch weights, summed over slots of an expert
    slots: dict[str, Tensor]


@dataclass(frozen=True)
class Survey:
    """What was seen of a model over a data set."""

    title: str  # says which model or checkpoint
    images: int  # how many were looked at
    classes: list[str] | None  # names by index, None without labels
    layers: dict[str, LayerSurvey]  # by name, such as 'blocks.1.mlp'
    examples: list[Example]  # the first pictures
    # by 'gaussian_noise 3' and 'blocks.1.mlp.router': share of tokens whose first expert changes
    shifts: dict[str, dict[str, float]]

    def numbers(self) -> dict[str, Any]:
        """All but pictures and samples, as JSON can hold it."""
        return {
            'title': self.title,
            'images': self.images,
            'classes': self.classes,
            'layers': {name: _layer_numbers(layer) for name, layer in self.layers.items()},
            'shifts': self.shifts,
        }


def _layer_numbers(layer: LayerSurvey) -> dict[str, Any]:
    return {
        'num_experts': layer.num_experts,
        'numbers': layer.numbers,
        'load': {name: load.tolist() for name, load in layer.load.items()},
        'expert_by_class': {n: counts.tolist() for n, counts in layer.expert_by_class.items()},
        'similarity': {name: cosine.tolist() for name, cosine in layer.similarity.items()},
        'code_usage': None if layer.codebook is None else layer.codebook.usage.tolist(),
    }
