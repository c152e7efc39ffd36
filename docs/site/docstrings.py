"""Makes Markdown of the package's docstrings, for mkdocstrings."""

from __future__ import annotations

import re
from typing import Any

import griffe

# Where a docstring leaves the keywords to a dataclass of options, which has a place on the page of options.
SEE = re.compile(r"^(options: +see )(\w+)$", re.MULTILINE)
# `name: meaning` at the start of a line; its further lines are indented.
FIELD = re.compile(r"((?:\w+, )*\w+): +(\S.*)")


def as_markdown(docstring: str) -> str:
    """Fields become a list, and other indented lines, which are equations, a block of code."""
    lines: list[str] = []
    in_field = False
    linked = SEE.sub(lambda match: f"{match[1]}[{match[2]}](options.md#{match[2].lower()})", docstring)
    for line in linked.splitlines():
        if field := FIELD.fullmatch(line):
            lines += ["", f"- `{field[1]}`: {field[2]}"]
            in_field = True
        elif line.startswith(" ") and in_field:
            lines.append(f"  {line.strip()}")
        elif line.startswith(" "):
            if lines and not lines[-1].startswith("    "):
                lines.append("")
            lines.append(f"    {line}")
        else:
            if lines and lines[-1].startswith(("- ", "    ", "  ")) and line:
                lines.append("")
            lines.append(line)
            in_field = False
    return "\n".join(lines)


class Docstrings(griffe.Extension):
    """Rewrites every docstring when it has been read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
