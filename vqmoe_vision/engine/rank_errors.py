"""What a process of many raises, and errors of collective operations in terms of a run."""

import re

# what gloo says where another process is gone, and where it has not answered in time
_GONE = re.compile(r'Connection (reset|closed) by peer|Connection refused|Broken pipe')
_LATE = re.compile(r'Timed out waiting \d+ ?ms')


class LostError(Exception):
    """Another process of the run did not answer."""


class RankError(Exception):
    """What the rank that failed first raised."""

    def __init__(self, rank: int, error: Exception) -> None:
        super().__init__(f'rank {rank}: {error}')
        self.rank, self.error = rank, error


def plain_error(error: RuntimeError, timeout: float) -> Exception:
    """An error of a collective operation in terms of a run; any other one as it is."""
    if 'Expected to have finished reduction' in str(error):
        return ValueError(
            'some parameters got no gradient: the processes wait for all of them unless the '
            'config has find_unused_parameters=True'
        )
    if _GONE.search(str(error)):
        return LostError(
            'another process has ended without a word, killed or out of memory for example'
        )
    if _LATE.search(str(error)):
        return LostError(
            f'another process has not answered within env_cfg.dist_cfg.timeout={timeout:g} seconds'
        )
    return error
