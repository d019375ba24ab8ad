"""What makes two model files the same model, whatever they are called and wherever they lie."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from m3cli.errors import ModelError

if TYPE_CHECKING:
    from m3cli.model.header import Header

_SAMPLES = 64  # a file
_SAMPLE_BYTES = 4096


def model_digest(header: Header) -> str:
    """Digest of a model's content: 32 hexadecimal digits.

    Of each file its size, all that stands before the tensor data, and samples of these, spread evenly:
    another quant, another vocabulary or other weights differ there, and reading 64 pieces of a
    file takes no time where hashing 100 GB would. Raises ModelError when a file cannot be read.
    """
    digest = hashlib.sha256()
    for number, path in enumerate(header.files):
        data = min((tensor.offset for tensor in header.tensors if tensor.file == number), default=0)
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(0)
                digest.update(size.to_bytes(8, "little"))
                digest.update(file.read(data))
                for sample in range(_SAMPLES):
                    file.seek(data + (size - data) * sample // _SAMPLES)
                    digest.update(file.read(_SAMPLE_BYTES))
        except OSError as error:
            raise ModelError(
                f"{path} cannot be read: {error.strerror}.", "Check its permissions and its disk."
            ) from error
    return digest.hexdigest()[:32]
