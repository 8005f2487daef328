"""Trained PyTorch networks folded into cheaper ones, each rewrite verified."""
