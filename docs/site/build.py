"""Gathers the pages of the site, makes their links fit, and has zensical build it.

The pages are Markdown that GitHub shows too: a link there leads to a file of the repository. On the site it leads to
the page that is made of that file; where there is none, to the file in the repository, if its address is known.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from docs.site import notebooks, reference

ROOT = Path(__file__).parents[2]
SETTINGS = Path(__file__).with_name("site.yml")
STYLE = Path(__file__).with_name("site.css")
LANGUAGES = {".py": "python", ".c": "c", ".cpp": "cpp", ".rs": "rust", ".txt": "cmake"}
FOLDERS = ("docs", "study", "benchmarks", "examples")
LINK = re.compile(r"\[(?P<text>(?:[^][]|\[[^]]*\])*)\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")
PICTURE = re.compile(r'(?<=<img src=")[^"]+')


def build(site: Path) -> None:
    """Writes the site into a folder, in place of what is there.

    Exits with an error for a dead link, and for a page that the navigation lacks.
    """
    site = site.resolve()
    staged = site.with_name(f"{site.name}.pages")
    for folder in (site, staged):
        shutil.rmtree(folder, ignore_errors=True)
    pages = pages_of_repository()
    texts = {pages[source]: text_of(source) for source in pages}
    for source, page in pages.items():
        texts[page] = relinked(texts[page], source, pages, staged / "docs")
    texts |= reference.pages()
    settings = with_places(yaml.safe_load(SETTINGS.read_text(encoding="utf-8")))
    if missing := sorted(texts.keys() ^ set(navigated(settings["nav"]))):
        sys.exit(f"{', '.join(missing)}: in the navigation of {SETTINGS.name}, or a page, but not both")
    for page, text in texts.items():
        path = staged / "docs" / page
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    shutil.copy(STYLE, staged / "docs")
    (staged / "mkdocs.yml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", str(staged / "mkdocs.yml")]
    if failed := subprocess.run(command, check=False, cwd=staged).returncode:
        sys.exit(failed)
    shutil.move(staged / "site", site)
    shutil.rmtree(staged)


def pages_of_repository() -> dict[str, str]:
    """By file of the repository, the page that is made of it."""
    pages = {"README.md": "manual.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            source = path.relative_to(ROOT)
            if "results" in source.parts[1:] and path.name != "README.md":
                continue
            page = PurePosixPath(*source.parts[folder == "docs" :])
            if path.suffix == ".md":
                pages[source.as_posix()] = str(page.with_stem("index") if path.stem == "README" else page)
            elif source.parent.as_posix() == "examples" and (path.suffix == ".py" or path.is_dir()):
                pages[source.as_posix()] = str(page.with_suffix(".md"))
            elif path.suffix == ".ipynb":
                pages[source.as_posix()] = f"notebooks/{path.stem}.md"
    return pages


def text_of(source: str) -> str:
    """The Markdown that is made of a file."""
    path = ROOT / source
    if path.suffix == ".ipynb":
        return notebooks.as_markdown(path)
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    programs = sorted(path.iterdir()) if path.is_dir() else [path]
    parts = (
        f"{'' if program == path else f'## {program.name}'}\n\n"
        f"```{LANGUAGES[program.suffix]}\n{program.read_text(encoding='utf-8')}```"
        for program in programs
        if program.suffix in LANGUAGES
    )
    return "\n\n".join([f"# {source}", *parts]) + "\n"


def relinked(text: str, source: str, pages: dict[str, str], staged: Path) -> str:
    """The text of a page with links that fit the site; its pictures are copied there."""
    home = PurePosixPath(pages[source]).parent

    def picture(match: re.Match[str]) -> str:
        path = (ROOT / source).parent / match[0]
        staged.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, staged)
        return os.path.relpath(path.name, home)

    def link(match: re.Match[str]) -> str:
        path = (ROOT / source).parent / match["target"]
        if ":" in match["target"] or not path.exists():
            return match[0]  # zensical finds dead ones
        found, anchor = path.resolve().relative_to(ROOT).as_posix(), match["anchor"] or ""
        for file in (found, f"{found}/README.md"):
            if page := pages.get(file) or reference.PAGE_OF.get(file):
                return f"[{match['text']}]({os.path.relpath(page, home)}{anchor})"
        repository = address()
        return f"[{match['text']}]({repository}/blob/HEAD/{found}{anchor})" if repository else match["text"]

    return LINK.sub(link, PICTURE.sub(picture, text))


def address() -> str | None:
    """Where the repository is, as GitHub tells its workflows."""
    server, name = (os.environ.get(f"GITHUB_{key}") for key in ("SERVER_URL", "REPOSITORY"))
    return f"{server}/{name}" if server and name else None


def with_places(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with the folders of this build."""
    handler = settings["plugins"][1]["mkdocstrings"]["handlers"]["python"]
    handler["paths"] = [str(ROOT / "python")]
    handler["options"]["extensions"] = [str(Path(__file__).with_name("docstrings.py"))]
    if repository := address():  # no `repo_url`, of which a page would ask GitHub for its stars
        settings["extra"]["social"] = [{"icon": "fontawesome/brands/git-alt", "link": repository, "name": "Source"}]
    return settings


def navigated(entries: list[Any]) -> list[str]:
    """The pages of a navigation."""
    pages: list[str] = []
    for entry in entries:
        for part in entry.values() if isinstance(entry, dict) else [entry]:
            pages += navigated(part) if isinstance(part, list) else [part]
    return pages
