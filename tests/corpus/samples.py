"""Sources of many languages in `tests/data/sources`, each line with what is to become of it.

A line of such a file begins with the depth of the definition that begins there, or a point, then
`+` if `compress` keeps the line or `-` if not, a space, and the line itself. Where `strip_comments`
changes the line, `=> ` and the changed line follow, or `=x` if it goes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Sample:
    path: str
    text: str = ""
    depths: dict[int, int] = field(default_factory=dict)
    kept: list[int] = field(default_factory=list)
    stripped: dict[int, str] = field(default_factory=dict)


def _read(file: Path) -> Sample:
    sample = Sample(file.name.removesuffix(".lines"))
    number = 0
    for line in file.read_text("utf-8").splitlines():
        if line == "=x":
            del sample.stripped[number]
        elif line.startswith("=> "):
            sample.stripped[number] = line[3:]
        else:
            number += 1
            if line[0] != ".":
                sample.depths[number] = int(line[0])
            if line[1] == "+":
                sample.kept.append(number)
            sample.text += line[3:] + "\n"
            sample.stripped[number] = line[3:]
    return sample


SAMPLES = [_read(file) for file in sorted(Path(__file__).parents[1].joinpath("data/sources").iterdir())]
