"""What a process of many knows before it meets the others, and what errors of theirs say."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mmengine.config import Config
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vqmoe_vision.engine import process_group
from vqmoe_vision.engine.launchers import check_alone, multiplied_batch, place
from vqmoe_vision.engine.process_group import (
    FilledInDataParallel,
    Unwrapped,
    claim_gpu,
    group_options,
)
from vqmoe_vision.engine.processes import Processes
from vqmoe_vision.engine.rank_errors import plain_error

from ..groups import alone

SLURM = ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID')


def test_a_launcher_that_did_not_start_the_process_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ('SLURM_PROCID', 'RANK'):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        ValueError, match=r"slurm is for processes that 'srun python' has started: SLURM_P"
    ):
        place('slurm')


def test_processes_without_a_launcher_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {'TORCHELASTIC_RUN_ID': 'none', 'WORLD_SIZE': '8', 'RANK': '0'}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match='torchrun has started 8 processes: --launcher pytorch'):
        check_alone()
    monkeypatch.setenv('WORLD_SIZE', '1')
    check_alone()


def test_slurm_names_the_first_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv('PATH', str(tmp_path))  # no scontrol
    for name, value in zip(SLURM, ('3', '8', '1'), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv('MASTER_ADDR', raising=False)
    monkeypatch.setenv('SLURM_STEP_NODELIST', 'node[1-2]')
    with pytest.raises(ValueError, match='MASTER_ADDR'):
        place('slurm')
    monkeypatch.setenv('SLURM_STEP_NODELIST', 'node7')
    assert place('slurm') == (3, 8, 1)
    assert (os.environ['MASTER_ADDR'], os.environ['MASTER_PORT']) == ('node7', '29500')
    monkeypatch.setenv('SLURM_PROCID', '8')
    with pytest.raises(ValueError, match='SLURM_PROCID=8 must be below SLURM_NTASKS=8'):
        place('slurm')
    monkeypatch.setenv('SLURM_NTASKS', 'many')
    with pytest.raises(ValueError, match='SLURM_NTASKS=many must be a whole number'):
        place('slurm')


def test_a_batch_is_not_multiplied_in_silence() -> None:
    config, name = Config({'train_dataloader': {'batch_size': 8}}), 'train_dataloader.batch_size'
    said = multiplied_batch(config, 8, ())
    # 8 x 8 = 64, and 8 / 8 = 1; no batch of three processes is 8
    assert said.startswith(f'{name}=8 ') and '64 images' in said and f'{name}=1 holds 8' in said
    assert 'holds' not in multiplied_batch(config, 3, ())
    assert multiplied_batch(config, 1, ()) == multiplied_batch(config, 8, {name: 8}) == ''
    assert multiplied_batch(config, 8, {'train_dataloader': {'batch_size': 8}}) == ''


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'backend': 'mpi'}, r"backend='mpi' is not possible on device cpu, which has gloo"),
        ({'timeout': 0}, r'timeout=0 must be a number of seconds above 0'),
        ({'timeout': True}, r'timeout=True must be'),
        ({'port': 1}, r'dist_cfg\.port=1 is not supported; it takes backend and timeout'),
    ],
)
def test_options_of_the_group_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_options(options, 'cpu')


def test_the_device_decides_the_backend() -> None:
    assert group_options({}, 'cpu') == ('gloo', 1800)
    assert group_options({'timeout': 60}, 'cuda') == ('nccl', 60)
    assert group_options({'backend': 'gloo'}, 'cuda') == ('gloo', 1800)
    assert group_options({'backend': 'nccl'}, 'cpu') == ('gloo', 1800)  # as configs of mmseg say


def test_every_process_has_a_gpu() -> None:
    store = dist.HashStore()
    claim_gpu(store, 'GPU-1', 0)
    claim_gpu(store, 'GPU-2', 1)
    with pytest.raises(ValueError, match=r'LOCAL_RANK=2 has no GPU of its own: .* has GPU-1'):
        claim_gpu(store, 'GPU-1', 2)


class BiasUnused(torch.nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def test_parameters_without_a_gradient_are_one_line() -> None:
    with alone():
        model = DistributedDataParallel(BiasUnused(2, 2))
        model(torch.ones(2)).sum().backward()
        with pytest.raises(RuntimeError) as raised:
            model(torch.ones(2))
    error = plain_error(raised.value, 60)
    assert isinstance(error, ValueError)
    assert 'got no gradient' in str(error) and 'find_unused_parameters=True' in str(error)


@pytest.mark.parametrize('kind', [FilledInDataParallel, Unwrapped])
def test_batch_norms_over_processes_are_those_of_each_on_a_cpu(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(process_group, 'print_log', lambda line, logger: told.append(line))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4))
    names = list(model.state_dict())
    with alone():
        wrapped = kind(module=model)
        wrapped(torch.randn(2, 3, 4, 4)).sum().backward()
    assert [line[:48] for line in told] == ['sync_bn needs GPUs: as sync_bn=None on a CPU, wh']
    assert list(getattr(wrapped, 'module', wrapped).state_dict()) == names


def test_a_restart_knows_which_checkpoints_are_older(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
    agent = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(store.port)}
    rank = {'RANK': '0', 'WORLD_SIZE': '1', 'LOCAL_RANK': '0'}
    for name, value in {**agent, **rank, 'TORCHELASTIC_USE_AGENT_STORE': 'True'}.items():
        monkeypatch.setenv(name, value)
    known = []
    for attempt, newest in enumerate([5.0, 7.0]):
        monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', str(attempt))
        processes = Processes('pytorch')
        known.append(processes.newest_before(newest))
        processes.leave()
    assert known == [5.0, 5.0]  # what the first attempt has written is newer
