"""Benchmark layers and models: python tools/benchmark.py moe|model [--help]."""

from vqmoe_vision.benchmark.cli import main

if __name__ == '__main__':
    main()
