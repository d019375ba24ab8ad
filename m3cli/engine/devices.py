"""The devices that this build of llama.cpp can use, and the buffer types that their memory is known by.

Runs in the worker process, as all that uses llama.cpp does.
"""

from __future__ import annotations

import ctypes
from typing import Any

from m3cli.engine.llama_library import lib, libggml, physical_cores, version

_SIZE, _POINTER, _TEXT = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_char_p

# ggml-backend.h: function → type of its result and of its arguments.
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "ggml_backend_dev_count": (_SIZE,),
    "ggml_backend_dev_get": (_POINTER, _SIZE),
    "ggml_backend_dev_name": (_TEXT, _POINTER),
    "ggml_backend_dev_description": (_TEXT, _POINTER),
    "ggml_backend_dev_type": (ctypes.c_int, _POINTER),
    "ggml_backend_dev_memory": (None, _POINTER, ctypes.POINTER(_SIZE), ctypes.POINTER(_SIZE)),
    "ggml_backend_dev_buffer_type": (_POINTER, _POINTER),
    "ggml_backend_dev_host_buffer_type": (_POINTER, _POINTER),
    "ggml_backend_cpu_buffer_type": (_POINTER,),
    "ggml_backend_buft_name": (_TEXT, _POINTER),
    "ggml_backend_buft_is_host": (ctypes.c_bool, _POINTER),
    "ggml_backend_buft_get_device": (_POINTER, _POINTER),
}
_KINDS = ("cpu", "gpu", "igpu", "accel", "meta")  # enum ggml_backend_dev_type

for _name, (_result, *_arguments) in _FUNCTIONS.items():
    _function = getattr(libggml, _name)
    _function.restype, _function.argtypes = _result, _arguments

ggml: Any = libggml  # with the types of all functions above


def buffer_types() -> dict[str, int]:
    """Address of each buffer type that weights can be put into, by the name that llama.cpp logs."""
    devices = [ggml.ggml_backend_dev_get(index) for index in range(ggml.ggml_backend_dev_count())]
    found = [ggml.ggml_backend_dev_buffer_type(device) for device in devices]
    found += [ggml.ggml_backend_dev_host_buffer_type(device) for device in devices]
    found.append(ggml.ggml_backend_cpu_buffer_type())
    return {buffer_type_name(address): address for address in found if address}


def buffer_type_name(address: int) -> str:
    """Name of a buffer type, e.g. `CPU` or `CUDA0`."""
    return str(ggml.ggml_backend_buft_name(address).decode("utf-8", "replace"))


def device_of(address: int) -> str:
    """Name of the device in whose memory a buffer type lies; empty for main memory."""
    device = None if ggml.ggml_backend_buft_is_host(address) else ggml.ggml_backend_buft_get_device(address)
    return ggml.ggml_backend_dev_name(device).decode("utf-8", "replace") if device else ""


def system_facts() -> dict[str, Any]:
    """Describe this build of llama.cpp and what it sees.

    `version`, `system_info`, `gpu_offload`, `cores`, and `devices`: a list of `name`, `description`,
    `kind` (cpu; gpu; igpu, which uses the RAM; accel, which helps the CPU), `free` and `total` memory in
    bytes.
    """
    devices = []
    for index in range(ggml.ggml_backend_dev_count()):
        device = ggml.ggml_backend_dev_get(index)
        free, total = _SIZE(), _SIZE()
        ggml.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        devices.append(
            {
                "name": ggml.ggml_backend_dev_name(device).decode("utf-8", "replace"),
                "description": ggml.ggml_backend_dev_description(device).decode("utf-8", "replace"),
                "kind": _KINDS[ggml.ggml_backend_dev_type(device)],
                "free": free.value,
                "total": total.value,
            }
        )
    return {
        "version": version(),
        "system_info": lib.llama_print_system_info().decode("utf-8", "replace").strip(" |"),
        "gpu_offload": bool(lib.llama_supports_gpu_offload()),
        "cores": physical_cores(),
        "devices": devices,
    }
