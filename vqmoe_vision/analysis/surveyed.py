"""What was seen of the routing of a model over a data set: numbers, samples and examples.

Legend: E experts, C classes of the data set, M codes, D width, S sampled tokens.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor


class Patch(NamedTuple):
    """One patch that an expert took.

    Args:
        pixels: (3, h, w) in [0, 1].
        weight: The combine weight of the expert for this patch.
        image: Index of the image in the data set.
    """

    pixels: Tensor
    weight: float
    image: int


@dataclass(frozen=True)
class Codes:
    """A codebook and some of the tokens around its codes.

    Args:
        codes: (M, D).
        usage: (M,), share of tokens per code, sums to 1.
        tokens: (S, D), a sample of the tokens of all images, as they are compared with the codes.
        indices: (S,) int64, the codes of the sampled tokens.
    """

    codes: Tensor
    usage: Tensor
    tokens: Tensor
    indices: Tensor


@dataclass(frozen=True)
class LayerSurvey:
    """What was seen of one MoE layer.

    A decider is what chooses experts in a layer, by its module name inside the layer: 'router',
    'quantizer.codebook'. SoftMoE has none, but slots.

    Args:
        num_experts: E.
        numbers: Scalar measures by name, such as 'router/load_entropy'.
        load: By decider, or 'slots': (E,), sums to 1.
        expert_by_class: By decider: (E, C), how many tokens of a class an expert took as their
            first; {} without labels.
        similarity: 'weights' and 'outputs': (E, E) cosine similarity of the experts.
        confident: By decider and expert: the patches with the largest weights, largest first.
        codebook: Of the layer, None where it has none.
    """

    num_experts: int
    numbers: dict[str, float]
    load: dict[str, Tensor]
    expert_by_class: dict[str, Tensor]
    similarity: dict[str, Tensor]
    confident: dict[str, list[list[Patch]]]
    codebook: Codes | None


@dataclass(frozen=True)
class Example:
    """One picture and what every layer does with its patches.

    Args:
        name: Of the picture.
        image: (3, H, W) in [0, 1].
        experts: 'blocks.1.mlp.router': (rows, columns) int64, the first expert, -1 for none.
        codes: 'blocks.1.mlp.quantizer.codebook': (rows, columns) int64.
        gates: 'blocks.1.mlp': (rows, columns), share of the continuous branch.
        slots: 'blocks.1.mlp': (E, rows, columns), SoftMoE's dispatch weights, summed over the slots
            of an expert.
    """

    name: str
    image: Tensor
    experts: dict[str, Tensor]
    codes: dict[str, Tensor]
    gates: dict[str, Tensor]
    slots: dict[str, Tensor]


@dataclass(frozen=True)
class Survey:
    """What was seen of a model over a data set.

    Args:
        title: Says which model or checkpoint.
        images: How many were looked at.
        classes: Names by index, None without labels.
        layers: By name, such as 'blocks.1.mlp'.
        examples: The first pictures.
        shifts: By shift and severity, such as 'gaussian_noise 3', and by decider, such as
            'blocks.1.mlp.router': share of tokens whose first expert changes; {} if not asked for.
    """

    title: str
    images: int
    classes: list[str] | None
    layers: dict[str, LayerSurvey]
    examples: list[Example]
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
