"""A model of another machine in the place of a file: what prompts are made with, and what may leave."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3cli.corpus.types import Chunk
from m3cli.engine.remote import EstimatingTokenizer, RemoteServer
from m3cli.errors import ModelError, UsageError
from m3cli.model.catalog import ModelRef, demo_model
from m3cli.model.header import read_header
from m3cli.model.token_cache import CachingTokenizer
from m3cli.model.tokenizer import load_tokenizer
from m3cli.prompt.chat import PLAIN_TEMPLATE, ChatTemplate
from m3cli.prompt.secrets import Redactor
from m3cli.tasks.model import OpenModel

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from m3cli.engine.remote import Endpoint
    from m3cli.memo import Memo
    from m3cli.model.tokens import Tokenizer
    from m3cli.prompt.thinking import ThinkMode

SENDS = "the files and what you ask about them go to {host}"
UNENCRYPTED = "what goes to {host} is not encrypted: others on the way can read it (use https)"
REDACTED = "{count} secrets were replaced by placeholders before anything is sent"
COUNTED = "{host} offers no tokenizer: tokens are counted as {name} does, with some room to spare"
# Where servers say how many tokens of context a model has: vLLM, SGLang and m3; others.
_LENGTHS = ("max_model_len", "context_length", "context_window", "max_context_length")
_TEMPLATE_TOKENS = 256  # for the chat template, which the server alone knows
_UNCERTAIN = 0.9  # share of the context that is used where tokens are counted by another tokenizer
_MODES = {"off": "disabled", "on": "enabled", "adaptive": "adaptive"}


@dataclass(frozen=True, slots=True)
class RemoteModel:
    """A model behind an endpoint: the connection, and a redactor that sees all that leaves."""

    server: RemoteServer
    opened: OpenModel
    redactor: Redactor
    notes: tuple[str, ...]

    def redacted(self, text: str) -> str:
        """A text without its secrets; nothing is replaced that stays on this machine."""
        if self.server.endpoint.is_local or not text:
            return text
        lines = text.count("\n") + 1
        return "".join(chunk.text for chunk in self.redactor.redact([Chunk("", 1, lines, text)]))

    def without_secrets(self, chunks: Iterable[Chunk]) -> tuple[Chunk, ...]:
        """The chunks of a corpus without their secrets; as they are where nothing leaves this machine."""
        return tuple(chunks if self.server.endpoint.is_local else self.redactor.redact(chunks))

    def variables(self, mode: ThinkMode | None) -> Mapping[str, Any]:
        """What the chat template is given, by the names that M3 and most others have for it."""
        if mode is None and "minimax-m3" not in self.opened.ref.name.lower():
            return {}
        mode = mode or "off"
        return {
            "thinking_mode": _MODES[mode],
            **({} if mode == "adaptive" else {"enable_thinking": mode == "on"}),
        }


def open_remote(endpoint: Endpoint, ctx: int, memo: Memo | None, state_dir: Path | None) -> RemoteModel:
    """Ask a server for its models, and for the context and the tokenizer of one. Raises M3Error.

    `ctx` is the context in tokens where the server does not say; `state_dir` keeps which hosts the user has
    been told of.
    """
    server = RemoteServer(endpoint)
    try:
        models = server.models()
        names = [model["id"] for model in models]
        name = endpoint.model or names[0]
        if name not in names:
            listed = ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
            raise ModelError(
                f"The server at {endpoint.url} has no model {name}.",
                f"It has {listed}: name one with --model.",
            )
        length = _context_length(server, models[names.index(name)]) or ctx
        if not length:
            raise UsageError(
                f"The server at {endpoint.url} does not say how much context {name} has.",
                "Say it with --ctx, in tokens.",
            )
        notes = []
        if not endpoint.is_local and _is_new(endpoint.host, state_dir):
            notes.append(SENDS.format(host=endpoint.host))
        if endpoint.is_open:
            notes.append(UNENCRYPTED.format(host=endpoint.host))
        tokenizer: Tokenizer | None = server.tokenizer(name)
        if tokenizer is None:
            tokenizer, counted_by = _own_tokenizer()
            notes.append(COUNTED.format(host=endpoint.host, name=counted_by))
            length = int(length * _UNCERTAIN)
        if memo is not None:
            tokenizer = CachingTokenizer(tokenizer, memo)
        ref = ModelRef(name, Path(), "remote", endpoint.url)
        usable = max(length - _TEMPLATE_TOKENS, 1)
        opened = OpenModel(ref, usable, tokenizer, ChatTemplate(PLAIN_TEMPLATE), (), None)
        return RemoteModel(server, opened, Redactor(memo), tuple(notes))
    except BaseException:
        server.close()
        raise


def _context_length(server: RemoteServer, model: dict[str, Any]) -> int:
    """Tokens of context that a server gives a model; 0 if it does not say."""
    meta = model.get("meta")
    told = [model.get(key) for key in _LENGTHS] + [meta.get("n_ctx") if isinstance(meta, dict) else None]
    found = next((value for value in told if type(value) is int and value > 0), 0)
    return found or server.llama_context()


def _own_tokenizer() -> tuple[Tokenizer, str]:
    """A tokenizer that is at hand, and whose it is."""
    demo = demo_model()
    if demo is not None:
        tokenizer = load_tokenizer(read_header(demo.path))
        if tokenizer is not None:
            return tokenizer, "the demo model"
    return EstimatingTokenizer(), "three bytes a token"


def _is_new(host: str, state_dir: Path | None) -> bool:
    """Whether the user was not told yet that something goes to this host; it is remembered."""
    if state_dir is None:
        return True
    path = state_dir / "hosts"
    try:
        known = path.read_text("utf-8").splitlines()
    except (OSError, ValueError):
        known = []
    if host in known:
        return False
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{host}\n")
    except OSError:
        pass  # it is told again
    return True
