"""torchrun without its page about a rank that failed: `python -m vqmoe_vision.torchrun ARGUMENTS`.

The arguments are torchrun's. The rank has said in one line what went wrong; one that a signal has
ended could not, and then the line comes from here.
"""

import logging
import os
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> None:
    """Runs the program that the command line names in several processes."""
    args = run.parse_args(None)
    # torchrun's own default, without a warning
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    logging.disable(logging.ERROR)
    try:
        run.run(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(f'error: rank {rank} was ended by {failure.signal_name()}', file=sys.stderr)
        sys.exit(1)
    except SignalException as signal:
        sys.exit(128 + signal.sigval)


if __name__ == '__main__':
    main()
