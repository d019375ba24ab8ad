"""Questions, conversations and reviews that a server answers: what of them gets there, and what does not."""

from __future__ import annotations

import itertools
import json
import random
import string
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3cli.corpus.corpus import CorpusRequest
from m3cli.corpus.patch import misfit, parse_diff, split_lines
from m3cli.corpus.reviewed import ChangesRequest, read_changes
from m3cli.engine.endpoint import Endpoint, RemoteServer
from m3cli.engine.events import Finished, Loaded, Notice, Prefilled, Token
from m3cli.engine.remote import EstimatingTokenizer
from m3cli.errors import DoesNotFitError, EngineCrashError, ModelError, UsageError
from m3cli.model.catalog import ModelRef
from m3cli.model.tokens import ByteTokenizer
from m3cli.report.ask_json import ask_object, ask_schema
from m3cli.tasks import remote
from m3cli.tasks.ask import Answer, AskRequest, Text, ask
from m3cli.tasks.chat import Chat
from m3cli.tasks.context import Caching, ContextRequest, Packed
from m3cli.tasks.findings import Review
from m3cli.tasks.remote import COUNTED, SENDS, UNENCRYPTED, CautiousTokenizer, open_remote
from m3cli.tasks.review import ReviewRequest, review
from tests.git_repositories import commit, make_repository
from tests.openai_stub import (
    HOST,
    MODELS,
    PROPS,
    TOKENIZE,
    OpenAIStub,
    chunk,
    error,
    events,
    hosted,
    llama_server,
    sglang,
    vllm,
    whole,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from m3cli.corpus.patch import FileChange
    from m3cli.engine.fake import FakeEngine
    from m3cli.tasks.ask import AskEvent
    from tests.openai_stub import Kind

# Secrets are made here, so that this file holds none.
_RANDOM = random.Random(11)


def _some(prefix: str, alphabet: str, count: int) -> str:
    return prefix + "".join(_RANDOM.choice(alphabet) for _ in range(count))


AWS, OTHER, UNKNOWN = (_some("AK" + "IA", string.ascii_uppercase, 16) for _ in range(3))
GITHUB = _some("gh" + "p_", string.ascii_letters + string.digits, 36)
PASSWORD = _some("", string.ascii_lowercase, 6) + "9"
KEY_WORDS = "PRIVATE" + " KEY"
KEY_LINES = [
    f"-----BEGIN RSA {KEY_WORDS}-----",
    *(_some("", string.ascii_letters + string.digits, 64) for _ in range(20)),
    f"-----END RSA {KEY_WORDS}-----",
]
REMOTE = f"http://{HOST}/v1"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    top = tmp_path / "tree"
    top.mkdir()
    (top / "retry.py").write_text("def retry(call):\n    for _ in range(3):\n        call()\n")
    (top / "other.py").write_text("def other():\n    return 1\n")
    return top


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAIStub]:
    """A vLLM that is at another host."""
    with OpenAIStub(vllm()) as stub:
        for name, value in stub.proxy.items():
            monkeypatch.setenv(name, value)
        yield stub


def context(tree: Path, url: str, *, model: str | None = None, **options: Any) -> ContextRequest:
    return ContextRequest(
        CorpusRequest((str(tree),)),
        ModelRef(model or "", Path(), "remote", url),
        endpoint=Endpoint.parse(url, model=model),
        **options,
    )


def no_engine(*_: object) -> FakeEngine:
    raise AssertionError("no engine of this machine is wanted")


def asked(tree: Path, url: str, question: str = "where?", **options: Any) -> list[AskEvent]:
    request = AskRequest(question, context(tree, url, **options))
    return list(ask(request, open_engine=no_engine, stdin=lambda: b""))


def answer_of(heard: list[AskEvent]) -> Answer:
    last = heard[-1]
    assert isinstance(last, Answer)
    return last


def notices(heard: list[Any]) -> list[str]:
    return [event.text for event in heard if isinstance(event, Notice)]


# Answers


@pytest.mark.parametrize(
    "kind",
    [vllm(), vllm(reasoning_key="reasoning_content"), sglang(), llama_server(), hosted()],
    ids=["vllm", "vllm-0.10", "sglang", "llama-server", "hosted"],
)
def test_a_question_to_every_kind_of_server(tree: Path, kind: Kind) -> None:
    """The answer is checked as one of this machine is, reasoning is told apart, cached tokens are counted."""
    with OpenAIStub(kind) as stub:
        stub.next(
            kind.answer(
                "It retries (retry.py:2-3).",
                "See other.py:1.",
                usage={"prompt": 150, "generated": 12, "cached": 96},
            )
        )
        heard = asked(tree, stub.url)
    answer = answer_of(heard)
    assert answer.text == "It retries (retry.py:2-3)."
    assert [(c.path, c.start_line, c.end_line, c.verified) for c in answer.citations] == [
        ("retry.py", 2, 3, True)
    ]
    thinking = [event.text for event in heard if isinstance(event, Text) and event.kind == "thinking"]
    assert "".join(thinking) == "See other.py:1."
    assert (answer.restored_tokens, answer.generated_tokens, answer.finish_reason) == (96, 12, "stop")
    order = [type(event) for event in heard if not isinstance(event, (Token, Notice))]
    assert list(dict.fromkeys(order)) == [Packed, Loaded, Prefilled, Text, Finished, Answer]
    found = ask_object(answer, {})
    jsonschema.validate(found, ask_schema())
    name = kind.models["data"][0]["id"]
    assert found["model"] == {"name": name, "endpoint": stub.url, "context_length": 32_768}


def test_reasoning_that_the_server_leaves_in_the_text(tree: Path) -> None:
    """A server without a parser for reasoning sends the tags, and they are seen as those of a model here."""
    with OpenAIStub(vllm(), "<think>Hm, other.py:1.</think>\n\nIt retries (retry.py:2-3).") as stub:
        answer = answer_of(asked(tree, stub.url))
    assert answer.text == "It retries (retry.py:2-3)."
    assert [citation.path for citation in answer.citations] == ["retry.py"]


def test_a_server_that_does_not_stream(tree: Path) -> None:
    """One object in place of a stream is an answer, with its reasoning beside it."""
    with OpenAIStub(vllm()) as stub:
        stub.next(whole("It retries (retry.py:2-3).", "Hm."))
        assert answer_of(asked(tree, stub.url)).text == "It retries (retry.py:2-3)."


def test_a_capped_answer(tree: Path) -> None:
    """An answer that the server has cut at the cap says so, as one of this machine does."""
    with OpenAIStub(vllm()) as stub:
        stub.next(stub.kind.answer("It retr", finish="length"))
        assert answer_of(asked(tree, stub.url, max_tokens=3)).finish_reason == "length"
        assert stub.asked()[0].body["max_tokens"] == 3


def test_what_the_server_did_is_a_warning(tree: Path) -> None:
    """Attempts that failed, and a filter that has cut the answer, are told and kept in the answer."""
    with OpenAIStub(vllm()) as stub:
        stub.next(error(503, {}, Retry_After="0"), stub.kind.answer("It", finish="content_filter"))
        answer = answer_of(asked(tree, stub.url))
    assert "127.0.0.1: it answered with status 503; trying again in 0 s" in answer.warnings
    assert "127.0.0.1 has cut the answer by its content filter." in answer.warnings


def test_an_answer_that_breaks(tree: Path) -> None:
    """What was said before a connection broke is shown, and the run fails all the same."""
    with OpenAIStub(vllm()) as stub:
        stub.next(events([chunk({"content": "It retries."})], done=False, cut=True))
        heard: list[AskEvent] = []
        with pytest.raises(EngineCrashError):
            heard.extend(
                ask(AskRequest("where?", context(tree, stub.url)), open_engine=no_engine, stdin=lambda: b"")
            )
    assert "".join(event.text for event in heard if isinstance(event, Text)) == "It retries."


# The prompt


def test_the_messages(tree: Path) -> None:
    """Instructions go as the system's message; the user's holds the files and, at its end, the question."""
    with OpenAIStub(vllm()) as stub:
        asked(tree, stub.url, " where is it?\n")
        ((system, user),) = stub.prompts()
    assert (system["role"], user["role"]) == ("system", "user")
    assert system["content"].startswith("You answer questions about files.")
    assert "retry.py" in user["content"]
    assert "for _ in range(3)" in user["content"]
    assert user["content"].endswith("\nQuestion: where is it?")


def test_two_questions_share_all_but_the_question(tree: Path) -> None:
    """What differs between two questions comes last, so a server's prefix cache has the rest."""
    with OpenAIStub(vllm()) as stub:
        for question in ("where is it?", "when?"):
            asked(tree, stub.url, question)
        first, second = (json.dumps(messages) for messages in stub.prompts())
    shared = next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    assert first[:shared].endswith("Question: whe")
    assert first[shared:] == 're is it?"}]'


def test_a_secret_in_the_question_changes_nothing_before_it(leaky: Path, elsewhere: OpenAIStub) -> None:
    """Placeholders in the files are numbered as they are without one, for a server's prefix cache."""
    (leaky / "more.py").write_text(f'OTHER = "{OTHER}"\n')
    for question in ("who?", f"who has {AWS} and {GITHUB}?", f"who has {UNKNOWN}?"):
        asked(leaky, REMOTE, question)
    files = [messages[1]["content"].partition("\nQuestion: ")[0] for messages in elsewhere.prompts()]
    assert files[0] == files[1] == files[2]
    assert "[REDACTED:aws-access-key:2]" in files[0]
    assert UNKNOWN not in elsewhere.everything()


def test_a_conversation_only_grows(tree: Path) -> None:
    """Each question of a chat begins with all that was said before, the answer without its reasoning."""
    with OpenAIStub(vllm()) as stub:
        stub.next(stub.kind.answer("It is in retry.py:2.", "Hm."))
        with Chat(context(tree, stub.url), open_engine=no_engine, stdin=lambda: b"") as chat:
            for question in ("where?", "why?", "when?"):
                list(chat.ask(question))
        first, second, third = stub.prompts()
    assert second[: len(first)] == first
    assert third[: len(second)] == second
    assert second[len(first) :] == [
        {"role": "assistant", "content": "It is in retry.py:2."},
        {"role": "user", "content": "\nQuestion: why?"},
    ]


@pytest.mark.parametrize(
    ("name", "think", "variables"),
    [
        ("some-model", None, None),
        ("some-model", "off", {"thinking_mode": "disabled", "enable_thinking": False}),
        ("some-model", "on", {"thinking_mode": "enabled", "enable_thinking": True}),
        ("some-model", "adaptive", {"thinking_mode": "adaptive"}),
        ("MiniMaxAI/MiniMax-M3-MXFP8", None, {"thinking_mode": "disabled", "enable_thinking": False}),
        ("/models/minimax-m3.gguf", None, {"thinking_mode": "disabled", "enable_thinking": False}),
        ("MiniMaxAI/MiniMax-M3", "on", {"thinking_mode": "enabled", "enable_thinking": True}),
        ("MiniMaxAI/MiniMax-M2", None, None),
    ],
)
def test_what_the_chat_template_is_told(
    tree: Path, name: str, think: Any, variables: Mapping[str, Any] | None
) -> None:
    """Servers of other models may refuse what they do not know: only M3 is told without being asked."""
    with OpenAIStub(vllm(name=name)) as stub:
        asked(tree, stub.url, think=think)
        assert stub.asked()[0].body.get("chat_template_kwargs") == variables


# Models, contexts, tokenizers


@pytest.mark.parametrize(
    "kind",
    [vllm(window=4096), sglang(window=4096), llama_server(window=4096), hosted(window=4096)],
    ids=["vllm", "sglang", "llama-server", "hosted"],
)
def test_a_prompt_keeps_to_the_context_of_the_server(tree: Path, kind: Kind) -> None:
    """What does not fit beside the answer is left out, by the server's own counts or with room to spare."""
    for number in range(60):
        (tree / f"m{number}.py").write_text(f"def f{number}(value):\n    return value + {number}\n" * 20)
    with OpenAIStub(kind) as stub:
        packed = next(event for event in asked(tree, stub.url) if isinstance(event, Packed))
        body = stub.asked()[0].body
    assert packed.pack.strategy == "select"
    sent = sum(-(-len(message["content"].encode()) // 4) for message in body["messages"])
    assert 1000 < sent < packed.prompt_tokens
    assert packed.prompt_tokens + body["max_tokens"] <= 4096
    with OpenAIStub(kind) as stub, pytest.raises(DoesNotFitError, match="room for"):
        asked(tree, stub.url, strategy="whole")


def test_more_context_than_the_server_has(tree: Path) -> None:
    """A --ctx beyond what the server says is refused, one up to that is kept to."""
    with OpenAIStub(vllm(window=4096)) as stub:
        with pytest.raises(DoesNotFitError, match="8,192 tokens"):
            asked(tree, stub.url, ctx=8192)
        assert stub.asked() == []
        for ctx in (4096, 2048):
            heard = asked(tree, stub.url, ctx=ctx)
            assert answer_of(heard).packed.n_ctx <= ctx


def test_a_server_that_does_not_say_its_context(tree: Path) -> None:
    """Then it has to be said, and what was said is all that is used."""
    with OpenAIStub(hosted(window=None)) as stub:
        with pytest.raises(UsageError, match="does not say how much context some-model has") as unknown:
            asked(tree, stub.url)
        assert "--ctx" in unknown.value.hint
        assert stub.url in unknown.value.message
        assert stub.asked() == []
        answer = answer_of(asked(tree, stub.url, ctx=2048))
        assert answer.packed.model.context_length == 2048
        assert answer.packed.n_ctx <= 2048


@pytest.mark.parametrize("value", [0, -1, "4096", True, None, 4096.0])
def test_a_context_that_is_none(tree: Path, value: object) -> None:
    """What is no number of tokens is passed over, and asked for elsewhere."""
    kind = vllm()
    kind.models["data"][0]["max_model_len"] = value
    with OpenAIStub(kind) as stub:
        with pytest.raises(UsageError, match="does not say how much context"):
            asked(tree, stub.url)
        assert len(stub.asked(PROPS)) == 1


def test_which_model(tree: Path) -> None:
    """The first that the server names is asked, or the one that is named here; another is an error."""
    kind = vllm()
    kind.models["data"].append({"id": "larger", "max_model_len": 65_536})
    with OpenAIStub(kind) as stub:
        answers = [answer_of(asked(tree, stub.url, model=name)) for name in (None, "larger")]
        assert [sent.body["model"] for sent in stub.asked()] == ["some-model", "larger"]
        assert {sent.body["model"] for sent in stub.asked(TOKENIZE)} == {"some-model", "larger"}
        assert [answer.packed.model.context_length for answer in answers] == [32_768, 65_536]
        with pytest.raises(ModelError, match="has no model smaller") as unknown:
            asked(tree, stub.url, model="smaller")
    assert "some-model, larger" in unknown.value.hint


def test_who_counts(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's tokenizer if it has one, else the demo model's, else an estimate, and the user is told."""
    with OpenAIStub(vllm()) as stub:
        assert not [note for note in notices(asked(tree, stub.url)) if "tokenizer" in note]
    with OpenAIStub(hosted()) as stub:
        told = [
            COUNTED.format(host="127.0.0.1", name=name) for name in ("the demo model", "three bytes a token")
        ]
        assert told[0] in notices(asked(tree, stub.url))
        monkeypatch.setattr(remote, "demo_model", lambda: None)
        assert told[1] in notices(asked(tree, stub.url))


@given(st.lists(st.text(max_size=200), max_size=5), st.sampled_from([0, 1, 9]))
def test_the_counts_err_on_one_side(texts: list[str], every: int) -> None:
    """Never fewer tokens than the tokenizer within counts, and a share more where that is another's."""
    for within in (ByteTokenizer(), EstimatingTokenizer()):
        tokenizer = CautiousTokenizer(within, every=every)
        for count, exact in zip(tokenizer.count_batch(texts), within.count_batch(texts), strict=True):
            assert count == (exact + -(-exact // every) if every else exact)
        assert tokenizer.count_batch(texts) == [len(tokenizer.encode(text)) for text in texts]
        assert all(len(tokenizer.encode_template(text)) > len(within.encode(text)) for text in texts)


def test_counts_are_remembered(tree: Path, tmp_path: Path) -> None:
    """Files that did not change are not sent to be counted again."""
    (tree / "long.py").write_text("".join(f"value_{number} = {number}\n" for number in range(400)))
    with OpenAIStub(vllm()) as stub:
        for expected in (True, False):
            del stub.sent[:]
            asked(tree, stub.url, caching=Caching(tmp_path / "cache"))
            counted = [sent.body["prompt"] for sent in stub.asked(TOKENIZE)]
            assert any("value_77" in text for text in counted) == expected
            assert len(stub.asked()) == 1


# What leaves this machine


@pytest.fixture
def leaky(tmp_path: Path) -> Path:
    """A repository with a secret, whose last commit brings in another."""
    head = "import os\n\n\ndef client():\n"
    top = make_repository(
        tmp_path / "leaky", {"aws.py": f'KEY = "{AWS}"\n', "client.py": f"{head}    return 1\n"}
    )
    commit(top, {"client.py": f'{head}    token = "{GITHUB}"\n    return connect(token)\n'})
    return top


def reviewed(top: Path, url: str, **options: Any) -> tuple[Review, list[Any]]:
    changes = read_changes(ChangesRequest(str(top), "HEAD~1", "HEAD"))
    request = ReviewRequest(changes, context(top, url), **options)
    *heard, last = review(request, open_engine=no_engine, stdin=lambda: b"")
    assert isinstance(last, Review)
    return last, heard


def claims(*found: dict[str, str]) -> str:
    return json.dumps({"analysis": "Something could go wrong.", "findings": found})


def claim(quote: str) -> dict[str, Any]:
    return {
        "path": "client.py", "quote": quote, "message": "It is not closed.", "rule": "resource",
        "severity": "error", "confidence": "high", "replacement": None,
    }  # fmt: skip


def talk(top: Path, url: str) -> None:
    """A question about files, one with a secret in it and after that another, and a review."""
    asked(top, url, f"what is {AWS}?")
    with Chat(context(top, url), open_engine=no_engine, stdin=lambda: b"") as chat:
        for question in (f"who has {GITHUB}?", "and now?"):
            list(chat.ask(question))
    for mode in ("diff", "related", "repo"):
        reviewed(top, url, mode=mode)


def test_secrets_do_not_leave_this_machine(leaky: Path, elsewhere: OpenAIStub) -> None:
    """Neither those in files nor those in diffs, questions and earlier turns, to be answered or counted."""
    elsewhere.text = claims()
    talk(leaky, REMOTE)
    assert len(elsewhere.asked()) == 6
    assert elsewhere.asked(TOKENIZE)
    assert {sent.host for sent in elsewhere.sent} == {HOST}
    sent = elsewhere.everything()
    assert AWS not in sent
    assert GITHUB not in sent
    for messages in elsewhere.prompts():
        assert "[REDACTED:" in messages[1]["content"]
    assert "[REDACTED:" in elsewhere.prompts()[2][1]["content"].partition("who has ")[2]


def test_secrets_stay_as_they_are_on_this_machine(leaky: Path) -> None:
    """A server on the loopback interface sees the files as they are: its answers are about them."""
    with OpenAIStub(vllm(), claims()) as stub:
        talk(leaky, stub.url)
        sent = stub.everything()
    assert AWS in sent
    assert GITHUB in sent
    assert "[REDACTED:" not in sent


@pytest.mark.parametrize("mode", ["diff", "related", "repo"])
@pytest.mark.parametrize(
    ("name", "line"),
    [("settings.yaml", "password: {}"), (".env", "DB_PASSWORD={}"), ("app.ini", "password = {}")],
)
def test_what_is_a_secret_by_its_file(
    tmp_path: Path, elsewhere: OpenAIStub, name: str, line: str, mode: str
) -> None:
    """A password without quotes, which only the kind of file tells, does not leave with a review either."""
    before = f"{'[main]' if name == 'app.ini' else '# main'}\n{line.format(PASSWORD)}\n# one\n"
    top = make_repository(tmp_path / "top", {name: before, "a.py": "x = 1\n"})
    commit(top, {name: before.replace("one", "two").replace(PASSWORD, f"{PASSWORD}x")})
    elsewhere.text = claims()
    reviewed(top, REMOTE, mode=mode)
    assert elsewhere.asked()
    assert PASSWORD not in elsewhere.everything()


def test_a_key_that_is_reviewed_in_parts(tmp_path: Path, elsewhere: OpenAIStub) -> None:
    """The second half of a private key does not leave either, though what tells is in another part."""
    top = make_repository(tmp_path / "top", {"a.py": "x = 1\n"})
    commit(top, {"key.txt": "\n".join([*["some words"] * 150, *KEY_LINES, *["some words"] * 150, ""])})
    elsewhere.text = claims()
    changes = read_changes(ChangesRequest(str(top), "HEAD~1", "HEAD"))
    list(
        review(
            ReviewRequest(changes, context(top, REMOTE, ctx=2600, max_tokens=300), "diff"),
            open_engine=no_engine,
            stdin=lambda: b"",
        )
    )
    assert len(elsewhere.asked()) > 1
    assert not [line for line in KEY_LINES[1:-1] if line in elsewhere.everything()]


def changed(change: FileChange, url: str = REMOTE) -> FileChange:
    endpoint = Endpoint.parse(url)
    with OpenAIStub(vllm()) as stub:
        model = open_remote(Endpoint(stub.url), 0, None, None)
        model.server.close()
    return replace(model, server=RemoteServer(endpoint)).change_without_secrets(change)


def test_a_change_without_its_secrets(tmp_path: Path) -> None:
    """Both versions and the hunks lose them alike, by what the whole file and its name tell."""
    lines = [
        "top: 1",
        f"password: {PASSWORD}",
        *(f"line{number}: {number}" for number in range(20)),
        "end: 1",
        "",
    ]
    top = make_repository(tmp_path / "top", {"a.yaml": "\n".join(lines)})
    after = [
        line.replace("end: 1", f"password: {PASSWORD}x").replace("line1: 1", "line1: 2") for line in lines
    ]
    commit(top, {"a.yaml": "\n".join(after), "key.pem": "\n".join([*KEY_LINES, ""])})
    pem, yaml = reversed(read_changes(ChangesRequest(str(top), "HEAD~1", "HEAD")).files)
    for change in (pem, yaml):
        safe = changed(change)
        text = f"{safe.base}\n{safe.head}\n{safe.diff}"
        assert PASSWORD not in text
        assert not any(line in text for line in KEY_LINES[1:-1])
        assert safe.added == change.added
        assert safe.head_lines().keys() == change.head_lines().keys()
        assert misfit(split_lines(safe.head or ""), safe.hunks, new=True) is None
        assert misfit(split_lines(safe.base or ""), safe.hunks, new=False) is None
        pairs = [(line, safe.head_lines()[number]) for number, line in change.head_lines().items()]
        secret = [line for line, shown in pairs if line != shown]
        assert secret == (KEY_LINES if change is pem else [line for line in after if PASSWORD in line])
        assert changed(change, "http://localhost:1/v1") is change


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_change_of_which_only_the_hunks_are_known(end: str) -> None:
    """A diff of files that are elsewhere loses its secrets as well, and the words behind its @@."""
    lines = [
        "--- a/.env",
        "+++ b/.env",
        f"@@ -4,3 +4,3 @@ DB_PASSWORD={PASSWORD}",
        " A=1",
        f"-API_PASSWORD={PASSWORD}x",
        f"+API_PASSWORD={PASSWORD}y",
        f" OLD_PASSWORD={PASSWORD}z",
        "",
    ]
    (change,) = parse_diff(end.join(lines).encode())
    safe = changed(change)
    assert PASSWORD not in safe.diff
    assert [line[0] for line in safe.hunks[0].lines] == [" ", "-", "+", " "]
    assert safe.hunks[0].lines[0] == change.hunks[0].lines[0]
    assert all("_PASSWORD=[REDACTED:" in line for line in safe.hunks[0].lines[1:])


def test_how_many_secrets_is_told(leaky: Path, elsewhere: OpenAIStub) -> None:
    """The user hears that something was taken out of the files, and nothing if nothing was."""
    assert [note for note in notices(asked(leaky, REMOTE)) if "2" in note and "secrets" in note]
    (leaky / "aws.py").unlink()
    (leaky / "client.py").write_text("x = 1\n")
    assert not [note for note in notices(asked(leaky, REMOTE)) if "secrets" in note]


def test_a_host_is_named_the_first_time(tree: Path, tmp_path: Path, elsewhere: OpenAIStub) -> None:
    """Before the first prompt goes to another host the user is told its name, and not at the next one."""
    state = tmp_path / "state"
    told = SENDS.format(host=HOST)
    assert told in notices(asked(tree, REMOTE, state_dir=state))
    assert told not in notices(asked(tree, REMOTE, state_dir=state))
    other = "http://other.example/v1"
    assert SENDS.format(host="other.example") in notices(asked(tree, other, state_dir=state))
    assert SENDS.format(host="other.example") not in notices(asked(tree, other, state_dir=state))
    assert told not in notices(asked(tree, REMOTE, state_dir=state))


def test_a_host_is_named_again_where_nothing_can_be_kept(
    tree: Path, tmp_path: Path, elsewhere: OpenAIStub
) -> None:
    """Without a place to remember it, it is told each time."""
    told = SENDS.format(host=HOST)
    state = tmp_path / "state"
    state.write_text("a file where the directory should be")
    for _ in range(2):
        assert told in notices(asked(tree, REMOTE))
        assert told in notices(asked(tree, REMOTE, state_dir=state / "deeper"))
    damaged = tmp_path / "damaged"
    (damaged / "hosts").mkdir(parents=True)
    assert told in notices(asked(tree, REMOTE, state_dir=damaged))
    (damaged / "hosts").rmdir()
    (damaged / "hosts").write_bytes(b"\xff\n" + HOST.encode() + b"\n")
    assert told in notices(asked(tree, REMOTE, state_dir=damaged))


def test_what_is_not_encrypted_is_told_each_time(tree: Path, tmp_path: Path, elsewhere: OpenAIStub) -> None:
    """Over http to another host others can read it; the warning is in the answer as well."""
    warning = UNENCRYPTED.format(host=HOST)
    for _ in range(2):
        heard = asked(tree, REMOTE, state_dir=tmp_path)
        assert warning in notices(heard)
        assert warning in answer_of(heard).warnings


def test_this_machine_is_not_warned_of(tree: Path, tmp_path: Path) -> None:
    """On the loopback interface nothing leaves: there is nothing to tell or to remember."""
    with OpenAIStub(vllm()) as stub:
        heard = notices(asked(tree, stub.url, state_dir=tmp_path / "state"))
    assert not [note for note in heard if "127.0.0.1" in note]
    assert not (tmp_path / "state" / "hosts").exists()


# Reviews


def test_a_review(leaky: Path) -> None:
    """Claims are located and checked as those of a model here, though reasoning comes with them."""
    with OpenAIStub(vllm()) as stub:
        stub.next(
            stub.kind.answer(claims(claim("return connect(token)"), claim("not there")), "Let me see."),
            stub.kind.answer(json.dumps({"argument": "So it is.", "claim": "right"}), "Hm."),
        )
        found, heard = reviewed(leaky, stub.url)
        first, second = stub.asked()
    (finding,) = found.findings
    assert (finding.path, finding.start_line, finding.rule) == ("client.py", 6, "resource")
    assert found.dropped == {"unverified": 1}
    assert found.model == "some-model"
    assert (found.prompt_tokens, found.generated_tokens) == (200, 14)
    assert "findings" in first.body["response_format"]["json_schema"]["schema"]["properties"]
    assert "claim" in second.body["response_format"]["json_schema"]["schema"]["properties"]
    # The second question begins as the first: instructions, what is around the change, the change.
    shared = itertools.takewhile(
        lambda pair: pair[0] == pair[1],
        zip(*(json.dumps(sent.body["messages"]) for sent in (first, second)), strict=False),
    )
    assert "That was the end of the change." in "".join(a for a, _ in shared)
    assert not [event for event in heard if isinstance(event, Token) and "think" in event.text]


def test_a_sweep(tree: Path, elsewhere: OpenAIStub) -> None:
    """A corpus that is read in windows is asked about there too, and its question goes without secrets."""
    passages = json.dumps({"passages": [{"path": "retry.py", "first": 1, "last": 3}]})
    elsewhere.next(elsewhere.kind.answer(passages))
    answer = answer_of(asked(tree, REMOTE, f"where is {AWS}?", strategy="sweep"))
    assert answer.text == elsewhere.text
    assert AWS not in elsewhere.everything()
    window, last = elsewhere.prompts()
    assert "def retry(call)" in window[1]["content"]
    assert "def retry(call)" in last[1]["content"]


def test_an_unreachable_model_list_is_the_first_error(tree: Path) -> None:
    """What a server refuses is told before any file goes there."""
    with OpenAIStub(vllm()) as stub:
        stub.next(error(401, {"error": {"message": "Missing key."}}), path=MODELS)
        with pytest.raises(UsageError, match=r"does not let m3 in \(status 401\): Missing key\."):
            asked(tree, stub.url)
        assert [sent.path for sent in stub.sent] == [MODELS]


def test_the_connection_ends_with_an_error(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that cannot be opened leaves no connection behind."""
    closed: list[object] = []
    close = remote.RemoteServer.close
    monkeypatch.setattr(remote.RemoteServer, "close", lambda self: (closed.append(self), close(self))[1])
    with OpenAIStub(vllm()) as stub:
        with pytest.raises(ModelError):
            open_remote(Endpoint(stub.url, model="none"), 0, None, None)
        assert len(closed) == 1
        open_remote(Endpoint(stub.url), 0, None, None).server.close()
    assert len(closed) == 2
