"""`m3 chat`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from m3cli.cli import options, values
from m3cli.errors import UsageError


def chat(
    paths: Annotated[list[str] | None, typer.Argument(metavar="PATH...", show_default=False)] = None,
    model: options.Model = None,
    endpoint: options.Endpoint = None,
    api_key_env: options.APIKeyEnv = None,
    ref: options.Ref = None,
    strategy: options.Strategy = None,
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
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    r"""Ask several questions about one context, which the model reads once. /help lists the commands.

    Questions come from the terminal, or from standard input, one a line.

    Example:  m3 chat ./repo

    Example:  printf 'What is it?\nIs it safe?\n' | m3 chat ./repo
    """
    from m3cli.report.chat_console import ChatConsole
    from m3cli.tasks.chat import Chat

    if "-" in (paths or []):
        raise UsageError(
            "Standard input cannot be both a document and the questions.",
            "Put the document into a file and name that.",
        )
    settings = values.settings(locals())
    corpus = values.corpus_request(
        paths or [],
        settings,
        files_from=files_from,
        null=null,
        no_ignore=no_ignore,
        order=values.order(settings),
        ref=ref,
    )
    context = values.context_request(corpus, settings, allow_dense=allow_dense, asks=True)
    console = ChatConsole(answers_to=sys.stdout, quiet=quiet, verbose=verbose, show_thinking=show_thinking)
    with Chat(
        context,
        open_engine=values.open_engine,
        stdin=values.read_stdin,
        sampling=values.sampling(settings),
    ) as conversation:
        values.note_demo(console, context, settings)
        # What questions load: an interrupt, after which others may come, could leave half of it behind.
        import bm25s  # noqa: F401
        import numpy  # noqa: F401
        import tiktoken  # noqa: F401

        console.run(conversation, values.question_lines())
