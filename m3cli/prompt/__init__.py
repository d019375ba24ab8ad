"""Chunks into the exact tokens that a model will see."""
