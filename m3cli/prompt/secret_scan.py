"""What detect-secrets finds in a text, at the speed of a packer.

The detectors and the filters against false positives are detect-secrets' own, with the defaults of
`detect-secrets scan --no-verify`; nothing is looked up on the network and no configuration is read.
A detector costs microseconds for every line it sees, so a prefilter (`m3cli.prompt.secret_marks`) decides
which lines each of them sees. A detector that it does not know (a later release may bring some) sees every
line.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from m3cli.prompt.secret_marks import IS_RUN, KNOWN, bytes_of, marked, random_looking

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from detect_secrets.plugins.base import BasePlugin
    from detect_secrets.types import NamedIO

# To be raised when what `scan` finds changes: verdicts are remembered.
SCAN_VERSION = 1

# More aliases than this and a YAML document is not unfolded: they may multiply (a "YAML bomb").
_MOST_ALIASES = 20
_ALIAS = re.compile(r"(?:^|[\s\[,:-])\*\w", re.MULTILINE)
# A line at the margin that is neither a comment nor `key = value`: not the contents of an INI file.
_NOT_INI = re.compile(rb"^(?![#;\[\s])[^=:\n]+$", re.MULTILINE)
_INI_SECTION = re.compile(rb"(?:[^\S\n]*(?:[#;][^\n]*)?\n)*[^\S\n]*\[[^\n]+\]")
# Escapes in YAML that may make a secret of what does not look like one.
_ESCAPED = re.compile(rb"\"[^\n]*\\|\\[xuU/\r\n]")
# In such files the value may stand on a later line than its key.
_CLOUDANT = re.compile(rb"cl(?:ou|oudant)?[_-]?(?:api)?(?:key|pw|pass|token)")
_LONG_RUN = b"x" * 44
# What quotes would make a random-looking string of.
_BARE = (re.compile(rb"[0-9a-fA-F]{9,}"), re.compile(rb"[A-Za-z0-9+/\\_=-]{22,}"))


class Hit(NamedTuple):
    """What a detector reports: the 0-based line, the kind in detect-secrets' words, and the secret."""

    line: int
    kind: str
    secret: str


@dataclass(frozen=True)
class _Tools:
    """detect-secrets, loaded: its detectors by class name and its filters by what they look at."""

    detectors: dict[str, BasePlugin]
    skips_file: Callable[[str], bool]
    skips_line: Callable[[str, str, str], bool]
    skips_secret: Callable[[str, str, BasePlugin], bool]
    transforms: Callable[[str, str, bool], list[str] | None]
    is_yaml: Callable[[str], bool]
    is_other: Callable[[str], bool]


def scan(path: str, text: str, *, prefilter: bool = True) -> list[Hit]:
    """Everything that `detect-secrets scan` would report of a file `path` that holds `text`, and more.

    INI and YAML files are looked at both as they are (detect-secrets passes over their comments and
    lists) and, as there, with their values in quotes. Lock files, style sheets and other files that
    detect-secrets leaves out are left out, as are lines with its `pragma: allowlist secret`.
    `prefilter` off shows each detector each line; the result is the same.
    """
    tools = _tools()
    if tools.skips_file(path):
        return []
    wanted = _wanted(tools, text) if prefilter else None
    hits = set(_hits(tools, path, text.split("\n"), wanted)) if wanted != {} else set()
    for transformed in _transformed(tools, path, text, prefilter=prefilter):
        # (a block of YAML is one "line" with line feeds in it)
        one_each = "\n".join(line.replace("\n", "\x1f") for line in transformed)
        hits.update(_hits(tools, path, transformed, _wanted(tools, one_each) if prefilter else None))
    return sorted(hits)


def _hits(
    tools: _Tools, path: str, lines: Sequence[str], wanted: dict[int, set[str]] | None
) -> Iterator[Hit]:
    """What the detectors find in `lines`: each in the lines it is wanted for, or in all of them."""
    every = tools.detectors.keys()
    for number in range(len(lines)) if wanted is None else sorted(wanted):
        if not lines[number]:
            continue
        names = every if wanted is None else wanted[number]
        previous = lines[number - 1].rpartition("\r")[2] if number else ""
        for part in lines[number].rstrip("\r").split("\r"):
            line = part.rstrip()
            found = [hit for name in names for hit in _found(tools, name, path, number, line)] if line else []
            # (what detect-secrets asks of a line first takes longer than the detectors do)
            if found and not tools.skips_line(path, line, previous):
                yield from found
            previous = part


def _found(tools: _Tools, name: str, path: str, number: int, line: str) -> Iterator[Hit]:
    detector = tools.detectors[name]
    for found in detector.analyze_line(filename=path, line=line, line_number=number + 1):
        secret = found.secret_value
        if secret and not tools.skips_secret(secret, line, detector):
            yield Hit(number, found.type, secret)


def _wanted(tools: _Tools, text: str) -> dict[int, set[str]]:
    """The numbers of the lines that a detector has to see, with the names of those detectors."""
    raw = bytes_of(text)
    positions: dict[int, set[str]] = {}
    for position, name in marked(raw):
        positions.setdefault(raw.rfind(b"\n", 0, position) + 1, set()).add(name)
    wanted: dict[int, set[str]] = {}
    line, at = 0, 0
    for start in sorted(positions):
        line += raw.count(b"\n", at, start)
        at = start
        wanted[line] = positions[start] & tools.detectors.keys()
    unknown = tools.detectors.keys() - KNOWN
    if unknown:
        for line in range(raw.count(b"\n") + 1):
            wanted.setdefault(line, set()).update(unknown)
    return wanted


def _transformed(tools: _Tools, path: str, text: str, *, prefilter: bool) -> Iterator[list[str]]:
    """`text` as detect-secrets rewrites YAML and INI files, if it is one: with all values in quotes."""
    is_yaml = tools.is_yaml(path)
    raw = bytes_of(text)
    if is_yaml:
        kinds: Iterable[bool] = (False,) if len(_ALIAS.findall(text)) <= _MOST_ALIASES else ()
    elif _INI_SECTION.match(raw):
        kinds = (False,) if not tools.is_other(path) else (False, True)
    else:
        kinds = (True,) if tools.is_other(path) else ()
    if not kinds or (prefilter and not _worth_transforming(tools, raw, is_yaml=is_yaml)):
        return
    for eager in kinds:
        lines = tools.transforms(path, text, eager)
        if lines:
            yield lines


def _worth_transforming(tools: _Tools, raw: bytes, *, is_yaml: bool) -> bool:
    """Whether quotes around the values may bring to light what the lines as they are do not show."""
    if not is_yaml and _NOT_INI.search(raw):
        return False
    if is_yaml and (b"!!binary" in raw or _ESCAPED.search(raw)):
        return True
    folded = raw.lower()
    return (
        next(marked(raw), None) is not None
        or b"aws" in folded
        or _LONG_RUN in raw.translate(IS_RUN)
        or _CLOUDANT.search(folded) is not None
        or any(_random(tools, match[0], is_yaml=is_yaml) for bare in _BARE for match in bare.finditer(raw))
    )


def _random(tools: _Tools, characters: bytes, *, is_yaml: bool) -> bool:
    """Whether `characters` in quotes may be reported; in an INI file they may begin with the key."""
    for end in (b"", b"\\"):  # a quote that ends them within the value is escaped
        line = f"'{(characters + end).decode('ascii')}'"
        for name in random_looking(characters + end):
            if not is_yaml or tools.detectors[name].analyze_line(filename="", line=line):
                return True
    return False


@lru_cache(maxsize=1)
def _tools() -> _Tools:
    """Load detect-secrets. Takes a fifth of a second, most of it for `requests`, which is never used."""
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
    from detect_secrets.filters import allowlist, heuristic
    from detect_secrets.transformers import get_transformed_file
    from detect_secrets.util.code_snippet import CodeSnippet
    from detect_secrets.util.filetype import FileType, determine_file_type

    def skips_file(path: str) -> bool:
        return (
            heuristic.is_non_text_file(path)
            or heuristic.is_lock_file(path)
            or heuristic.is_swagger_file(path)
        )

    def skips_line(path: str, line: str, previous: str) -> bool:
        context = CodeSnippet(snippet=[previous, line], start_line=0, target_index=1)
        return allowlist.is_line_allowlisted(path, line, context) or heuristic.is_indirect_reference(line)

    def skips_secret(secret: str, line: str, detector: BasePlugin) -> bool:
        return (
            heuristic.is_sequential_string(secret)
            or heuristic.is_potential_uuid(secret)
            or heuristic.is_likely_id_string(secret, line, detector)
            or heuristic.is_templated_secret(secret)
            or heuristic.is_prefixed_with_dollar_sign(secret)
            or heuristic.is_not_alphanumeric_string(secret)
        )

    def transforms(path: str, text: str, eager: bool) -> list[str] | None:
        file = io.StringIO(text.replace("\r\n", "\n").replace("\r", "\n"))
        file.name = path
        try:
            return get_transformed_file(cast("NamedIO", file), use_eager_transformers=eager)
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
            return None  # YAML that the parser takes and the rewriting does not

    known: dict[str, Any] = get_mapping_from_secret_type_to_class()
    classes: dict[str, Callable[[], BasePlugin]] = {plugin.__name__: plugin for plugin in known.values()}
    return _Tools(
        detectors={name: detector() for name, detector in classes.items()},
        skips_file=skips_file,
        skips_line=skips_line,
        skips_secret=skips_secret,
        transforms=transforms,
        is_yaml=lambda path: determine_file_type(path) == FileType.YAML,
        is_other=lambda path: determine_file_type(path) == FileType.OTHER,
    )
