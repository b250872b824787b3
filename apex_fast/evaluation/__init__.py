"""Metrics: how far generated images are from held-out real ones, whether they show what the prompt asks, and how
varied they are.
"""
