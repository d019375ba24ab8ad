"""What a machine has: memory, devices, cores, disk. This one's, or another one's from a description.

A description is a TOML file:

    name = "24 GB GPU, 64 GB RAM"
    ram = "64 GiB"
    cores = 16
    ram_bandwidth = "80 GB"      # a second
    disk_read = "3 GB"           # a second
    compute = "1.5 T"            # operations a second of the CPU, as prefill uses them

    [[devices]]
    name = "RTX 4090"
    memory = "24 GiB"
    bandwidth = "1008 GB"
    compute = "160 T"
    link = "25 GB"               # a second, between RAM and the device

A device with `unified = true` has its memory out of the RAM, as on a Mac.
"""

from __future__ import annotations

import os
import re
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3cli.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS = {"KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30, "TI": 1 << 40}
_AMOUNT = re.compile(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([KMGT]I?|)B?\s*", re.IGNORECASE)

# What common hardware does, where nothing is known: two channels of DDR5, a PCIe 4.0 x16 slot.
_RAM_BANDWIDTH, _LINK, _DISK_READ, _CPU_COMPUTE = 60e9, 25e9, 1e9, 0.5e12
_DEVICE_BANDWIDTH, _DEVICE_COMPUTE = 500e9, 50e12

_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU or another accelerator: bytes of memory, bytes a second, operations a second.

    `unified` memory is a part of the RAM. `link` is what goes between RAM and device in a second.
    """

    name: str
    total: int
    free: int
    bandwidth: float
    compute: float
    link: float
    unified: bool = False


@dataclass(frozen=True, slots=True)
class Machine:
    """One computer. Bytes, bytes a second, and operations a second of the CPU in prefill.

    `ram_available` is what a new process may take; `limit` says what holds it back, if it is not the
    RAM itself. `estimated` names the rates that nobody measured or described.
    """

    name: str
    ram_total: int
    ram_available: int
    cores: int
    ram_bandwidth: float
    disk_read: float
    compute: float
    devices: tuple[Device, ...] = ()
    limit: str = ""
    estimated: tuple[str, ...] = ()

    @property
    def device_memory(self) -> int:
        """Bytes that are free on devices with memory of their own."""
        return sum(device.free for device in self.devices if not device.unified)


def described(source: Mapping[str, Any], name: str) -> Machine:
    """The machine of a description. Raises UsageError, naming what is wrong in `name`."""

    def amount(table: Mapping[str, Any], key: str, default: float | None, least: float = 1) -> float:
        if key not in table and default is not None:
            return default
        value = table.get(key)
        match = _AMOUNT.fullmatch(str(value).removesuffix("/s"))
        size = float(match[1]) * (_UNITS | _BINARY_UNITS)[match[2].upper()] if match is not None else -1
        if size < least:
            problem = "is missing" if value is None else f"is {value!r}, which is no amount"
            raise UsageError(f"In {name}, {key} {problem}.", 'Write an amount such as "64 GiB" or "80 GB".')
        return size

    tables = source.get("devices", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UsageError(f"In {name}, devices is no list of tables.", "Begin each device with [[devices]].")
    known = {"name", "ram", "ram_free", "cores", "ram_bandwidth", "disk_read", "compute", "devices"}
    of_devices = {"name", "memory", "free", "bandwidth", "compute", "link", "unified"}
    for table, names in ((source, known), *((table, of_devices) for table in tables)):
        if unknown := sorted(set(table) - names):
            raise UsageError(
                f"{name} has an unknown key {unknown[0]}.", f"Known are {', '.join(sorted(names))}."
            )
    ram = int(amount(source, "ram", None))
    devices = []
    for number, table in enumerate(tables):
        memory = int(amount(table, "memory", None))
        devices.append(
            Device(
                str(table.get("name", f"device {number}")),
                memory,
                int(amount(table, "free", memory * 0.96, least=0)),  # a driver and a screen take some
                amount(table, "bandwidth", _DEVICE_BANDWIDTH),
                amount(table, "compute", _DEVICE_COMPUTE),
                amount(table, "link", _LINK),
                bool(table.get("unified", False)),
            )
        )
    return Machine(
        name=str(source.get("name", name)),
        ram_total=ram,
        ram_available=int(amount(source, "ram_free", ram * 0.92, least=0)),  # the system takes some
        cores=int(amount(source, "cores", 8)),
        ram_bandwidth=amount(source, "ram_bandwidth", _RAM_BANDWIDTH),
        disk_read=amount(source, "disk_read", _DISK_READ),
        compute=amount(source, "compute", _CPU_COMPUTE),
        devices=tuple(devices),
        estimated=tuple(key for key in ("ram_bandwidth", "disk_read", "compute") if key not in source),
    )


def this_machine(devices: Iterable[Mapping[str, Any]], cores: int) -> Machine:
    """The computer that m3 runs on, with the devices that the engine sees, as its facts tell them.

    What is no GPU among them is passed over. Rates are those of common hardware until they are measured.
    """
    total, available, limit = _memory()
    gpus = tuple(
        Device(
            str(device["description"] or device["name"]),
            int(device["total"]),
            int(device["free"]),
            _DEVICE_BANDWIDTH,
            _DEVICE_COMPUTE,
            _LINK,
            # Apple's GPUs call themselves one with memory of its own.
            unified=device["kind"] == "igpu" or device["name"].startswith(("Metal", "MTL")),
        )
        for device in devices
        if device["kind"] in ("gpu", "igpu")
    )
    return Machine(
        name="this machine",
        ram_total=total,
        ram_available=available,
        cores=cores,
        ram_bandwidth=_RAM_BANDWIDTH,
        disk_read=_DISK_READ,
        compute=_CPU_COMPUTE,
        devices=gpus,
        limit=limit,
        estimated=("ram_bandwidth", "disk_read", "compute"),
    )


def _memory() -> tuple[int, int, str]:
    """Bytes of RAM, bytes that may be taken, and what holds them back if it is not the RAM."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        facts = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text("ascii").splitlines())
        available = int(facts["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        available = int(total * 0.8)  # no such file on macOS
    limit = ""
    for room, name in ((_cgroup_room(), "a memory limit (cgroup)"), (_address_room(), "ulimit -v")):
        if room is not None and room < available:
            available, limit = room, name
    return total, max(available, 0), limit


def _cgroup_room() -> int | None:
    """What the control groups of this process let it take yet; None without a limit."""
    try:
        lines = Path("/proc/self/cgroup").read_text("utf-8").splitlines()
    except OSError:
        return None
    rooms: list[int] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        names = ("memory.max", "memory.current") if not controllers else (
            "memory.limit_in_bytes", "memory.usage_in_bytes",
        )  # fmt: skip
        if controllers and "memory" not in controllers.split(","):
            continue
        root = _CGROUPS / "memory" if controllers else _CGROUPS
        place = root / path.lstrip("/")
        while True:
            try:
                allowed, used = ((place / name).read_text("ascii").strip() for name in names)
                if allowed != "max" and int(allowed) < 1 << 60:
                    rooms.append(int(allowed) - int(used) + _reclaimable(place))
            except (OSError, ValueError):
                pass
            if place == root or root not in place.parents:
                break
            place = place.parent
    return min(rooms, default=None)


def _reclaimable(place: Path) -> int:
    """Bytes of cached files in a control group, which count as used and are given up when needed."""
    try:
        stat = dict(line.split() for line in (place / "memory.stat").read_text("ascii").splitlines())
        return int(stat.get("inactive_file", 0))
    except (OSError, ValueError):
        return 0


def _address_room() -> int | None:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else limit
