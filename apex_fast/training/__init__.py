"""Training: typed configs, the loop, checkpoints that resume exactly, progress. Nothing is imported here; the parts
name their extras."""
