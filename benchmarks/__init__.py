"""Benchmarks: what the library saves, on the machine in front of you: ``python benchmarks/run.py --help``."""
