"""Test a checkpoint: python tools/test.py CONFIG CHECKPOINT [--help]."""

import sys

try:
    from vqmoe_vision.engine.cli import test
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}; training and testing need: pip install '.[train]'")

if __name__ == '__main__':
    test()
