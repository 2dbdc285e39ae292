"""Codes of a layer among the tokens around them, on a plane.

Legend: M codes, D width, S sampled tokens. Needs matplotlib (extra `train`).
"""

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from .drawing import WIDTH, Picture, percent, short, styled
from .pictures import expert_colours, with_legend
from .surveyed import Codes

NAMED = 32  # more numbers would lie on each other


@styled
def code_map(name: str, codebook: Codes, num_experts: int) -> Picture:
    """Tokens and codes on the two axes along which the tokens vary most (PCA)."""
    tokens, codes = codebook.tokens.double(), codebook.codes.double()
    mean, plane, shares = _plane(tokens)
    colours = expert_colours(num_experts)
    figure = Figure(figsize=(WIDTH, 7), layout='constrained')
    axes = figure.subplots()
    x, y = ((tokens - mean) @ plane).t().numpy()
    of_tokens = colours[codebook.indices % num_experts].numpy()
    axes.scatter(x, y, c=of_tokens, s=9, alpha=0.35, linewidths=0)
    of_codes = colours[torch.arange(len(codes)) % num_experts]
    _draw_codes(axes, (codes - mean) @ plane, codebook.usage, of_codes)
    axes.set(
        title=f'{short(name)}: codes (large, x: unused) among tokens',
        xlabel=f'first component, {percent(shares[0])} of the variance',
        ylabel=f'second component, {percent(shares[1])}',
    )
    axes.grid(alpha=0.3)
    if num_experts <= 20:
        with_legend(figure, [f'expert {i}' for i in range(num_experts)], colours)
    used, top = codebook.usage > 0, int(codebook.usage.argmax())
    alt = (
        f'{len(codes)} codes among {len(tokens)} tokens, on axes that hold '
        f'{percent(sum(shares))} of the variance. {int(used.sum())} codes are used; code {top} '
        f'takes most, {percent(codebook.usage[top].item())} of the tokens.'
    )
    return Picture(f'codes-{name}', f'{name}: codes among tokens', alt, figure)


def _draw_codes(axes: Axes, places: Tensor, usage: Tensor, colours: Tensor) -> None:
    """Codes at (M, 2) places, as large as their usage (M,) and with numbers if they are few."""
    sizes = 60 + 600 * usage
    for mask, marker in ((usage > 0, 'o'), (usage <= 0, 'X')):
        x, y = places[mask].t().numpy()
        axes.scatter(
            x,
            y,
            c=colours[mask].numpy(),
            s=sizes[mask].numpy(),
            marker=marker,
            edgecolors='black',
            linewidths=1.5,
        )
    if len(places) <= NAMED:
        for number, place in enumerate(places.tolist()):
            axes.annotate(str(number), place, xytext=(7, 7), textcoords='offset points')


def _plane(tokens: Tensor) -> tuple[Tensor, Tensor, list[float]]:
    """Mean (D,), first two principal axes (D, 2) and their shares of the variance."""
    # not scikit-learn's: tokens that are all the same have no variance to divide by
    mean = tokens.mean(dim=0)
    spread, axes = torch.linalg.eigh((tokens - mean).t() @ (tokens - mean))  # smallest first
    shares = spread.clamp(min=0) / spread.sum().clamp(min=1e-12)
    return mean, axes[:, -2:].flip(1), shares[-2:].flip(0).tolist()
