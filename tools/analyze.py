"""See what the experts of a model do: python tools/analyze.py CONFIG CHECKPOINT [--help]."""

import sys

try:
    from vqmoe_vision.analysis.cli import analyze
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}; the report needs: pip install '.[analyze]'")

if __name__ == '__main__':
    analyze()
