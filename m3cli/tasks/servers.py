"""A running `m3 serve` that does what a command would do itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from m3cli.engine.running import model_state, running_servers

if TYPE_CHECKING:
    from pathlib import Path

    from m3cli.engine.running import RunningServer
    from m3cli.tasks.configure import RunOptions


def find_server(directory: Path, model: Path, run: RunOptions, *, keeps: bool) -> RunningServer | None:
    """The youngest server of a model file that runs as `run` asks for, and is alive.

    `keeps` says whether KV caches are to be kept on the disk, which the server does or does not.
    """
    wanted = (str(model.resolve()), model_state(model), keeps)
    for server in running_servers(directory):
        same = (server.model_path, server.model_state, server.caches) == wanted
        if same and run.agrees_with(server.run):
            from m3cli.engine.served import is_alive

            if is_alive(server):
                return server
    return None
