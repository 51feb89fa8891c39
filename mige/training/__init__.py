"""Trainer, optimisers, averaged weights, metrics, checkpoints of a run."""
