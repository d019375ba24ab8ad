"""Runs a model and streams what happens."""
