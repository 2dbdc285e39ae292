"""Speed and memory of MoE layers and whole models, beside dense ones and other libraries.

`python tools/benchmark.py moe` and `model`; what a run does is in `layers` and `networks`.
"""
