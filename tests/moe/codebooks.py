"""Codebooks past their start, one step of learning, and tokens in clusters for them."""

import pytest
import torch

from vqmoe_vision.moe.codebooks import CODEBOOKS
from vqmoe_vision.moe.codebooks.codebook import SimVQCodebook
from vqmoe_vision.moe.codebooks.ema import EmaCodebook

from .conftest import D

M = 6
ZERO = torch.tensor(0)  # updates before
LEARNS = torch.tensor(True)
every_codebook = pytest.mark.parametrize('name', CODEBOOKS)
STARTED = [name for name, cls in CODEBOOKS.items() if issubclass(cls, EmaCodebook)]


def make(name, num_codes=M, dim=D, **options):
    """Codebook with codes of the size of the tokens, past its start if it has one."""
    book = CODEBOOKS[name](num_codes, dim, **options)
    codes = torch.randn(num_codes, dim)
    with torch.no_grad():
        if isinstance(book, SimVQCodebook):
            book.frozen_embed.copy_(codes)
        elif name in STARTED:
            book._start(codes, LEARNS)
        else:
            book.embed.copy_(codes)
    return book


def learn(book, x):
    """One training pass: quantize, observe, update."""
    quantized = book(x)
    book.observe(x, quantized.indices)
    book.update()
    return quantized


def state(book):
    return {name: value.clone() for name, value in book.state_dict().items()}


def same(before, after):
    return all(torch.equal(before[name], after[name]) for name in before)


def clusters(num_tokens, num_codes=M, mean=0.0):
    """Well separated clusters of even size and their centres."""
    centres = 5 * torch.randn(num_codes, D) + mean
    labels = torch.arange(num_tokens) % num_codes
    return centres[labels] + 0.01 * torch.randn(num_tokens, D), centres
