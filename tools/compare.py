"""Compare models over seeds: python tools/compare.py run SPEC [--help]."""

import sys

try:
    from vqmoe_vision.comparison.cli import compare
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}; comparisons need: pip install '.[compare]'")

if __name__ == '__main__':
    compare()
