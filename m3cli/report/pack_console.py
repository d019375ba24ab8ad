"""What `m3 pack` tells a person on stderr."""

from __future__ import annotations

from typing import TYPE_CHECKING

from m3cli.report.text import amount, printable, skip_lines, skip_summary, stderr_console

if TYPE_CHECKING:
    from rich.tree import Tree

    from m3cli.tasks.pack import PackResult

_DEEPEST = 64  # levels of directories that are shown as such


def show_pack(result: PackResult, *, tree: bool, verbose: bool) -> None:
    """Counts, what was left out and why, and the token tree if asked for."""
    console = stderr_console()
    pack, corpus = result.pack, result.corpus

    def note(line: str) -> None:
        console.print(printable(line), style="dim", markup=False)

    if tree:
        console.print(token_tree(result))
    about = "" if result.counted_by else "about "
    how = f"counted as {result.counted_by} does" if result.counted_by else "estimated at 4 bytes each"
    note(
        f"packed {amount(len(pack.paths), 'file')} in {amount(len(pack.chunks), 'chunk')}: "
        f"{about}{pack.tokens:,} tokens ({how})"
    )
    if result.split:
        largest = max(part.tokens for part in result.split)
        note(f"written as {amount(len(result.split), 'file')} of at most {largest:,} tokens")
    if result.redacted:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in result.redacted.items())
        note(f"redacted: {kinds} (--no-redact keeps them)")
    if corpus.skips:
        note(f"skipped: {skip_summary(corpus.skips)}")
    if pack.omitted:
        note(
            f"left out {amount(len(pack.omitted), 'chunk')} over the budget; "
            f"whole: {about}{pack.tokens_needed:,} tokens"
        )
    for text in corpus.notes:
        note(f"note: {text}")
    if verbose:
        for line in skip_lines(corpus.skips):
            note(line)
        for chunk in pack.omitted:
            note(f"  left out {chunk.path}:{chunk.start_line}-{chunk.end_line}: over the budget")


def token_tree(result: PackResult) -> Tree:
    """Directories and files with their tokens, the largest first."""
    from rich.text import Text
    from rich.tree import Tree

    totals: dict[tuple[str, ...], int] = {}
    for chunk, tokens in zip(result.pack.chunks, result.pack.chunk_tokens, strict=True):
        parts = tuple(chunk.path.split("/", _DEEPEST))
        for depth in range(len(parts) + 1):
            totals[parts[:depth]] = totals.get(parts[:depth], 0) + tokens
    children: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for key in totals:
        if key:
            children.setdefault(key[:-1], []).append(key)

    def grow(node: Tree, key: tuple[str, ...]) -> None:
        for child in sorted(children.get(key, []), key=lambda k: (-totals[k], k)):
            name = printable(child[-1]) + ("/" if child in children else "")
            label = Text.assemble(name, (f"  {totals[child]:,}", "dim"))
            grow(node.add(label), child)

    root = Tree(Text.assemble("tokens", (f"  {totals.get((), 0):,}", "dim")))
    grow(root, ())
    return root
