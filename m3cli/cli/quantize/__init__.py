"""`m3 quantize`: from a published checkpoint to a model file that fits."""

from m3cli.cli.quantize import convert, imatrix, recipe, run, verify
from m3cli.cli.quantize.app import quantize

__all__ = ["convert", "imatrix", "quantize", "recipe", "run", "verify"]
