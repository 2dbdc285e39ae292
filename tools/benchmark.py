"""Benchmark layers, models and cards: tools/benchmark.py moe|model|gpu -h."""

from benchmark.cli import main

if __name__ == '__main__':
    main()
