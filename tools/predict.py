"""Segment images: python tools/predict.py CONFIG CHECKPOINT IMAGE_OR_FOLDER... [--help]."""

import sys

try:
    from vqmoe_vision.segmentation.inference import main
except ModuleNotFoundError as missing:
    sys.exit(f'error: {missing}')

if __name__ == '__main__':
    main()
