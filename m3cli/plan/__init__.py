"""Decides how a model will be run; touches neither llama.cpp nor processes."""
