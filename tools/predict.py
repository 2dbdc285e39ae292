"""Predict images: python tools/predict.py CONFIG CHECKPOINT IMAGE_OR_FOLDER... [--help]."""

import sys

try:
    from vqmoe_vision.engine.cli import predict
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}; predicting needs: pip install '.[train]', or '.[seg]'")

if __name__ == '__main__':
    predict()
