"""Train a model: python tools/train.py CONFIG [--help]."""

from vqmoe_vision.engine.cli import train

if __name__ == '__main__':
    train()
