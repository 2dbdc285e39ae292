"""Benchmark layers, models, exports, steps: tools/benchmark.py moe|model|export|scaling -h."""

from benchmark.cli import main

if __name__ == '__main__':
    main()
