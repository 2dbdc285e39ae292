"""Export a model: python tools/export.py CONFIG CHECKPOINT OUT.onnx|OUT.pt2 [--help]."""

import sys

try:
    from vqmoe_vision.contrib.int8 import export_int8
    from vqmoe_vision.engine.publish import export
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}; exporting needs: pip install '.[train,export]'")

if __name__ == '__main__':
    export(int8=export_int8)
