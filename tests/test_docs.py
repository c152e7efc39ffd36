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

import sts_fast
from sts_fast.cli.app import app

pytest.importorskip("zensical")

ROOT = Path(__file__).parents[1]
ELSEWHERE = re.compile(r"(?:\w+:)?//")
# Attributes from which a browser loads; a link that a reader may follow is none.
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href", "object": "data"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "site"
    known = {key: value for key, value in os.environ.items() if not key.startswith("GITHUB_")}
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


def test_links_lead_to_pages_and_never_out_of_the_site(site: Path) -> None:
    text = (site / "calibration" / "index.html").read_text(encoding="utf-8")
    assert 'href="../study/world/calibration/"' in text
    assert "conformal.py" not in text  # a source file, whose address nobody has told


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
