"""torch.export programs and ONNX files: same answers, any batch, chosen experts alone."""

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing import ProcessExitedException

from vqmoe_vision.models import export
from vqmoe_vision.models.export import Exportable, differences, export_onnx, load_exported
from vqmoe_vision.moe import METHODS, moe_layers
from vqmoe_vision.moe.routing import TopKRouter

from .. import mostly_long, needs_onnx, refused
from ..forked import spawn
from ..variants import VARIANTS
from .conftest import WITH_GATE, make, shaken

# Other kernels sum float32 in another order: a few 1e-7 of values near 1.
CLOSE = {'rtol': 1e-5, 'atol': 2e-6}
# Four patches and a class token: few enough tokens that images leave an expert out.
SMALL = {'img_size': 16, 'depth': 1, 'moe_layers': [0], 'embed_dim': 16, 'num_experts': 3}


@torch.no_grad()
def spoil_an_expert(model: nn.Module, images: Tensor) -> Tensor | None:
    """Gives NaN to the expert that most images do without; returns these images, None if none."""
    (layer,) = moe_layers(model).values()
    found = []
    for expert in range(layer.experts.num_experts):
        spoiled = copy.deepcopy(model)
        for parameter in moe_layers(spoiled).popitem()[1].experts.parameters():
            parameter[expert] = torch.nan
        found.append((spoiled, images[spoiled(images).isfinite().all(dim=1)]))
    spoiled, left = max(found, key=lambda pair: len(pair[1]))
    if len(left) < 8:
        return None
    model.load_state_dict(spoiled.state_dict())
    return left[:8]


@pytest.mark.parametrize('method', mostly_long(METHODS, 'vqmoe'))
def test_onnxruntime_gives_the_same_and_computes_no_expert_that_was_not_chosen(method, tmp_path):
    needs_onnx()
    model = make(method, **SMALL).eval()
    (layer,) = moe_layers(model).values()
    images = spoil_an_expert(model, torch.randn(512, 3, 16, 16))
    if images is None:  # every expert takes part in every image
        assert not isinstance(getattr(layer, 'router', None), TopKRouter)
        images = torch.randn(8, 3, 16, 16)
    run = load_exported(export_onnx(model, tmp_path / 'model.onnx'), threads=1)
    for batch in (1, 4, 8):
        (found,) = run(images[:batch])
        assert found.isfinite().all()
        torch.testing.assert_close(found, model(images[:batch]).detach(), **CLOSE)


@pytest.mark.parametrize('gate', [pytest.param('first', marks=pytest.mark.long), 'separate'])
def test_onnxruntime_runs_gated_experts(gate, tmp_path):
    needs_onnx()
    model, images = shaken(make('smoe', **SMALL, **WITH_GATE[gate])), torch.randn(4, 3, 16, 16)
    (found,) = load_exported(export_onnx(model, tmp_path / 'model.onnx'), threads=1)(images)
    torch.testing.assert_close(found, model(images).detach(), **CLOSE)


@pytest.mark.long
@pytest.mark.parametrize('variant', VARIANTS)
def test_every_variant_leaves(variant, tmp_path):
    needs_onnx()
    method, options = VARIANTS[variant]
    model = make(method, **{'depth': 2, **options}).eval()
    for name, leave in (('a.onnx', export_onnx), ('a.pt2', export.save_program)):
        run = load_exported(leave(model, tmp_path / name), threads=1)
        for difference in differences(model, run, (1, 4, 8)):
            assert difference.largest < 2e-6, (name, difference)


IMAGES = torch.arange(2304.0).view(3, 3, 16, 16).sin()


def run_elsewhere(file: Path, *statements: str) -> list[str]:
    """What statements print; they know `program`, `images`, which are `IMAGES`, and `extra`."""
    code = (
        'import sys, torch',
        'extra = {"about.json": ""}',
        'program = torch.export.load(sys.argv[1], extra_files=extra)',
        'images = torch.arange(2304.0).view(3, 3, 16, 16).sin()',
        *statements,
        'assert not any(name.startswith("vqmoe_vision") for name in sys.modules)',
    )
    command = [sys.executable, '-W', 'ignore', '-c', '\n'.join(code), file]
    return subprocess.check_output(command, text=True).splitlines()


def test_a_program_loads_where_this_package_is_not_imported(tmp_path):
    model = make('vqmoe', **SMALL)
    file = export.save_program(model, tmp_path / 'model.pt2')
    answers, about = run_elsewhere(
        file, 'print(program.module()(images).tolist())', 'print(extra["about.json"])'
    )
    expected = Exportable.of(model).run(IMAGES)[0]
    torch.testing.assert_close(torch.tensor(json.loads(answers)), expected, **CLOSE)
    assert json.loads(about) == {'channels': 'RGB', 'mean': [0.5] * 3, 'std': [0.5] * 3}


def state_of(model: nn.Module) -> list[tuple]:
    """Modes and switches of all modules, and where all tensors are."""
    switches = [(m.training, getattr(m, 'grad_checkpointing', None)) for m in model.modules()]
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [*switches, *((name, tensor.data_ptr()) for name, tensor in tensors)]


@pytest.mark.parametrize('method', mostly_long(METHODS, 'vqmoe', 'softmoe'))
def test_a_program_has_torchs_operators_alone_and_leaves_the_model_as_it_was(method, tmp_path):
    """As it is loaded again: torch checks it then, and what it wrote itself need not pass."""
    model = make(method, **SMALL).train()
    model.set_grad_checkpointing()
    before, values = state_of(model), copy.deepcopy(model.state_dict())
    program = torch.export.load(export.save_program(model, tmp_path / 'model.pt2'))
    targets = {str(node.target) for node in program.graph.nodes if node.op == 'call_function'}
    assert 'aten.linear.default' in targets
    assert {target for target in targets if 'vqmoe' in target} == set()
    assert state_of(model) == before
    torch.testing.assert_close(model.state_dict(), values, rtol=0, atol=0)
    # nor is a tensor of the tracing left in what layers hand to each other
    model.set_grad_checkpointing(False)
    images = torch.randn(7, 3, 16, 16)
    run, model = program.module(), model.eval()
    for batch in (1, 7):
        torch.testing.assert_close(run(images[:batch]), model(images[:batch]), **CLOSE)


def test_differences_tell_numbers_and_labels():
    model = Exportable(nn.Identity(), (2, 2, 2), ('pixels',))
    second = torch.tensor([0.0, 8.0])[:, None, None]  # a power of two, which rounds nothing away
    (found,) = differences(model, lambda images: [images + second], (3,))
    equal = int((model.images(3, seed=3).argmax(1) == 1).sum())
    assert 0 < equal < 12 and found.differing == 12
    assert str(found) == f'batch 3, pixels: {equal} of 12 predictions equal, largest difference 8'
    (spoiled,) = differences(model, lambda images: [images * torch.nan], (1,))
    assert str(spoiled).endswith('largest difference nan')


def write_and_die(_rank: int, target: Path) -> None:
    def save(file: Path) -> None:
        file.write_bytes(b'half')
        os.kill(os.getpid(), signal.SIGKILL)

    export.write_whole(target, save)


def test_a_kill_leaves_nothing_that_the_next_call_does_not_replace(tmp_path):
    target = tmp_path / 'model.pt2'
    for _ in range(2):
        with pytest.raises(ProcessExitedException):
            spawn(write_and_die, (target,), 1)
        assert len([*tmp_path.iterdir()]) == 1 and not target.exists()
    with export.scratch_beside(target) as scratch:
        refused('^out=.*model.pt2', export.write_whole, target, Path.touch)
        assert [*scratch.iterdir()] == []
    export.write_whole(target, lambda file: file.write_bytes(b'whole'))
    assert target.read_bytes() == b'whole' and [*tmp_path.iterdir()] == [target]


def test_without_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr('vqmoe_vision.models.export._PACKAGES', ('onnx_of_nobody',))
    with pytest.raises(ModuleNotFoundError, match=r'need onnx_of_nobody: pip install .*\[export\]'):
        export_onnx(make('smoe', **SMALL), tmp_path / 'model.onnx')


@pytest.mark.filterwarnings('ignore')  # torch deprecates it
@pytest.mark.parametrize('variant', VARIANTS)
def test_a_trace_answers_as_its_model(variant):
    method, options = VARIANTS[variant]
    model = make(method, **{**SMALL, **options}).eval()
    with torch.no_grad():  # as torch checks a trace, and `rotation_trick` is another graph without
        traced = torch.jit.trace(model, torch.randn(2, 3, 16, 16))
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(traced(images), model(images), **CLOSE)


@pytest.mark.filterwarnings('ignore')  # torch deprecates it
def test_a_trace_of_equal_groups_can_be_saved(tmp_path):
    model, images = make('softmoe', **SMALL).eval(), torch.randn(2, 3, 16, 16)
    torch.jit.save(torch.jit.trace(model, images), tmp_path / 'model.pt')
    torch.testing.assert_close(torch.jit.load(tmp_path / 'model.pt')(images), model(images))
