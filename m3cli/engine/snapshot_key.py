"""What a KV cache depends on beside its tokens."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from m3cli.engine.adapters import adapter_contents

if TYPE_CHECKING:
    from m3cli.engine.events import CacheConfig, EngineConfig

# Settings that change neither the numbers in a KV cache nor their order; adapters do, by their content.
_IRRELEVANT = {"model_path", "n_ctx", "threads", "allow_dense", "mmap", "mlock", "lora", "in_place"}


def snapshot_key(config: EngineConfig, cache: CacheConfig, build: str, attention: str) -> str:
    """What two runs have to share so that the KV cache of one serves the other.

    The model's content and that of its adapters, the build of llama.cpp, the types and the attention of the
    cache, batch sizes and placement, which decide the last digits. Raises ModelError when an adapter cannot
    be read.
    """
    parts = {name: value for name, value in asdict(config).items() if name not in _IRRELEVANT}
    parts |= {"model": cache.model_digest, "build": build, "attention": attention}
    adapters = adapter_contents(config.lora)
    if adapters:
        parts["lora"] = adapters
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
