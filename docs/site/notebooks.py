"""Notebooks: run again, and shown as pages.

python -m docs.site.notebooks [FOLDER]    # runs those of examples/ and writes them, by default in their places
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_all(folder: Path) -> None:
    """Writes every notebook of examples/ with new outputs; progress and warnings are left out.

    All share one kernel, which forgets its variables in between, so that torch is imported once.
    """
    import nbformat
    from nbclient import NotebookClient

    books = {path: nbformat.read(path, as_version=4) for path in sorted(EXAMPLES.glob("*.ipynb"))}
    whole = nbformat.v4.new_notebook()
    for book in books.values():
        whole.cells += [*book.cells, nbformat.v4.new_code_cell("%reset -f")]
    NotebookClient(whole, kernel_name="python3", timeout=300).execute()
    for path, book in books.items():
        for count, cell in enumerate((cell for cell in book.cells if cell.cell_type == "code"), start=1):
            cell.execution_count = count
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = count
        for cell in book.cells:
            cell.metadata.pop("execution", None)
        nbformat.write(book, folder / path.name)


def as_markdown(path: Path) -> str:
    """The cells of a notebook, each of code with its outputs behind it."""
    parts: list[str] = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        else:
            parts += [f"```python\n{source}\n```", *map(shown, cell["outputs"])]
    return "\n\n".join(parts) + f"\n\nThis page is the notebook `{path.parent.name}/{path.name}`.\n"


def shown(output: dict[str, Any]) -> str:
    """One output: what is printed, or the richest form of a value that a page can show."""
    if output["output_type"] == "stream":
        return f"```text\n{''.join(output['text']).rstrip()}\n```"
    data = {kind: "".join(content) for kind, content in output["data"].items()}
    if "image/png" in data:
        return f'<img alt="figure" src="data:image/png;base64,{data["image/png"].strip()}">'
    if "text/html" in data:
        plain = re.sub(r"(?s)<style.*?</style>|(?<=<table)[^>]*", "", data["text/html"])  # the page has a style
        return f'<div class="output">{" ".join(plain.split())}</div>'
    return f"```text\n{data['text/plain'].rstrip()}\n```"


if __name__ == "__main__":
    run_all(Path(sys.argv[1]) if len(sys.argv) > 1 else EXAMPLES)
