"""What a process of many knows before it trains, and what errors of theirs say."""

import os
import subprocess
import sys
import time

import pytest
import torch
from mmengine.config import Config
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vqmoe_vision.engine import processes
from vqmoe_vision.engine.processes import (
    OwnDataParallel,
    RankError,
    Unwrapped,
    check_batch,
    plain_error,
    together,
)

from ..groups import alone

SLURM = {'SLURM_PROCID': '3', 'SLURM_NTASKS': '8', 'SLURM_LOCALID': '1'}


@pytest.fixture(autouse=True)
def environment(monkeypatch) -> None:
    """One that a test may change: what it sets is taken back."""
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'TORCHELASTIC_RUN_ID', *SLURM):
        monkeypatch.setenv(name, '')
        monkeypatch.delenv(name)
    monkeypatch.setattr(processes, '_PATIENCE', 0.0)


def test_processes_without_a_launcher_are_refused(monkeypatch):
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'none')
    monkeypatch.setenv('WORLD_SIZE', '8')
    with pytest.raises(ValueError, match=r"--launcher='none' .*'pytorch'.* 8 "), together('none'):
        pass
    monkeypatch.setenv('WORLD_SIZE', '1')
    with together('none'):
        pass


def test_a_rank_is_named_in_its_error(monkeypatch, capsys):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RankError, match=r"3, ValueError\('mine'\)"), together('slurm'):
        print('not of the first')
        assert [os.environ[n] for n in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')] == ['3', '8', '1']
        raise ValueError('mine')
    # of a connection that is lost the first one speaks
    for rank, kind in (('3', SystemExit), ('0', RankError)):
        monkeypatch.setenv('SLURM_PROCID', rank)
        with pytest.raises(kind), together('slurm'):
            raise RuntimeError('Connection closed by peer')
    assert capsys.readouterr().out == ''


ORPHAN = """
import os, sys, time
from vqmoe_vision.engine import processes
os.environ.update(TORCHELASTIC_RUN_ID='none', RANK='0', WORLD_SIZE='1', LOCAL_RANK='0')
if child := os.fork():
    print(child, flush=True)
    time.sleep(0.5)
    os._exit(0)
with processes.together('pytorch'):
    time.sleep(60)
"""


def test_a_process_ends_with_the_torchrun_that_started_it():
    done = subprocess.run([sys.executable, '-c', ORPHAN], stdout=subprocess.PIPE, text=True)
    for _ in range(100):
        try:
            os.kill(int(done.stdout), 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError('it is an orphan')


def test_a_batch_is_not_multiplied_in_silence(monkeypatch):
    config, name = Config({'train_dataloader': {'batch_size': 8}}), 'train_dataloader.batch_size'
    monkeypatch.setattr(processes, 'get_world_size', lambda: 8)
    with pytest.raises(ValueError, match=rf'^{name}=8 .* 64 images'):  # 8 x 8
        check_batch(config, ())
    check_batch(config, {name: 8})
    check_batch(config, {'train_dataloader': {'batch_size': 8}})
    monkeypatch.setattr(processes, 'get_world_size', lambda: 1)
    check_batch(config, ())


class BiasUnused(torch.nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def test_parameters_without_a_gradient_are_one_line():
    with alone():
        model = DistributedDataParallel(BiasUnused(2, 2))
        model(torch.ones(2)).sum().backward()
        with pytest.raises(RuntimeError) as raised:
            model(torch.ones(2))
    error = plain_error(raised.value)
    assert isinstance(error, ValueError)
    assert str(error).startswith('find_unused_parameters=False: some parameters got no gradient')


@pytest.mark.parametrize('kind', [OwnDataParallel, Unwrapped])
def test_batch_norms_over_processes_are_those_of_each_on_a_cpu(kind, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr(processes, 'print_log', lambda line, logger: told.append(line))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4))
    names = list(model.state_dict())
    with alone():
        wrapped = kind(module=model)
        wrapped(torch.randn(2, 3, 4, 4)).sum().backward()
    assert [line[:48] for line in told] == ['sync_bn needs GPUs: as sync_bn=None on a CPU, wh']
    assert list(getattr(wrapped, 'module', wrapped).state_dict()) == names
