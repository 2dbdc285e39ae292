"""torch.compile; torch.export is in test_export.py."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from vqmoe_vision import collect_losses


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(
    model: nn.Module,
    steps: int,
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    amp: bool = False,
) -> list[dict[str, Tensor]]:
    """Train a copy of `model`; loss, gradients and statistics of each step."""
    model = copy.deepcopy(model).train()
    called = wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for step in range(steps):
        torch.manual_seed(step)  # the same images and the same router noise
        images = torch.randn(4, 3, 32, 32) + step  # other tokens, other experts
        model.zero_grad()
        with collect_losses(called) as collected:
            with torch.autocast('cpu', torch.bfloat16, enabled=amp):
                logits = called(images)
            loss = F.cross_entropy(logits.float(), torch.arange(4)) + collected.total()
            loss.backward()
        optimizer.step()
        learned = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        found.append({'loss': loss.detach(), **learned, **collected.losses, **collected.stats})
    return found


def test_compiled_training_equals_eager_and_compiles_once(tiny) -> None:
    model = tiny(depth=2, init_values=0.1)
    counter = CompileCounterWithBackend('aot_eager')
    expected = run(model, 4)
    found = run(model, 4, lambda m: torch.compile(m, fullgraph=True, backend=counter))
    # the same operations in the same order, but for fused sums
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert counter.frame_count == 1
