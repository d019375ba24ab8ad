"""Options that several commands share."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

CORPUS_PANEL = "What is read"
MODEL_PANEL = "Model"
ANSWER_PANEL = "Answer"
RUN_PANEL = "How the model runs"
PLACE_PANEL = "What goes where"
COST_PANEL = "Cost"
CACHE_PANEL = "What is kept"
OUTPUT_PANEL = "Output"

FilesFrom = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|-",
        help="Read more paths from a file or stdin, one a line.",
        rich_help_panel=CORPUS_PANEL,
    ),
]
Nul = Annotated[
    bool,
    typer.Option(
        "-0", "--null", help="Paths of --files-from end in NUL bytes.", rich_help_panel=CORPUS_PANEL
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        metavar="GLOB", help="Read only files that match; repeatable.", rich_help_panel=CORPUS_PANEL
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        metavar="GLOB", help="Leave out files that match; repeatable.", rich_help_panel=CORPUS_PANEL
    ),
]
NoIgnore = Annotated[
    bool,
    typer.Option(
        "--no-ignore", help="Read ignored files (.gitignore, .m3ignore) too.", rich_help_panel=CORPUS_PANEL
    ),
]
Hidden = Annotated[
    bool | None,
    typer.Option(
        "--hidden/--no-hidden", help="Read files whose names begin with a dot.", rich_help_panel=CORPUS_PANEL
    ),
]
HTMLText = Annotated[
    bool | None,
    typer.Option(
        "--html-text/--html-source",
        help="Take the text of HTML pages, not their source.",
        rich_help_panel=CORPUS_PANEL,
    ),
]
NotebookOutputs = Annotated[
    bool | None,
    typer.Option(
        "--notebook-outputs/--no-notebook-outputs",
        help="Read what the cells of notebooks have printed.",
        rich_help_panel=CORPUS_PANEL,
    ),
]
Diff = Annotated[
    bool,
    typer.Option(
        "--diff", help="Add the changes that are not committed, as a diff.", rich_help_panel=CORPUS_PANEL
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="REF", help="Add the changes since this commit, as a diff.", rich_help_panel=CORPUS_PANEL
    ),
]
Log = Annotated[
    int,
    typer.Option(
        "--log", min=0, metavar="N", help="Add the last N commit messages.", rich_help_panel=CORPUS_PANEL
    ),
]
Compress = Annotated[
    bool,
    typer.Option(
        "--compress",
        help="Leave out the bodies of functions; signatures and docstrings stay.",
        rich_help_panel=CORPUS_PANEL,
    ),
]
StripComments = Annotated[
    bool,
    typer.Option("--strip-comments", help="Leave out comments in code.", rich_help_panel=CORPUS_PANEL),
]
MaxFileSize = Annotated[
    int | None,
    typer.Option(
        metavar="BYTES", min=1, help="Skip larger files (default 2000000).", rich_help_panel=CORPUS_PANEL
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="FILE|NAME",
        help="A GGUF file or a name of `m3 model list`.",
        rich_help_panel=MODEL_PANEL,
    ),
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="List everything left out.", rich_help_panel=OUTPUT_PANEL)
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Nothing on stderr but errors.", rich_help_panel=OUTPUT_PANEL)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.", rich_help_panel=OUTPUT_PANEL)]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.", rich_help_panel=OUTPUT_PANEL)]


class StrategyChoice(str, Enum):
    """`--strategy`."""

    auto = "auto"
    whole = "whole"
    select = "select"
    sweep = "sweep"


class ThinkChoice(str, Enum):
    """`--think`."""

    off = "off"
    on = "on"
    adaptive = "adaptive"


class KVTypeChoice(str, Enum):
    """`--kv-type`."""

    f16 = "f16"
    q8_0 = "q8_0"
    q4_0 = "q4_0"


class UpdateChoice(str, Enum):
    """`--update`."""

    exact = "exact"
    inplace = "inplace"
    auto = "auto"


class SwitchChoice(str, Enum):
    """`--flash-attention`, `--recap`."""

    auto = "auto"
    on = "on"
    off = "off"


class OrderChoice(str, Enum):
    """`--order`."""

    auto = "auto"
    churn = "churn"
    path = "path"
    given = "given"
    dependency = "dependency"
    relevance = "relevance"


Order = Annotated[
    OrderChoice | None,
    typer.Option(
        help="Order of files: what changes often last (churn), path, as given, definitions before uses "
        "(dependency), what matches the question last (relevance) (auto: churn in git trees).",
        rich_help_panel=CORPUS_PANEL,
    ),
]
Ref = Annotated[
    str | None,
    typer.Option(
        metavar="REF",
        help="Read the files of this git commit, branch or tag, not those on the disk.",
        rich_help_panel=CORPUS_PANEL,
    ),
]
Strategy = Annotated[
    StrategyChoice | None,
    typer.Option(
        help="Read the whole corpus at once, select what matches the question, or sweep: read all of it in "
        "windows (auto: whole, as far as the model uses it well).",
        rich_help_panel=CORPUS_PANEL,
    ),
]
Recap = Annotated[
    SwitchChoice | None,
    typer.Option(
        help="Repeat the excerpts that match best just before the question (auto: in long contexts).",
        rich_help_panel=CORPUS_PANEL,
    ),
]
QuoteFirst = Annotated[
    bool | None,
    typer.Option(
        "--quote-first/--no-quote-first",
        help="Have the model quote what bears on the question, and then answer.",
        rich_help_panel=ANSWER_PANEL,
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Longest answer, in tokens.", rich_help_panel=ANSWER_PANEL),
]
Think = Annotated[
    ThinkChoice | None,
    typer.Option(
        help="Let the model reason before it answers (default: off; adaptive: as it sees fit).",
        rich_help_panel=ANSWER_PANEL,
    ),
]
ShowThinking = Annotated[
    bool,
    typer.Option(
        "--show-thinking", help="Show the model's reasoning on stderr.", rich_help_panel=ANSWER_PANEL
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        min=0.0, help="0, the default, always takes the likeliest token.", rich_help_panel=ANSWER_PANEL
    ),
]
TopP = Annotated[float | None, typer.Option(min=0.0, max=1.0, rich_help_panel=ANSWER_PANEL)]
TopK = Annotated[int | None, typer.Option(min=0, rich_help_panel=ANSWER_PANEL)]
MinP = Annotated[float | None, typer.Option(min=0.0, max=1.0, rich_help_panel=ANSWER_PANEL)]
Seed = Annotated[int | None, typer.Option(min=0, max=2**32 - 2, rich_help_panel=ANSWER_PANEL)]
RepeatPenalty = Annotated[
    float | None,
    typer.Option(
        min=1.0,
        max=10.0,
        help="Over 1, keeps tiny models from repeating themselves.",
        rich_help_panel=ANSWER_PANEL,
    ),
]
Ctx = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Use at most N tokens of context (default: the model's).",
        rich_help_panel=RUN_PANEL,
    ),
]
KVType = Annotated[
    KVTypeChoice | None,
    typer.Option(
        help="Type of the KV cache; smaller saves memory (default: f16, or what fits).",
        rich_help_panel=RUN_PANEL,
    ),
]
KVTypeV = Annotated[
    KVTypeChoice | None,
    typer.Option(help="Type of the values in it, if another.", rich_help_panel=RUN_PANEL),
]
UBatch = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Tokens computed at a time (default: by plan).", rich_help_panel=RUN_PANEL
    ),
]
Lora = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE[:SCALE]",
        help="Apply a LoRA adapter, a GGUF file; repeatable.",
        rich_help_panel=RUN_PANEL,
    ),
]
FlashAttention = Annotated[
    SwitchChoice | None, typer.Option(help="Flash attention (auto: on).", rich_help_panel=RUN_PANEL)
]
AllowDense = Annotated[
    bool,
    typer.Option(
        "--allow-dense",
        help="Run MiniMax-M3 even without its sparse attention.",
        rich_help_panel=RUN_PANEL,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="CPU threads (default: physical cores).", rich_help_panel=RUN_PANEL),
]
GPULayers = Annotated[
    str | None,
    typer.Option(metavar="auto|N", help="Layers on the GPU (auto: by plan).", rich_help_panel=PLACE_PANEL),
]
CPUMoE = Annotated[
    bool,
    typer.Option("--cpu-moe", help="Keep all routed experts in RAM.", rich_help_panel=PLACE_PANEL),
]
CPUMoELayers = Annotated[
    int | None,
    typer.Option(
        "--n-cpu-moe",
        min=0,
        metavar="N",
        help="Keep the routed experts of the first N layers in RAM (default: by plan).",
        rich_help_panel=PLACE_PANEL,
    ),
]
OverrideTensor = Annotated[
    list[str] | None,
    typer.Option(
        "--override-tensor",
        metavar="REGEX=BUFFER",
        help="Put tensors whose names match into a buffer type, such as exps=CPU; repeatable.",
        rich_help_panel=PLACE_PANEL,
    ),
]
TensorSplit = Annotated[
    str | None,
    typer.Option(
        metavar="N,N,…", help="How layers are divided among GPUs, e.g. 3,1.", rich_help_panel=PLACE_PANEL
    ),
]
MainGPU = Annotated[
    int | None,
    typer.Option("--main-gpu", min=0, metavar="N", help="Use this GPU alone.", rich_help_panel=PLACE_PANEL),
]
OpOffload = Annotated[
    bool | None,
    typer.Option(
        "--op-offload/--no-op-offload",
        help="Let a GPU compute large batches of layers that are in RAM (default).",
        rich_help_panel=PLACE_PANEL,
    ),
]
NoHost = Annotated[
    bool | None,
    typer.Option(
        "--no-host", help="Keep weights in RAM out of the GPU's pinned memory.", rich_help_panel=PLACE_PANEL
    ),
]
MMap = Annotated[
    bool | None,
    typer.Option(
        "--mmap/--no-mmap",
        help="Map the model file instead of reading it (default).",
        rich_help_panel=PLACE_PANEL,
    ),
]
MLock = Annotated[
    bool | None,
    typer.Option("--mlock", help="Keep the weights from being swapped out.", rich_help_panel=PLACE_PANEL),
]
Endpoint = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Have an OpenAI-compatible server answer, e.g. http://HOST:8000/v1; --model is a name there.",
        rich_help_panel=MODEL_PANEL,
    ),
]
APIKeyEnv = Annotated[
    str | None,
    typer.Option(
        "--api-key-env",
        metavar="NAME",
        help="Environment variable that holds the key of --endpoint.",
        rich_help_panel=MODEL_PANEL,
    ),
]
Server = Annotated[
    bool | None,
    typer.Option(
        "--server/--no-server",
        help="Use a running `m3 serve` of this model, if there is one (default).",
        rich_help_panel=RUN_PANEL,
    ),
]
PriceIn = Annotated[
    float | None,
    typer.Option(
        min=0, metavar="PRICE", help="Hosted price of a million prompt tokens.", rich_help_panel=COST_PANEL
    ),
]
PriceOut = Annotated[
    float | None,
    typer.Option(
        min=0, metavar="PRICE", help="Hosted price of a million answer tokens.", rich_help_panel=COST_PANEL
    ),
]
Watts = Annotated[
    float | None, typer.Option(min=0, help="What this machine draws.", rich_help_panel=COST_PANEL)
]
PriceKWh = Annotated[
    float | None,
    typer.Option(
        "--price-kwh",
        min=0,
        metavar="PRICE",
        help="Price of a kilowatt-hour (default 0.3).",
        rich_help_panel=COST_PANEL,
    ),
]
Cache = Annotated[
    bool | None,
    typer.Option(
        "--cache/--no-cache",
        help="Keep what was computed of the context for the next run (default).",
        rich_help_panel=CACHE_PANEL,
    ),
]
Update = Annotated[
    UpdateChoice | None,
    typer.Option(
        help="What an edit costs: all behind it (exact, the default), only what has changed (inplace: fast, "
        "approximate, files in the order of paths), or that where it saves much and loses little (auto).",
        rich_help_panel=CACHE_PANEL,
    ),
]
CheckpointEvery = Annotated[
    str | None,
    typer.Option(
        metavar="TIME",
        help="In long prefills, save after each TIME, such as 30s or 5m (default 5m).",
        rich_help_panel=CACHE_PANEL,
    ),
]
