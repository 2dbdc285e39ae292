"""A released V-MoE for timm: python tools/convert_vmoe.py CHECKPOINT FOLDER [--help]."""

import sys

try:
    from vqmoe_vision.contrib.vmoe_checkpoints import convert_vmoe
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}; converting needs: pip install '.[train]'")

if __name__ == '__main__':
    convert_vmoe()
