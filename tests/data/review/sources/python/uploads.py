"""Uploaded files: safe names, a place below one directory, thumbnails by an external program."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import BinaryIO

MAX_NAME_LENGTH = 120
MAX_UPLOAD_BYTES = 20 * 1024 * 1024
_CHUNK = 64 * 1024
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


class UploadError(Exception):
    """The upload is refused; the message may be shown to the user."""


def safe_name(name: str) -> str:
    """A file name without directories, control characters and leading dots."""
    base = name.replace("\\", "/").rsplit("/", 1)[-1]
    cleaned = _UNSAFE.sub("_", base)[-MAX_NAME_LENGTH:].lstrip(".")
    if not cleaned:
        raise UploadError("The file has no usable name.")
    return cleaned


def resolve(root: Path, relative: str) -> Path:
    """The path of a stored file; UploadError if it is not below `root`."""
    root = root.resolve()
    path = (root / relative).resolve()
    if not path.is_relative_to(root):
        raise UploadError("This file does not exist.")
    return path


def store(root: Path, name: str, stream: BinaryIO) -> tuple[Path, str]:
    """Write an upload below `root`; return its path and the SHA-256 of its content.

    The file appears under its name only when it is complete, and replaces an earlier one of that name.
    """
    target = resolve(root, safe_name(name))
    digest = hashlib.sha256()
    size = 0
    handle, temporary = tempfile.mkstemp(dir=root, prefix=".upload-")
    try:
        with os.fdopen(handle, "wb") as file:
            while chunk := stream.read(_CHUNK):
                size += len(chunk)
                if size > MAX_UPLOAD_BYTES:
                    raise UploadError("The file is too large.")
                digest.update(chunk)
                file.write(chunk)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
    return target, digest.hexdigest()


def make_thumbnail(source: Path, target: Path, width: int = 320, timeout: float = 20.0) -> None:
    """Scale an image down with ImageMagick; UploadError if it cannot."""
    program = shutil.which("convert")
    if program is None:
        raise UploadError("Thumbnails are not available.")
    command = [program, str(source), "-thumbnail", f"{width}x", str(target)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=timeout)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise UploadError("The image cannot be read.") from error


def usage(root: Path) -> int:
    """Bytes of all files below `root`; symbolic links are not followed."""
    size = 0
    for directory, _, names in os.walk(root):
        for name in names:
            size += os.lstat(os.path.join(directory, name)).st_size
    return size
