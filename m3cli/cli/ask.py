"""`m3 ask`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from m3cli.cli import options, values
from m3cli.errors import ExitCode, UsageError


def ask(
    words: Annotated[list[str], typer.Argument(metavar="PATH... QUESTION", show_default=False)],
    model: options.Model = None,
    endpoint: options.Endpoint = None,
    api_key_env: options.APIKeyEnv = None,
    ref: options.Ref = None,
    strategy: options.Strategy = None,
    recap: options.Recap = None,
    order: options.Order = None,
    files_from: options.FilesFrom = None,
    null: options.Nul = False,
    include: options.Include = None,
    exclude: options.Exclude = None,
    no_ignore: options.NoIgnore = False,
    hidden: options.Hidden = None,
    html_text: options.HTMLText = None,
    notebook_outputs: options.NotebookOutputs = None,
    max_file_size: options.MaxFileSize = None,
    max_tokens: options.MaxTokens = None,
    quote_first: options.QuoteFirst = None,
    think: options.Think = None,
    show_thinking: options.ShowThinking = False,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    seed: options.Seed = None,
    repeat_penalty: options.RepeatPenalty = None,
    ctx: options.Ctx = None,
    kv_type: options.KVType = None,
    kv_type_v: options.KVTypeV = None,
    ubatch: options.UBatch = None,
    flash_attention: options.FlashAttention = None,
    allow_dense: options.AllowDense = False,
    threads: options.Threads = None,
    lora: options.Lora = None,
    gpu_layers: options.GPULayers = None,
    cpu_moe: options.CPUMoE = False,
    cpu_moe_layers: options.CPUMoELayers = None,
    override_tensor: options.OverrideTensor = None,
    tensor_split: options.TensorSplit = None,
    main_gpu: options.MainGPU = None,
    op_offload: options.OpOffload = None,
    no_host: options.NoHost = None,
    mmap: options.MMap = None,
    mlock: options.MLock = None,
    server: options.Server = None,
    cache: options.Cache = None,
    update: options.Update = None,
    checkpoint_every: options.CheckpointEvery = None,
    price_in: options.PriceIn = None,
    price_out: options.PriceOut = None,
    watts: options.Watts = None,
    price_kwh: options.PriceKWh = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Answer a question from files, directories or standard input, with checked citations.

    Example:  m3 ask ./repo "where is the retry logic, and is it safe?"

    Example:  git diff HEAD~1 | m3 ask - "Summarize this change in one sentence."
    """
    from m3cli.report.ask_console import AskConsole
    from m3cli.report.ask_json import ask_object
    from m3cli.report.output import write_json
    from m3cli.tasks.ask import Answer, AskRequest
    from m3cli.tasks.ask import ask as run

    settings = values.settings(locals())
    paths, question = _split(words, has_list=files_from is not None)
    corpus = values.corpus_request(
        paths,
        settings,
        files_from=files_from,
        null=null,
        no_ignore=no_ignore,
        order=values.order(settings),
        ref=ref,
        question=question,
    )
    context = values.context_request(corpus, settings, allow_dense=allow_dense, asks=True)
    request = AskRequest(question, context, values.sampling(settings))
    answer: Answer | None = None
    with AskConsole(
        answer_to=None if json else sys.stdout, quiet=quiet, verbose=verbose, show_thinking=show_thinking
    ) as console:
        values.note_demo(console, context, settings)
        for event in run(request, open_engine=values.open_engine, stdin=values.read_stdin):
            console.show(event)
            if isinstance(event, Answer):
                answer = event
        assert answer is not None
        costs = answer.costs(values.prices(settings))
        for name, cost in costs.items():
            console.note(f"cost {name}: {cost:.6f}")
    if json:
        write_json(ask_object(answer, costs))
    if answer.finish_reason == "length":
        raise typer.Exit(ExitCode.CAP_REACHED)


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
