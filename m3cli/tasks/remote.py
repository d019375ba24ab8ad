"""A model of another machine in the place of a file: what prompts are made with, and what may leave."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3cli.corpus.patch import misfit, split_lines
from m3cli.corpus.types import Chunk
from m3cli.engine.endpoint import RemoteServer
from m3cli.engine.remote import EstimatingTokenizer, RemoteTokenizer
from m3cli.errors import ModelError, UsageError
from m3cli.model.catalog import ModelRef, demo_model
from m3cli.model.header import read_header
from m3cli.model.token_cache import CachingTokenizer
from m3cli.model.tokenizer import load_tokenizer
from m3cli.prompt.chat import PLAIN_TEMPLATE, ChatTemplate
from m3cli.prompt.secrets import Redactor
from m3cli.tasks.model import OpenModel

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from m3cli.corpus.patch import FileChange
    from m3cli.engine.endpoint import Endpoint
    from m3cli.memo import Memo
    from m3cli.model.tokens import Tokenizer
    from m3cli.prompt.thinking import ThinkMode

SENDS = "the files and what you ask about them go to {host}"
UNENCRYPTED = "what goes to {host} is not encrypted: others on the way can read it (use https)"
REDACTED = "secrets that were replaced by placeholders before anything is sent: {count}"
COUNTED = "{host} offers no tokenizer: tokens are counted as {name} does, with some room to spare"
# Where servers say how many tokens of context a model has: vLLM, SGLang and m3; others.
_LENGTHS = ("max_model_len", "context_length", "context_window", "max_context_length")
_TEMPLATE_TOKENS = 64  # for what the chat template, which the server alone knows, writes around a message
_UNCERTAIN = 9  # tokens, after which one more is counted where another tokenizer than the server's counts
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
        return text if self.server.endpoint.is_local else _redacted(text, self.redactor)

    def without_secrets(self, chunks: Iterable[Chunk]) -> tuple[Chunk, ...]:
        """The chunks of a corpus without their secrets; as they are where nothing leaves this machine."""
        return tuple(chunks if self.server.endpoint.is_local else self.redactor.redact(chunks))

    def about_secrets(self) -> list[str]:
        """How many secrets were replaced so far, if any."""
        count = sum(self.redactor.counts.values())
        return [REDACTED.format(count=count)] if count else []

    def change_without_secrets(self, change: FileChange) -> FileChange:
        """A changed file without its secrets: both versions, as far as they are known, and the hunks.

        What is a secret often shows in the whole of a file only, by its name and the lines above.
        """
        if self.server.endpoint.is_local:
            return change
        base, old = self._version(change, new=False)
        head, new = self._version(change, new=True)
        hunks = []
        for hunk in change.hunks:
            lines = []
            for line in hunk.lines:
                before = next(old) if line[0] != "+" else None
                after = next(new) if line[0] != "-" else None
                safe = after if after is not None else before
                lines.append(line if safe is None else line[0] + safe)
            section = _redacted(hunk.section, self.redactor, change.old_path)
            hunks.append(replace(hunk, lines=tuple(lines), section=section))
        return replace(change, hunks=tuple(hunks), base=base, head=head)

    def _version(self, change: FileChange, *, new: bool) -> tuple[str | None, Iterator[str | None]]:
        """The text of a version, and each of its lines in the hunks, None for one that stays as it is."""
        path, text = (change.path, change.head) if new else (change.old_path, change.base)
        safe = None if text is None else _redacted(text, self.redactor, path)
        if text is not None and safe is not None and misfit(split_lines(text), change.hunks, new=new) is None:
            changed = _changed(text, safe)
            starts = [(hunk.position(new=new), len(hunk.side(new=new))) for hunk in change.hunks]
            return safe, iter([line for start, length in starts for line in changed[start : start + length]])
        known = "".join(line for hunk in change.hunks for line in hunk.side(new=new))
        return safe, iter(_changed(known, _redacted(known, self.redactor, path)))

    def variables(self, mode: ThinkMode | None) -> Mapping[str, Any]:
        """What the chat template is given, by the names that M3 and most others have for it."""
        if mode is None and "minimax-m3" not in self.opened.ref.name.lower():
            return {}
        mode = mode or "off"
        return {
            "thinking_mode": _MODES[mode],
            **({} if mode == "adaptive" else {"enable_thinking": mode == "on"}),
        }


class CautiousTokenizer:
    """A Tokenizer that counts no fewer tokens than a server will; its ids are for counting.

    It adds what a chat template may write around a message and, unless `every` is 0, a token after so many.
    If the tokenizer within `sends` texts away, it is given them without secrets.
    """

    bos_id: int | None = None

    def __init__(self, tokenizer: Tokenizer, *, every: int = 0, sends: bool = False) -> None:
        self._tokenizer = tokenizer
        self._every = every
        self._sends = sends
        self.name = f"{tokenizer.name}, {every}"

    def encode(self, text: str) -> list[int]:
        """As many ids as a text may have there. Raises M3Error."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Ids of each text."""
        shown = [_redacted(text, Redactor()) for text in texts] if self._sends else texts
        return [[*ids, *[0] * self._spare(len(ids))] for ids in self._tokenizer.encode_batch(shown)]

    def count_batch(self, texts: Iterable[str]) -> list[int]:
        """How many ids each text has."""
        return list(map(len, self.encode_batch(texts)))

    def encode_template(self, text: str) -> list[int]:
        """Ids of what may stand between two messages, which `text` is not."""
        return [*self._tokenizer.encode_template(text), *[0] * _TEMPLATE_TOKENS]

    def _spare(self, tokens: int) -> int:
        return -(-tokens // self._every) if self._every else 0


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
        tokenizer: Tokenizer
        if (offered := RemoteTokenizer.offered_by(server, name)) is not None:
            tokenizer = CautiousTokenizer(offered, sends=not endpoint.is_local)
        else:
            own, counted_by = _own_tokenizer()
            notes.append(COUNTED.format(host=endpoint.host, name=counted_by))
            tokenizer = CautiousTokenizer(own, every=_UNCERTAIN)
        if memo is not None:
            tokenizer = CachingTokenizer(tokenizer, memo)
        ref = ModelRef(name, Path(), "remote", endpoint.url)
        opened = OpenModel(ref, length, tokenizer, ChatTemplate(PLAIN_TEMPLATE), (), None)
        return RemoteModel(server, opened, Redactor(memo), tuple(notes))
    except BaseException:
        server.close()
        raise


def _changed(text: str, safe: str) -> list[str | None]:
    """Each line of `safe`, without its end, that is not as in `text`; None for the others."""
    lines, shown = split_lines(text), split_lines(safe)
    shown += [""] * (len(lines) - len(shown))  # the last one may be gone
    pairs = zip(lines, shown, strict=True)
    return [after.rstrip("\r\n") if after != before else None for before, after in pairs]


def _redacted(text: str, redactor: Redactor, path: str = "") -> str:
    """A text without its secrets, in as many lines."""
    if not text:
        return text
    return "".join(chunk.text for chunk in redactor.redact([Chunk(path, 1, text.count("\n") + 1, text)]))


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
