"""HTML pages that need nothing else, and a policy that lets nothing run but what is this package's."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from typing import TYPE_CHECKING, Any

from m3cli import __version__
from m3cli.report.text import amount

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def own(name: str) -> str:
    """A file of this package as it is; never anything from elsewhere."""
    return resources.files("m3cli.report").joinpath(name).read_text("utf-8")


def policy(script: str, style: str) -> str:
    """A Content-Security-Policy: nothing is loaded, and only these two run, which it names by hash."""
    return (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def page(
    template: str,
    *,
    script: str,
    style: str,
    filters: Mapping[str, Callable[..., str]] | None = None,
    **values: Any,
) -> str:
    """The page that the Jinja `template` makes of `values`, which are all escaped, with more `filters`."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = lambda count: f"{count:,}"
    environment.filters["amount"] = amount
    environment.filters.update(filters or {})
    made: str = environment.from_string(own(template)).render(
        version=__version__,
        policy=policy(script, style),
        script=Markup(script),
        style=Markup(style),
        **values,
    )
    return made


def _hash(text: str) -> str:
    """The source expression of CSP that allows `text` inline."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
