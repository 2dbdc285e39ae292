"""Codebooks past their start, one step of learning, and tokens in clusters for them."""

import pytest
import torch

from vqmoe_vision.moe.codebooks import SimVQCodebook
from vqmoe_vision.moe.codebooks.ema import CODEBOOKS
from vqmoe_vision.moe.codebooks.usage import stream_of

from .conftest import D

M = 6
STREAM = stream_of(torch.tensor(0), 0, 0)  # no update and no pass before
LEARNS = torch.tensor(True)
# those that compare tokens with codes of their width
BY_DISTANCE = [name for name in CODEBOOKS if name != 'projected']
every_codebook = pytest.mark.parametrize('name', BY_DISTANCE)


def make(name, codes=None, **options):
    """Codebook with these codes, or of the size of the tokens, past its start if it has one."""
    codes = torch.randn(M, D) if codes is None else codes
    book = CODEBOOKS[name](*codes.shape, **options)
    with torch.no_grad():
        if isinstance(book, SimVQCodebook):
            book.project.weight.copy_(torch.eye(codes.shape[1]))
            book.project.bias.zero_()
            book.frozen_embed.copy_(codes)
        elif name == 'ema':
            book._put(LEARNS, codes)
            book.started |= LEARNS
        else:
            book.embed.copy_(codes)
    return book


def learn(book, x, indices=None):
    quantized = book(x)
    book.observe(x, quantized.indices if indices is None else indices)
    book.update()
    return quantized


def state(book):
    return {name: value.clone() for name, value in book.state_dict().items()}


def same(before, after):
    return all(torch.equal(before[name], after[name]) for name in before)


def clusters(num_tokens, num_codes=M, mean=0.0):
    centres = 5 * torch.randn(num_codes, D) + mean
    labels = torch.arange(num_tokens) % num_codes
    return centres[labels] + 0.01 * torch.randn(num_tokens, D), centres
