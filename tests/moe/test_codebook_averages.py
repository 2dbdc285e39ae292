"""How much the averages of a codebook trust its start: even usage, or what k-means counted."""

import copy

import pytest
import torch
from torch import Tensor

from vqmoe_vision.moe.codebook_learning import GradientCodebook
from vqmoe_vision.moe.codebook_sample import code_shares
from vqmoe_vision.moe.codebooks import CODEBOOKS
from vqmoe_vision.moe.methods._vqmoe_config import VQMoEConfig

from .codebooks import STARTED, M, learn, same, state
from .conftest import D

AVERAGED = [name for name, cls in CODEBOOKS.items() if issubclass(cls, GradientCodebook)]
RARE, CODES = 2, 8  # of 100 tokens


def uneven(rare: Tensor) -> Tensor:
    """100 tokens at eight far points (D = 8): two at `rare`, fourteen at each of the others."""
    return torch.cat([rare.expand(RARE, D), 10 * torch.eye(D)[1:].repeat(14, 1)])


def owner(book: GradientCodebook, x: Tensor) -> int:
    """The code that takes a token."""
    return int(book(x[None]).indices)


@pytest.mark.parametrize(
    ('from_kmeans', 'covered'),
    # 0.99^100 = 0.366 is left of the start, which weighs 1 / 8 or 0.02; the rest has 0.02:
    # 0.634 * 0.02 / (0.366 * 0.125 + 0.634 * 0.02) = 0.217, and 0.634
    [(False, 0.217), (True, 0.634)],
)
def test_how_far_a_rare_code_follows_its_tokens_known_answer(from_kmeans, covered) -> None:
    book = CODEBOOKS['ema'](CODES, D, usage_from_kmeans=from_kmeans)
    before = 10 * torch.eye(D)[0]
    learn(book, uneven(before))
    code = owner(book, before)
    torch.testing.assert_close(book.codes()[code], before)
    after = before - torch.eye(D)[0]
    for _ in range(100):
        learn(book, uneven(after))
    way = (before - book.codes()[code])[0].item()
    assert way == pytest.approx(covered, abs=0.001)


@pytest.mark.parametrize('name', STARTED)
def test_usage_starts_as_k_means_counted(name: str) -> None:
    book = CODEBOOKS[name](CODES, D, usage_from_kmeans=True)
    rare = 10 * torch.eye(D)[0]
    learn(book, uneven(rare))
    expected = torch.full((CODES,), 0.14)
    expected[owner(book, rare)] = 0.02
    torch.testing.assert_close(book.usage, expected)
    if name == 'ema':
        torch.testing.assert_close(book.token_sums, book.usage[:, None] * book.codes())


@pytest.mark.parametrize('name', STARTED)
def test_a_code_that_replaces_a_dead_one_starts_at_even_usage_even_so(name: str) -> None:
    book = CODEBOOKS[name](CODES, D, usage_from_kmeans=True, dead_code_threshold=0.2)
    rare = 10 * torch.eye(D)[0]
    learn(book, uneven(rare))
    code = owner(book, rare)
    assert book.usage[code] * CODES == pytest.approx(0.16)  # dead, from the next update on
    learn(book, uneven(rare))
    assert book.usage[code] * CODES == pytest.approx(1)


def test_a_code_without_tokens_weighs_one_and_keeps_its_place() -> None:
    # six codes for three distinct tokens: three of them repeat a place, and no token takes those
    x = 10 * torch.eye(D)[:3]
    book = CODEBOOKS['ema'](M, D, usage_from_kmeans=True, dead_code_threshold=0.0)
    learn(book, x)
    torch.testing.assert_close(book.usage, torch.full((M,), 1 / 3))
    for _ in range(20):
        learn(book, x)
    # epsilon takes 1e-5 of a token from places: 1e-5 / (0.99^20 + 1e-5)
    torch.testing.assert_close(
        torch.cdist(book.codes(), x).min(dim=1).values, torch.zeros(M), rtol=0, atol=1e-3
    )


def test_shares_are_of_the_usable_tokens_of_the_sample() -> None:
    # codes 0 and 1 get three and one of four usable tokens; code 2 none, which counts as one
    sample = torch.tensor([[0.0], [0.1], [-0.1], [5.0], [5.0], [5.0]])
    usable = torch.tensor([True, True, True, True, False, False])
    shares = code_shares(sample, torch.tensor([[0.0], [5.0], [50.0]]), usable)
    assert shares.tolist() == [0.75, 0.25, 0.25]


@pytest.mark.parametrize('name', STARTED)
def test_a_state_that_has_started_keeps_its_counts(name: str) -> None:
    book, twin = (CODEBOOKS[name](CODES, D, usage_from_kmeans=True) for _ in range(2))
    learn(book, uneven(10 * torch.eye(D)[0]))
    # in place, as averages of weights: k-means is computed once more, and not taken over
    for ours, theirs in zip(twin.state_dict().values(), state(book).values(), strict=True):
        ours.copy_(theirs)
    x = torch.randn(50, D)
    learn(book, x)
    learn(twin, x)
    assert same(state(book), twin.state_dict())


# --- averages without a bias


@pytest.mark.parametrize('name', AVERAGED)
def test_corrected_averages_are_those_of_adam(name: str) -> None:
    # hidden <- d hidden + (1 - d) x from zero, and hidden / (1 - d^t); the first x of the others
    # than CVQ is the start, at even usage
    options = {} if name == 'cvq' else {'dead_code_threshold': 0.0}
    book = CODEBOOKS[name](M, D, ema_decay=0.9, ema_bias_correction=True, **options)
    hidden, sums, x = torch.zeros(M), torch.zeros(M, D), torch.randn(5, 60, D)
    for number in range(1, 6):
        if number == 1 and name != 'cvq':
            learn(book, x[0])
            share, of_code = torch.full((M,), 1 / M), book.codes() / M
        else:
            taken = torch.nn.functional.one_hot(book(x[number - 1]).indices, M).float()
            learn(book, x[number - 1])
            share, of_code = taken.mean(dim=0), taken.t() @ x[number - 1] / 60
        hidden = 0.9 * hidden + 0.1 * share
        sums = 0.9 * sums + 0.1 * of_code
        torch.testing.assert_close(book.usage, hidden / (1 - 0.9**number), rtol=1e-5, atol=1e-6)
        if name == 'ema':
            corrected = sums / (1 - 0.9**number)
            torch.testing.assert_close(book.token_sums, corrected, rtol=1e-5, atol=1e-6)


def test_the_second_average_is_nearly_the_mean_of_two_updates_known_answer() -> None:
    # t = 2: of the start 0.99 (1 - 0.99) / (1 - 0.99^2) = 0.99 / 1.99 = 0.4975 is left. Counts of
    # k-means stay, so that all codes go 0.5025 of a jump of 1, and not 0.01
    book = CODEBOOKS['ema'](CODES, D, usage_from_kmeans=True, ema_bias_correction=True)
    before = 10 * torch.eye(D)[0]
    learn(book, uneven(before))
    code = owner(book, before)
    learn(book, uneven(before - torch.eye(D)[0]))
    assert (before - book.codes()[code])[0].item() == pytest.approx(0.5025, abs=1e-4)


@pytest.mark.parametrize('name', STARTED)
def test_a_corrected_average_replaces_an_unused_code_after_69_averages(name: str) -> None:
    # t updates leave 0.99^(t - 1) (1 - 0.99) / (1 - 0.99^t) of even usage: 0.010094 at 69, and
    # 0.009893 < 1 % at 70, the start being the first; without the correction it takes 459
    book = CODEBOOKS[name](M, D, ema_bias_correction=True)
    x = torch.randn(10, D)
    indices = torch.arange(10) % (M - 1)
    learn(book, x)
    for _ in range(68):
        book.observe(x, indices)
        book.update()
    assert (book.usage[M - 1] * M).item() == pytest.approx(0.010094, rel=1e-3)
    book.observe(x, indices)
    book.update()
    torch.testing.assert_close(book.usage[M - 1], torch.tensor(1 / M))
    assert (book.codes()[M - 1] == x).all(dim=1).any()


@pytest.mark.parametrize('name', AVERAGED)
def test_a_correction_goes_on_where_a_checkpoint_left_it(name: str) -> None:
    config = VQMoEConfig.from_options(codebook=name, ema_bias_correction=True)
    book, other = (config.build_codebook(M, D) for _ in range(2))
    for _ in range(3):
        learn(book, torch.randn(50, D))
    assert book.ema_bias_correction
    other.load_state_dict(book.state_dict())
    x = torch.randn(50, D)
    learn(book, x)
    learn(other, x)
    assert same(state(book), other.state_dict())


@pytest.mark.parametrize('name', AVERAGED)
def test_an_update_without_tokens_counts_for_no_correction(name: str) -> None:
    book = CODEBOOKS[name](M, D, ema_bias_correction=True)
    learn(book, torch.empty(0, D))
    assert all(value.isfinite().all() for value in book.state_dict().values())
    assert book.updates == 0


# --- refused


@pytest.mark.parametrize(
    'options',
    [
        {'ema_decay_warmup': True, 'ema_bias_correction': True},
        {'ema_decay': 0.0, 'ema_bias_correction': True},
        {'ema_decay': 0.0, 'usage_from_kmeans': True},
        {'codebook': 'plain', 'ema_bias_correction': True},
        {'codebook': 'plain', 'usage_from_kmeans': True},
        {'codebook': 'cvq', 'usage_from_kmeans': True},
        {'codebook': 'gradient', 'dead_code_threshold': 0.0, 'usage_from_kmeans': True},
        {'codebook': 'gradient', 'dead_code_threshold': 0.0, 'ema_decay': 0.9},
        {'train_codebook': False, 'usage_from_kmeans': True},
        {'form': 'continuous', 'usage_from_kmeans': True},
    ],
    ids=str,
)
def test_options_of_averages_that_nothing_reads(options: dict[str, object]) -> None:
    *_, name = options
    with pytest.raises(ValueError, match=f'^{name}='):
        VQMoEConfig.from_options(**options)


@pytest.mark.parametrize('name', AVERAGED)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_averages_stay_float32_in_a_model_that_is_cast(name: str, dtype: torch.dtype) -> None:
    plain, built = CODEBOOKS[name](M, D), CODEBOOKS[name](M, D, dtype=dtype)
    books = [plain, copy.deepcopy(plain).to(dtype), built]
    for _ in range(300):
        x = torch.randn(50, D) + 5
        indices = plain(x).indices
        for book in books:
            book.observe(x, indices)
            book.update()
    # the same sums of the same tokens: every bit. In bfloat16 1 % of the way is below half of the
    # last place, 2^-9 = 0.2 %, as soon as an average is within 20 % of its aim: it stays there
    for book in books[1:]:
        for key, value in plain.named_buffers():
            assert torch.equal(book.get_buffer(key), value), key


@pytest.mark.parametrize('name', AVERAGED)
def test_averages_are_moved_and_become_no_less_exact(name: str) -> None:
    book = CODEBOOKS[name](M, D)
    learn(book, torch.randn(50, D))
    before = state(book)
    # 1 / 6 is no number of bfloat16: rounded on the way, it would come back as another
    assert torch.equal(book.bfloat16().usage, before['usage'])
    moved = copy.deepcopy(book).to('meta', torch.float16).usage
    assert moved.is_meta and moved.dtype == torch.float32
    assert copy.deepcopy(book).to('meta').to_empty(device='cpu').usage.dtype == torch.float32
    assert book.double().usage.dtype == torch.float64
