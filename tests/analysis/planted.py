"""Mixtures of experts in plain PyTorch, trained in the control, with a defect planted.

`python -m tests.analysis.planted` counts in how many of 20 seeds each defect is named: the table of
docs/reference/measures.md.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vector_quantize_pytorch import VectorQuantize

from vqmoe_vision.analysis import Survey, analyze
from vqmoe_vision.analysis import verdicts as words
from vqmoe_vision.comparison import control
from vqmoe_vision.comparison.control import CLUSTERS, HIDDEN, LABELS, PIXELS, WIDTH, Source

DEFECTS = {
    'collapse': words.COLLAPSED,
    'ignores its input': words.IGNORES,
    'by position': words.BY_POSITION,
    'dead codes': words.DEAD_CODES,
}
STRENGTHS = (0.5, 0.9, 1.0)  # share of tokens whose choice is planted
DEAD = (1, 4, 7)  # of eight codes, at the three strengths
METHODS = ('smoe', 'vqmoe', 'xmoe', 'softmoe')
CODES, SEPARATION, STEPS = 8, 3.0, 60


class Gate(nn.Module):
    """Scores of experts, by a linear layer for those tokens on which nothing is planted."""

    def __init__(self, defect: str, share: float) -> None:
        super().__init__()
        self.linear, self.defect, self.share = nn.Linear(WIDTH, CLUSTERS), defect, share
        self.direction = F.normalize(torch.randn(WIDTH), dim=0)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.linear(x)
        wrong = torch.zeros_like(scores)
        if self.defect == 'collapse':
            wrong[..., 0] = 9
        elif self.defect == 'ignores its input':
            wrong = 9 * torch.randn_like(scores)
        else:
            wrong += 9 * F.one_hot(torch.arange(x.shape[1]) % CLUSTERS, CLUSTERS)
        # the same tokens in each pass: those on one side of a plane
        side = x @ self.direction < math.sqrt(2) * torch.erfinv(torch.tensor(2 * self.share - 1))
        return torch.where(side[..., None], wrong, scores)


class Experts(nn.Module):
    """One expert per token, by scores or by the nearest code."""

    def __init__(self, defect: str, share: float) -> None:
        super().__init__()
        self.gate = self.quantizer = None
        if defect == 'dead codes':
            self.quantizer = VectorQuantize(WIDTH, CODES, kmeans_init=True)
        else:
            self.gate = Gate(defect, share)
        self.inner = nn.Parameter(torch.randn(CLUSTERS, WIDTH, HIDDEN) / WIDTH**0.5)
        self.outer = nn.Parameter(torch.randn(CLUSTERS, HIDDEN, WIDTH) / HIDDEN**0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.quantizer is not None:
            _, chosen, loss = self.quantizer(x)
            share = torch.ones_like(x[..., :1])
        else:
            shares = self.gate(x).softmax(dim=-1)
            share, chosen = shares.max(dim=-1, keepdim=True)
            chosen = chosen.squeeze(-1)
            load = F.one_hot(chosen, CLUSTERS).float().mean((0, 1))
            loss = 0.01 * CLUSTERS * (load * shares.mean((0, 1))).sum()
        taken = F.one_hot(chosen, CLUSTERS) * share
        hidden = F.gelu(torch.einsum('bnd,edh->bneh', x, self.inner)) * taken[..., None]
        return torch.einsum('bneh,ehd->bnd', hidden, self.outer), loss.sum()


class Planted(nn.Module):
    """A layer between two norms, with a residual connection, and a head."""

    def __init__(self, defect: str, share: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.moe, self.head = Experts(defect, share), nn.Linear(WIDTH, LABELS)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = F.unfold(images, PIXELS, stride=PIXELS).mT
        y, loss = self.moe(self.norm1(tokens))
        return self.head(self.norm2(tokens + y)), loss


def planted(defect: str, strength: int, seed: int) -> Survey:
    """What is seen of a trained model, `strength` from 0, of nothing, to 3."""
    torch.manual_seed(seed)
    source = Source(SEPARATION, seed)
    model = Planted(defect, (0.0, *STRENGTHS)[strength])
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(STEPS):
        tokens, _, labels = source.draw()
        scores, loss = model(control.as_images(tokens))
        optimizer.zero_grad()
        (F.cross_entropy(scores.flatten(0, 1), labels.flatten()) + loss).backward()
        optimizer.step()
    if defect == 'dead codes':
        codebook: Any = model.moe.quantizer
        dead = torch.arange((0, *DEAD)[strength])
        codebook.codebook = codebook.codebook.index_fill(0, dead, 100.0)
    return analyze(model, drawn(source), top_k=1)


def drawn(source: Source) -> Tensor:
    return torch.cat([control.as_images(source.draw()[0]) for _ in range(2)])


class OfImages(nn.Module):
    """A row of the control as a model of images."""

    def __init__(self, bed: control.Bed) -> None:
        super().__init__()
        self.bed = bed

    def forward(self, images: Tensor) -> Tensor:
        tokens = F.unfold(images, PIXELS, stride=PIXELS).mT
        return self.bed((tokens, torch.zeros(tokens.shape[:2], dtype=torch.int64)))


def healthy(row: str, seed: int, steps: int = control.STEPS) -> Survey:
    source, bed = control.trained(control.all_rows()[row], SEPARATION, seed, steps)
    return analyze(OfImages(bed), drawn(source))


def words_of(seen: Survey) -> list[str]:
    (words,) = seen.verdicts.values()
    return words


def main() -> None:
    seeds = range(20)
    for defect, word in DEFECTS.items():
        of = [[words_of(planted(defect, s, seed)) for seed in seeds] for s in (1, 2, 3)]
        print('', defect, word, *(sum(word in words for words in each) for each in of), '', sep='|')
    # without a defect all gates are the same
    sound = [planted(defect, 0, seed) for seed in seeds for defect in ('collapse', 'dead codes')]
    sound += [healthy(method, seed) for seed in seeds[:5] for method in METHODS]
    print('alarms where nothing is planted:', sum(words_of(seen) != ['healthy'] for seen in sound))


if __name__ == '__main__':
    main()
