"""`python -m vqmoe_vision train CONFIG` runs tools/train.py, wherever it is; so for every tool."""

import argparse
import runpy
import sys

from . import FOLDER


def main() -> None:
    """Runs the tool that the command line names."""
    tools = {path.stem: path for path in (FOLDER / 'tools').glob('*.py')}
    parser = argparse.ArgumentParser(prog='python -m vqmoe_vision')
    parser.add_argument('tool', choices=sorted(tools))
    parser.add_argument('arguments', nargs=argparse.REMAINDER, help="the tool's; try --help")
    args = parser.parse_args()
    sys.argv[1:] = args.arguments
    sys.path.append(str(FOLDER / 'tools'))  # Python does so for a script that it runs by path
    runpy.run_path(str(tools[args.tool]), run_name='__main__')


if __name__ == '__main__':
    main()
