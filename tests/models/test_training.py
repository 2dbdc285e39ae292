"""Training: losses, gradients, optimizers, checkpoints of weights."""

import copy
import io
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import timm.task
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.task import TrainingTask
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from vqmoe_vision import collect_losses
from vqmoe_vision.models.timm_tasks import MoeClassificationTask, TrainsExperts, install
from vqmoe_vision.moe import METHODS, start_training

from .. import cases, mostly_long, refused
from ..variants import VARIANTS
from .conftest import make

TARGETS = torch.arange(4)
# Checkpointing repeats the very same operations, so nothing may differ but the order in which
# gradients of two passes are added.
SAME = {'rtol': 1e-6, 'atol': 1e-7}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def accumulated(model: nn.Module, batches: list[Tensor]) -> dict[str, Any]:
    """Loss, gradients, state and records after all forward passes and then one backward."""
    model.train()
    torch.manual_seed(1)  # router noise and drop path
    with collect_losses(model) as collected:
        loss = sum(F.cross_entropy(model(images), TARGETS) for images in batches)
        loss = loss + collected.total()
        loss.backward()
    seen = {'loss': loss.detach(), 'losses': collected.losses, 'stats': collected.stats}
    return seen | {'gradients': gradients(model), 'state': dict(model.named_buffers())}


@pytest.mark.parametrize('method, options', VARIANTS.values(), ids=VARIANTS)
def test_gradient_checkpointing_changes_nothing(method, options):
    batches = [torch.randn(4, 3, 32, 32) for _ in range(2)]
    # dropout has nothing to compute again
    drops = {} if 'recompute' in options else {'drop_path_rate': 0.3, 'proj_drop_rate': 0.1}
    plain = make(method, depth=2, init_values=0.1, **drops, **options)
    repeated = copy.deepcopy(plain)
    repeated.set_grad_checkpointing()
    for _ in range(2):
        expected = accumulated(plain, batches)
        torch.testing.assert_close(accumulated(repeated, batches), expected, **SAME)
        plain.zero_grad()
        repeated.zero_grad()


@cases(
    'method, options',
    ('vqmoe', {'preset': 'ema'}),
    ('vqmoe', {'preset': 'ema', 'form': 'discrete'}),
    ('vqmoe', {'codebook': 'cvq'}),
    ('stablemoe', {'stage1_steps': 1}),
)
@pytest.mark.parametrize('later', [False, True])
def test_backward_outside_the_block_is_an_error_in_timms_block(images, method, options, later):
    """Nothing behind the experts keeps a tensor there, so that the repeated pass ends early."""
    model = make(method, **options).train()
    model.set_grad_checkpointing()
    with collect_losses(model) as collected:
        loss = model(images).square().mean() + collected.total()
    message = r'call backward\(\) inside the collect_losses block'
    # the stage of StableMoE ends when the next block opens
    with collect_losses(model) if later or method == 'stablemoe' else nullcontext():
        if later:  # which does not hide it
            loss = loss + model(images).square().mean()
        refused(message, loss.backward, error=RuntimeError)


def decayed(model: nn.Module, **options) -> set[str]:
    groups = create_optimizer_v2(model, opt='adamw', weight_decay=0.1, **options).param_groups
    ids = {id(p) for group in groups if group['weight_decay'] > 0 for p in group['params']}
    return {name for name, p in model.named_parameters() if id(p) in ids}


def test_what_weight_decay_touches_in_a_moe_layer(tiny_variant):
    model = tiny_variant(depth=2)
    prefix = 'blocks.1.mlp.'
    touched = {n.removeprefix(prefix) for n in decayed(model) if n.startswith(prefix)}
    # timm knows a bias by its single dimension there, and those of experts have two
    assert decayed(model, layer_decay=0.8) == decayed(model)
    # Matrices, and no bias though experts stack theirs to matrices; what else is left alone is
    # named by its module, see the examples below.
    layer = model.blocks[1].mlp
    named = {n.removeprefix(prefix) for n in model.no_weight_decay() if n.startswith(prefix)}
    may_be_touched = {n for n, p in layer.named_parameters() if p.ndim > 1 and 'bias' not in n}
    assert {'experts.fc1.weight', 'experts.fc2.weight'} <= touched <= may_be_touched - named


LEFT_ALONE: dict[str, list[str]] = {
    'smoe': ['experts.fc1.bias'],
    'xmoe': ['router.log_temperature', 'router.expert_embed'],
    'stablemoe': ['router.expert_embed', 'router.distilled.expert_embed'],
    'softmoe': ['slot_embed', 'scale'],
    'softmoe-slot_norm=rms': ['slot_gain'],
    'vqmoe-codebook=cvq': ['quantizer.codebook.embed'],
    'vqmoe-codebook=simvq': ['quantizer.codebook.project.weight'],
}


@pytest.mark.parametrize('variant', LEFT_ALONE)
def test_what_weight_decay_leaves_alone(variant):
    method, _, option = variant.partition('-')
    name, _, value = option.partition('=')
    model = make(method, depth=2, **({name: value} if name else {}))
    names = {f'blocks.1.mlp.{each}' for each in LEFT_ALONE[variant]}
    assert names <= dict(model.named_parameters()).keys() - decayed(model)


def test_a_resumed_run_equals_an_uninterrupted_one(tiny_variant, train_step):
    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = tiny_variant(depth=2)
        start_training(model, 20)  # StableMoE freezes its router after two: in the second part
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, *steps: int) -> None:
        for i in steps:
            torch.manual_seed(i)
            train_step(model, optimizer, torch.randn(4, 3, 32, 32), torch.randint(10, (4,)))

    model, optimizer = start()
    train(model, optimizer, 0)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    train(model, optimizer, 1, 2)
    file.seek(0)
    resumed = start()
    for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    train(*resumed, 1, 2)
    torch.testing.assert_close(resumed[0].state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize('method', METHODS)
def test_a_pass_that_is_overtaken_sees_its_own_images_or_is_refused(method):
    model = make(method, depth=2).eval()
    slow_images, images = torch.randn(4, 3, 32, 32), 3 * torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected, expected_slow = model(images), model(slow_images)
    main, begun, overtaken = threading.get_ident(), threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        if threading.get_ident() != main:
            begun.set()
            assert overtaken.wait(60)

    model.blocks[0].register_forward_pre_hook(wait)
    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        slow = pool.submit(torch.no_grad()(model), slow_images)
        assert begun.wait(60)
        answer = model(images)
        overtaken.set()
    torch.testing.assert_close(answer, expected, rtol=0, atol=0)
    if METHODS[method].read_patches is not None:
        refused(r'^thread=', slow.result)
    else:
        torch.testing.assert_close(slow.result(), expected_slow, rtol=0, atol=0)


class Checkpointed(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False)


def in_blocks(model: nn.Module) -> nn.Module:
    model.blocks = nn.Sequential(*map(Checkpointed, model.blocks))
    return model


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('passes', [1, 2])
@pytest.mark.parametrize('checkpointed', [in_blocks, Checkpointed])
def test_gradients_are_the_same_or_refused(method, passes, checkpointed):
    batches = [torch.randn(4, 3, 32, 32) for _ in range(passes)]
    plain = make(method, depth=2)
    own = checkpointed(copy.deepcopy(plain))
    if passes == 2 and METHODS[method].read_patches is not None:
        message = r'use model\.set_grad_checkpointing\(\)'
        refused(message, accumulated, own, batches, error=RuntimeError)
    else:
        found, expected = (accumulated(model, batches)['gradients'] for model in (own, plain))
        torch.testing.assert_close([*found.values()], [*expected.values()], **SAME)


def run(model: nn.Module, wrap: Callable) -> list:
    model = copy.deepcopy(model).train()
    called, found = wrap(model), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        torch.manual_seed(step)  # the same images and the same router noise
        images = torch.randn(4, 3, 32, 32) + step  # other tokens, other experts
        model.zero_grad()
        with collect_losses(called) as collected:
            loss = F.cross_entropy(called(images), TARGETS) + collected.total()
            loss.backward()
        optimizer.step()
        found.append({'loss': loss.detach(), **gradients(model), **collected.losses})
        found.append(collected.stats)
    return found


@pytest.mark.parametrize('variant', mostly_long(VARIANTS, 'vqmoe', 'ecmoe'))
def test_compiled_training_equals_eager_and_compiles_once(variant):
    method, options = VARIANTS[variant]
    model = make(method, depth=2, init_values=0.1, **options)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend('aot_eager')
    expected = run(model, lambda m: m)
    found = run(model, lambda m: torch.compile(m, fullgraph=True, backend=counter))
    # the same operations in the same order, but for fused sums, which four steps carry on: by 4e-6
    # in preset `fine`, whose 32 experts have few tokens each
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=5e-6)
    assert counter.frame_count == 1


def make_task(model: nn.Module) -> Any:
    return MoeClassificationTask(model.train(), nn.CrossEntropyLoss(), verbose=False)


def test_a_task_trains_as_the_loop_of_the_readme(tiny_variant, train_step, images):
    model = tiny_variant(depth=2)
    twin = copy.deepcopy(model)
    torch.manual_seed(1)  # router noise
    expected = train_step(twin, None, images, TARGETS)
    task = make_task(model)
    torch.manual_seed(1)
    result = task(images, TARGETS)
    result['loss'].backward()
    torch.testing.assert_close(result['loss'].detach(), expected, rtol=0, atol=0)
    torch.testing.assert_close(gradients(model), gradients(twin), rtol=0, atol=0)
    task.update_ema()
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize('checkpointing', [False, True])
def test_state_moves_once_per_step_and_travels_in_checkpoints(checkpointing):
    options = {'vqmoe': {'preset': 'ema'}, 'stablemoe': {'stage1_steps': 2}}
    moved = {}
    for method, chosen in options.items():
        torch.manual_seed(0)
        task = make_task(make(method, depth=2, **chosen))
        task.trainable_module.set_grad_checkpointing(checkpointing)
        task.setup_ema(decay=0.5)
        optimizer = create_optimizer_v2(task.trainable_module, opt='adamw', lr=1e-2)
        for _ in range(3):  # what `train.py` does for one update, accumulating over two batches
            for _ in range(2):
                (task(torch.randn(4, 3, 32, 32), TARGETS)['loss'] / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
            task.update_ema(step=1)
        again = make_task(make(method, depth=2, **chosen))
        again.load_checkpoint_state(task.get_checkpoint_state()['state_dict'])
        moved |= again.trainable_module.state_dict()
        averages = task.get_checkpoint_state(ema=True)
        moved |= {f'ema.{k}': v for k, v in averages['state_dict_ema'].items()}
    book, router = 'blocks.1.mlp.quantizer.codebook', 'blocks.1.mlp.router.distilled'
    assert moved[f'{book}.updates'] == moved[f'{router}.steps'] == 3
    assert moved[f'{book}.started'] and moved[f'ema.{book}.started'] and moved[f'{router}.frozen']


ORIGINALS = {
    name: task
    for name, task in vars(timm.task).items()
    if isinstance(task, type) and issubclass(task, TrainingTask)
}


def test_install_leaves_nothing_of_timms_but_the_base():
    install()
    install()  # a second time changes nothing
    try:
        found = {name: getattr(timm.task, name) for name in ORIGINALS}
    finally:
        vars(timm.task).update(ORIGINALS)
    assert found.pop('TrainingTask') is TrainingTask
    assert found['ClassificationTask'] is MoeClassificationTask
    for name, task in found.items():
        assert task.__mro__[1:3] == (TrainsExperts, ORIGINALS[name]), name
