"""`m3 ask`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from m3cli.cli import options
from m3cli.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from m3cli.corpus.corpus import CorpusRequest
    from m3cli.settings import Settings
    from m3cli.tasks.ask import AskRequest

_ANSWER = "Answer"
_RUN = "How the model runs"


def ask(
    words: Annotated[list[str], typer.Argument(metavar="PATH... QUESTION", show_default=False)],
    model: options.Model = None,
    strategy: Annotated[
        options.StrategyChoice | None,
        typer.Option(
            help="Read the whole corpus, or select what fits (auto: whole if it fits).",
            rich_help_panel=options.CORPUS_PANEL,
        ),
    ] = None,
    files_from: options.FilesFrom = None,
    null: options.Nul = False,
    include: options.Include = None,
    exclude: options.Exclude = None,
    no_ignore: options.NoIgnore = False,
    hidden: options.Hidden = None,
    max_file_size: options.MaxFileSize = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Longest answer, in tokens.", rich_help_panel=_ANSWER),
    ] = None,
    think: Annotated[
        options.ThinkChoice | None,
        typer.Option(
            help="Let the model reason before it answers (default: off; adaptive: as it sees fit).",
            rich_help_panel=_ANSWER,
        ),
    ] = None,
    show_thinking: Annotated[
        bool,
        typer.Option(
            "--show-thinking", help="Show the model's reasoning on stderr.", rich_help_panel=_ANSWER
        ),
    ] = False,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="0, the default, always takes the likeliest token.", rich_help_panel=_ANSWER
        ),
    ] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0, rich_help_panel=_ANSWER)] = None,
    top_k: Annotated[int | None, typer.Option(min=0, rich_help_panel=_ANSWER)] = None,
    min_p: Annotated[float | None, typer.Option(min=0.0, max=1.0, rich_help_panel=_ANSWER)] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**32 - 2, rich_help_panel=_ANSWER)] = None,
    repeat_penalty: Annotated[
        float | None,
        typer.Option(
            min=1.0,
            max=10.0,
            help="Over 1, keeps tiny models from repeating themselves.",
            rich_help_panel=_ANSWER,
        ),
    ] = None,
    ctx: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Use at most N tokens of context (default: the model's).",
            rich_help_panel=_RUN,
        ),
    ] = None,
    kv_type: Annotated[
        options.KVTypeChoice | None,
        typer.Option(help="Type of the KV cache; smaller saves memory.", rich_help_panel=_RUN),
    ] = None,
    flash_attention: Annotated[
        options.SwitchChoice | None, typer.Option(help="Flash attention (auto: on).", rich_help_panel=_RUN)
    ] = None,
    allow_dense: Annotated[
        bool,
        typer.Option(
            "--allow-dense",
            help="Run MiniMax-M3 even without its sparse attention.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads (default: physical cores).", rich_help_panel=_RUN)
    ] = None,
    gpu_layers: Annotated[
        str | None,
        typer.Option(
            metavar="auto|N", help="Layers on the GPU (auto: as many as there are).", rich_help_panel=_RUN
        ),
    ] = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,  # noqa: ARG001 - read from sys.argv by m3cli.cli.app
) -> None:
    """Answer a question from files, directories or standard input, with checked citations.

    Example:  m3 ask ./repo "where is the retry logic, and is it safe?"

    Example:  git diff HEAD~1 | m3 ask - "Summarize this change in one sentence."
    """
    from m3cli.engine.local import LocalEngine
    from m3cli.report.ask_console import AskConsole
    from m3cli.report.ask_json import ask_object
    from m3cli.report.output import write_json
    from m3cli.settings import cache_dir, load_settings
    from m3cli.tasks.ask import Answer
    from m3cli.tasks.ask import ask as run

    settings = load_settings(
        {
            "model": model,
            "strategy": strategy and strategy.value,
            "include": include,
            "exclude": exclude,
            "hidden": hidden,
            "max_file_size": max_file_size,
            "max_tokens": max_tokens,
            "think": think and think.value,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "seed": seed,
            "repeat_penalty": repeat_penalty,
            "ctx": ctx,
            "kv_type": kv_type and kv_type.value,
            "flash_attention": flash_attention and flash_attention.value,
            "threads": threads,
            "gpu_layers": gpu_layers,
        }
    )
    paths, question = _split(words, has_list=files_from is not None)
    corpus = options.corpus_request(paths, settings, files_from=files_from, null=null, no_ignore=no_ignore)
    request = _request(question, corpus, settings, allow_dense=allow_dense)
    answer: Answer | None = None
    with AskConsole(
        answer_to=None if json else sys.stdout, quiet=quiet, verbose=verbose, show_thinking=show_thinking
    ) as console:
        if request.model.origin == "demo" and settings.model is None:
            console.note(
                "note: using the bundled demo model, which is for trying m3 out; name a real one with --model"
            )
        for event in run(
            request,
            open_engine=lambda config: LocalEngine(config, state_dir=cache_dir()),
            stdin=options.read_stdin,
        ):
            console.show(event)
            if isinstance(event, Answer):
                answer = event
    assert answer is not None
    if json:
        write_json(ask_object(answer))
    if answer.finish_reason == "length":
        raise typer.Exit(ExitCode.CAP_REACHED)


def _request(question: str, corpus: CorpusRequest, settings: Settings, *, allow_dense: bool) -> AskRequest:
    from m3cli.engine.events import Sampling
    from m3cli.model.catalog import resolve
    from m3cli.tasks.ask import AskRequest

    flash = settings.flash_attention != "off"
    if not flash and settings.kv_type != "f16":
        raise UsageError(
            f"A {settings.kv_type} KV cache needs flash attention, which is switched off.",
            "Leave out --flash-attention off, or use --kv-type f16.",
        )
    return AskRequest(
        question=question,
        corpus=corpus,
        model=resolve(settings.model, settings.models),
        strategy=settings.strategy,
        think=settings.think if "think" in settings.origins else None,
        ctx=settings.ctx,
        max_tokens=settings.max_tokens,
        sampling=Sampling(
            settings.temperature,
            settings.top_p,
            settings.top_k,
            settings.min_p,
            settings.seed,
            settings.repeat_penalty,
        ),
        kv_type=settings.kv_type,
        flash_attention=flash,
        allow_dense=allow_dense,
        threads=settings.threads,
        gpu_layers=settings.gpu_layers,
    )


def _split(words: list[str], *, has_list: bool) -> tuple[list[str], str]:
    """Paths and question. Raises UsageError when either seems to be missing."""
    *paths, question = words
    if not paths and not has_list:
        if _is_path(question):
            raise UsageError(
                f"There is a path, {question}, but no question.", f'Ask something: m3 ask {question} "…"'
            )
        raise UsageError(
            "There is a question, but nothing to read.", f'Name what to read: m3 ask . "{question}"'
        )
    if _is_path(question):
        raise UsageError(
            f"The last argument, {question}, is a path; the question has to come last.",
            'Write m3 ask PATH... "QUESTION".',
        )
    return paths, question


def _is_path(text: str) -> bool:
    try:
        return text == "-" or (bool(text.strip()) and Path(text).exists())
    except (OSError, ValueError):  # a question is often longer than any path may be
        return False
