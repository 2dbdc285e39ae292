"""Make experts of a dense ViT: python tools/upcycle.py SOURCE MODEL FOLDER [--help]."""

import sys

try:
    from vqmoe_vision.engine.publish import upcycle
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}; upcycling needs: pip install '.[train]'")

if __name__ == '__main__':
    upcycle()
