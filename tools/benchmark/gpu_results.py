"""`benchmark.py gpu`: whether trainings on a card learn what they shall, and wait for nothing.

Small models of every method take steps in many ways. What they have learned is held against the
same on the CPU, or against another way on the card.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn.parallel import DistributedDataParallel

from vqmoe_vision.engine.hooks import JointMovingAverage
from vqmoe_vision.engine.sharded import clip_grad_norm
from vqmoe_vision.models.sharding import shard_model
from vqmoe_vision.moe import METHODS, collect_losses, start_training, update_state
from vqmoe_vision.moe.codebooks.usage import random_integers

from .cells import Settings
from .gpu_card import spoil_memory
from .gpu_stages import outcome
from .gpu_steps import counted_waits, told_waits
from .networks import Comparison, Network
from .oracle import WrongResultError

SIZES: Mapping[str, Any] = {'depth': 2, 'embed_dim': 64, 'num_heads': 2, 'num_experts': 4}
STEPS = 3
RATE = 0.05
ROUNDING, LOW_LOSS = 2e-3, 0.05  # of the largest number of a tensor; of a loss in half precision


class Way(NamedTuple):
    device: str
    how: str = ''
    dtype: str = 'float32'


# how steps may be taken that give what those without it do, and by how much that may differ
ALIKE = {'again': 0.0, 'resumed': 0.0, 'compiled': ROUNDING, 'checkpointed': ROUNDING}
ALIKE |= {'DDP': ROUNDING, 'FSDP2': ROUNDING}


def ways(device: str) -> Iterator[tuple[Way, Way, float]]:
    """Each way, what it is held against, and by how much it may differ."""
    for how, allowed in ALIKE.items():
        yield Way(device, how), Way(device), allowed
    for how in ('', 'accumulated', 'averaged'):
        yield Way(device, how), Way('cpu', how), ROUNDING
    for dtype in ('bfloat16', 'float16'):
        yield Way(device, '', dtype), Way('cpu'), LOW_LOSS


def check_results(
    settings: Settings, sizes: Mapping[str, Any] = SIZES, leave_out: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """Trainings of every method in every way, and the draws of codebooks."""
    rows = [_draws(settings.device)]
    backend = 'nccl' if settings.device.startswith('cuda') else 'gloo'
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    for method, (way, reference, allowed) in product(METHODS, ways(settings.device)):
        if way.how in leave_out:
            continue
        with outcome('equal', method=method, way=' '.join(way)) as row:
            spoil_memory(settings.device)
            expected, found = learned(method, reference, sizes)[0], learned(method, way, sizes)
            if way.dtype != 'float32':  # tokens near a border go to other experts
                expected = {n: value for n, value in expected.items() if 'loss' in n}
            compare(found[0], expected, allowed)
            told, row['ok'] = told_waits(found[1], 1)
            row['result'] += f', {told}'
        rows.append(row)
    dist.destroy_process_group()
    return rows


def _draws(device: str) -> dict[str, Any]:
    """Random numbers of codebooks are functions of integers: a card has the bits of the CPU."""
    places, rows = (device, 'cpu'), torch.arange(2**32 - 2**16, 2**32)
    with outcome('equal to the bit', way='draws of codebooks') as row:
        for n in (0, 1, 2**20, 2**31):
            own = [random_integers(rows.to(p), torch.tensor(n, device=p), n).cpu() for p in places]
            compare({'draws': own[0]}, {'draws': own[1]}, 0.0)
    return row


def compare(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], allowed: float) -> None:
    """Raises where tensors differ by more than a share of the largest number; 0 is to the bit."""
    for name, truth in expected.items():
        if torch.equal(found[name], truth):
            continue
        value, exact = found[name].double(), truth.double()
        error, most = (value - exact).abs().max().item(), exact.abs().max().item()
        # what starts at zero has little but rounding after some steps
        if allowed == 0 or not error <= allowed * max(most, RATE * allowed):
            raise WrongResultError(f'{name} is {error:.2g} from a largest number of {most:.2g}')


class Trial:
    def __init__(self, method: str, way: Way, sizes: Mapping[str, Any]) -> None:
        # noise comes from the generator of a device
        known = METHODS[method].config.option_names()
        options: dict[str, Any] = dict(sizes)
        noisy = ('router_noise', 'load_weight', 'router_drop')
        options |= {name: 0.0 for name in noisy if name in known}
        spec = ','.join([f'vit_tiny_{method}', *(f'{name}={v}' for name, v in options.items())])
        low = way.dtype != 'float32'
        comparison = Comparison(models=(spec,), batch=8, img_size=64, dtype=way.dtype, amp=low)
        self.way, self.network = way, Network(spec, comparison, Settings(device=way.device))
        self.model: nn.Module = self.network.model.train()
        start_training(self.model, 10)
        self.network.model.set_grad_checkpointing(way.how == 'checkpointed')
        torch._dynamo.reset()
        around: dict[str, Callable[[nn.Module], Any]] = {
            'compiled': torch.compile,
            'DDP': partial(DistributedDataParallel, gradient_as_bucket_view=True),
            'FSDP2': shard_model,
        }
        self.call = around.get(way.how, lambda model: model)(self.model)
        if way.how == 'averaged':
            self.average = JointMovingAverage(self.model, momentum=0.3)
        # fused, it takes no part of a tensor, and otherwise a loss scale would wait
        kernels: Any = {'foreach': False} if way.how == 'FSDP2' else {'fused': True}
        self.optimizer = torch.optim.SGD(self.model.parameters(), RATE, momentum=0.9, **kernels)
        kind, scales = torch.device(way.device).type, way.dtype == 'float16'
        self.scaler = torch.amp.GradScaler(kind, init_scale=2.0**10, enabled=scales)
        self.losses: list[Tensor] = []

    def step(self, index: int) -> None:
        """Forward, backward, optimizer, and what learns without gradients."""
        network, parts = self.network, 1 + (self.way.how == 'accumulated')
        self.optimizer.zero_grad()
        halves = (whole.chunk(parts) for whole in (network.images[index], network.labels))
        for images, labels in zip(*halves, strict=True):
            with collect_losses(self.model, update_state=False) as collected:
                with network.autocast():
                    logits = self.call(images)
                loss = F.cross_entropy(logits.float(), labels) + collected.total()
                self.scaler.scale(loss / parts).backward()
            self.losses.append(loss.detach())
        self.scaler.unscale_(self.optimizer)
        clip_grad_norm(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        update_state(self.model)
        if self.way.how == 'averaged':
            self.average.update_parameters(self.model)

    def state(self) -> dict[str, Tensor]:
        """What was learned, on the CPU; in half precision the losses alone."""
        losses = {f'loss {i}': loss.cpu() for i, loss in enumerate(self.losses)}
        if self.way.dtype != 'float32':
            return losses
        whole = StateDictOptions(full_state_dict=True)
        state: dict[str, Any] = {**get_model_state_dict(self.model, options=whole)}
        if self.way.how == 'averaged':
            state |= {f'average {n}': v for n, v in self.average.module.state_dict().items()}
        return losses | {name: value.cpu().clone() for name, value in state.items()}


def learned(
    method: str, way: Way, sizes: Mapping[str, Any]
) -> tuple[dict[str, Tensor], Counter[str]]:
    """Losses and weights of some steps, and waits of the last."""
    trial = Trial(method, way, sizes)
    for index in range(STEPS):
        if index == 1 and way.how == 'resumed':
            before, trial = trial, Trial(method, way, sizes)
            trial.model.load_state_dict(before.model.state_dict())
            trial.optimizer.load_state_dict(deepcopy(before.optimizer.state_dict()))
            trial.losses = before.losses
        with counted_waits(way.device) as waits:
            trial.step(index)
    return trial.state(), waits
