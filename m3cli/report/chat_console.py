"""A conversation as a person has it: questions in, answers on stdout, everything else on stderr."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from m3cli.errors import ImpossibleError, M3Error, UsageError
from m3cli.report.ask_console import AskConsole
from m3cli.report.output import write_file
from m3cli.report.text import amount, fact_table, printable, stderr_console

if TYPE_CHECKING:
    from collections.abc import Iterator

    from m3cli.tasks.chat import Chat

HELP = {
    "/files": "what the model reads, with tokens",
    "/reload": "read the files again, after you have changed them",
    "/save FILE": "write the conversation to a file, as Markdown",
    "/help": "this list",
    "/quit": "end; so does the end of input",
}


class ChatConsole:
    """Carries a conversation out. Commands begin with a slash; everything else is a question."""

    def __init__(
        self,
        *,
        answers_to: TextIO,
        quiet: bool = False,
        verbose: bool = False,
        show_thinking: bool = False,
    ) -> None:
        self._answers_to = answers_to
        self._quiet = quiet
        self._verbose = verbose
        self._show_thinking = show_thinking
        self._stderr = stderr_console()

    def note(self, line: str) -> None:
        """One line on stderr, unless quiet."""
        if not self._quiet:
            self._stderr.print(printable(line), style="dim", markup=False)

    def run(self, chat: Chat, lines: Iterator[str]) -> None:
        """Answer `lines` until they end or one of them is /quit.

        What cannot be answered is told, and the conversation goes on; an answer that is interrupted too.
        """
        for line in lines:
            text = line.strip()
            if text == "/quit":
                return
            try:
                if text.startswith("/"):
                    self._command(chat, text)
                elif text:
                    self._ask(chat, text)
            except (ImpossibleError, UsageError) as error:
                self._complain(error)
            except KeyboardInterrupt:
                self.note("interrupted; the question is forgotten")

    def _ask(self, chat: Chat, question: str) -> None:
        with AskConsole(
            answer_to=self._answers_to,
            quiet=self._quiet,
            verbose=self._verbose,
            show_thinking=self._show_thinking,
        ) as console:
            for event in chat.ask(question):
                console.show(event)

    def _command(self, chat: Chat, text: str) -> None:
        name, _, argument = text.partition(" ")
        if name == "/files":
            self._files(chat)
        elif name == "/reload":
            chat.reload()
            self.note(f"read {amount(len(chat.context.corpus.paths), 'file')}")
        elif name == "/save":
            if not argument.strip():
                raise UsageError("/save needs the name of a file.", "Write /save conversation.md.")
            write_file(Path(argument.strip()).expanduser(), [chat.transcript().encode("utf-8", "replace")])
            self.note(f"wrote {amount(len(chat.turns), 'question')} to {argument.strip()}")
        elif name == "/help":
            self._stderr.print(fact_table(HELP.items()))
        else:
            raise UsageError(f"There is no command {name}.", "/help lists the commands.")

    def _files(self, chat: Chat) -> None:
        tokens: dict[str, int] = {}
        if chat.packed is None:
            self.note("tokens are known after the first question")
        else:
            pack = chat.packed.pack
            for chunk, count in zip(pack.chunks, pack.chunk_tokens, strict=True):
                tokens[chunk.path] = tokens.get(chunk.path, 0) + count
        rows = [
            (path, f"{tokens[path]:,} tokens" if path in tokens else "-")
            for path in chat.context.corpus.paths
        ]
        self._stderr.print(fact_table((printable(path), count) for path, count in rows))

    def _complain(self, error: M3Error) -> None:
        self._stderr.print("error:", style="bold red", end=" ")
        self._stderr.print(printable(f"{error.message} {error.hint}"), markup=False)
