"""Processes that come together, and those that wait for one that does not come."""

import socket
from collections.abc import Iterator
from threading import Thread

import pytest
import torch.distributed as dist

from vqmoe_vision.engine import arrival, processes
from vqmoe_vision.engine.arrival import arrive, claim, is_complete, open_store
from vqmoe_vision.engine.rank_errors import LostError


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A port that is in use, by nobody who answers as a store does."""
    with socket.create_server(('127.0.0.1', 0)) as one:
        number = one.getsockname()[1]
        monkeypatch.setenv('MASTER_ADDR', '127.0.0.1')
        monkeypatch.setenv('MASTER_PORT', str(number))
        yield number


def test_all_go_on_once_the_last_is_there() -> None:
    store, there = dist.HashStore(), []

    def come(rank: int) -> None:
        claim(store, rank, 3)
        arrive(store, rank, 3, timeout=60)
        there.append(rank)

    early = [Thread(target=come, args=(rank,)) for rank in (0, 2)]
    for one in early:
        one.start()
    early[0].join(0.5)
    assert not there and not is_complete(store)
    come(1)
    for one in early:
        one.join()
    assert sorted(there) == [0, 1, 2] and is_complete(store)


def test_whoever_did_not_come_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(arrival, '_SILENT', 0.0)
    with pytest.raises(LostError, match=r'^ranks 1, 3 of 4 did not come in .*timeout=0\.3 seconds'):
        store = dist.HashStore()
        claim(store, 2, 4)
        claim(store, 0, 4)
        arrive(store, 0, 4, timeout=0.3)
    assert capsys.readouterr().err == 'rank 0 waits for ranks 1, 3 of 4\n'
    # of those that are there the first one says it
    with pytest.raises(LostError):
        store = dist.HashStore()
        claim(store, 0, 3)
        arrive(store, 1, 3, timeout=0.3)
    assert capsys.readouterr().err == ''


def test_processes_of_two_runs_are_told_apart() -> None:
    store = dist.HashStore()
    claim(store, 1, 2)
    with pytest.raises(ValueError, match='one of 4 processes, and another is one of 2'):
        claim(store, 3, 4)
    with pytest.raises(ValueError, match='another process is rank 1 as well'):
        claim(store, 1, 2)


@pytest.mark.parametrize('complete', [True, False])
def test_a_stray_process_ends_no_run_that_is_complete(
    complete: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(('127.0.0.1', 0)) as one:
        free = str(one.getsockname()[1])
    of_rank_0 = {'RANK': '0', 'WORLD_SIZE': '2', 'LOCAL_RANK': '0', 'MASTER_PORT': free}
    for name, value in {**of_rank_0, 'MASTER_ADDR': '127.0.0.1'}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv('TORCHELASTIC_USE_AGENT_STORE', raising=False)
    monkeypatch.setattr(processes, '_PULSE', 0.01)
    first = processes.Processes('pytorch')
    store = first._store
    assert store is not None
    if complete:
        claim(store, 1, 2)
        arrive(store, 0, 2, timeout=60)
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setenv('WORLD_SIZE', '4')
    first._left.set()  # its own watch would end this process
    with pytest.raises(ValueError, match='this rank is one of 4 processes'):
        processes.Processes('pytorch')
    assert first.ended() is not complete


def test_a_port_in_use_and_one_where_nobody_is(
    port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=f'^MASTER_PORT={port} is in use on this machine'):
        open_store(hosts=True, rank=0)
    monkeypatch.setenv('MASTER_PORT', 'ssh')
    with pytest.raises(ValueError, match='MASTER_PORT=ssh must be the number of a port'):
        open_store(hosts=False, rank=1)
    with socket.create_server(('127.0.0.1', 0)) as one:
        free = one.getsockname()[1]
    monkeypatch.setenv('MASTER_PORT', str(free))
    monkeypatch.setattr(arrival, '_SILENT', 0.2)
    monkeypatch.setattr(arrival, '_PATIENCE', 0.5)
    with pytest.raises(LostError, match=rf'nobody answers at 127\.0\.0\.1:{free} after 0\.5 sec'):
        open_store(hosts=False, rank=1)
    assert capsys.readouterr().err == f'rank 1 waits for rank 0 at 127.0.0.1:{free}\n'
