"""From a published checkpoint to a quantized GGUF file.

The conversion and quantization commands are not built yet; the package is here so that its
place in the wheel and in the import contracts is fixed.
"""
