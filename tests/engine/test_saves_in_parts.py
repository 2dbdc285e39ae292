"""Saves in parts by one process: what cannot be written, and files that are there already."""

import io
import resource
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

from vqmoe_vision.engine import parts, sharded_saves
from vqmoe_vision.engine.checkpoint import load_from_local, read_content, read_state
from vqmoe_vision.engine.checkpoint_files import (
    RUN,
    SaveError,
    delete,
    remove_partial,
    write_atomically,
)
from vqmoe_vision.engine.sharded_saves import JointSaves, whole_state, write_parts
from vqmoe_vision.models.weights import IN_PARTS

from ..groups import alone
from ..soak.bits import same
from .test_sharded_saves import OWN, folders


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """One process, over which tensors are spread all the same."""
    with alone():
        yield init_device_mesh('cpu', (1,))


def write(file: Path, content: dict) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(file, buffer.getvalue())


class Writer:
    """What a runner does at a save."""

    iter = 0
    message_hub = SimpleNamespace(get_info={RUN: OWN}.get)

    def __init__(self, model: nn.Module) -> None:
        whole: Any = self
        self.saves = JointSaves(whole, model, in_parts=True)

    def save_checkpoint(self, out_dir: str, filename: str, *_: Any) -> None:
        write(Path(out_dir) / filename, self.saves.state)


@pytest.mark.parametrize('name', ['iter_1.pth', 'iter_2.pth'])
def test_parts_go_whose_file_cannot_be_written(mesh: DeviceMesh, tmp_path: Path, name: str) -> None:
    model = distribute_module(nn.Linear(4, 2), mesh)
    save = Writer(model).saves
    save(str(tmp_path), 'iter_1.pth', save_optimizer=False)
    expected = read_content(str(tmp_path / 'iter_1.pth'))['state_dict']
    assert same(expected, whole_state(model.state_dict()))
    blocked = tmp_path / f'.{name}.part'
    blocked.mkdir()
    with pytest.raises(SaveError, match=rf'{name} could not be written \(Is a directory\)'):
        save(str(tmp_path), name, save_optimizer=False)
    assert folders(tmp_path) == [blocked.name, 'iter_1.1.sharded']
    assert same(read_content(str(tmp_path / 'iter_1.pth'))['state_dict'], expected)
    blocked.rmdir()
    save(str(tmp_path), name, save_optimizer=False)
    assert len(folders(tmp_path)) == (1 if name == 'iter_1.pth' else 2)


def test_a_disk_that_is_full_amid_a_tensor(mesh: DeviceMesh, tmp_path: Path) -> None:
    spread = distribute_tensor(torch.ones(300_000), mesh, [Shard(0)])
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limit[1]))
    try:
        with pytest.raises(SaveError, match=r'\(rank 0: File too large\)'):
            write_parts(tmp_path / 'iter_1.pth', {'state_dict': {'weight': spread}}, OWN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not folders(tmp_path)


def test_a_file_has_as_much_as_fits_into_memory_beside_the_training(
    mesh: DeviceMesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharded_saves, '_FILE_SIZE', 40)
    file = tmp_path / 'iter_1.pth'
    state = {name: torch.full((4,), float(name)) for name in '12345'}
    spread = {name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in state.items()}
    write(file, write_parts(file, {'state_dict': spread}, OWN))
    assert same(read_content(str(file)), {'state_dict': state})
    (folder,) = tmp_path.glob('iter_1.*.sharded')
    assert len([*folder.glob('*.safetensors')]) == 3  # of 16 bytes each: two, two and one


def write_in_parts(mesh: DeviceMesh, file: Path, value: torch.Tensor) -> None:
    weight = distribute_tensor(value, mesh, [Shard(0)])
    write(file, write_parts(file, {'state_dict': {'weight': weight}}, OWN))


@pytest.mark.parametrize('name', ['best.pt', 'iter_1.pth.bak'])
def test_a_checkpoint_under_another_name_keeps_its_folder(
    mesh: DeviceMesh, tmp_path: Path, name: str
) -> None:
    write_in_parts(mesh, tmp_path / 'iter_1.pth', torch.ones(4))
    (tmp_path / 'iter_1.pth').rename(tmp_path / name)
    shutil.copytree(tmp_path / 'iter_1.1.sharded', tmp_path / 'iter_7.1.sharded')
    with zipfile.ZipFile(tmp_path / 'notes', 'w') as archive:
        archive.writestr('of others', '')
    remove_partial(tmp_path, OWN)
    assert folders(tmp_path) == ['iter_1.1.sharded', 'iter_7.1.sharded']
    (tmp_path / 'notes').unlink()
    delete(tmp_path, ['iter_1.pth'], OWN)
    remove_partial(tmp_path, OWN)
    assert folders(tmp_path) == ['iter_1.1.sharded']
    assert same(read_content(str(tmp_path / name)), {'state_dict': {'weight': torch.ones(4)}})


def test_memory_that_does_not_suffice_is_no_damage(
    mesh: DeviceMesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_in_parts(mesh, tmp_path / 'iter_2.pth', torch.ones(4))
    monkeypatch.setattr(parts, 'DefaultLoadPlanner', lambda **_: torch.ones(1 << 50))
    for read in (read_content, read_state, lambda path: load_from_local(path, 'cpu')):
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            read(str(tmp_path / 'iter_2.pth'))


@pytest.mark.parametrize('under', ['state_dict', 'model', ''])
def test_weights_without_their_parts(tmp_path: Path, under: str) -> None:
    state = {'weight': IN_PARTS, 'bias': torch.ones(2)}
    torch.save({under: state} if under else state, tmp_path / 'mine.pth')
    for read in (read_content, read_state, lambda path: load_from_local(path, 'cpu')):
        with pytest.raises(ValueError, match=r"mine.pth' lacks tensors, and does not say which"):
            read(str(tmp_path / 'mine.pth'))


def test_a_file_that_is_written_again_stays_whole(mesh: DeviceMesh, tmp_path: Path) -> None:
    """Until it is replaced: what is written meanwhile has another name."""
    file = tmp_path / 'iter_1.pth'
    old, new = torch.ones(4), torch.zeros(4)
    for value in (old, new):
        state = {'state_dict': {'weight': distribute_tensor(value, mesh, [Shard(0)])}}
        content = write_parts(file, state, OWN)
        if value is new:
            assert same(read_content(str(file)), {'state_dict': {'weight': old}})
        write(file, content)
    assert folders(tmp_path) == ['iter_1.1.sharded', 'iter_1.2.sharded']
    assert same(read_content(str(file)), {'state_dict': {'weight': new}})
