"""Train a model: python tools/train.py CONFIG [--help]."""

import sys

try:
    from vqmoe_vision.engine.cli import train
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}; training and testing need: pip install '.[train]'")

if __name__ == '__main__':
    train()
