"""m3 as a library: what `from m3cli import pack` gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from m3cli.corpus.order import Order
    from m3cli.tasks.pack import PackResult


def pack(
    *paths: str | Path,
    format: Literal["xml", "markdown", "json", "plain"] = "xml",  # noqa: A002 - the option's name
    budget: int | None = None,
    query: str = "",
    split_tokens: int | None = None,
    line_numbers: bool = False,
    template: str | None = None,
    compress: bool = False,
    strip_comments: bool = False,
    redact: bool = True,
    order: Literal["auto"] | Order = "path",
    ref: str | None = None,
    diff: str | None = None,
    log: int = 0,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    ignore_files: bool = True,
    hidden: bool = False,
    max_file_size: int | None = 2_000_000,
    html_text: bool = False,
    notebook_outputs: bool = False,
    model: str | Path | None = None,
    cache_dir: Path | None = None,
) -> PackResult:
    """Pack files and directories into one text, as `m3 pack` does; no settings file is read.

    `budget` and `split_tokens` are in tokens of `model`, a GGUF file; without one they are those of the
    demo model, or 4 bytes each where that is not installed. `template` is the source of a Jinja template.
    `ref` names a commit to read, `diff` one to show the changes since, and `log` so many commits. Sizes are
    in bytes. `cache_dir` keeps token counts for the next call.

    The result has the text in `text`, tokens and chunks in `pack`, what was left out in `corpus.skips` and
    `pack.omitted`. Raises subclasses of `m3cli.errors.M3Error`.

    >>> from m3cli import pack
    >>> pack("src", "docs", budget=100_000, query="retry logic").text  # doctest: +SKIP
    """
    from m3cli.corpus.corpus import CorpusRequest
    from m3cli.corpus.documents import DocumentLimits
    from m3cli.corpus.extract import ExtractOptions
    from m3cli.corpus.sources import WalkOptions
    from m3cli.errors import UsageError
    from m3cli.prompt.template import Template
    from m3cli.tasks.pack import PackRequest, counter
    from m3cli.tasks.pack import pack as run

    def no_stdin() -> bytes:
        raise UsageError("Standard input is nothing that a library reads.", "Name files.")

    corpus = CorpusRequest(
        tuple(map(str, paths)),
        walk=WalkOptions(tuple(include), tuple(exclude), ignore_files, hidden),
        limits=DocumentLimits(max_bytes=max_file_size),
        extract=ExtractOptions(html=html_text, outputs=notebook_outputs),
        ref=ref,
        order=order,
        question=query,
        compress=compress,
        strip_comments=strip_comments,
        diff=diff,
        log=log,
    )
    with counter(str(model) if model is not None else None, {}, cache_dir) as (tokenizer, name, memo):
        return run(
            PackRequest(
                corpus=corpus,
                format=format,
                budget=budget,
                query=query,
                tokenizer=tokenizer,
                counted_by=name,
                redact=redact,
                memo=memo,
                line_numbers=line_numbers,
                template=Template(template, "given") if template is not None else None,
                split_tokens=split_tokens,
            ),
            no_stdin,
        )
