r"""What detect-secrets finds in a text, at the speed of a packer.

The detectors and the filters against false positives are detect-secrets' own, with the defaults of
`detect-secrets scan --no-verify`; nothing is looked up on the network and no configuration is read.
A detector costs microseconds for every line it sees, so a prefilter decides which lines each of them
sees: byte patterns (`_MARKS`, `_RUN_MARKS`) that whatever the detector reports must contain, and for most
of them words without which they cannot match. All words are searched at once, then, in the few texts
that hold one, the patterns. A detector that the prefilter does not know (a later release may bring some)
sees every line.

The bytes are the text in Latin-1, so that positions are those of the text. Other characters become `?`,
which the patterns take for any character, as they do the bytes above 0x7f: `\d` and `\w` of the
detectors match more than ASCII.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from ahocorasick_rs import BytesAhoCorasick
    from detect_secrets.plugins.base import BasePlugin
    from detect_secrets.types import NamedIO

# To be raised when what `scan` finds changes: verdicts are remembered.
SCAN_VERSION = 1

_WILD = rb"?\x80-\xff"
# What secrets are made of: runs of these are found by translation, which is much faster than a pattern.
_RUN_CHARACTERS = rb"[A-Za-z0-9_\\" + _WILD + rb"-]"
_IS_RUN = bytes(ord("x") if re.match(_RUN_CHARACTERS, bytes([i])) else ord(" ") for i in range(256))

# Letters that a pattern without case takes for s, k and i, and that bytes.lower() does not know.
_FOLDED = {"ſ": "s", "\u212a": "k", "ı": "i", "İ": "i"}

_KEYWORD = "KeywordDetector"
_AWS = "AWSKeyDetector"
_BASE64 = "Base64HighEntropyString"
_HEX = "HexHighEntropyString"


def _preceded_by(word: bytes, stems: str) -> bytes:
    """A pattern of `word` after one of `stems` and perhaps an underscore; `re` seeks `word` itself."""
    return word + b"(?:%s)" % b"|".join(
        b"(?<=%s%s%s)" % (stem.encode(), joint, word) for stem in stems.split() for joint in (b"", b"_")
    )


class _Mark(NamedTuple):
    """`detector` is to see the lines in which `pattern` occurs, which needs one of `words`, if any."""

    detector: str
    pattern: re.Pattern[bytes]
    words: frozenset[bytes]


def _marks(*marks: tuple[str, bytes, str]) -> tuple[_Mark, ...]:
    """Marks of detector, pattern, and words in lower case."""
    return tuple(
        _Mark(name, re.compile(pattern, re.DOTALL), frozenset(words.encode().split(b"|")) - {b""})
        for name, pattern, words in marks
    )


def _after(word: str, stems: str) -> str:
    """`word` after each of `stems`, with an underscore between and without."""
    return "|".join(f"{stem}{joint}{word}" for stem in stems.split() for joint in ("", "_"))


_PASS_STEMS = "db database key"
_KEY_STEMS = "api auth service account db database priv private client"

_MARKS = _marks(
    ("ArtifactoryDetector", rb"AKC[a-zA-Z0-9]{10}", "akc"),
    ("ArtifactoryDetector", rb"AP[0-9A-F" + _WILD + rb"][a-zA-Z0-9]{8}", ""),
    (_AWS, rb"A(?:3T[A-Z0-9]|BIA|CCA|KIA|SIA)[0-9A-Z]{16}", "a3t|abia|acca|akia|asia"),
    ("AzureStorageKeyDetector", rb"AccountKey=", "accountkey="),
    ("BasicAuthDetector", rb"://[^:/#\[\]@!$&'()*+,;=\s]+:[^:/#\[\]@!$&'()*+,;=\s]+@", "://"),
    ("IPPublicDetector", rb"\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]", ""),
    ("JwtTokenDetector", rb"eyJ[A-Za-z0-9_=-]+\.[A-Za-z0-9_=-]", "eyj"),
    ("NpmDetector", rb":_authToken=", ":_authtoken="),
    ("PrivateKeyDetector", rb"PRIVATE KEY", "private key"),
    ("PrivateKeyDetector", rb"PuTTY-User-Key-File-2", "putty-user-key-file-2"),
)
# Searched in lower case.
_FOLDED_MARKS = _marks(
    ("SlackDetector", rb"xox[abposr]-", "xox"),
    ("SlackDetector", rb"hooks\.slack\.com/services/t", "hooks.slack.com/services/t"),
    (
        _KEYWORD,
        rb"pass(?:w(?:or)?d|%s)" % _preceded_by(b"pass", _PASS_STEMS)[4:],
        f"passwd|password|{_after('pass', _PASS_STEMS)}",
    ),
    (_KEYWORD, rb"pwd", "pwd"),
    (_KEYWORD, rb"secret", "secret"),
    (_KEYWORD, rb"contrase", "contrase"),
    (_KEYWORD, _preceded_by(b"key", _KEY_STEMS), _after("key", _KEY_STEMS)),
)
# Searched in runs of _RUN_CHARACTERS and a little around them; the number is the run's shortest length.
_GITLAB_KINDS = "pat dt ft soat rt cbt imt ptt agent oas"
_RUN_MARKS = tuple(
    (length, mark)
    for length, mark in zip(
        (40, 25, 32, 50, 78, 48, 36, 34),
        _marks(
            ("GitHubTokenDetector", rb"gh[pousr]_", "ghp_|gho_|ghu_|ghs_|ghr_"),
            (
                "GitLabTokenDetector",
                rb"gl(?:%s)-|GR1348941" % _GITLAB_KINDS.replace(" ", "|").encode(),
                "|".join(f"gl{kind}-" for kind in _GITLAB_KINDS.split()) + "|gr1348941",
            ),
            ("StripeDetector", rb"[rs]k_live_", "rk_live_|sk_live_"),
            ("SquareOAuthDetector", rb"sq0csp-", "sq0csp-"),
            ("PypiTokenDetector", rb"pypi-AgE", "pypi-age"),
            ("OpenAIDetector", rb"T3BlbkFJ", "t3blbkfj"),
            ("MailchimpDetector", rb"[0-9a-z]{32}-us[0-9]", "-us"),
            ("TwilioKeyDetector", rb"(?:AC|SK)[a-z0-9]{32}", ""),
        ),
        strict=True,
    )
)
# Searched in the 32 bytes before a run.
_BEFORE_MARKS = tuple(
    (length, mark)
    for length, mark in zip(
        (35, 27, 43),
        _marks(
            ("TelegramBotTokenDetector", rb"[0-9" + _WILD + rb"]{8}:\Z", ""),
            ("DiscordBotTokenDetector", rb"\." + _RUN_CHARACTERS + rb"{6}\.\Z", ""),
            ("SendGridDetector", rb"SG\." + _RUN_CHARACTERS + rb"{22}\.\Z", "sg."),
        ),
        strict=True,
    )
)
_CLOUDANT_WORDS = [
    f"{name}{joint}{api}{word}"
    for name in ("cl", "clou", "cloudant")
    for joint in ("", "-", "_")
    for api in ("", "api")
    for word in ("key", "pw", "pass", "token")
]
# Searched in lower case in what stands on the line before a run.
_ASSIGNMENT_MARKS = tuple(
    (length, mark)
    for length, mark in zip(
        (44, 48, 64, 64, 24),
        _marks(
            ("IbmCloudIamDetector", rb"key|pwd|pass|token| {64}", ""),
            ("IbmCosHmacDetector", rb"secret| {64}", ""),
            (
                "SoftlayerDetector",
                rb"(?:softlayer|sl)[_-]?(?:api)?[_-]?(?:key|pwd|pass|token)| {64}",
                "",
            ),
            ("SoftlayerDetector", rb"softlayer", "softlayer"),
            (
                "CloudantDetector",
                rb"cl(?:ou|oudant)?[_-]?(?:api)?(?:key|pw|pass|token)|https?:| {64}",
                "|".join(["cloudant.com", " " * 64, *_CLOUDANT_WORDS]),
            ),
        ),
        strict=True,
    )
)
_ASSIGNMENT_REACH = 256

# Random-looking strings: of more than 3 bits a character in hex, 4.5 in base64. That takes at least
# 9 and 23 different characters. The closing quote may open the next string.
_QUOTED = re.compile(rb"['\"]([0-9a-fA-F]{9,}|[A-Za-z0-9+/\\_=-]{23,})(?=['\"])")
# They are found like runs: by translation to q (a quote), x (of the string) and blanks.
_QUOTED_HEX, _QUOTED_BASE64 = (
    (
        bytes(ord("q" if i in b"'\"" else "x" if i in letters else " ") for i in range(256)),
        b"q" + b"x" * count,
    )
    for letters, count in (
        (b"0123456789abcdefABCDEF", 9),
        (b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/\\_=-", 23),
    )
)
_BARE = (re.compile(rb"[0-9a-fA-F]{9,}"), re.compile(rb"[A-Za-z0-9+/\\_=-]{22,}"))
_HEX_CHARACTERS = frozenset(b"0123456789abcdefABCDEF")
_HEX_DISTINCT, _BASE64_DISTINCT = 9, 23

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
    raw = _bytes_of(text)
    positions: dict[int, set[str]] = {}
    for position, name in _marked(raw):
        positions.setdefault(raw.rfind(b"\n", 0, position) + 1, set()).add(name)
    wanted: dict[int, set[str]] = {}
    line, at = 0, 0
    for start in sorted(positions):
        line += raw.count(b"\n", at, start)
        at = start
        wanted[line] = positions[start] & tools.detectors.keys()
    unknown = tools.detectors.keys() - _KNOWN
    if unknown:
        for line in range(raw.count(b"\n") + 1):
            wanted.setdefault(line, set()).update(unknown)
    return wanted


def _bytes_of(text: str) -> bytes:
    if not text.isascii():
        for letter, plain in _FOLDED.items():
            text = text.replace(letter, plain)
    return text.encode("latin-1", "replace")


def _marked(raw: bytes) -> Iterator[tuple[int, str]]:
    """Positions in `raw` of what detectors look for, with the detector's name."""
    folded = raw.lower()
    words = _words_in(folded)
    for marks, data in ((_MARKS, raw), (_FOLDED_MARKS, folded)):
        for mark in _possible(marks, words):
            for match in mark.pattern.finditer(data):
                yield match.start(), mark.detector
    for match in _quoted(raw):
        characters = match[1]
        if len(characters) == 40 and b"aws" in folded[max(0, match.start() - 64) : match.start()]:
            yield match.start(), _AWS
        for name in _random_looking(characters):
            yield match.start(), name
    yield from _marked_runs(raw, folded, words)


def _words_in(folded: bytes) -> set[bytes]:
    """The words of all marks that occur in a text."""
    automaton, words = _automaton()
    return {words[i] for i, _, _ in automaton.find_matches_as_indexes(folded, overlapping=True)}


@lru_cache(maxsize=1)
def _automaton() -> tuple[BytesAhoCorasick, list[bytes]]:
    import ahocorasick_rs

    runs = [mark for _, mark in (*_RUN_MARKS, *_BEFORE_MARKS, *_ASSIGNMENT_MARKS)]
    words = sorted({word for mark in (*_MARKS, *_FOLDED_MARKS, *runs) for word in mark.words})
    kind = ahocorasick_rs.Implementation.DFA  # the fastest, and small for so few words
    return ahocorasick_rs.BytesAhoCorasick(words, implementation=kind), words


def _possible(marks: Iterable[_Mark], words: set[bytes]) -> list[_Mark]:
    return [mark for mark in marks if not mark.words or not mark.words.isdisjoint(words)]


def _quoted(raw: bytes) -> Iterator[re.Match[bytes]]:
    """The matches of _QUOTED in `raw`; the same one may come twice."""
    for table, beginning in (_QUOTED_HEX, _QUOTED_BASE64):
        classes = raw.translate(table)
        start = classes.find(beginning)
        while start >= 0:
            match = _QUOTED.match(raw, start)
            if match is not None:
                yield match
            start = classes.find(beginning, start + len(beginning))


def _random_looking(characters: bytes) -> Iterator[str]:
    distinct = set(characters)
    if len(distinct) >= _BASE64_DISTINCT:
        yield _BASE64
    if len(distinct) >= _HEX_DISTINCT and distinct <= _HEX_CHARACTERS:
        yield _HEX
    # (hex has at most 22 different characters: too few for base64)


def _marked_runs(raw: bytes, folded: bytes, words: set[bytes]) -> Iterator[tuple[int, str]]:
    in_run, before_run, on_line = (
        [(length, mark) for length, mark in marks if not mark.words or not mark.words.isdisjoint(words)]
        for marks in (_RUN_MARKS, _BEFORE_MARKS, _ASSIGNMENT_MARKS)
    )
    shortest = min(length for length, _ in (*in_run, *before_run, *on_line))
    classes = raw.translate(_IS_RUN)
    run = b"x" * shortest
    start = classes.find(run)
    while start >= 0:
        end = classes.find(b" ", start + shortest)
        end = len(raw) if end < 0 else end
        length = end - start
        for least, (name, pattern, _) in in_run:
            if length >= least and pattern.search(raw, start, end):
                yield start, name
        if start and raw[start - 1] in b".:":  # the last character of all these marks
            before = raw[max(0, start - 32) : start]
            for least, (name, pattern, _) in before_run:
                if length >= least and pattern.search(before):
                    yield start, name
        if start and any(length >= least for least, _ in on_line):
            before = folded[max(0, start - _ASSIGNMENT_REACH) : start].rpartition(b"\n")[2]
            for least, (name, pattern, _) in on_line:
                if length >= least and pattern.search(before):
                    yield start, name
        start = classes.find(run, end)


_KNOWN = frozenset(
    [mark.detector for mark in (*_MARKS, *_FOLDED_MARKS)]
    + [mark.detector for _, mark in (*_RUN_MARKS, *_BEFORE_MARKS, *_ASSIGNMENT_MARKS)]
    + [_BASE64, _HEX]
)


def _transformed(tools: _Tools, path: str, text: str, *, prefilter: bool) -> Iterator[list[str]]:
    """`text` as detect-secrets rewrites YAML and INI files, if it is one: with all values in quotes."""
    is_yaml = tools.is_yaml(path)
    raw = _bytes_of(text)
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
        next(_marked(raw), None) is not None
        or b"aws" in folded
        or _LONG_RUN in raw.translate(_IS_RUN)
        or _CLOUDANT.search(folded) is not None
        or any(_random(tools, match[0], is_yaml=is_yaml) for bare in _BARE for match in bare.finditer(raw))
    )


def _random(tools: _Tools, characters: bytes, *, is_yaml: bool) -> bool:
    """Whether `characters` in quotes may be reported; in an INI file they may begin with the key."""
    for end in (b"", b"\\"):  # a quote that ends them within the value is escaped
        line = f"'{(characters + end).decode('ascii')}'"
        for name in _random_looking(characters + end):
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
