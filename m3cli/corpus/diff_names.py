"""What the header of a file in a git diff says: its names, before and after, and what became of it.

Names are text in which bytes that are not UTF-8 are surrogate escapes, as in `os.fsdecode`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from m3cli.corpus.names import printable
from m3cli.errors import CorpusError

NOTHING = "/dev/null"

_HUNK = re.compile(r"@@ -\d{1,9}(?:,\d{1,9})? \+\d{1,9}(?:,\d{1,9})? @@")
_HUNK_START = re.compile(r"@@ -\d")
_COMBINED = re.compile(r"diff --(?:cc|combined) |@@@+ -")
_PROSE = re.compile(r"(?:commit|From) [0-9a-f]{40,64}\b")  # begins a log's entry, or a mail
_MODES = re.compile(r"index [0-9a-f]+\.\.[0-9a-f]+ (?P<mode>\d+)$")
_FACT = re.compile(
    r"(?P<name>(?:old|new|new file|deleted file) mode|(?:rename|copy) (?:from|to)|---|\+\+\+) (?P<value>.*)",
    re.DOTALL,
)
_BINARY = ("Binary files ", "GIT binary patch")
_QUOTED = r'"(?:[^"\\]|\\.)*"'
_PAIR = re.compile(rf"(?P<old>{_QUOTED}|.*) (?P<new>{_QUOTED})|({_QUOTED}) (.*)", re.DOTALL)
_ESCAPE = re.compile(rb"\\(?:([0-7]{1,3})|(.))", re.DOTALL)
_CONTROLS = {b"a": b"\a", b"b": b"\b", b"t": b"\t", b"n": b"\n", b"v": b"\v", b"f": b"\f", b"r": b"\r"}
_LONGEST_NAME = 10_000  # characters; the kernel allows 4,096 bytes, each up to four characters in quotes


@dataclass(slots=True)
class GitHeader:
    """What stands between a line `diff --git` and the file's first hunk; `line` is counted from 1.

    `facts` are the values by the words before them, such as "rename from" and "+++".
    """

    line: int
    pair: str
    facts: dict[str, str] = field(default_factory=dict)
    mode: str = ""
    is_binary: bool = False

    def names(self) -> tuple[str, str]:
        """The names before and after, without the prefixes that git puts before them.

        Raises CorpusError if they cannot be told.
        """
        for kind in ("rename", "copy"):  # these never have a prefix
            old, new = self.facts.get(f"{kind} from"), self.facts.get(f"{kind} to")
            if old is not None and new is not None:
                return unquoted(old), unquoted(new)
        pair = _both(self.pair)
        if pair is None and "---" in self.facts and "+++" in self.facts:
            pair = name_of(self.facts["---"]), name_of(self.facts["+++"])
        if pair is None:
            raise malformed(self.line, f"the names in “{printable(self.pair[:200])}” cannot be told apart")
        return without_prefixes(*pair)

    @property
    def modes(self) -> tuple[str, str]:
        """The modes of the file before and after, as git writes them, empty where they are not known."""
        facts = self.facts
        old = facts.get("old mode") or facts.get("deleted file mode") or self.mode
        return old, facts.get("new mode") or facts.get("new file mode") or self.mode


def read_headers(lines: list[str]) -> tuple[list[str], dict[int, GitHeader]]:
    """The diff with plain headers, `a/N` and `b/N`, in place of git's; and those by their lines, N.

    What readers of diffs take for more than it is becomes plain too.
    Raises CorpusError for combined diffs, and for hunks whose places are not numbers.
    """
    plain: list[str] = []
    headers: dict[int, GitHeader] = {}
    header: GitHeader | None = None
    in_prose = False
    before = ""
    for number, line in enumerate(lines, 1):
        text = line.rstrip("\r\n")
        if _COMBINED.match(line):
            raise CorpusError(
                f"The diff is a combined one, of a merge, at line {number:,}.",
                "Make it against one parent, as `git diff BASE...HEAD` or `git show --first-parent -m` does.",
            )
        if line.startswith("diff --git "):
            header = headers[number] = GitHeader(number, text.removeprefix("diff --git "))
            in_prose = False
            plain.append(f"diff --git a/{number} b/{number}\n")
        elif in_prose or _PROSE.match(line):
            in_prose, header = True, None
            plain.append("#\n")
        elif _HUNK_START.match(line):
            if not _HUNK.match(line):
                raise malformed(number, "the place of a hunk is not written as “@@ -1,2 +1,2 @@”")
            header = None
            plain.append(line)
        elif header is not None:
            plain.append(_taken(header, text))
        elif line.startswith("\\ ") and before[:1] in (" ", "+", "-", "\n", "\r"):
            plain.append("\\ No newline at end of file\n")  # programs say it in the user's language
        elif line.startswith(("\\", "Binary file")) and (line[0] == "\\" or len(line) > _LONGEST_NAME):
            plain.append("#\n")
        else:
            plain.append(line)
        before = line
    return plain, headers


def _taken(header: GitHeader, text: str) -> str:
    """Note what `text` says in `header`; the line to read in its place."""
    if match := _FACT.match(text):
        name = match["name"]
        header.facts.setdefault(name, match["value"])
        if name in ("---", "+++"):
            return f"{name} {'a' if name == '---' else 'b'}/{header.line}\n"
    elif match := _MODES.match(text):
        header.mode = match["mode"]
    elif text.startswith(_BINARY):
        header.is_binary = True
    return "#\n"


def _both(pair: str) -> tuple[str, str] | None:
    """The two names after `diff --git`; None if it is not clear where the second begins."""
    if len(pair) > 2 * _LONGEST_NAME:
        return None
    if match := _PAIR.fullmatch(pair):
        old, new = match["old"] or match[3], match["new"] or match[4]
        return unquoted(old), unquoted(new)
    # Blanks are not quoted, but unless the file was renamed, both names are the same.
    middle = len(pair) // 2
    old, new = pair[:middle], pair[middle + 1 :]
    same = old == new or old.partition("/")[2] == new.partition("/")[2] != ""
    return (old, new) if same and pair[middle : middle + 1] == " " else None


def name_of(text: str) -> str:
    """The name that follows `---` or `+++`: without the time behind a tab, and out of its quotes."""
    return unquoted(text.partition("\t")[0].rstrip("\r\n"))


def unquoted(name: str) -> str:
    """A name as git quotes it, with octal escapes, as what it stands for."""
    if len(name) < 2 or not (name[0] == name[-1] == '"'):
        return name
    data = name[1:-1].encode("utf-8", "surrogateescape")

    def replace(match: re.Match[bytes]) -> bytes:
        return bytes([int(match[1], 8) & 0xFF]) if match[1] else _CONTROLS.get(match[2], match[2])

    return _ESCAPE.sub(replace, data).decode("utf-8", "surrogateescape")


def without_prefixes(old: str, new: str) -> tuple[str, str]:
    """Two names of a file without a first directory that only tells before from after: `a/x` and `b/x`.

    git's own prefixes also go where the rest differs, or where there is only one name.
    """
    (before, _, old_rest), (after, _, new_rest) = old.partition("/"), new.partition("/")
    if NOTHING not in (old, new):
        if old == new:
            return _without_dot(old), _without_dot(new)
        if old_rest and new_rest and ((before, after) == ("a", "b") or old_rest == new_rest):
            return _without_dot(old_rest), _without_dot(new_rest)
        return _without_dot(old), _without_dot(new)
    if old != NOTHING and before == "a" and old_rest:
        old = old_rest
    if new != NOTHING and after == "b" and new_rest:
        new = new_rest
    return (old if old == NOTHING else _without_dot(old)), (new if new == NOTHING else _without_dot(new))


def _without_dot(name: str) -> str:
    return name.removeprefix("./")


def check_name(name: str, line: int) -> None:
    """Raise CorpusError for a name that leads out of the tree, or into git's own data."""
    parts = name.split("/")
    if not name or "\0" in name or any(part in ("", ".", "..") or part.lower() == ".git" for part in parts):
        raise CorpusError(
            f"The diff names “{printable(name[:200])}” at line {line:,}, which leads out of the tree.",
            "Make the diff at the top of the tree, with relative paths, as `git diff` does.",
        )


def malformed(line: int, why: str) -> CorpusError:
    """The error of a diff that cannot be read at `line`, counted from 1."""
    return CorpusError(
        f"The diff cannot be read at line {line:,}: {why}.",
        "Make it anew with `git diff`, and hand it on unchanged; editors and mail break diffs.",
    )
