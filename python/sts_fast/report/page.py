"""Rendering of a page: a template of this folder with its style sheet and the formats of numbers."""

from __future__ import annotations

from importlib import resources
from typing import Any

from markupsafe import Markup

from sts_fast._version import __version__
from sts_fast.report import numbers

STYLE = "report.css"


def render(template: str, **content: Any) -> str:
    """The page as text; `content` must have every name in the template, and all text is escaped."""
    import jinja2

    source = resources.files("sts_fast.report")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: source.joinpath(name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        name: getattr(numbers, name)
        for name in (
            "significant", "interval", "correlation", "correlations", "chance", "percent", "count", "counted",
            "visible_token", "visible_context", "with_sign",
        )
    }  # fmt: skip
    style = source.joinpath(STYLE).read_text(encoding="utf-8")
    return environment.get_template(template).render(style=Markup(style), version=__version__, **content)
