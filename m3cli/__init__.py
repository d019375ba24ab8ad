"""m3: ask a million tokens, on your own machine."""

from m3cli.api import pack

__all__ = ["__version__", "pack"]
__version__ = "0.1.0"
