"""m3: ask a million tokens, on your own machine."""

__version__ = "0.1.0"
