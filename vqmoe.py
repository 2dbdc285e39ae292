"""`vqmoe TOOL ...` runs a tool from any folder; a typo is told before torch is imported."""

import argparse
import re
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path


def main() -> None:
    """Check what the command line says, and run the tool that it names."""
    spec = find_spec('vqmoe_vision')  # which finds the package, and does not import it
    if spec is None or spec.origin is None:
        sys.exit('error: vqmoe needs the package vqmoe_vision')
    package = Path(spec.origin).parent
    arguments = runpy.run_path(str(package / 'arguments.py'))
    folder = package / '.mim' if (package / '.mim').is_dir() else package.parent
    parser = argparse.ArgumentParser(
        prog='vqmoe',
        description='Vision transformers with mixtures of experts, on timm and mmsegmentation.',
        epilog='vqmoe TOOL --help shows examples and all options of a tool.',
    )
    found = re.search(r"__version__ = '(.*)'", Path(spec.origin).read_text())
    parser.add_argument('--version', action='version', version=found[1] if found else 'unknown')
    tools = parser.add_subparsers(title='tools', required=True, metavar='TOOL', dest='tool')
    for name, (line, *_) in arguments['TOOLS'].items():
        arguments['fill'](tools.add_parser(name, help=line), name)
    args, unknown = parser.parse_known_args()
    if unknown:  # as the tool would say it
        tools.choices[args.tool].error(f'unrecognized arguments: {" ".join(unknown)}')
    config = getattr(args, 'config', getattr(args, 'spec', None))
    if config is not None:
        own = config.removeprefix('vqmoe_vision::')
        file = Path(config).expanduser() if own == config else folder / 'configs' / own
        if not file.is_file():
            sys.exit(f'error: there is no config {config}')
    script = folder / 'tools' / f'{args.tool}.py'
    sys.argv = [str(script), *sys.argv[2:]]
    try:
        runpy.run_path(str(script), run_name='__main__')
    except SystemExit as end:
        if folder != package.parent and isinstance(end.code, str):  # pip finds no '.' there
            end.code = end.code.replace("'.[", "'vqmoe-vision[")
        raise


if __name__ == '__main__':
    if __spec__ is not None and not getattr(sys.flags, 'safe_path', False):
        sys.path.pop(0)  # the current folder, which `python -m vqmoe` has put first
    main()
