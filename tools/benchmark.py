"""Benchmark layers, models and training steps: python tools/benchmark.py moe|model|training -h."""

from benchmark.cli import main

if __name__ == '__main__':
    main()
