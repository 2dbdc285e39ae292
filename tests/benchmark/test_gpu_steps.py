"""How `make gpu-check` runs training steps, on the CPU, and with a card that waits."""

import re

import pytest
import torch

from benchmark import gpu_steps
from benchmark.cells import Settings
from benchmark.gpu_stages import PACKAGE
from vqmoe_vision.moe import METHODS
from vqmoe_vision.moe.kernels import grouped_linear, use_kernel
from vqmoe_vision.moe.routing import perplexity

SIZES = dict(depth=2, embed_dim=16, num_heads=2, patch_size=8)
CPU = Settings(device='cpu')


@pytest.fixture
def card_that_waits(monkeypatch):
    """Waiting is forbidden on the CPU as on a card: what asks for a number of a tensor fails."""
    forbidden = []

    def mode(value):
        forbidden[:] = [value] if value == 'error' else []

    def watched(read):
        def reads(tensor):
            if forbidden:
                raise RuntimeError('called a synchronizing CUDA operation\nin item')
            return read(tensor)

        return reads

    monkeypatch.setattr(torch.cuda, 'get_sync_debug_mode', lambda: 0)
    monkeypatch.setattr(torch.cuda, 'set_sync_debug_mode', mode)
    for name in ('item', 'tolist'):
        monkeypatch.setattr(torch.Tensor, name, watched(getattr(torch.Tensor, name)))
    return forbidden


def test_every_method_takes_steps_and_one_that_waits_is_found(card_that_waits):
    rows = gpu_steps.check_methods(CPU, SIZES, 32)
    assert len(rows) == len(METHODS) + 1 and all(row['ok'] for row in rows)
    assert 'cpu has no waits' in rows[0]['result']
    with gpu_steps.waiting_forbidden('cuda'):
        assert card_that_waits == ['error']
        with pytest.raises(RuntimeError, match='synchronizing'):
            torch.ones(()).item()
    assert card_that_waits == []
    row = gpu_steps._row('step', lambda: lambda index: torch.ones(()).item(), CPU, False)
    assert row['ok']  # the CPU has nothing to wait for


@pytest.mark.parametrize('backward', [False, True])
def test_where_a_step_waits_is_said(card_that_waits, backward):
    x, weight, ends = torch.ones(2, 4), torch.ones(2, 4, 4), torch.tensor([1, 2]).int()
    with use_kernel('batched'):
        out = grouped_linear(x.requires_grad_(), weight, None, ends)

    def step(index):
        if backward:
            out.sum().backward(retain_graph=True)
        else:
            perplexity(torch.ones(2))

    object.__setattr__(settings := Settings(device='cpu'), 'device', 'cuda')
    row = gpu_steps._row('step', lambda: step, settings, may_wait=True)
    assert (row['result'], row['ok']) == (
        'runs; experts wait, as their kernel does on this card',
        True,
    )
    row = gpu_steps._row('step', lambda: step, settings, may_wait=False)
    result, _, place = row['result'].rpartition(' (')
    assert (result, row['ok']) == ('RuntimeError: called a synchronizing CUDA operation', False)
    where = 'kernels/cpu' if backward else 'routing'
    file, line = place.rstrip(')').split(':')
    assert file == f'vqmoe_vision/moe/{where}.py'
    lines = (PACKAGE.parent / file).read_text().splitlines()
    assert ('.tolist()' if backward else '.item()') in lines[int(line) - 1]


@pytest.mark.parametrize('task', gpu_steps.CONFIGS)
def test_configs_are_found_from_anywhere(monkeypatch, tmp_path, task):
    pytest.importorskip('mmseg')
    monkeypatch.chdir(tmp_path)

    def stop(config, device, waits):
        raise FloatingPointError(config.train_dataloader.dataset.type)

    monkeypatch.setattr(gpu_steps, '_train', stop)
    row = gpu_steps._config_row(task, {}, CPU)
    assert not row['ok'] and re.match('FloatingPointError: (digits|DigitScenes) ', row['result'])
