"""Segment images: python tools/predict.py CONFIG CHECKPOINT IMAGE_OR_FOLDER... [--help]."""

from vqmoe_vision.segmentation.cli import predict

if __name__ == '__main__':
    predict()
