"""What a config may say of spreading a model, and gradients whose layouts differ."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import optimizer as optimizers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vqmoe_vision import collect_losses
from vqmoe_vision.engine import processes, sharded
from vqmoe_vision.engine.processes import OwnDataParallel, RankError, together
from vqmoe_vision.models.sharding import shard_model

from .. import cases, refused
from ..forked import spawn
from ..groups import alone, begin
from ..variants import VARIANTS


@cases(
    'options, processes, field',
    ({'expert': 2}, 2, 'parallel'),
    ({}, 1, 'parallel'),
    ({'param_dtype': 'float16'}, 2, 'parallel.param_dtype'),
    ({'state_dict_type': 'parts'}, 2, 'parallel.state_dict_type'),
)
def test_options_that_there_are_not(options, processes, field, monkeypatch):
    monkeypatch.setattr(sharded, 'get_world_size', lambda: processes)
    with pytest.raises(ValueError, match=rf'^{field}='):
        sharded.check_parallel(Config({'parallel': options}))
        sharded.ShardingHook(**options)


def wrapper(kind='SGD', clip_grad=None, loss_scaler=None, **options: Any) -> OptimWrapper:
    optimizer = create_optimizer_v2(nn.Linear(3, 2), kind, lr=0.1, **options)
    made: Any = OptimWrapper(optimizer, clip_grad=clip_grad)
    made.loss_scaler = loss_scaler
    return made


def test_optimizers_that_see_wholes():
    sharded.check_optim_wrapper(wrapper(clip_grad={'max_norm': 1.0}))
    # what mmengine's `AmpOptimWrapper` has, which needs a GPU
    sharded.check_optim_wrapper(wrapper(loss_scaler=torch.amp.GradScaler('cpu', enabled=False)))
    for bad, field in [
        (wrapper('lamb'), 'optimizer.type'),
        (wrapper(clip_grad={'type': 'value', 'clip_value': 1.0}), 'clip_grad.type'),
        (wrapper(loss_scaler=torch.amp.GradScaler('cpu')), 'loss_scale'),
        (wrapper('adamw', foreach=True), 'optimizer.foreach'),
    ]:
        refused(rf'^optim_wrapper\.{field}=', sharded.check_optim_wrapper, bad)


@pytest.mark.parametrize('kernels', [{}, {'foreach': True}, {'fused': True}, {'foreach': False}])
def test_a_file_keeps_the_kernels_of_a_model_that_is_not_spread(kernels):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), **kernels)
    expected = optimizer.state_dict()
    named = dict(model.named_parameters())
    sharded._exchange(optimizer, named, named)
    assert not any(optimizer.param_groups[0][kernel] for kernel in ('foreach', 'fused'))
    assert sharded.with_kernels(optimizer.state_dict(), optimizer) == expected


@cases('options', {}, {'norm_type': 'inf'}, {'norm_type': 1, 'error_if_nonfinite': True}, ids=str)
def test_clips_as_torch_does(options):
    one, other = (nn.Linear(3, 2) for _ in range(2))
    other.load_state_dict(one.state_dict())
    x = torch.randn(4, 3)
    norms = []
    for layer, clip in ((one, nn.utils.clip_grad_norm_), (other, sharded.clip_grad_norm)):
        layer(x).square().sum().backward()
        norms.append(clip(list(layer.parameters()), max_norm=0.1, **options))
    torch.testing.assert_close(*norms)
    torch.testing.assert_close(*([p.grad for p in each.parameters()] for each in (one, other)))


TINY = {'img_size': 16, 'patch_size': 8, 'depth': 1, 'embed_dim': 16, 'num_heads': 2}


class Mixtures(TorchDispatchMode):
    """Operators that are given floating tensors of several dtypes, which those of CUDA refuse."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.ndim > 0]
        dtypes = {x.dtype for x in tensors if x.is_floating_point()}
        if len(dtypes) > 1 and 'copy' not in func.name():
            self.found.add(func.name())
        return func(*args, **(kwargs or {}))


def make(method: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(f'vit_tiny_{method}', num_classes=4, moe_layers=[0], **TINY, **options)


def take_steps(rank: int, world: int, folder: Path) -> None:
    begin(rank, world, folder)
    # as on a GPU, where torch takes kernels for lists of tensors unasked
    optimizers._get_foreach_kernels_supported_devices = lambda: ['cpu', 'cuda']
    for name, (method, options) in VARIANTS.items():
        model = make(method, **options)
        optimizer = torch.optim.AdamW(model.parameters())
        before = dict(model.named_parameters())
        shard_model(model, param_dtype=torch.bfloat16)
        sharded._exchange(optimizer, before, dict(model.named_parameters()))
        with collect_losses(model) as collected:
            with Mixtures() as mixtures:
                logits = model(torch.randn(4, 3, 16, 16))
            collected.add({'task': F.cross_entropy(logits.float(), torch.arange(4))}, 4)
            collected.total().backward()
        optimizer.step()
        assert not mixtures.found, f'{name}: {mixtures.found}'
    dist.destroy_process_group()


def test_every_method_takes_a_step_in_bfloat16(tmp_path):
    spawn(take_steps, (2, tmp_path), nprocs=2)


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


def orphan(_rank: int, file: Path) -> None:
    os.environ.update(TORCHELASTIC_RUN_ID='none', RANK='0', WORLD_SIZE='1', LOCAL_RANK='0')
    if child := os.fork():
        file.write_text(str(child))
        time.sleep(0.5)
        os._exit(0)
    with together('pytorch'):
        time.sleep(60)


def test_a_process_ends_with_the_torchrun_that_started_it(tmp_path):
    spawn(orphan, (tmp_path / 'pid',), nprocs=1)
    child = int((tmp_path / 'pid').read_text())
    for _ in range(100):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError('it is an orphan')


class BiasUnused(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def test_parameters_without_a_gradient_are_one_line():
    with alone():
        model = DistributedDataParallel(BiasUnused(2, 2))
        model(torch.ones(2)).sum().backward()
        with pytest.raises(RuntimeError) as raised:
            model(torch.ones(2))
    said = repr(processes.plain_error(raised.value))
    assert "ValueError('find_unused_parameters=False: some parameters got no gradient" in said


@pytest.mark.parametrize('kind', [OwnDataParallel, processes.Unwrapped])
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


def test_gradients_lie_where_they_are_sent_from_unless_a_config_says_otherwise():
    with alone():
        for given, view in (({}, True), ({'gradient_as_bucket_view': False}, False)):
            assert OwnDataParallel(nn.Linear(2, 2), **given).gradient_as_bucket_view == view
