"""Runs a notebook without Jupyter: `python -m tests.notebooks FILE...` writes its outputs anew."""

import ast
import json
import re
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / 'docs/tutorials'
MAGIC = re.compile(r'^( *)%pip .*$', re.MULTILINE)


def cells_of(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """Those with code."""
    return [cell for cell in notebook['cells'] if cell['cell_type'] == 'code']


def execute(notebook: dict[str, Any]) -> None:
    """Run the cells in one namespace, and keep what they print."""
    names: dict[str, Any] = {'__name__': '__main__'}
    for number, cell in enumerate(cells_of(notebook), 1):
        source = MAGIC.sub(r'\1pass', ''.join(cell['source']))
        with redirect_stdout(StringIO()) as said:
            exec(compile(ast.parse(source), f'cell {number}', 'exec'), names)
        text = said.getvalue().splitlines(keepends=True)
        stream = {'name': 'stdout', 'output_type': 'stream', 'text': text}
        cell.update(execution_count=number, outputs=[stream] if text else [])


if __name__ == '__main__':
    for name in sys.argv[1:]:
        execute(notebook := json.loads(Path(name).read_text()))
        Path(name).write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + '\n')
