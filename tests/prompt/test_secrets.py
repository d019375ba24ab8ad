"""Secrets are found as detect-secrets finds them, only faster, and go completely."""

from __future__ import annotations

import base64
import json
import random
import re
import sqlite3
import string
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from detect_secrets.core.scan import scan_file
from detect_secrets.plugins import keyword
from detect_secrets.plugins.base import RegexBasedDetector
from detect_secrets.settings import Settings, default_settings
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from m3cli.corpus.chunks import chunk_document
from m3cli.corpus.types import Document
from m3cli.memo import Memo
from m3cli.prompt import secret_marks, secret_scan, secrets
from m3cli.prompt.secret_scan import scan
from m3cli.prompt.secrets import Redactor

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from m3cli.corpus.types import Chunk
    from m3cli.prompt.secrets import Finding

# Secrets are made here, so that this file holds none.
_RANDOM = random.Random(3)
HEX = "0123456789abcdef"
LOWER = string.ascii_lowercase + string.digits
WORD = string.ascii_letters + string.digits


def some(alphabet: str, count: int) -> str:
    return "".join(_RANDOM.choice(alphabet) for _ in range(count))


def jwt() -> str:
    parts = [json.dumps(part).encode() for part in ({"alg": "HS256", "typ": "JWT"}, {"sub": "1234"})]
    return (
        ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts) + "." + some(WORD, 43)
    )


KEY_WORDS = "PRIVATE" + " KEY"
SAMPLES = {
    "Artifactory Credentials": ["a: AKC" + some(WORD, 20), '"AP5' + some(WORD, 20) + '"'],
    "AWS Access Key": [
        "x AK" + "IA" + some(string.ascii_uppercase, 16),
        f"aws_secret_key = '{some(WORD, 40)}'",
    ],
    "Azure Storage Account access key": ["Account" + "Key=" + some(WORD, 88)],
    "Basic Auth Credentials": ["https://me:" + "pa55word" + "@example.com/"],
    "Cloudant Credentials": [
        f"cloudant_password: {some(HEX, 64)}",
        f"cl_apikey = '{some(string.ascii_lowercase, 24)}'",
        f"https://me:{some(HEX, 64)}@me.cloudant.com",
        f"https://me:{some(string.ascii_lowercase, 24)}@me.cloudant.com",
    ],
    "Discord Bot Token": [f"M{some(WORD, 23)}.{some(WORD, 6)}.{some(WORD, 27)}"],
    "GitHub Token": ["gh" + f"{letter}_{some(WORD, 36)}" for letter in "pousr"],
    "GitLab Token": [
        "gl" + f"{rest}{some(WORD, count)}"
        for rest, count in [
            *(("pat-", 20), ("dt-", 20), ("ft-", 20), ("soat-", 20), ("rt-", 20), ("cbt-a1_", 20)),
            *(("imt-", 25), ("ptt-", 40), ("agent-", 50), ("oas-", 64)),
        ]
    ]
    + ["GR" + "1348941" + some(WORD, 20)],
    "IBM Cloud IAM Key": [f"ibm_cloud_iam_api_key = {some(WORD, 44)}", f"token: '{some(WORD, 44)}'"],
    "IBM COS HMAC Credentials": [
        f"cos_hmac_secret_access_key = {some(HEX, 48)}",
        f"secret_key: '{some(HEX, 48)}'",
    ],
    "Public IP (ipv4)": ["host 8.8." + "4.4:80", "https://133.1." + "33.7/x"],
    "JSON Web Token": [jwt()],
    "Mailchimp Access Key": [some(LOWER, 32) + "-us" + "12"],
    "NPM tokens": ["//registry.npmjs.org/:_auth" + "Token=npm_" + some(WORD, 36)],
    "OpenAI Token": ["sk" + f"-{some(WORD, 20)}T3Blbk" + f"FJ{some(WORD, 20)}"],
    "Private Key": [f"-----BEGIN {kind}{KEY_WORDS}" for kind in ("", "RSA ", "EC ", "DSA ", "OPENSSH ")]
    + [
        "PuTTY-User-Key" + "-File-2: ssh-rsa",
        f"BEGIN PGP {KEY_WORDS} BLOCK",
        f"BEGIN SSH2 ENCRYPTED {KEY_WORDS}",
    ],
    "PyPI Token": [
        "pypi" + "-AgEIcHlwaS5vcmc" + some(WORD, 70),
        "pypi" + "-AgENdGVzdC5weXBpLm9yZw" + some(WORD, 70),
    ],
    "SendGrid API Key": ["SG" + f".{some(WORD, 22)}.{some(WORD, 43)}"],
    "Slack Token": [
        "XOX" + "B-34532-45345-" + some(LOWER, 20),
        "https://hooks.slack" + ".com/services/T" + f"{some(WORD, 8)}/B{some(WORD, 8)}/{some(WORD, 20)}",
    ],
    "SoftLayer Credentials": [
        f"softlayer_api_key: {some(LOWER, 64)}",
        f"sl-token = '{some(LOWER, 64)}'",
        f"https://api.softlayer.com/soap/v3/{some(LOWER, 64)}",
    ],
    "Square OAuth Secret": ["sq0" + f"csp-{some(WORD, 20)}\\{some(WORD, 22)}"],
    "Stripe Access Key": ["sk" + f"_live_{some(WORD, 24)}", "rk" + f"_live_{some(WORD, 24)}"],
    "Telegram Bot Token": [f"{some('123456789', 10)}:{some(WORD, 35)}"],
    "Twilio API Key": ["AC" + some(LOWER, 32), "SK" + some(LOWER, 32)],
    "Hex High Entropy String": [f"x = '{some(HEX, 40)}'"],
    "Base64 High Entropy String": [f'x = "{some(WORD + "+/", 60)}="'],
    "Secret Keyword": [
        *(
            f'{name} = "hunt-2-er"'
            for name in "password api_key privKey db_pass keypass client_secret".split()
        ),
        'contraseña: "hunt-2-er"',
        'if ("hunt-2-er" == my_pwd) {',
        'serviceKey => "hunt-2-er"',
        'pa\u017f\u017fword = "hunt-2-er"',  # a pattern without case takes the long s for an s
    ],
}
EVERY_SAMPLE = [(kind, line) for kind, lines in SAMPLES.items() for line in lines]
PATHS = ["a.py", "a.txt", "a.go", "a.c", "a.cpp", "a.yaml", "a.ini", "a.properties", "a.js", "a.env", "a"]


def kinds(path: str, text: str, *, prefilter: bool = True) -> set[str]:
    return {hit.kind for hit in scan(path, text, prefilter=prefilter)}


@dataclass(frozen=True)
class Redacted:
    chunks: tuple[Chunk, ...]
    findings: tuple[Finding, ...]
    counts: dict[str, int]


def redact(chunks: Iterable[Chunk], *, prefilter: bool = True) -> Redacted:
    redactor = Redactor(prefilter=prefilter)
    redacted = tuple(redactor.redact(chunks))
    return Redacted(redacted, tuple(redactor.findings), redactor.counts)


def redact_text(path: str, text: str, tokens: int = 512) -> Redacted:
    return redact(chunk_document(Document(path, text, "utf-8"), tokens))


def redacted_text(path: str, text: str) -> str:
    return "".join(chunk.text for chunk in redact_text(path, text).chunks)


# The prefilter


def test_there_are_samples_for_every_detector() -> None:
    """A detector that a new release of detect-secrets brings is noticed here."""
    detectors = secret_scan._tools().detectors
    assert SAMPLES.keys() == {detector.secret_type for detector in detectors.values()}
    assert detectors.keys() == secret_marks.KNOWN


@pytest.mark.parametrize(("kind", "line"), EVERY_SAMPLE)
def test_every_kind_of_secret_is_found_through_the_prefilter(kind: str, line: str) -> None:
    """Each sample is reported as what it is, wherever it stands in a file."""
    for text in (line, f"one\n{line}\ntwo\n", f"größe €\r\n{line}\r\n漢字"):
        # (an address has no letters, which a default scan takes for no secret)
        assert kind in kinds("a.py", text) or kind == "Public IP (ipv4)"
        assert scan("a.py", text) == scan("a.py", text, prefilter=False)


@pytest.mark.parametrize("path", PATHS)
def test_the_prefilter_loses_nothing_in_any_kind_of_file(path: str) -> None:
    """With every sample, in every form that detect-secrets reads, both ways report the same."""
    lines = [line for _, line in EVERY_SAMPLE]
    values = [re.sub(r"\W+$", "", re.sub(r"^.*[=:]\s*['\"]?", "", line)) for line in lines]
    texts = ["\n".join(lines), "[section]\n" + "\n".join(f"x{i} = {v}" for i, v in enumerate(values))]
    texts += [f"password:\n  {value}\n" for value in values] + [f"name={value}" for value in values]
    for text in texts:
        assert scan(path, text) == scan(path, text, prefilter=False)


def _denylists() -> list[tuple[str, re.Pattern[str]]]:
    pairs = [
        (name, pattern)
        for name, detector in secret_scan._tools().detectors.items()
        if isinstance(detector, RegexBasedDetector)
        for pattern in detector.denylist
    ]
    patterns = {pattern for group in keyword.REGEX_BY_FILETYPE.values() for pattern in group}
    return pairs + [
        ("KeywordDetector", pattern)
        for pattern in sorted(patterns, key=lambda each: (each.pattern, each.flags))
    ]


@pytest.mark.parametrize(("name", "pattern"), _denylists())
@settings(
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
@given(data=st.data())
def test_whatever_a_detectors_pattern_matches_is_shown_to_it(
    name: str, pattern: re.Pattern[str], data: st.DataObject
) -> None:
    """Lines are generated from the patterns themselves, with anything around them."""
    around = st.sampled_from(["", " ", "'", '"', "x", "é", "€", "=", "key: ", "\t"])
    match = data.draw(st.from_regex(pattern)).split("\n")[0]
    line = data.draw(around) + match + data.draw(around)
    wanted = secret_scan._wanted(secret_scan._tools(), "before\n" + line + "\nafter").get(1, set())
    for other, detector in secret_scan._tools().detectors.items():
        for path in ("a.py", "a.go", "a.c", "a.cpp", "a.yaml"):
            if detector.analyze_line(filename=path, line=line.rstrip()):
                assert other in wanted


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    st.lists(
        st.text(alphabet="'\"abcdefghijklmnopqrstuvwxyzABCDEF0123456789+/=-_\\", max_size=80), max_size=6
    )
)
def test_random_looking_strings_reach_their_detectors(pieces: list[str]) -> None:
    """However quotes open and close, the two measures of entropy see what they would report."""
    text = "'".join(pieces)
    assert scan("a.py", text) == scan("a.py", text, prefilter=False)


def test_a_detector_that_the_prefilter_does_not_know_sees_every_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A newer detect-secrets may cost time, but no findings."""
    monkeypatch.setattr(secret_scan, "KNOWN", frozenset())
    assert set(secret_scan._wanted(secret_scan._tools(), "a\nb\n")) == {0, 1, 2}


# Parity with detect-secrets


def test_the_filters_are_those_of_a_default_scan() -> None:
    """All of detect-secrets' default filters are applied, but for the one that asks for a file on disk."""
    ours = {
        "common.is_invalid_file",  # the text is here already
        "allowlist.is_line_allowlisted",
        *(f"heuristic.{name}" for name in "is_non_text_file is_lock_file is_swagger_file".split()),
        *(f"heuristic.{name}" for name in "is_indirect_reference is_sequential_string".split()),
        *(f"heuristic.{name}" for name in "is_potential_uuid is_likely_id_string".split()),
        *(f"heuristic.{name}" for name in "is_templated_secret is_prefixed_with_dollar_sign".split()),
        "heuristic.is_not_alphanumeric_string",
    }
    assert set(Settings().filters) == {f"detect_secrets.filters.{name}" for name in ours}


@pytest.mark.parametrize("path", PATHS)
def test_all_that_a_default_scan_reports_is_found(path: str, tmp_path: Path) -> None:
    """detect-secrets itself scans the same file; nothing of its report is missing."""
    file = tmp_path / path
    texts = ["\n".join(line for _, line in EVERY_SAMPLE) + "\n"]
    texts += [line + "\n" for _, line in EVERY_SAMPLE]
    texts += [f"[a]\nb = {some(WORD, 60)}\n; c\nd: {some(HEX, 40)}\n", f"a:\n  b: {some(WORD, 60)}\n"]
    texts += [f"token={some(WORD, 60)}\n", "x = 'y'  # pragma: allowlist secret\n"]
    for text in texts:
        file.write_text(text, encoding="utf-8")
        with default_settings():
            reported = {
                (secret.line_number - 1, secret.type, secret.secret_value) for secret in scan_file(str(file))
            }
        found = set(scan(str(file), text))
        assert reported <= found
        if path == "a.py":
            assert reported == found


@pytest.mark.parametrize(
    "line",
    [
        'password = "${PASSWORD}"',
        'password = get_password("name")',
        'password = "*******"',
        'password = "hunt-2-er"  # pragma: allowlist secret',
        f"user_id = '{some(HEX, 40)}'",
    ],
)
def test_what_detect_secrets_takes_for_no_secret_stays(line: str) -> None:
    """The filters against false positives are applied."""
    assert redacted_text("a.py", line) == line


def test_lines_in_a_lock_file_stay() -> None:
    """detect-secrets does not look into lock files."""
    assert scan("poetry.lock", f"x = '{some(HEX, 40)}'") == []


# Redaction


def test_a_secret_becomes_a_placeholder_that_is_the_same_everywhere() -> None:
    """Numbers count the different secrets of a kind; what surrounds them stays."""
    first, second = ("gh" + "p_" + some(WORD, 36) for _ in range(2))
    chunks = [
        *chunk_document(Document("a.py", f"a({first})\nb({second})\n", "utf-8")),
        *chunk_document(Document("b.py", f"\n\nc({first})\n", "utf-8")),
    ]
    redacted = redact(chunks)
    assert [chunk.text for chunk in redacted.chunks] == [
        "a([REDACTED:github-token:1])\nb([REDACTED:github-token:2])\n",
        "\n\nc([REDACTED:github-token:1])\n",
    ]
    assert [(f.path, f.line, f.kind) for f in redacted.findings] == [
        ("a.py", 1, "github-token"),
        ("a.py", 2, "github-token"),
        ("b.py", 3, "github-token"),
    ]
    assert redacted.counts == {"github-token": 3}
    assert redact(chunks) == redacted == redact(chunks, prefilter=False)


@pytest.mark.parametrize(("kind", "line"), EVERY_SAMPLE)
def test_nothing_of_a_secret_stays(kind: str, line: str) -> None:
    """Not even where detect-secrets reports a token by its first letters."""
    tail = max(re.findall(r"\w+", line), key=len)[-8:]
    left = tail in redacted_text("a.py", f"one\n{line}\ntwo\n")
    assert not left or kind in {"Public IP (ipv4)", "Private Key"} or "hunt-2-er" in line
    assert "hunt-2-er" not in redacted_text("a.py", line)


def test_chunks_without_secrets_are_the_same_objects() -> None:
    """Positions, digests and texts of what holds no secret do not change."""
    chunks = chunk_document(Document("a.py", "def f():\n    return 1\n", "utf-8"))
    assert all(new is old for new, old in zip(redact(chunks).chunks, chunks, strict=True))


def test_a_changed_chunk_has_the_digest_of_its_new_text() -> None:
    """The digest is that of a document which never held the secret."""
    (chunk,) = redact_text("a.py", 'password = "hunt-2-er"\n').chunks
    (same,) = chunk_document(Document("a.py", chunk.text, "utf-8"))
    assert chunk == same


def pem(lines: int, kind: str = "RSA ") -> list[str]:
    body = [some(WORD + "+/", 64) for _ in range(lines)] + [some(WORD, 10) + "=="]
    return [f"-----BEGIN {kind}{KEY_WORDS}-----", *body, f"-----END {kind}{KEY_WORDS}-----"]


@pytest.mark.parametrize("tokens", [20, 64, 4096])
@pytest.mark.parametrize("prefix", ["", "    ", "# ", '    "'])
def test_a_private_key_goes_completely_wherever_chunks_are_cut(tokens: int, prefix: str) -> None:
    """All lines of the block go, in all chunks, and no line before or after it; lines keep their numbers."""
    key = [prefix + line for line in pem(25)]
    text = "\n".join(["x = 1", *key, "y = 2 + x", ""])
    redacted = redact_text("a.py", text, tokens)
    result = "".join(chunk.text for chunk in redacted.chunks)
    assert result.split("\n") == ["x = 1", prefix + "[REDACTED:private-key:1]", *[""] * 27, "y = 2 + x", ""]
    before = chunk_document(Document("a.py", text, "utf-8"), tokens)
    for old, new in zip(before, redacted.chunks, strict=True):
        assert (old.start_line, old.end_line) == (new.start_line, new.end_line)
        assert old.text.count("\n") == new.text.count("\n")
    assert redacted.counts == {"private-key": 1}


def test_a_private_key_on_one_line_goes_completely() -> None:
    """A service account's JSON holds the key with its line feeds written out."""
    text = json.dumps({"private_key": "\n".join([*pem(10, ""), ""]), "name": "me"})
    assert redacted_text("a.json", text) == '{"private_key": "[REDACTED:private-key:1]\\n", "name": "me"}'


def test_a_private_key_that_is_cut_off_goes_as_far_as_it_is_there() -> None:
    """Without an end mark the base64 lines go, and what follows stays."""
    text = "\n".join([*pem(3)[:4], "", "That was a key.", ""])
    assert redacted_text("a.txt", text) == "[REDACTED:private-key:1]\n\n\n\n\nThat was a key.\n"


def test_a_program_that_names_private_keys_keeps_its_code() -> None:
    """A mark that no key follows is all that goes."""
    text = f"marks = [\n    'BEGIN {KEY_WORDS}',\n]\nend = x\n"
    assert redacted_text("a.py", text) == "marks = [\n    '[REDACTED:private-key:1]',\n]\nend = x\n"


def test_a_secret_in_a_line_that_is_cut_into_chunks_goes_completely() -> None:
    """The parts of a long line are looked at as one."""
    token = "gh" + "p_" + some(WORD, 36)
    for padding in range(0, 60, 7):
        text = "x" * padding + "(" + token + ")" + "y" * 200 + "\n"
        redacted = redact_text("a.txt", text, tokens=16)
        assert len(redacted.chunks) > 1
        assert "".join(c.text for c in redacted.chunks) == text.replace(token, "[REDACTED:github-token:1]")


def test_several_findings_in_one_place_are_one_placeholder() -> None:
    """The kind that says most names it."""
    token = "gh" + "p_" + some(WORD, 36)
    assert redacted_text("a.py", f'password = "{token}"') == 'password = "[REDACTED:github-token:1]"'


def test_a_short_secret_is_not_taken_out_of_words() -> None:
    """Only where it stands alone."""
    assert redacted_text("a.py", 'password = "pass"') == 'password = "[REDACTED:secret-keyword:1]"'


def test_yaml_values_go_also_where_the_parser_rewrote_them() -> None:
    """Values without quotes, on the next line, in blocks, with escapes."""
    secret = some(WORD, 40)
    text = (
        f"token: {secret}\npassword:\n  hunt-2-er\nblock_secret: |\n  first-{secret[:9]}\n"
        f"  second-{secret[9:20]}\n"
        'my_password: "a\\x62c-\\x64ef"\n'
    )
    result = redacted_text("a.yaml", text)
    for gone in (secret, "hunt-2-er", secret[:9], secret[9:20], "x64ef"):
        assert gone not in result
    assert result.count("\n") == text.count("\n")


def test_a_yaml_bomb_is_not_unfolded() -> None:
    """Aliases that multiply a million times cost no time; the lines are looked at all the same."""
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
    assert kinds("a.yaml", bomb + 'password: "hunt-2-er"\n') == {"Secret Keyword"}


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from([*(line for _, line in EVERY_SAMPLE), "x = 1", "", "def f():"]), max_size=12))
def test_no_secret_is_left(lines: list[str]) -> None:
    """What was redacted holds none of the secrets of before, in as many lines."""
    text = "\n".join(lines)
    result = redacted_text("a.py", text)
    assert result.count("\n") == text.count("\n")
    for hit in scan("a.py", text):
        assert len(hit.secret) < 12 or hit.secret not in result


def test_detect_secrets_is_loaded_only_when_it_is_used() -> None:
    """`m3 --help` does not pay for it."""
    code = (
        "import sys, m3cli.prompt.secrets; print('detect_secrets' in sys.modules, 'requests' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_what_was_found_is_remembered_without_the_secrets(tmp_path: Path) -> None:
    """A second run scans nothing and gives the same; the file holds no secret, and damage costs only time."""
    secret = "ghp_" + some(WORD, 36)
    chunks = [
        *chunk_document(Document("a.py", f"token = '{secret}'\nx = 1\n", "utf-8")),
        *chunk_document(Document("b.py", "y = 2\n", "utf-8")),
    ]
    path = tmp_path / "memo.sqlite"

    def run() -> tuple[list[Chunk], list[Finding]]:
        memo = Memo(path)
        redactor = Redactor(memo)
        redacted = list(redactor.redact(chunks))
        memo.close()
        return redacted, redactor.findings

    first = run()
    assert first[1]
    assert secret not in str(first[0])
    assert secret.encode() not in path.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(secrets, "scan", lambda *_, **__: pytest.fail("scanned again"))
        assert run() == first
    for value in (b"", b"[[5, 900, 1]]", b"[[9, 2, 1]]", b"[1]", b"{}x"):
        with sqlite3.connect(path) as database:
            database.execute("UPDATE memo SET value = ?", (value,))
        database.close()
        assert run() == first
