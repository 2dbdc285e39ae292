"""How the processes of a run come together at its start, and say for whom they wait."""

import os
import socket
import sys
import time

import torch.distributed as dist

from .rank_errors import LostError

# Seconds. The first process opens its port before it reads a config, which has the timeout.
_PATIENCE = 300.0
_SILENT = 10.0
_PAUSE = 0.1
_COMPLETE = 'complete'


def open_store(hosts: bool, rank: int) -> dist.TCPStore:
    """The store at MASTER_ADDR and MASTER_PORT, in which processes leave notes for each other."""
    address, port = os.environ['MASTER_ADDR'], os.environ['MASTER_PORT']
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f'MASTER_PORT={port} must be the number of a port')
    if not hosts:
        _reach(address, int(port), rank)
    try:
        return dist.TCPStore(address, int(port), is_master=hosts, wait_for_workers=False)
    except dist.DistNetworkError as error:
        if 'EADDRINUSE' not in str(error):
            raise
        used = f'MASTER_PORT={port} is in use on this machine, by another run for example'
        raise ValueError(used) from error


def _reach(address: str, port: int, rank: int) -> None:
    """Waits until somebody listens: torch's store would write pages to the terminal meanwhile."""
    started, silent = time.monotonic(), True
    while True:
        try:
            socket.create_connection((address, port), timeout=_SILENT).close()
            return
        except OSError as error:
            waited = time.monotonic() - started
            if waited > _PATIENCE:
                raise LostError(
                    f'nobody answers at {address}:{port} after {_PATIENCE:g} seconds ({error}): '
                    'MASTER_ADDR and MASTER_PORT say where rank 0 is'
                ) from error
        if silent and waited > _SILENT:
            print(f'rank {rank} waits for rank 0 at {address}:{port}', file=sys.stderr, flush=True)
            silent = False
        time.sleep(_PAUSE)


def claim(store: dist.Store, rank: int, size: int) -> None:
    """Takes the place of a process in a run."""
    number = int(store.compare_set('size', '', str(size)))
    if number != size:
        raise ValueError(
            f'this rank is one of {size} processes, and another is one of {number}: the number of '
            'processes must be the same for all'
        )
    if store.add(f'arrived {rank}', 1) > 1:
        raise ValueError(
            f'another process is rank {rank} as well: each must have a rank of its own, and each '
            'run a MASTER_PORT'
        )


def arrive(store: dist.Store, rank: int, size: int, timeout: float) -> None:
    """Waits until all processes of a run are there; the first of those says for whom."""
    started, silent, missing = time.monotonic(), True, list(range(size))
    while missing := [other for other in missing if not store.check([f'arrived {other}'])]:
        waited = time.monotonic() - started
        names = f'rank{"s" * (len(missing) > 1)} {", ".join(map(str, missing))} of {size}'
        if waited > timeout:
            raise LostError(f'{names} did not come in env_cfg.dist_cfg.timeout={timeout:g} seconds')
        if silent and waited > _SILENT and all(other in missing for other in range(rank)):
            print(f'rank {rank} waits for {names}', file=sys.stderr, flush=True)
            silent = False
        time.sleep(_PAUSE)
    store.set(_COMPLETE, '1')


def is_complete(store: dist.Store) -> bool:
    """Whether all processes of a run have been there."""
    return store.check([_COMPLETE])
