"""Comparisons that can decide: rows by seeds in, runs, tables and figures out.

A run is an ordinary `tools/train.py` and `tools/test.py` in processes of their own; this package
knows configs and the records that runs leave, and no task.
"""
