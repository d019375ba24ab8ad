r"""What secrets look like, cheaply: which places of a text the detectors of detect-secrets have to see.

A mark is a byte pattern that whatever a detector reports must contain, and for most of them words without
which it cannot match. All words are searched at once, then, in the few texts that hold one, the patterns.

The bytes are the text in Latin-1, so that positions are those of the text. Other characters become `?`,
which the patterns take for any character, as they do the bytes above 0x7f: `\d` and `\w` of the
detectors match more than ASCII.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ahocorasick_rs import BytesAhoCorasick

_WILD = rb"?\x80-\xff"
# What secrets are made of: runs of these are found by translation, which is much faster than a pattern.
_RUN_CHARACTERS = rb"[A-Za-z0-9_\\" + _WILD + rb"-]"
IS_RUN = bytes(ord("x") if re.match(_RUN_CHARACTERS, bytes([i])) else ord(" ") for i in range(256))

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
_HEX_CHARACTERS = frozenset(b"0123456789abcdefABCDEF")
_HEX_DISTINCT, _BASE64_DISTINCT = 9, 23


def bytes_of(text: str) -> bytes:
    """`text` in Latin-1, with `?` for what that lacks."""
    if not text.isascii():
        for letter, plain in _FOLDED.items():
            text = text.replace(letter, plain)
    return text.encode("latin-1", "replace")


def marked(raw: bytes) -> Iterator[tuple[int, str]]:
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
        for name in random_looking(characters):
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


def random_looking(characters: bytes) -> Iterator[str]:
    """Which detectors of random strings may report these characters."""
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
    classes = raw.translate(IS_RUN)
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


# All detectors that there are marks for.
KNOWN = frozenset(
    [mark.detector for mark in (*_MARKS, *_FOLDED_MARKS)]
    + [mark.detector for _, mark in (*_RUN_MARKS, *_BEFORE_MARKS, *_ASSIGNMENT_MARKS)]
    + [_BASE64, _HEX]
)
