"""A training step waits for nothing on its device: on the meta device there is nothing to read."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

from vqmoe_vision import collect_losses
from vqmoe_vision.moe import METHODS, use_kernel

from ..forked import spawn
from ..variants import VARIANTS
from ..watch import RAISED, READS, Watch
from .conftest import WITH_GATE, make

SMALL = {'embed_dim': 16, 'depth': 1, 'moe_layers': [0], 'num_experts': 4}


def train(model: nn.Module) -> None:
    """Two steps: codebooks start in the first, and a stage of one step is over in the second."""
    model.to('meta', torch.bfloat16).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images = torch.empty(4, 3, 32, 32, device='meta', dtype=torch.bfloat16)
    targets = torch.empty(4, device='meta', dtype=torch.int64)
    with use_kernel('grouped_mm'):
        for clips in (False, True):  # which takes as long as all else, and is torch's own
            optimizer.zero_grad()
            with Watch(), collect_losses(model) as collected:
                loss = F.cross_entropy(model(images).float(), targets) + collected.total()
                loss.backward()
                if clips:
                    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
            assert all(value.is_meta for value in collected.stats.values())


def test_a_training_step_reads_nothing_back(tiny_variant):
    model = tiny_variant(**SMALL)
    train(model)
    assert any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize('gate', WITH_GATE)
def test_gated_experts_read_nothing_back(gate):
    train(make('smoe', **SMALL, **WITH_GATE[gate]))


@pytest.mark.parametrize(
    'name, read',
    [*(('router', read) for read in READS), ('quantizer.codebook', 'item'), ('experts', 'item')],
)
def test_a_single_read_is_seen(name, read):
    def hook(_module: nn.Module, args: tuple[Tensor, ...], _answer: object) -> None:
        READS[read](args[0].detach())

    model = make('vqmoe', **SMALL)
    model.blocks[0].mlp.get_submodule(name).register_forward_hook(hook)
    with pytest.raises(RAISED):
        train(model)


def pretended() -> torch.device:
    """For the rest of the process, as torch cannot forget a kind of device."""
    backend_registration._setup_privateuseone_for_python_backend('pretended')
    module = torch.get_device_module('pretended')
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    return torch.device('pretended:0')


def run(model: Any, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
    """Two steps: codebooks start in the first, and a stage of one step is over in the second."""
    mode = FakeTensorMode()
    model.to(dtype)._apply(lambda t: FakeTensor(mode, t.detach().to('meta'), device))
    with mode:
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
        images = torch.empty(4, 3, 32, 32, device=device, dtype=dtype)
        targets = torch.zeros(4, device=device, dtype=torch.int64)
        for _ in range(2):
            optimizer.zero_grad()
            with collect_losses(model) as collected:
                loss = F.cross_entropy(model(images).float(), targets) + collected.total()
            loss.backward()
            optimizer.step()
            assert all(value.device == device for value in collected.stats.values())
        with torch.no_grad():
            assert model.eval()(images).device == device
            model.set_input_size(img_size=48)
            larger = torch.empty(2, 3, 48, 48, device=device, dtype=dtype)
            assert model(larger).device == device
    assert all(tensor.device == device for tensor in model.state_dict().values())


class Reads(TorchDispatchMode):
    """Counts copies to the host."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self.count += answer.device.type == 'cpu' != args[0].device.type
        return answer


def of_method(_rank: int, method: str, varied: bool) -> None:
    device = pretended()
    for name, (owner, options) in VARIANTS.items():
        if owner == method and bool(options) == varied:
            # the second is that of GPUs, for bfloat16
            for kernel, dtype in (('batched', torch.float32), ('grouped_mm', torch.bfloat16)):
                try:
                    with use_kernel(kernel), Reads() as reads:
                        run(make(method, **options, **SMALL), device, dtype)
                except Exception as error:
                    raise AssertionError(f'{name} by {kernel}') from error
                # the slow kernel reads one plan in each of two steps and two predictions
                assert (name, kernel) != ('smoe', 'batched') or reads.count == 4


@pytest.mark.parametrize('varied', [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize('method', METHODS)
def test_a_model_is_on_one_device(method, varied):
    spawn(of_method, (method, varied), 1)
