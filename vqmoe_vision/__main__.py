"""`python -m vqmoe_vision TOOL ...` is `vqmoe TOOL ...`, as torchrun wants it."""

import runpy
from pathlib import Path

if __name__ == '__main__':
    runpy.run_path(str(Path(__file__).parents[1] / 'vqmoe.py'), run_name='__main__')
