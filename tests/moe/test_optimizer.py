"""Optimizers that look at a tensor as a whole: an expert is a matrix of its own for them."""

import copy

import pytest
import torch
from timm.optim import Lamb, create_optimizer_v2, list_optimizers
from torch import nn

from vqmoe_vision.moe.collect import collect_losses
from vqmoe_vision.moe.experts import StackedLinear
from vqmoe_vision.moe.optimizer import check_optimizer, mixes_experts, per_expert

from .. import refused

# LAMB and the like start at a width and a batch that is theirs; 16 x 24 is what Muon orthogonalises
E, OUT, IN = 4, 24, 16
# These need CUDA, or a gradient that was made with create_graph.
ELSEWHERE = ('bnb', 'fused', 'adahessian')
OPTIMIZERS = [name for name in list_optimizers() if not name.startswith(ELSEWHERE)]
SOME = ['lamb', 'lars', 'muon', 'cadamw', 'mars']


class Separate(nn.Module):
    """The experts of a `StackedLinear` as matrices and vectors of their own."""

    def __init__(self, stacked: StackedLinear) -> None:
        super().__init__()
        for name, parameter in stacked.named_parameters():
            parts = [nn.Parameter(part.clone()) for part in parameter.detach()]
            setattr(self, name, nn.ParameterList(parts))

    def stack(self, name: str) -> torch.Tensor:
        return torch.stack(list(getattr(self, name)))


def make(model: nn.Module, name: str) -> torch.optim.Optimizer:
    return create_optimizer_v2(model, opt=name, lr=0.05, weight_decay=0.01)


def pair(name: str) -> tuple:
    stacked = StackedLinear(E, IN, OUT)
    nn.init.normal_(stacked.weight)
    nn.init.normal_(stacked.bias)
    separate = Separate(stacked)
    return stacked, make(stacked, name), separate, make(separate, name)


def step(stacked, optimizer, separate, reference, scale: float = 1.0) -> None:
    """One step of both with the same gradients, of very different size from expert to expert."""
    sizes = scale * torch.tensor([1.0, 0.1, 3.0, 0.01])[torch.randperm(E)]
    for name, parameter in stacked.named_parameters():
        parameter.grad = torch.randn(parameter.shape) * sizes.view(E, *[1] * (parameter.ndim - 1))
        for part, grad in zip(getattr(separate, name), parameter.grad, strict=True):
            part.grad = grad.clone()
    for each in (optimizer, reference):
        torch.manual_seed(1)  # some draw random numbers, as many for either
        each.step()


def assert_equal(stacked, separate) -> None:
    for name, parameter in stacked.named_parameters():
        # the same operations on the same numbers; in batches or not, which may round differently
        torch.testing.assert_close(parameter.detach(), separate.stack(name), rtol=1e-5, atol=1e-6)


# torch warns of options that timm sets
@pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::FutureWarning')
@pytest.mark.parametrize('name', OPTIMIZERS)
@torch.compiler.set_stance('force_eager')  # Kron compiles its steps for half a minute
def test_every_optimizer_of_timm_updates_an_expert_as_a_matrix_or_is_refused(name):
    case = pair(name)
    if mixes_experts(case[1]):
        match = rf'optimizer={type(case[1]).__name__} is not possible.*per_expert'
        with pytest.raises(ValueError, match=match), collect_losses(case[0], case[1]):
            pass
        per_expert(case[1], case[0])
    for scale in (1.0, 10.0, 1.0, 100.0):
        step(*case, scale)
    assert_equal(case[0], case[2])


@pytest.mark.parametrize('name', ['LARS', 'NovoGrad', 'Shampoo', 'SOAP', 'Own'])
def test_optimizers_of_others_are_known_by_name_and_by_base(name):
    stacked = StackedLinear(E, IN, OUT)
    kind = type(name, (Lamb if name == 'Own' else torch.optim.SGD,), {})
    optimizer = kind(stacked.parameters(), lr=0.1)
    refused(f'optimizer={name} is not possible', check_optimizer, optimizer, stacked)


def test_the_experts_of_one_model_do_not_teach_those_of_another():
    models = nn.ModuleList([StackedLinear(E, IN, OUT) for _ in range(2)])
    optimizer = make(models, 'lamb')
    for _ in range(2):  # to be taught twice is to be taught once
        per_expert(optimizer, models[0])
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    refused('Lamb', check_optimizer, optimizer, models)
    check_optimizer(per_expert(optimizer, models[1]), models)


@pytest.mark.parametrize('name', ['adamw', *SOME])
def test_a_resumed_optimizer_goes_on_as_if_never_stopped(name):
    torch.manual_seed(0)
    first = pair(name)
    per_expert(first[1], first[0])
    for _ in range(3):
        step(*first)
    resumed = copy.deepcopy(first[0])
    optimizer = per_expert(make(resumed, name), resumed)
    optimizer.load_state_dict(copy.deepcopy(first[1].state_dict()))
    case = (resumed, optimizer, *first[2:])
    for _ in range(2):
        step(*case)
    assert_equal(resumed, first[2])


def test_a_lookahead_is_not_taught():
    model = StackedLinear(E, IN, OUT)
    check_optimizer(make(model, 'lookahead_adamw'), model)
    for refuse in (check_optimizer, per_expert):
        refused(r"optimizer='Lookahead'", refuse, make(model, 'lookahead_lamb'), model)


def test_a_model_that_was_moved_is_updated_where_it_is_now():
    model = StackedLinear(E, IN, OUT)
    optimizer = per_expert(make(model, 'lamb'), model)
    model.double()  # other memory behind the same parameters
    before = model.weight.detach().clone()
    model.weight.grad = torch.randn(E, OUT, IN, dtype=torch.float64)
    model.bias.grad = torch.zeros(E, OUT, dtype=torch.float64)
    optimizer.step()
    assert not torch.equal(model.weight, before)


def test_a_closure_is_refused():
    """Its gradients would be those of whole parameters."""
    model = StackedLinear(E, IN, OUT)
    optimizer = per_expert(make(model, 'lamb'), model)
    for args, kwargs in (((print,), {}), ((), {'closure': print})):
        refused(r'^closure=', optimizer.step, *args, **kwargs)
