"""Test a checkpoint: python tools/test.py CONFIG CHECKPOINT [--help]."""

from vqmoe_vision.engine.cli import test

if __name__ == '__main__':
    test()
