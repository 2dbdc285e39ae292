"""torchrun without its page about a rank that failed: `python -m vqmoe_vision.torchrun ARGUMENTS`.

The arguments are torchrun's. The rank has said in one line what went wrong; one that a signal has
ended could not, and then the line comes from here.
"""

import logging
import os
import signal
import sys

from torch.distributed import DistNetworkError, run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

# what our tools have a line for themselves: they save, and end by the signal
_OWN = (-signal.SIGTERM, -signal.SIGINT)


def main() -> None:
    """Runs the program that the command line names in several processes."""
    args = run.parse_args(None)
    # torchrun's own default, without a warning
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    logging.disable(logging.ERROR)
    try:
        _check_processes(args.nproc_per_node)
        run.run(args)
    except ChildFailedError as error:
        sys.exit(_status(error))
    except SignalException as caught:
        sys.exit(128 + caught.sigval)
    except DistNetworkError as error:
        used = f'port {args.master_port} is in use on this machine: set PORT to another one'
        sys.exit(f'error: {used if "EADDRINUSE" in str(error) else error}')
    except ValueError as error:
        sys.exit(f'error: {error}')


def _check_processes(number: str) -> None:
    """Refuses what torchrun answers with a trace."""
    if number not in ('auto', 'cpu', 'gpu', 'xpu') and not (number.isdecimal() and int(number)):
        raise ValueError(f'{number} is no number of processes: GPUS must be 1, or 2, and so on')


def _status(error: ChildFailedError) -> int:
    """Says what has ended a rank that could not do so itself, and how the whole run ended."""
    ended = {rank: failure for rank, failure in error.failures.items() if failure.exitcode < 0}
    for rank, failure in sorted(ended.items(), key=lambda item: item[1].timestamp):
        if failure.exitcode not in _OWN:
            print(f'error: rank {rank} was ended by {failure.signal_name()}', file=sys.stderr)
            return 1
    codes = {failure.exitcode for failure in error.failures.values()}
    # a rank that failed itself has been told first, and torchrun ends the others by SIGTERM
    return 1 if any(code > 0 for code in codes) else 128 - min(codes, default=127)


if __name__ == '__main__':
    main()
