"""Checkpoints in parts: written by two processes, read by one, damaged, orphaned and forged."""

import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from vqmoe_vision.engine.checkpoint import load_from_local, read_content, read_state
from vqmoe_vision.engine.checkpoint_files import (
    RUN,
    SaveError,
    delete,
    newest_checkpoint,
    remove_partial,
)
from vqmoe_vision.engine.finite import NonFiniteError, check_own_parts, check_weights
from vqmoe_vision.engine.parts import KEY, checksum
from vqmoe_vision.engine.publish import publish_checkpoint
from vqmoe_vision.engine.sharded_saves import (
    whole_state,
    write_parts,
)
from vqmoe_vision.models.create import create_model
from vqmoe_vision.models.sharding import shard_model
from vqmoe_vision.models.weights import IN_PARTS

from ..forked import spawn
from ..groups import begin
from ..models.test_sharding import make, train
from ..soak.bits import same

OWN = 'a run'
FILE = 'shard-0000{}-model-00001-of-00001.safetensors'


def content_of(state: dict, iteration: int) -> dict[str, Any]:
    meta = {'epoch': 0, 'iter': iteration, 'saved_at': time.time()}
    return {'meta': meta, 'message_hub': {'runtime_info': {RUN: OWN}}, **state}


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
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('saved')
    world, expert_processes = request.param
    spawn(save, (world, expert_processes, folder), nprocs=world)
    return folder


@pytest.fixture
def work(saved: Path, tmp_path: Path) -> Path:
    """A copy to do harm to."""
    return shutil.copytree(saved, tmp_path / 'work')


def test_what_is_read_is_what_a_whole_file_has(saved: Path) -> None:
    file = saved / 'iter_2.pth'
    expected = torch.load(saved / 'whole_2', weights_only=True)
    found = read_content(str(file))
    for part in ('state_dict', 'optimizer'):
        assert same(found[part], expected[part])
    assert list(found['state_dict']) == list(expected['state_dict'])
    assert found.keys() == expected.keys()
    assert same(read_state(str(file)), expected['state_dict'])
    assert same(load_from_local(str(file), 'cpu')['optimizer'], expected['optimizer'])
    on_another_device = load_from_local(str(file), torch.device('meta'))['state_dict']
    assert {value.device.type for value in on_another_device.values()} == {'meta'}


def test_the_file_itself_has_words_in_the_place_of_tensors(saved: Path) -> None:
    content = read_content(str(saved / 'iter_2.pth'), verify=False)
    words = [name for name, value in content['state_dict'].items() if value == IN_PARTS]
    assert 10 < len(words) < len(content['state_dict'])
    (folder,) = saved.glob('iter_2.*.sharded')
    in_folder = sum(path.stat().st_size for path in folder.iterdir())
    assert in_folder > 3 * (saved / 'iter_2.pth').stat().st_size


def test_published_in_one_piece(saved: Path, tmp_path: Path) -> None:
    file = publish_checkpoint(str(saved / 'iter_2.pth'), str(tmp_path / 'out.pth'))
    content = torch.load(file, weights_only=True)
    assert same(content['state_dict'], read_state(str(saved / 'iter_2.pth')))
    assert content.keys() == {'meta', 'state_dict'}


@pytest.mark.parametrize('option', ['checkpoint_path', 'upcycle'])
def test_a_model_begins_with_whole_files(saved: Path, option: str) -> None:
    options = {'img_size': 16, 'patch_size': 8, 'embed_dim': 32, 'depth': 2, 'num_heads': 2}
    file = str(saved / 'iter_2.pth')
    with pytest.raises(ValueError, match=r"iter_2.pth' is in parts, and timm reads whole files: "):
        create_model('vit_tiny_vqmoe', **options, **{option: file})


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize('part', [FILE.format(1), FILE.format(2)])
@pytest.mark.parametrize('harm', [flip, truncate, Path.unlink])
def test_a_damaged_part_is_passed_over(work: Path, part: str, harm: Callable) -> None:
    harm(work / 'iter_2.1.sharded' / part)
    said: list[str] = []
    assert newest_checkpoint(work, said.append) == work / 'iter_1.pth'
    (line,) = said
    assert part in line and '\n' not in line
    for read in (read_content, read_state, lambda path: load_from_local(path, 'cpu')):
        with pytest.raises(ValueError, match=part):
            read(str(work / 'iter_2.pth'))


def folders(work: Path) -> list[str]:
    return sorted(path.name for path in work.iterdir() if path.is_dir())


def test_what_a_kill_leaves_is_removed(work: Path) -> None:
    # the save that failed has left nothing
    assert folders(work) == ['iter_1.1.sharded', 'iter_2.1.sharded']
    shutil.copytree(work / 'iter_2.1.sharded', work / '.iter_3.1.sharded.part')
    shutil.copytree(work / 'iter_2.1.sharded', work / 'iter_2.2.sharded')
    shutil.copytree(work / 'iter_2.1.sharded', work / 'iter_3.1.sharded')
    remove_partial(work, OWN)
    assert folders(work) == ['iter_1.1.sharded', 'iter_2.1.sharded']
    (work / 'iter_1.pth').write_bytes(b'damaged')
    (work / 'iter_2.pth').rename(work / 'mine.pth')
    remove_partial(work, OWN)
    assert folders(work) == ['iter_1.1.sharded', 'iter_2.1.sharded']
    delete(work, ['iter_1.pth'], OWN)  # damaged, it does not say whose it is
    assert folders(work) == ['iter_1.1.sharded', 'iter_2.1.sharded']
    (work / 'iter_1.pth').unlink()
    remove_partial(work, 'of another run')
    assert folders(work) == ['iter_1.1.sharded', 'iter_2.1.sharded']
    remove_partial(work, OWN)
    assert folders(work) == ['iter_2.1.sharded']
    assert read_content(str(work / 'mine.pth'))


def test_what_is_of_others_is_not(work: Path, tmp_path: Path) -> None:
    outside = shutil.copytree(work / 'iter_2.1.sharded', tmp_path / 'iter_4.1.sharded')
    (work / 'iter_4.1.sharded').symlink_to(outside)
    (work / '.iter_4.2.sharded.part').symlink_to(outside)
    for name in ('notes.sharded', 'iter_5.1.sharded', '.notes.part'):
        (work / name).mkdir()
        (work / name / 'notes.txt').touch()
    kept = {*folders(work)}
    remove_partial(work, OWN)
    delete(work, ['../iter_4.pth', 'iter_4.pth', 'iter_5.pth', 'notes.pth', '.notes'], OWN)
    assert {*folders(work)} == kept
    assert len(list(outside.iterdir())) == len(list((work / 'iter_2.1.sharded').iterdir())) > 2


def forge(work: Path, change: Callable[[dict], None]) -> str:
    """A checkpoint whose checksums are right, and that says something else."""
    file = work / 'iter_2.pth'
    content = torch.load(file, weights_only=True)
    for path in (work / content[KEY]['folder']).glob('*.safetensors'):
        content[KEY]['files'][path.name] = list(checksum(path))
    change(content[KEY])
    file.unlink()  # who has read it may have it mapped
    torch.save(content, file)
    return str(file)


class Code:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


def test_code_in_a_part_is_not_run(work: Path, tmp_path: Path) -> None:
    torch.save(Code(tmp_path / 'ran'), work / 'iter_2.1.sharded' / FILE.format(2))
    with pytest.raises(ValueError, match='is damaged, or holds more than weights'):
        read_content(forge(work, lambda _: None))
    assert not (tmp_path / 'ran').exists()


def lose_a_chunk(folder: Path) -> None:
    """Of a tensor whose other one is there."""
    path = folder / FILE.format(1)
    with safe_open(path, 'pt') as file:
        kept = {name: file.get_tensor(name) for name in list(file.keys())[1:]}
        save_file(kept, path, file.metadata())


@pytest.mark.parametrize(
    ('change', 'harm'),
    [
        (lambda said: said.update(folder='../iter_2.1.sharded'), None),
        (lambda said: said.update(folder='/tmp'), None),
        (lambda said: said['files'].update({'../../secret': [1, 1]}), None),
        (lambda said: said['files'].popitem(), None),
        (lambda said: said.pop('files'), None),
        (lambda said: None, lose_a_chunk),
        (lambda said: None, lambda folder: save_file({}, folder / FILE.format(1))),
    ],
)
def test_what_no_save_has_written_is_refused(work: Path, change: Callable, harm: Any) -> None:
    if harm is not None:
        harm(work / 'iter_2.1.sharded')
    with pytest.raises(ValueError, match=r"iter_2.pth' is damaged, or holds more than weights"):
        read_content(forge(work, change))
