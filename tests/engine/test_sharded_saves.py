"""Checkpoints in parts: written by two processes, read by one, damaged, orphaned and forged."""

import io
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial, reduce
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_module, distribute_tensor

from vqmoe_vision.engine import checkpoint
from vqmoe_vision.engine import checkpoint_files as files
from vqmoe_vision.engine.checkpoint import load_from_local, read_content, read_state
from vqmoe_vision.engine.checkpoint_files import SaveError
from vqmoe_vision.engine.publish import publish_checkpoint
from vqmoe_vision.engine.sharded import ShardingHook, whole_state, write_parts
from vqmoe_vision.engine.step_values import NonFiniteError, check_own_parts, check_weights
from vqmoe_vision.models.sharding import shard_model
from vqmoe_vision.models.weights import IN_PARTS

from .. import cases, refused
from ..damaged import Call, flip
from ..forked import spawn
from ..groups import alone, begin
from ..models.test_sharding import make, train
from ..soak.kinds import same

OWN, PIECES = 'a run', ('state_dict', 'optimizer')
READERS = read_content, read_state, partial(load_from_local, map_location='cpu')
FILE = 'shard-0000{}-model-00001-of-00001.safetensors'


def content_of(state: dict, iteration: int) -> dict[str, Any]:
    meta = {'epoch': 0, 'iter': iteration, 'saved_at': time.time()}
    return {'meta': meta, 'message_hub': {'runtime_info': {files.RUN: OWN}}, **state}


def save(rank: int, world: int, expert_processes: int, folder: Path) -> None:
    """Two checkpoints in parts, and what a whole file would have."""
    begin(rank, world, folder)
    model = shard_model(make('vqmoe', embed_dim=32), expert_processes)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    for iteration in (1, 2):
        train(model, optimizer, steps=1)
        state = {'state_dict': model.state_dict(), 'optimizer': optimizer.state_dict()}
        check_own_parts(model, iteration, state['state_dict'])
        left = write_parts(folder / f'iter_{iteration}.pth', state, OWN)
        whole = whole_state(state)
        if rank == 0:
            torch.save(content_of(left, iteration), folder / f'iter_{iteration}.pth')
            torch.save(content_of(whole, iteration), folder / f'whole_{iteration}')
    refuse(model, state, rank, folder)
    dist.destroy_process_group()


def refuse(model: Any, state: dict, rank: int, folder: Path) -> None:
    """What one process finds ends the save in all of them."""
    name, spread = next((n, p) for n, p in model.named_parameters() if isinstance(p, DTensor))
    if rank == 1:
        spread.to_local().data.view(-1)[0] = torch.nan
    else:  # before it writes, when the other would not answer
        check_weights(model, 3)
    with pytest.raises(NonFiniteError, match=f'parameter {name} became nan or infinite at itera'):
        check_own_parts(model, 3, state['state_dict'])
    # as on two machines whose work dirs have the same name
    own = folder / 'elsewhere' if rank == 1 else folder
    own.mkdir(exist_ok=True)
    if rank:
        write_parts(own / 'iter_3.pth', state, OWN)
    else:  # which ends the run
        with pytest.raises(SaveError, match=r'shard-00002-.* as rank 1 .*: all processes have to'):
            write_parts(own / 'iter_3.pth', state, OWN)
        assert not [*own.glob('*iter_3*'), *own.glob('.*iter_3*')]
    dist.barrier()
    if rank == 1:
        shutil.rmtree(own)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    with pytest.raises(SaveError, match=r'iter_3.pth could not be written \(rank 1: File too larg'):
        write_parts(folder / 'iter_3.pth', state, OWN)


LAYOUTS = [
    pytest.param((2, 1), id='2', marks=pytest.mark.long),
    # experts are cut along one dimension by two meshes
    pytest.param((2, 2), id='2-experts'),
    pytest.param((4, 2), id='4-experts', marks=pytest.mark.long),
]


@pytest.fixture(scope='module', params=LAYOUTS)
def saved(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('saved')
    world, expert_processes = request.param
    spawn(save, (world, expert_processes, folder), nprocs=world)
    return folder


@pytest.fixture
def work(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / 'work')


def test_what_is_read_is_what_a_whole_file_has(saved):
    file = saved / 'iter_2.pth'
    expected = torch.load(saved / 'whole_2', weights_only=True)
    found = read_content(str(file))
    assert same([found[p] for p in PIECES], [expected[p] for p in PIECES])
    assert [*found['state_dict']] == [*expected['state_dict']] and found.keys() == expected.keys()
    assert same(read_state(str(file)), expected['state_dict'])
    assert same(load_from_local(str(file), 'cpu')['optimizer'], expected['optimizer'])


def test_published_in_one_piece(saved, tmp_path):
    file = publish_checkpoint(str(saved / 'iter_2.pth'), str(tmp_path / 'out.pth'))
    content = torch.load(file, weights_only=True)
    assert same(content['state_dict'], read_state(str(saved / 'iter_2.pth')))
    assert content.keys() == {'meta', 'state_dict'}


@pytest.mark.parametrize('part', [FILE.format(1), FILE.format(2)])
@cases(
    'harm',
    lambda path: flip(path, path.stat().st_size // 2),
    lambda path: path.write_bytes(path.read_bytes()[:-1]),
    Path.unlink,
)
def test_a_damaged_part_is_passed_over(work, part, harm):
    harm(work / 'iter_2.1.sharded' / part)
    said: list[str] = []
    assert files.newest_checkpoint(work, said.append) == work / 'iter_1.pth'
    (line,) = said
    assert part in line and '\n' not in line
    for read in READERS:
        refused(part, read, str(work / 'iter_2.pth'))


def folders(work: Path) -> list[str]:
    return sorted(path.name for path in work.iterdir() if path.is_dir())


def test_what_a_kill_leaves_is_removed(work):
    both = ['iter_1.1.sharded', 'iter_2.1.sharded']
    assert folders(work) == both
    for name in ('.iter_3.1.sharded.part', 'iter_2.2.sharded', 'iter_3.1.sharded'):
        shutil.copytree(work / both[1], work / name)
    files.remove_partial(work, OWN)
    assert folders(work) == both
    (work / 'iter_1.pth').write_bytes(b'damaged')
    (work / 'iter_2.pth').rename(work / 'mine.pth')
    files.remove_partial(work, OWN)
    files.delete(work, ['iter_1.pth'], OWN)  # damaged, it does not say whose it is
    assert folders(work) == both
    (work / 'iter_1.pth').unlink()
    files.remove_partial(work, 'of another run')
    assert folders(work) == both
    files.remove_partial(work, OWN)
    assert folders(work) == ['iter_2.1.sharded']
    assert read_content(str(work / 'mine.pth'))


def test_what_is_of_others_is_not(work, tmp_path):
    outside = shutil.copytree(work / 'iter_2.1.sharded', tmp_path / 'iter_4.1.sharded')
    (work / 'iter_4.1.sharded').symlink_to(outside)
    (work / '.iter_4.2.sharded.part').symlink_to(outside)
    for name in ('notes.sharded', 'iter_5.1.sharded', '.notes.part'):
        (work / name).mkdir()
        (work / name / 'notes.txt').touch()
    kept = {*folders(work)}
    files.remove_partial(work, OWN)
    files.delete(work, ['../iter_4.pth', 'iter_4.pth', 'iter_5.pth', 'notes.pth', '.notes'], OWN)
    assert {*folders(work)} == kept
    assert len(list(outside.iterdir())) == len(list((work / 'iter_2.1.sharded').iterdir())) > 2


def forge(work: Path, change: Callable[[dict], None]) -> str:
    """A checkpoint whose checksums are right, and that says something else."""
    file = work / 'iter_2.pth'
    content = torch.load(file, weights_only=True)
    for path in (work / content[checkpoint.PARTS]['folder']).glob('*.safetensors'):
        content[checkpoint.PARTS]['files'][path.name] = list(checkpoint.checksum(path))
    change(content[checkpoint.PARTS])
    file.unlink()  # who has read it may have it mapped
    torch.save(content, file)
    return str(file)


def test_code_in_a_part_is_not_run(work, tmp_path):
    torch.save(Call(Path.touch, tmp_path / 'ran'), work / 'iter_2.1.sharded' / FILE.format(2))
    refused('is damaged, or holds more than weights', read_content, forge(work, lambda _: None))
    assert not (tmp_path / 'ran').exists()


@cases(
    'change',
    lambda said: said.update(folder='../iter_2.1.sharded'),
    lambda said: said['files'].update({'../../secret': [1, 1]}),
    lambda said: said['files'].popitem(),
    lambda said: said.pop('files'),
    # 2**30 paths lead to the number, and 40 lists
    lambda said: said.update(more=reduce(lambda inner, _: [inner, inner], range(30), 1)),
    lambda said: said.update(more=reduce(lambda inner, _: [inner], range(40), 1)),
)
def test_what_no_save_has_written_is_refused(work, change):
    refused("iter_2.pth' is damaged, or holds more than weights", read_content, forge(work, change))


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """One process, over which tensors are spread all the same."""
    with alone():
        yield init_device_mesh('cpu', (1,))


def place(content: dict[str, Any], file: Path) -> None:
    torch.save(content, buffer := io.BytesIO())
    files.write_atomically(file, buffer.getvalue())


def parts(mesh: DeviceMesh, file: Path, value: torch.Tensor) -> dict[str, Any]:
    state = {'state_dict': {'weight': distribute_tensor(value, mesh, [Shard(0)])}}
    return write_parts(file, state, OWN)


def saving(model: nn.Module) -> Callable[..., None]:
    """What a runner does at a save of a model that is spread."""
    hook = ShardingHook(state_dict_type='sharded')
    hook._sharded = model

    def save_first(out_dir: str, filename: str, **_: Any) -> None:
        place(hook._state, Path(out_dir) / filename)

    hub = SimpleNamespace(get_info={files.RUN: OWN}.get)
    return partial(hook._save, SimpleNamespace(iter=0, message_hub=hub), save_first)


@pytest.mark.parametrize('name', ['iter_1.pth', 'iter_2.pth'])
def test_parts_go_whose_file_cannot_be_written(mesh, tmp_path, name):
    model = distribute_module(nn.Linear(4, 2), mesh)
    save = saving(model)
    save(str(tmp_path), 'iter_1.pth', save_optimizer=False)
    blocked = tmp_path / f'.{name}.part'
    blocked.mkdir()
    with pytest.raises(SaveError, match=rf'{name} could not be written \(Is a directory\)'):
        save(str(tmp_path), name, save_optimizer=False)
    assert folders(tmp_path) == [blocked.name, 'iter_1.1.sharded']
    found = read_content(str(tmp_path / 'iter_1.pth'))['state_dict']
    assert same(found, whole_state(model.state_dict()))


@pytest.mark.parametrize('name', ['best.pt', 'iter_1.pth.bak'])
def test_a_checkpoint_under_another_name_keeps_its_folder(mesh, tmp_path, name):
    place(parts(mesh, tmp_path / 'iter_1.pth', torch.ones(4)), tmp_path / 'iter_1.pth')
    (tmp_path / 'iter_1.pth').rename(tmp_path / name)
    shutil.copytree(tmp_path / 'iter_1.1.sharded', tmp_path / 'iter_7.1.sharded')
    files.delete(tmp_path, ['iter_1.pth'], OWN)
    files.remove_partial(tmp_path, OWN)
    assert folders(tmp_path) == ['iter_1.1.sharded']
    assert same(read_content(str(tmp_path / name)), {'state_dict': {'weight': torch.ones(4)}})


@pytest.mark.parametrize('under', ['state_dict', 'model', ''])
def test_weights_without_their_parts(tmp_path, under):
    state = {'weight': IN_PARTS, 'bias': torch.ones(2)}
    torch.save({under: state} if under else state, tmp_path / 'mine.pth')
    for read in READERS:
        refused("mine.pth' lacks tensors, and does not say which", read, str(tmp_path / 'mine.pth'))


def test_a_file_that_is_written_again_stays_whole(mesh, tmp_path):
    """Until it is replaced: what is written meanwhile has another name."""
    file, old, new = tmp_path / 'iter_1.pth', torch.ones(4), torch.zeros(4)
    place(parts(mesh, file, old), file)
    content = parts(mesh, file, new)
    assert same(read_content(str(file)), {'state_dict': {'weight': old}})
    place(content, file)
    assert same(read_content(str(file)), {'state_dict': {'weight': new}})
