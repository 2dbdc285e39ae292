"""Tutorials run from their first cell to the last, with what comes with the package."""

import json
import os
import subprocess
import sys

import pytest

from .notebooks import FOLDER, cells_of

NOTEBOOKS = sorted(FOLDER.glob('*.ipynb'))


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_kept_and_small(path):
    cells = cells_of(json.loads(path.read_text()))
    assert [cell['execution_count'] for cell in cells] == [*range(1, len(cells) + 1)]
    assert '%pip install' in ''.join(cells[0]['source']) and cells[-1]['outputs']
    assert path.stat().st_size < 50_000


@pytest.mark.long
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_runs(path, tmp_path):
    (copy := tmp_path / path.name).write_bytes(path.read_bytes())
    environment = {**os.environ, 'PYTHONPATH': str(FOLDER.parents[1])}
    subprocess.run(
        [sys.executable, '-m', 'tests.notebooks', str(copy)],
        cwd=tmp_path, env=environment, check=True, timeout=280,
    )  # fmt: skip
    before, after = (cells_of(json.loads(each.read_text())) for each in (path, copy))
    assert [bool(cell['outputs']) for cell in before] == [bool(cell['outputs']) for cell in after]
