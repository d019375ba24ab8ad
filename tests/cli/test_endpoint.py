"""`--endpoint` on the command line: a stub of a server, an `m3 serve`, and what may not be done with it."""

from __future__ import annotations

import json
import random
import string
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest

from m3cli.cli import values
from m3cli.errors import ExitCode, UsageError
from m3cli.report.ask_json import ask_schema
from m3cli.tasks.remote import SENDS, UNENCRYPTED
from tests.git_repositories import commit, make_repository
from tests.openai_stub import CHAT, HOST, MODELS, TOKENIZE, OpenAIStub, error, events, hosted, vllm
from tests.serve.servers import serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from subprocess import CompletedProcess

    from tests.cli.conftest import Run

KEY = "key-5dd1f0a4c9be"
WITH_KEY = ["--api-key-env", "SOME_KEY"]
# Secrets are made here, so that this file holds none.
_RANDOM = random.Random(5)
AWS, GITHUB = (
    prefix + "".join(_RANDOM.choice(string.ascii_uppercase) for _ in range(count))
    for prefix, count in (("AK" + "IA", 16), ("gh" + "p_", 36))
)


@pytest.fixture
def stub() -> Iterator[OpenAIStub]:
    with OpenAIStub(vllm()) as running:
        yield running


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "retry.py").write_text("def retry(call):\n    for _ in range(3):\n        call()\n")
    return "retry.py"


def told(done: CompletedProcess[str]) -> str:
    """An error as it is shown, on one line, with no traceback."""
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "error:" in done.stderr
    return " ".join(done.stderr.split())


def test_an_answer(m3: Run, stub: OpenAIStub, file: str) -> None:
    """The answer and its sources are on stdout, the rest on stderr, and no model of this machine is named."""
    stub.next(stub.kind.answer("It retries (retry.py:2-3).", "Hm, let me see."))
    done = m3("ask", file, "where is it?", "--endpoint", stub.url, "--show-thinking")
    assert done.returncode == ExitCode.DONE
    assert done.stdout == "It retries (retry.py:2-3).\n\nSources:\n  [ok] retry.py:2-3\n"
    assert "Hm, let me see." in done.stderr
    assert "demo model" not in done.stderr
    assert "loading" not in done.stderr


def test_the_object(m3: Run, stub: OpenAIStub, file: str) -> None:
    """`--json` has the server's address in place of a file, and what it did not have to compute again."""
    stub.next(stub.kind.answer("Yes (retry.py:1).", usage={"prompt": 90, "generated": 5, "cached": 64}))
    done = m3("ask", file, "is it?", "--endpoint", stub.url, "--json", "--price-in", "1", "--price-out", "2")
    found = json.loads(done.stdout)
    jsonschema.validate(found, ask_schema())
    assert found["model"] == {"name": "some-model", "endpoint": stub.url, "context_length": 32_768}
    assert (found["usage"]["restored_tokens"], found["usage"]["generated_tokens"]) == (64, 5)
    assert found["costs"]["hosted, each time"] > 0


def test_options_reach_the_server(m3: Run, stub: OpenAIStub, file: str) -> None:
    """Sampling, the cap, the model and the thinking mode are the server's matter."""
    options = ["--temperature", "0.5", "--seed", "7", "--top-p", "0.9", "--max-tokens", "99", "--think", "on"]
    m3("ask", file, "is it?", "--endpoint", stub.url, "-m", "some-model", *options)
    body = stub.asked()[0].body
    assert (body["temperature"], body["seed"], body["top_p"], body["max_tokens"]) == (0.5, 7, 0.9, 99)
    assert body["chat_template_kwargs"] == {"thinking_mode": "enabled", "enable_thinking": True}


def test_a_capped_answer(m3: Run, stub: OpenAIStub, file: str) -> None:
    """An answer that the cap has cut ends with exit code 4, whoever has cut it."""
    stub.next(stub.kind.answer("It re", finish="length"))
    assert m3("ask", file, "is it?", "--endpoint", stub.url).returncode == ExitCode.CAP_REACHED


def test_where_the_address_comes_from(m3: Run, stub: OpenAIStub, file: str, tmp_path: Path) -> None:
    """The environment and the user's settings may name the server, and the variable with its key."""
    config = tmp_path / "user.toml"
    config.write_text(f'endpoint = "{stub.url}"\napi_key_env = "SOME_KEY"\n')
    for more in (
        {"M3_ENDPOINT": stub.url, "M3_API_KEY_ENV": "SOME_KEY", "SOME_KEY": KEY},
        {"M3_CONFIG": str(config), "SOME_KEY": KEY},
    ):
        assert m3("ask", file, "is it?", **more).returncode == ExitCode.DONE
        assert stub.sent[-1].headers["authorization"] == f"Bearer {KEY}"


def test_a_project_may_not_name_a_server(m3: Run, stub: OpenAIStub, file: str, tmp_path: Path) -> None:
    """A repository that somebody else has written cannot have files sent anywhere, nor a variable read."""
    for line in (f'endpoint = "{stub.url}"\n', 'api_key_env = "HOME"\n'):
        (tmp_path / ".m3.toml").write_text(line)
        done = m3("ask", file, "is it?")
        assert done.returncode == ExitCode.USAGE
        assert f"sets '{line.partition(' ')[0]}', which a project file may not" in told(done)
    top = make_repository(tmp_path / "top", {"a.py": "x = 1\n", ".m3.toml": f'endpoint = "{stub.url}"\n'})
    commit(top, {"a.py": "x = 2\n"})
    done = m3("review", ".", "--base", "HEAD~1", cwd=top)
    assert done.returncode == ExitCode.USAGE
    assert "sets 'endpoint', which a project file may not" in told(done)
    assert stub.sent == []


def test_how_the_model_runs_is_for_the_server(m3: Run, stub: OpenAIStub, tmp_path: Path) -> None:
    """What says how a model runs on this machine contradicts --endpoint, and nothing is sent."""
    top = make_repository(tmp_path / "top", {"a.py": "x = 1\n"})
    for command in (["ask", "a.py", "is it?"], ["chat", "a.py"], ["review"]):
        done = m3(*command, "--endpoint", stub.url, "--kv-type", "q8_0", cwd=top)
        assert done.returncode == ExitCode.USAGE
        assert "With --endpoint, the server decides how the model runs: it is not told --kv-type." in told(
            done
        )
    assert stub.sent == []


@pytest.mark.parametrize(
    "option",
    [
        {"kv_type": "q8_0"},
        {"kv_type_v": "q8_0"},
        {"ubatch": 64},
        {"flash_attention": "off"},
        {"threads": 2},
        {"lora": ("a.gguf",)},
        {"gpu_layers": "3"},
        {"cpu_moe_layers": 3},
        {"cpu_moe": True},
        {"override_tensor": ("exps=CPU",)},
        {"tensor_split": "1,1"},
        {"main_gpu": 0},
    ],
)
def test_what_is_for_the_server(
    option: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each option that places or sizes a model is refused beside an address; each alone is not."""
    monkeypatch.setenv("M3_CONFIG", str(tmp_path / "none.toml"))
    values.context_request(None, values.settings(option), allow_dense=False, asks=True)
    settings = values.settings({**option, "endpoint": "http://localhost:1"})
    with pytest.raises(UsageError, match="the server decides how the model runs"):
        values.context_request(None, settings, allow_dense=False, asks=True)


def test_settings_of_this_machine_do_not_contradict(m3: Run, stub: OpenAIStub, file: str) -> None:
    """What is set for this machine once and for all does not keep anybody from asking a server."""
    more = {"M3_KV_TYPE": "q8_0", "M3_THREADS": "1", "M3_GPU_LAYERS": "0"}
    assert m3("ask", file, "is it?", "--endpoint", stub.url, **more).returncode == ExitCode.DONE


def test_a_variable_that_is_not_set(m3: Run, stub: OpenAIStub, file: str) -> None:
    """A key that is named and is not there is a usage error, and nothing is sent without it."""
    done = m3("ask", file, "is it?", "--endpoint", stub.url, *WITH_KEY)
    assert done.returncode == ExitCode.USAGE
    assert "The variable SOME_KEY of --api-key-env holds no key." in told(done)
    assert stub.sent == []


@pytest.mark.parametrize("value", ["", "two words", "tab\there", "line\nfeed", "schlüssel", "\x7f", " "])
def test_a_variable_without_a_key(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be sent as a key is refused, and not shown."""
    monkeypatch.setenv("SOME_KEY", value)
    with pytest.raises(UsageError, match="The variable SOME_KEY of --api-key-env holds no key") as refused:
        values.api_key("SOME_KEY")
    assert not value.strip() or value not in str(refused.value)


def test_what_is_no_address(m3: Run, file: str) -> None:
    """An address that cannot be asked is a usage error, and a password in it is not shown."""
    for address in ("gpu-box:8000", "http://a:hunter2@b/v1"):
        done = m3("ask", file, "is it?", "--endpoint", address, "--debug")
        assert done.returncode == ExitCode.USAGE
        assert "http://HOST:PORT/v1" in done.stderr
        assert "hunter2" not in done.stderr


@pytest.mark.parametrize(
    ("status", "body", "code", "words"),
    [
        (401, {"error": {"message": f"Incorrect API key: {KEY}"}}, ExitCode.USAGE, "does not let m3 in"),
        (400, {"message": "maximum context length is 9"}, ExitCode.IMPOSSIBLE, "no prompt of this size"),
        (429, {"detail": [{"msg": "slow down"}]}, ExitCode.IMPOSSIBLE, "(status 429): slow down."),
        (302, "", ExitCode.USAGE, "is elsewhere (status 302)."),
    ],
)  # fmt: skip
def test_what_a_server_says(
    m3: Run, stub: OpenAIStub, file: str, status: int, body: Any, code: ExitCode, words: str
) -> None:
    """An error is a sentence with the address, one that helps, and an exit code; the key is in neither."""
    stub.next(*[error(status, body, Retry_After="0", Location="http://other.example/")] * 5)
    done = m3("ask", file, "is it?", "--endpoint", stub.url, *WITH_KEY, "--json", "--debug", SOME_KEY=KEY)
    assert done.returncode == code
    shown = " ".join(done.stderr.split())
    assert f"The server at {stub.url} " in shown
    assert words in shown
    assert KEY not in done.stdout + done.stderr
    assert stub.asked()[0].headers["authorization"] == f"Bearer {KEY}"


def test_an_answer_that_breaks(m3: Run, stub: OpenAIStub, file: str) -> None:
    """What came of an answer stays on stdout, and the exit code says that it is not whole."""
    stub.next(events([{"choices": [{"delta": {"content": "It retries"}}]}], done=False))
    done = m3("ask", file, "is it?", "--endpoint", stub.url)
    assert done.returncode == ExitCode.INTERNAL
    assert done.stdout == "It retries"
    assert "ended its answer in the middle" in done.stderr


def test_a_page_in_place_of_a_server(m3: Run, stub: OpenAIStub, file: str) -> None:
    """A page says that the address is wrong, in two sentences."""
    stub.next(error(200, "<html>Welcome</html>"), path=MODELS)
    done = m3("ask", file, "is it?", "--endpoint", stub.url)
    assert done.returncode == ExitCode.IMPOSSIBLE
    assert "does not speak OpenAI's API: its answer is not JSON." in told(done)
    assert "it ends in /v1 with most servers" in told(done)


def test_a_server_that_is_busy(m3: Run, stub: OpenAIStub, file: str) -> None:
    """Attempts are told on stderr; --quiet keeps them from there."""
    for quiet in ([], ["--quiet"]):
        stub.next(error(503, {}, Retry_After="0"))
        done = m3("ask", file, "is it?", "--endpoint", stub.url, *quiet)
        assert done.returncode == ExitCode.DONE
        assert ("status 503; trying again" in done.stderr) != bool(quiet)


def test_the_context_has_to_be_known(m3: Run, file: str) -> None:
    """A hosted API that does not say it needs --ctx, and works with it."""
    with OpenAIStub(hosted(window=None)) as stub:
        asked = ["ask", file, "is it?", "--endpoint", stub.url]
        unknown = m3(*asked)
        assert unknown.returncode == ExitCode.USAGE
        assert "does not say how much context some-model has. Say it with --ctx, in tokens." in told(unknown)
        assert stub.asked() == []
        assert m3(*asked, "--ctx", "4096").returncode == ExitCode.DONE


def test_another_host(m3: Run, stub: OpenAIStub, file: str, tmp_path: Path) -> None:
    """Secrets stay here, the host is named the first time, and a connection in the open is told each time."""
    (tmp_path / "keys.py").write_text(f'KEY = "{AWS}"\n')
    asked = ["ask", file, "keys.py", f"who has {GITHUB}?", "--endpoint", f"http://{HOST}/v1", *WITH_KEY]
    first, second = (m3(*asked, SOME_KEY=KEY, **stub.proxy) for _ in range(2))
    assert first.returncode == second.returncode == ExitCode.DONE
    assert (SENDS.format(host=HOST) in first.stderr, SENDS.format(host=HOST) in second.stderr) == (
        True,
        False,
    )
    assert all(UNENCRYPTED.format(host=HOST) in done.stderr for done in (first, second))
    assert stub.asked(TOKENIZE)
    sent = stub.everything()
    assert AWS not in sent
    assert GITHUB not in sent
    assert "[REDACTED:" in sent
    assert not any(KEY in json.dumps(each.body) for each in stub.sent)
    assert KEY not in first.stdout + first.stderr


def test_a_conversation(m3: Run, stub: OpenAIStub, file: str) -> None:
    """`m3 chat` asks the server each question with what was said before."""
    done = m3("chat", file, "--endpoint", stub.url, stdin="where?\nwhy?\n")
    assert done.returncode == ExitCode.DONE
    assert done.stdout.count("It retries (retry.py:2-3).") == 2
    first, second = stub.prompts()
    assert second[: len(first)] == first
    assert len(second) == len(first) + 2


def test_a_review(m3: Run, stub: OpenAIStub, tmp_path: Path) -> None:
    """`m3 review` finds what the server claims, at its line, and says so by the exit code."""
    top = make_repository(tmp_path / "top", {"reader.py": "def read(path):\n    return path\n"})
    commit(top, {"reader.py": "def read(path):\n    file = open(path)\n    return file.read()\n"})
    claim = {
        "path": "reader.py", "quote": "file = open(path)", "message": "The file stays open.",
        "rule": "resource", "severity": "error", "confidence": "high", "replacement": None,
    }  # fmt: skip
    stub.next(
        stub.kind.answer(json.dumps({"analysis": "Something could go wrong.", "findings": [claim]}), "Hm."),
        stub.kind.answer(json.dumps({"argument": "So it is.", "claim": "right"})),
    )
    done = m3(
        "review", "--base", "HEAD~1", "--head", "HEAD", "--endpoint", stub.url, "--format", "json", cwd=top
    )
    assert done.returncode == ExitCode.FINDINGS
    (finding,) = json.loads(done.stdout)["findings"]
    assert (finding["path"], finding["start_line"]) == ("reader.py", 2)
    assert len(stub.asked(CHAT)) == 2


def test_commands_that_run_here_do_not_ask_a_server(m3: Run, stub: OpenAIStub, file: str) -> None:
    """Where a server is set once and for all, packing and planning still say what would be here."""
    for command in (["pack", file], ["plan"]):
        assert m3(*command, M3_ENDPOINT=stub.url).returncode == ExitCode.DONE
    assert stub.sent == []


def test_a_server_of_m3(m3: Run, environ: dict[str, str], tmp_path: Path) -> None:
    """A running `m3 serve` answers too, and the second question about files finds them computed."""
    functions = [f"def function_{number}(value):\n    return value + {number}\n" for number in range(56)]
    (tmp_path / "corpus.py").write_text("".join(functions))
    other = {**environ, "M3_CACHE_DIR": str(tmp_path / "other"), "M3_THREADS": "1"}
    with serving("--ctx", "2560", environ=other) as server:
        asked = ["ask", "corpus.py", "--endpoint", server.url, "--json", "--max-tokens", "8"]
        found = []
        for question in ("What does function_7 return?", "How many functions are there?"):
            done = m3(*asked[:2], question, *asked[2:])
            assert done.returncode in (ExitCode.DONE, ExitCode.CAP_REACHED), done.stderr
            found.append(json.loads(done.stdout))
    first, second = found
    for each in found:
        jsonschema.validate(each, ask_schema())
        assert each["model"]["endpoint"] == server.url
        assert each["model"]["context_length"] == 2560
        assert 0 < each["usage"]["generated_tokens"] <= 8
        assert not [warning for warning in each["warnings"] if "tokenizer" in warning]
    assert first["pack"]["tokens"] > 1100
    assert first["usage"]["restored_tokens"] < 100
    assert second["usage"]["restored_tokens"] >= 1024
