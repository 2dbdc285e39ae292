"""Publish the model of a run: python tools/publish.py WORK_DIR FOLDER [--help]."""

import sys

try:
    from vqmoe_vision.engine.publish import publish
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}; training and testing need: pip install '.[train]'")

if __name__ == '__main__':
    publish()
