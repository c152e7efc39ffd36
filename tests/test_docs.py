"""The documentation site: built strictly, complete, and asking for nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import typer
from browser import needs_browser, opened_page
from docs.site.build import relinked
from docs.site.docstrings import as_markdown

import sts_fast
from sts_fast.cli.app import app

ROOT = Path(__file__).parents[1]
ELSEWHERE = re.compile(r"(?:\w+:)?//")
# Attributes from which a browser loads; a link that a reader may follow is none.
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href", "object": "data"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "site"
    known = {**os.environ, "GITHUB_SERVER_URL": "https://github.com", "GITHUB_REPOSITORY": "owner/name"}
    command = [sys.executable, "-m", "docs.site", str(folder)]
    built = subprocess.run(command, cwd=ROOT, env=known, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


class Loads(HTMLParser):
    """What a page loads from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        address = given.get(LOADED.get(tag, "")) or ""
        if ELSEWHERE.match(address) or re.search(r"url\(['\"]?(?:\w+:)?//", given.get("style") or ""):
            self.found.append(f"<{tag}> {address}")


def test_no_page_asks_for_anything_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 50
    for page in pages:
        loads = Loads()
        loads.feed(page.read_text(encoding="utf-8"))
        assert not loads.found, page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*['\"]?(?:\w+:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_reference_has_every_public_name_and_every_option(site: Path) -> None:
    pages = [page.read_text(encoding="utf-8") for page in (site / "reference").rglob("*.html")]
    for name in set(sts_fast.__all__) - {"__version__"}:
        value = getattr(sts_fast, name)
        kind = "class" if isinstance(value, type) else "function"
        symbol = rf'<h2 id="{value.__module__}.{name}" class="doc doc-heading">\s*<code [^>]*doc-symbol-{kind}"'
        assert any(re.search(symbol, page) for page in pages), name
    text = (site / "reference" / "command-line" / "index.html").read_text(encoding="utf-8")
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        section = text.split(f'<h2 id="{name}">')[1].split("<h2 ")[0]
        for word in (word for each in command.params if each.param_type_name == "option" for word in each.opts):
            assert word == "--help" or f"<code>{word}</code>" in section, f"{name} {word}"


def test_links_lead_to_pages_else_to_the_repository(site: Path) -> None:
    text = (site / "calibration" / "index.html").read_text(encoding="utf-8")
    assert 'href="../study/world/calibration/"' in text
    module = "python/sts_fast/outcomes/calibration/conformal.py"
    assert f'href="https://github.com/owner/name/blob/HEAD/{module}"' in text


def test_without_a_repository_a_link_to_a_source_is_plain_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
    pages = {"docs/saes.md": "saes.md", "study/README.md": "study/index.md"}
    text = "[code](../csrc/c_api.cpp), [study](../study/README.md#x), [folder](../study), `x[0](y)`, [no](no.md)"
    assert relinked(text, "docs/saes.md", pages, tmp_path) == (
        "code, [study](study/index.md#x), [folder](study/index.md), `x[0](y)`, [no](no.md)"
    )


def test_every_schema_is_on_the_page_of_files(site: Path) -> None:
    text = (site / "reference" / "files" / "index.html").read_text(encoding="utf-8")
    schemas = list((ROOT / "python" / "sts_fast").rglob("*.schema.json"))
    assert len(schemas) >= 5
    for schema in schemas:
        assert f"sts_fast/{schema.relative_to(ROOT / 'python' / 'sts_fast')}" in text


def test_fields_of_a_docstring_become_a_list_and_equations_a_block() -> None:
    docstring = "Sums.\n\nacts: [n, d_in] rows,\n    as they are\nn:    their number\n\nThen\n  y = x\nand so on."
    assert as_markdown(docstring).split("\n") == [
        "Sums.", "", "", "- `acts`: [n, d_in] rows,", "  as they are", "", "- `n`: their number", "", "Then", "",
        "      y = x", "", "and so on.",
    ]  # fmt: skip


@needs_browser
def test_pages_are_read_on_a_phone_and_in_the_dark(site: Path, tmp_path: Path) -> None:
    with opened_page(tmp_path / "profile") as page:
        for name, width, scheme in (
            (".", 1280, "dark"),
            ("manual", 390, "dark"),
            ("reference/command-line", 390, "light"),
        ):
            page.value("location.protocol == 'file:' && localStorage.clear()")
            page.show(site / name / "index.html", width=width, scheme=scheme)
            assert all(address.startswith(("file:", "data:", "blob:")) for address in page.requests())
            assert page.value("document.documentElement.scrollWidth") <= width
            colours = page.value("document.body.getAttribute('data-md-color-scheme')")
            assert colours == {"dark": "slate", "light": "default"}[scheme]
