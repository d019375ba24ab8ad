"""`m3 warm`."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from m3cli.cli import options, values


def warm(
    paths: Annotated[list[str] | None, typer.Argument(metavar="PATH...", show_default=False)] = None,
    model: options.Model = None,
    ref: options.Ref = None,
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
    update: options.Update = None,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact",
            help="Compute anew what was updated in place, in the same order.",
            rich_help_panel=options.CACHE_PANEL,
        ),
    ] = False,
    checkpoint_every: options.CheckpointEvery = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Read files into the model now and keep that, so that questions about them are answered fast later.

    Can be interrupted and run again; it goes on where it was. Give the same options as to `m3 ask`.

    Example:  m3 warm ./repo
    """
    from m3cli.report.ask_console import AskConsole
    from m3cli.report.ask_json import warm_object
    from m3cli.report.output import write_json
    from m3cli.tasks.warm import Warmed
    from m3cli.tasks.warm import warm as run

    settings = values.settings({**locals(), "cache": True})
    corpus = values.corpus_request(
        paths or [],
        settings,
        files_from=files_from,
        null=null,
        no_ignore=no_ignore,
        order=values.order(replace(settings, update="inplace") if exact else settings),
        ref=ref,
    )
    context = values.context_request(corpus, settings, allow_dense=allow_dense)
    if exact:
        context = replace(context, run=replace(context.run, update="exact"))
    warmed: Warmed | None = None
    with AskConsole(answer_to=None, quiet=quiet, verbose=verbose) as console:
        values.note_demo(console, context, settings)
        for event in run(context, open_engine=values.open_engine, stdin=values.read_stdin):
            if isinstance(event, Warmed):
                warmed = event
            else:
                console.show(event)
        assert warmed is not None
        console.note(
            f"warm: {warmed.tokens:,} tokens, {warmed.restored_tokens:,} of them computed before, "
            f"in {warmed.seconds:.1f} s"
        )
    if json:
        write_json(warm_object(warmed))
