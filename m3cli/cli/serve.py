"""`m3 serve`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from m3cli.cli import options, values
from m3cli.errors import MachineError, UsageError

_PANEL = "Who may ask, and how much"


def serve(
    paths: Annotated[list[str] | None, typer.Argument(metavar="PATH...", show_default=False)] = None,
    model: options.Model = None,
    host: Annotated[str, typer.Option(help="Address to listen at.", rich_help_panel=_PANEL)] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="0 is any that is free.", rich_help_panel=_PANEL)
    ] = 8303,
    api_key_env: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Environment variable with the key that clients have to send.",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    max_waiting: Annotated[
        int, typer.Option(min=1, metavar="N", help="Refuse more requests than wait.", rich_help_panel=_PANEL)
    ] = 32,
    max_body: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Largest request (default: what the context takes).", rich_help_panel=_PANEL
        ),
    ] = None,
    time_limit: Annotated[
        str, typer.Option(metavar="TIME", help="Longest time for one answer.", rich_help_panel=_PANEL)
    ] = "24h",
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
    cache: options.Cache = None,
    update: options.Update = None,
    checkpoint_every: options.CheckpointEvery = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Keep a model loaded, and files read into it, behind an OpenAI-compatible API.

    `m3 ask`, `chat`, `warm` and `review` find it by themselves. To clients, the model's name is a plain
    model, and `corpus` answers about the files as they are then. Prints its address on stdout.

    Example:  m3 serve ./repo --model M3.gguf
    """
    try:
        from m3cli.serve.run import ServeRequest
        from m3cli.serve.run import serve as run
        from m3cli.serve.stream import Limits
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("m3cli"):
            raise
        raise MachineError(
            f"m3 serve needs the package {error.name}, which is not installed.",
            "Install it: pip install 'm3cli[serve]'.",
        ) from error
    from m3cli.report.serve_console import ServeConsole
    from m3cli.settings import cache_dir

    settings = values.settings({**locals(), "server": False})
    corpus = None
    if paths or files_from is not None:
        corpus = values.corpus_request(
            paths or [],
            settings,
            files_from=files_from,
            null=null,
            no_ignore=no_ignore,
            order=values.order(settings),
            ref=ref,
        )
    if corpus is not None and settings.strategy == "sweep":
        raise UsageError("A server does not sweep.", "Use --strategy auto, whole or select.")
    piped = values.read_stdin() if "-" in (paths or []) else b""
    with ServeConsole(sys.stdout, quiet=quiet, debug=debug) as console:
        run(
            ServeRequest(
                context=values.context_request(corpus, settings, allow_dense=allow_dense),
                host=host,
                port=port,
                api_key=values.api_key(api_key_env) if api_key_env else "",
                most_waiting=max_waiting,
                limits=Limits(
                    body_bytes=values.nbytes(max_body, "--max-body") if max_body else 0,
                    answer_seconds=values.seconds(time_limit, "--time-limit"),
                ),
                sampling=values.sampling(settings),
                servers=cache_dir() / "servers",
            ),
            open_engine=values.open_engine,
            stdin=lambda: piped,
            console=console,
        )
