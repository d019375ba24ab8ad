"""What this installation can do, in one screen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from m3cli.report.text import fact_table, size

if TYPE_CHECKING:
    from rich.table import Table

    from m3cli.tasks.doctor import Diagnosis


def doctor_table(diagnosis: Diagnosis) -> Table:
    """One row a fact; problems say what to do."""
    rows: list[tuple[str, str, str]] = []

    def row(name: str, value: object, style: str = "") -> None:
        rows.append((name, str(value), style))

    row("m3", diagnosis.m3)
    row("Python", diagnosis.python)
    facts = diagnosis.llama_cpp
    if facts is not None:
        row("llama.cpp", facts["version"])
        row("CPU features", facts["system_info"])
        row("cores", facts["cores"])
        for device in facts["devices"]:
            memory = f"{size(device['free'])} free of {size(device['total'])}"
            row("device", f"{device['name']} ({device['description']}), {memory}")
        row("GPU offload", "yes" if facts["gpu_offload"] else "no: this build of llama.cpp runs on the CPU")
    row("git", diagnosis.git or "not found: only ignore files are honoured, not what git tracks")
    row("model", diagnosis.model)
    row("cache", diagnosis.cache)
    row("settings file", diagnosis.settings_file)
    for name, value, origin in diagnosis.settings:
        if origin != "default":
            row(f"  {name}", f"{value} (from {origin})")
    for problem in diagnosis.problems:
        row("problem", problem, style="bold red")
    return fact_table(rows)
