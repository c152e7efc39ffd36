from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from html_tree import read_page, rows_of
from written_run import HOSTILE, Report, make_scores, make_signed, write_firings, write_scores, write_validation

from sts_fast.report import build_report


def test_the_page_needs_nothing_from_outside(full: Report) -> None:
    _, page, path = full
    for node in page.walk():
        for key, value in node.attrs.items():
            if re.search("https?:|//", value):
                assert (node.tag, key) == ("a", "href"), f"<{node.tag} {key}={value}>"
        assert node.tag not in ("script", "iframe", "object", "embed", "img", "image", "use", "base", "form")
    style = page.one("style").text()
    assert not re.search("@import|url\\(|https?:|expression", style)
    [policy] = [m for m in page.all("meta") if m.attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy.attrs["content"].startswith("default-src 'none'")
    assert path.stat().st_size < 1_000_000


def test_the_page_is_built_for_everyone(full: Report) -> None:
    _, page, _ = full
    assert page.one("html").attrs["lang"] == "en"
    ids = [node.attrs["id"] for node in page.walk() if "id" in node.attrs]
    assert len(ids) == len(set(ids))
    by_id = {node.attrs["id"]: node for node in page.walk() if "id" in node.attrs}
    outer = page.all("svg", role="img")
    assert len(outer) == 12
    for svg in outer:
        assert svg.attrs["role"] == "img"
        title, description = (by_id[name] for name in svg.attrs["aria-labelledby"].split())
        assert (title.tag, description.tag) == ("title", "desc")
        assert len(title.text()) > 10
        assert len(description.text()) > 20
    for table in page.all("table"):
        assert table.one("caption").text()
        assert all(th.attrs["scope"] in ("row", "col") for th in table.all("th"))
        assert table.all("th")
    for region in page.all("div", class_="scroll"):
        assert region.attrs["tabindex"] == "0"
        assert region.attrs["role"] == "region"
        assert region.attrs["aria-label"]
    levels = [int(node.tag[1]) for node in page.walk() if re.fullmatch("h[1-6]", node.tag)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    for link in page.one("nav").all("a"):
        assert link.attrs["href"].removeprefix("#") in by_id
    for node in page.all("section"):
        assert by_id[node.attrs["aria-labelledby"]].tag == "h2"


# What people see of linear RGB: all of it, or without one kind of cone (Machado, Oliveira and Fernandes 2009).
SEEN = {
    "all": np.eye(3),
    "no red": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "no green": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "no blue": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colour: str) -> np.ndarray:
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of linear RGB, where distances are about as large as differences look."""
    t = TO_XYZ @ np.clip(rgb, 0, 1) / TO_XYZ.sum(axis=1)
    x, y, z = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def shades_of(style: str, colours: dict[str, str], kind: str) -> list[str]:
    """A grid's three colours of a kind, as color-mix makes them."""
    found = []
    for depth in (1, 2, 3):
        [share] = re.findall(rf"\.{kind}{depth}[^{{}}]*{{ background: color-mix\(in srgb, var\(--shade\) (\d+)%", style)
        pairs = ((int(colours[name][i : i + 2], 16) for name in (kind, "page")) for i in (1, 3, 5))
        found.append("#" + "".join(f"{round((int(share) * a + (100 - int(share)) * b) / 100):02x}" for a, b in pairs))
    return found


def luminance(colour: str) -> float:
    """Relative luminance as in WCAG 2.1."""
    return float(TO_XYZ[1] @ linear(colour))


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(full: Report, scheme: str) -> None:
    style = full[1].one("style").text()
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[:2]
    colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6});", light))
    if scheme == "dark":
        other = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6});", dark))
        assert other.keys() == colours.keys()
        colours = other
    for text, ground in (
        ("text", "page"), ("muted", "page"), ("accent", "page"), ("text", "panel"), ("muted", "panel"),
        ("warn-text", "warn-page"), ("mark-text", "mark-page"),
    ):  # fmt: skip
        assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    # What is drawn, rather than written, needs 3:1 against what it lies on.
    for drawn, ground in (
        ("accent", "page"), ("control", "page"), ("worse", "page"), ("muted", "page"),
    ):  # fmt: skip
        assert contrast(colours[drawn], colours[ground]) >= 3, (drawn, ground)
    shades = {kind: shades_of(style, colours, kind) for kind in ("better", "worse", "size")}
    for shade in itertools.chain(*shades.values()):
        assert contrast(colours["text"], shade) >= 4.5
    # Directions and depths are apart for everyone.
    for seen in SEEN.values():
        better, worse, size = ([lab(seen @ linear(shade)) for shade in shades[kind]] for kind in shades)
        for depth, least in enumerate((8, 15, 25)):
            assert np.linalg.norm(better[depth] - worse[depth]) > least
        for depths in (better, worse, size):
            for lighter, deeper in itertools.pairwise([lab(seen @ linear(colours["page"])), *depths]):
                assert np.linalg.norm(lighter - deeper) > 5
    # Every colour is one of these: no scheme is forgotten anywhere.
    rest = re.sub(r":root \{.*?\}", "", style, flags=re.DOTALL)
    assert not re.findall(r"#[0-9a-fA-F]{3,8}\b|rgba?\(|hsla?\(", rest)


def test_hostile_text_is_shown_as_text(tmp_path: Path) -> None:
    scores = make_scores(len(HOSTILE))
    for domain, name in zip(scores["domains"], HOSTILE, strict=True):
        domain["name"] = name
    bad = HOSTILE[0]
    scores["model"]["name"] = scores["sae"]["hook_name"] = HOSTILE[1]
    scores["sae"]["source"] = HOSTILE[3]
    scores["provenance"]["command"] = HOSTILE[4]
    scores["provenance"]["versions"][bad] = HOSTILE[1]
    scores["provenance"]["inputs"][0]["path"] = bad
    for feature, text in zip(scores["shifted_features"], HOSTILE, strict=False):
        feature |= {"promoted_tokens": [text], "label": text, "neuronpedia": "javascript:alert(1)"}
    scores["shifted_features"][0]["neuronpedia"] = 'https://x.org/"><script>'
    scores["domains"][0]["controls"][bad] = {HOSTILE[1]: 1.0}
    scores["warnings"] = HOSTILE
    scores["signed"] = make_signed(scores)
    for feature, text in zip(scores["signed"]["top_features"], HOSTILE, strict=False):
        feature |= {"promoted_tokens": [text], "label": text, "neuronpedia": "javascript:alert(1)"}
    write_scores(tmp_path, scores)
    write_firings(tmp_path, scores, text=HOSTILE[1])
    write_validation(tmp_path, scores)
    page = read_page(build_report(tmp_path))
    allowed = {
        "html", "head", "meta", "link", "title", "style", "body", "header", "main", "nav", "section", "h1", "h2", "h3",
        "p", "strong", "ul", "ol", "li", "a", "dl", "div", "dt", "dd", "details", "summary", "figure", "figcaption",
        "table", "caption", "thead", "tbody", "tr", "th", "td", "data", "bdi", "span", "code", "pre", "mark", "svg",
        "desc", "g", "sub",
        "rect", "line", "circle", "text", "polyline",
    }  # fmt: skip
    assert {node.tag for node in page.walk()} <= allowed
    for node in page.walk():
        assert not any(key.startswith("on") or key in ("style", "src") for key in node.attrs), node
        assert node.tag == "a" or "href" not in node.attrs or node.tag == "link"
    links = [node.attrs["href"] for node in page.all("a") if not node.attrs["href"].startswith("#")]
    assert links == ['https://x.org/"><script>', "https://arxiv.org/abs/2603.02908"]
    for cells in rows_of(page.one("table", id="table-act")):
        assert cells[1].text() in HOSTILE
    assert [li.text() for li in page.one("section", class_="warnings").all("li")][: len(HOSTILE)] == HOSTILE
    assert page.one("pre").text() == HOSTILE[4]
    assert len(page.all("title")[0].text()) < 300


def test_characters_that_html_cannot_hold(tmp_path: Path) -> None:
    scores = make_scores(5)
    scores["domains"][0]["name"] = "nul \0 bell \a half \ud800 lines\r\n and tabs\t"
    text = build_report(write_scores(tmp_path, scores)).read_text(encoding="utf-8")
    assert "nul ␀ bell ␇ half ? lines" in text
    assert "\0" not in text
    read_page(tmp_path / "report.html")
