"""Runs a script with the models registered: `python -m vqmoe_vision.script SCRIPT ARGUMENTS`.

For scripts that build a model by name and have no option that imports a package first, as most of
timm's are. A script that takes its task from `timm.task`, as timm's `train.py` does, gets one that
trains the experts too.
"""

import argparse
import runpy
import sys
from pathlib import Path

from .models.timm_tasks import install


def main() -> None:
    """Run the script that the command line names, as Python itself would."""
    parser = argparse.ArgumentParser(
        prog='python -m vqmoe_vision.script',
        description="Run a script, such as timm's validate.py, with the models registered.",
    )
    parser.add_argument('script', help='a Python file')
    parser.add_argument('arguments', nargs=argparse.REMAINDER, help='what the script is given')
    args = parser.parse_args()
    if not Path(args.script).is_file():
        parser.exit(2, f'script={args.script} is not possible: there is no such file\n')
    install()
    sys.argv = [args.script, *args.arguments]
    sys.path.insert(0, str(Path(args.script).resolve().parent))
    runpy.run_path(args.script, run_name='__main__')


if __name__ == '__main__':
    main()
