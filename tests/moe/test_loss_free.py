"""Loss-free balancing: what a bias chooses, and how counts of passes and processes move it."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from vqmoe_vision.moe import collect_losses, update_state
from vqmoe_vision.moe.experts import Experts
from vqmoe_vision.moe.layer import RoutedMlp
from vqmoe_vision.moe.methods.smoe import SMoEConfig, SMoERouter
from vqmoe_vision.moe.methods.xmoe import XMoEConfig, XMoERouter

from ..forked import spawn
from ..groups import begin
from .conftest import D, E

QUIET = {'router_noise': 0.0, 'importance_weight': 0.0, 'load_weight': 0.0}
METHODS = {
    'smoe': (SMoERouter, SMoEConfig, {**QUIET, 'top_k': 1}),
    'smoe-sigmoid': (
        SMoERouter,
        SMoEConfig,
        {'preset': 'sigmoid', 'top_k': 1, 'renormalize': False, 'num_shared_experts': 1},
    ),
    'xmoe': (XMoERouter, XMoEConfig, {'balance_weight': 0.0}),
    'xmoe-sigmoid': (XMoERouter, XMoEConfig, {'gate': 'sigmoid', 'renormalize': True, 'top_k': 2}),
}
every_method = pytest.mark.parametrize('method', METHODS)
WORLD = 2


def make(method: str = 'smoe', rate: float = 0.1) -> RoutedMlp:
    router, config, options = METHODS[method]
    torch.manual_seed(0)
    options = {'num_experts': E, 'bias_update_rate': rate, **options}
    made = router(D, config.from_options(**options))
    nn.init.normal_(next(iter(made.parameters())), std=0.5)
    return RoutedMlp(made, Experts(E, D, D))


def tokens(seed: int, number: int = 40) -> Tensor:
    return torch.randn(number, 1, D, generator=torch.Generator().manual_seed(seed))


def collect(layer: RoutedMlp, *passes: Tensor) -> RoutedMlp:
    for x in passes:
        with torch.no_grad(), collect_losses(layer, update_state=False):
            layer(x)
    return layer


def test_a_bias_moves_by_the_sign_of_the_error_known_answer():
    # tokens along the axes of four experts, 3, 1, 1 and 0 of them: the mean is 5 / 4, so that the
    # first is over it and the others below: -0.1, +0.1, +0.1, +0.1
    layer = make()
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(E, D))
    x = torch.eye(D)[[0, 0, 0, 1, 2]][:, None]
    with collect_losses(layer):
        layer(x)
    expected = torch.tensor([-0.1, 0.1, 0.1, 0.1])
    torch.testing.assert_close(layer.router.choice_bias, expected)
    # softmax of (1, 0, 0, 0) is 0.475 and three times 0.175: a bias of 0.31 on the last one makes
    # 0.485, which is chosen, and its weight stays 0.175
    layer.router.choice_bias.copy_(torch.tensor([0.0, 0.0, 0.0, 0.31]))
    routing = layer.eval().router(x[:1, 0])
    assert routing.indices.tolist() == [[3]]
    assert routing.weights.item() == pytest.approx(0.175, abs=1e-3)


@every_method
def test_a_bias_evens_a_load_that_is_uneven(method):
    layer, x = make(method, rate=0.002), tokens(0, 400)
    excess = []
    for _ in range(300):
        with torch.no_grad(), collect_losses(layer) as collected:
            layer(x + 2)  # a common mean: some experts win more
        excess.append(collected.stats['/load'].max().item() - 1 / E)
    assert excess[0] > 0.05 and sum(excess[-20:]) / 20 < excess[0] / 2


def test_passes_of_an_update_count_together():
    parts = [tokens(seed) for seed in range(3)]
    apart, whole = collect(make(), *parts), collect(make(), torch.cat(parts))
    assert torch.equal(apart.observed['counts'], whole.observed['counts'])
    update_state(apart)
    assert apart.observed == {} and apart.router.choice_bias.abs().max() > 0


def test_what_waits_goes_into_a_checkpoint_and_an_error_forgets_it():
    straight, stopped = collect(make(), tokens(0)), collect(make(), tokens(0))
    resumed = make()
    resumed.observed = copy.deepcopy(stopped.observed)
    for layer in (straight, resumed):
        update_state(collect(layer, tokens(1)))
    assert torch.equal(straight.router.choice_bias, resumed.router.choice_bias)
    with pytest.raises(ZeroDivisionError), collect_losses(resumed):
        resumed(tokens(2))
        raise ZeroDivisionError
    assert resumed.observed == {}


def biases(rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """After three steps, in the second of which the second process has no tokens."""
    found = {}
    for method in METHODS:
        layer = make(method)
        for step in range(3):
            x = tokens(step)
            x = x[::WORLD] if step == 1 else x[rank::world]
            update_state(collect(layer, x[:0] if step == 1 and rank else x))
        found[method] = layer.router.choice_bias
    return found


def run_rank(rank: int, folder: str) -> None:
    begin(rank, WORLD, folder)
    torch.save(biases(rank, WORLD), f'{folder}/{rank}.pt')
    dist.destroy_process_group()


def test_two_processes_move_one_bias_by_the_tokens_of_both(tmp_path):
    spawn(run_rank, args=(str(tmp_path),), nprocs=WORLD)
    for rank in range(WORLD):
        torch.testing.assert_close(torch.load(tmp_path / f'{rank}.pt'), biases(), rtol=0, atol=0)
