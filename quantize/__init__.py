"""From a published checkpoint to a GGUF file: `m3 quantize`."""
