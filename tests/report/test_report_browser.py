"""The report in a real browser, without a network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Page, needs_browser, opened_page
from made_up_demo import made_up
from written_run import HOSTILE, make_scores, make_signed, write_full_run, write_scores, write_validation

from sts_fast.forecast.run import COMPARISON_FILE
from sts_fast.report import build_comparison_report, build_report

pytestmark = needs_browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, reports: dict[str, Path]) -> Iterator[Page]:
    """A tab, opened when the reports lie there, so that its time is that of the tests."""
    with opened_page(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A full report; one of 72 domains; one of hostile and endless names; one without any domain; the demo's."""
    written = {}
    for name, scores in (
        ("full", make_scores(9)), ("many", make_scores(72)), ("hostile", make_scores(len(HOSTILE))),
        ("bare", make_scores(0)),
    ):  # fmt: skip
        folder = tmp_path_factory.mktemp(name)
        if name == "hostile":
            for i, (domain, text) in enumerate(zip(scores["domains"], HOSTILE, strict=True)):
                domain["name"] = domain["name"] + text if i % 2 else text
                domain["controls"][text] = {text: 1.0}
            scores["model"]["name"] = scores["sae"]["source"] = "m" * 500
            scores["provenance"]["command"] = "c" * 3000
        if name == "bare":
            (folder / "scores.json").write_text(json.dumps(scores))
        else:
            write_full_run(folder, scores)
        written[name] = build_report(folder)
    folder = tmp_path_factory.mktemp("demo")
    demo = made_up([0.6, 0.4, -0.2] * 3)
    for trial in demo.trials:
        (folder / trial.train).mkdir()
        trial.validation.save(folder / trial.train)
    demo.save(folder)
    written["demo"] = folder / "report.html"
    folder = tmp_path_factory.mktemp("compared")
    compared = [make_scores(9, seed) for seed in range(3)]
    names = ["first", "second " * 20, "third"]
    write_scores(folder / names[0], make_scores(9))
    write_validation(folder / names[0], make_scores(9))
    written["compared"] = build_comparison(folder, names, compared)
    return written


def build_comparison(folder: Path, names: list[str], of_trains: list[dict[str, Any]]) -> Path:
    """The page of several made-up runs over the same domains."""
    for scores in of_trains:
        scores["signed"] = make_signed(scores)
    columns = {
        estimator: {
            name: {key: [domain["scores"][estimator][key] for domain in scores["domains"]] for key in ("value", "ci")}
            for name, scores in zip(names, of_trains, strict=True)
        }
        for estimator in of_trains[0]["domains"][0]["scores"]
    }
    document = {
        "trains": [{"name": name} for name in names], "domains": [domain["name"] for domain in of_trains[0]["domains"]],
        "scores": columns, "changes": None, "shared_features": [[0.5] * len(names)] * len(names),
    }  # fmt: skip
    (folder / COMPARISON_FILE).write_text(json.dumps(document))
    return build_comparison_report(folder)


@pytest.mark.parametrize("name", ["full", "many", "hostile", "bare", "demo", "compared"])
@pytest.mark.parametrize("width", [400, 1200])
def test_nothing_complains_and_nothing_overflows(page: Page, reports: dict[str, Path], name: str, width: int) -> None:
    page.show(reports[name], width=width, scheme="dark" if width == 400 else "light")
    for opened in (False, True):
        page.value(f"document.querySelectorAll('details').forEach(d => d.open = {str(opened).lower()})")
        assert page.value("document.documentElement.scrollWidth") <= width
        # Nothing that is drawn crosses the edge, but for tables in boxes that scroll by themselves.
        beyond = page.value(
            """[...document.querySelectorAll('body *')].filter(node => !node.closest('.scroll'))
            .map(node => [node.tagName, node.getBoundingClientRect(), node.textContent.slice(0, 40)])
            .filter(([, box]) => box.width && (box.right > innerWidth + 1 || box.left < -1))
            .map(([tag, box, text]) => `${tag} ${box.left} to ${box.right}: ${text}`)"""
        )
        assert beyond == []
    assert page.complaints() == []
    assert page.requests() == [reports[name].as_uri()] or set(page.requests()) <= {reports[name].as_uri(), "data:,"}


@pytest.mark.parametrize("width", [400, 1200])
@pytest.mark.parametrize("name", ["full", "demo", "compared"])
def test_labels_do_not_cover_each_other(page: Page, reports: dict[str, Path], name: str, width: int) -> None:
    page.show(reports[name], width=width)
    covered = page.value(
        """[...document.querySelectorAll('svg[role=img]')].flatMap(svg => {
          const texts = [...svg.querySelectorAll('text')]
            .map(text => [text.textContent, text.getBoundingClientRect()]).filter(([, box]) => box.width);
          return texts.flatMap(([a, p], i) => texts.slice(i + 1)
            .filter(([, q]) => p.left < q.right - 2 && q.left < p.right - 2)
            .filter(([, q]) => p.top < q.bottom - 4 && q.top < p.bottom - 4)
            .map(([b]) => `${a} | ${b}`));
        })"""
    )
    assert covered == []


@pytest.mark.parametrize("name", ["full", "many", "demo", "compared"])
def test_a_wide_page_shows_every_column(page: Page, reports: dict[str, Path], name: str) -> None:
    page.show(reports[name], width=1400)
    page.value("document.querySelectorAll('details').forEach(d => d.open = true)")
    cut = (
        "[...document.querySelectorAll('.scroll')].filter(s => s.scrollWidth > s.clientWidth + 1).map(s => s.ariaLabel)"
    )
    assert page.value(cut) == []
    # The outcome is above the ranking, on the first screens.
    if name == "full":
        top = "document.getElementById('{}').getBoundingClientRect().top"
        assert page.value(top.format("outcome")) < min(900, page.value(top.format("ranking")))


def test_light_and_dark(page: Page, reports: dict[str, Path]) -> None:
    colours = {}
    for scheme in ("light", "dark"):
        page.show(reports["full"], width=800, scheme=scheme)
        colours[scheme] = page.value(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        )
    assert colours == {
        "light": ["rgb(255, 255, 255)", "rgb(27, 31, 38)"],
        "dark": ["rgb(20, 23, 28)", "rgb(230, 233, 238)"],
    }


def test_the_keyboard_reaches_and_opens_everything(page: Page, reports: dict[str, Path]) -> None:
    page.show(reports["full"], width=1200)
    for _ in range(40):
        page.press("Tab")
        if page.value("document.activeElement.tagName") == "SUMMARY":
            break
    assert page.value("document.activeElement.textContent") == "Correlations in numbers"
    assert page.value("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.press("Enter")
    assert page.value("document.activeElement.parentElement.open") is True
    page.press("Tab")
    assert page.value("document.activeElement.className") == "scroll"


def test_figures_have_names(page: Page, reports: dict[str, Path]) -> None:
    page.show(reports["full"], width=1200)
    page.value("document.querySelectorAll('details').forEach(details => details.open = true)")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    images = [node for node in nodes if node.get("role", {}).get("value") in ("image", "img")]
    assert len(images) == page.value("document.querySelectorAll('svg[role=img]').length") == 12
    assert all(len(node["name"]["value"]) > 20 for node in images)


def test_the_page_prints(page: Page, reports: dict[str, Path]) -> None:
    page.show(reports["full"], width=800, scheme="dark", media="print")
    assert page.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.value("document.documentElement.scrollWidth") <= 800
    # Numbers behind a click are printed, but for what would fill pages.
    assert page.value("document.querySelector('#table-act').offsetHeight") > 100
    assert page.value("document.querySelector('#table-controls-by-domain').offsetHeight") == 0
    assert page.call("Page.printToPDF", printBackground=True)["data"]
