"""Benchmark layers, models, exports, steps: tools/benchmark.py moe|model|export|training -h."""

from benchmark.cli import main

if __name__ == '__main__':
    main()
