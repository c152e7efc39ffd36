"""The report in a real browser, driven through the DevTools protocol over a pair of pipes, without a network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_up_demo import made_up
from written_run import HOSTILE, make_scores, make_signed, write_full_run, write_scores, write_validation

from sts_fast.forecast.run import COMPARISON_FILE
from sts_fast.report import build_comparison_report, build_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "chrome-headless-shell")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)
TIMEOUT = 120.0
# Chromium reads commands from descriptor 3 and writes answers to descriptor 4.
START = """
import fcntl, os, sys
commands, answers = (fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3])
os.dup2(commands, 3)
os.dup2(answers, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update",
    "--disable-background-networking", "--disable-sync", "--disable-dev-shm-usage", "--disable-extensions",
    "--host-resolver-rules=MAP * ~NOTFOUND", "--remote-debugging-pipe",
]  # fmt: skip

pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser on PATH: {', '.join(BROWSERS)}")


class Page:
    """One tab of a headless browser. events: (method, params) of everything it reported."""

    def __init__(self, commands: int, answers: int) -> None:
        self.commands, self.answers = commands, os.fdopen(answers, "rb")
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.n_sent, self.rest = 0, b""
        self.session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)

    def call(self, method: str, **params: Any) -> Any:
        self.n_sent += 1
        message = {"id": self.n_sent, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self.n_sent:
            self.events.append((answer.get("method", ""), answer.get("params", {})))
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            block = self.answers.read1(1 << 16)  # type: ignore[attr-defined]
            assert block, "the browser has gone, or took too long"
            self.rest += block
        message, _, self.rest = self.rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def value(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def show(self, path: Path, *, width: int, scheme: str = "light", media: str = "") -> None:
        self.events.clear()
        self.call(
            "Emulation.setEmulatedMedia", media=media, features=[{"name": "prefers-color-scheme", "value": scheme}]
        )
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Page.navigate", url=path.as_uri())
        while not any(method == "Page.loadEventFired" for method, _ in self.events):
            message = self._next()
            self.events.append((message.get("method", ""), message.get("params", {})))
        # Two frames, so that whatever is to be laid out or complained about has been.
        self.value("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def press(self, key: str) -> None:
        text = "\r" if key == "Enter" else ""
        code = {"Tab": 9, "Enter": 13}[key]
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, text=text)

    def complaints(self) -> list[Any]:
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [params for method, params in self.events if method in kinds]

    def requests(self) -> list[str]:
        return [params["request"]["url"] for method, params in self.events if method == "Network.requestWillBeSent"]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, reports: dict[str, Path]) -> Iterator[Page]:
    """A tab, opened when the reports lie there, so that its time is that of the tests."""
    assert BROWSER is not None
    to_browser, from_browser = os.pipe(), os.pipe()
    profile = tmp_path_factory.mktemp("profile")
    command = [sys.executable, "-c", START, str(to_browser[0]), str(from_browser[1])]
    process = subprocess.Popen(
        [*command, BROWSER, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        pass_fds=(to_browser[0], from_browser[1]),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_browser[0])
    os.close(from_browser[1])
    watchdog = threading.Timer(TIMEOUT, process.kill)
    watchdog.start()
    opened = None
    try:
        opened = Page(to_browser[1], from_browser[0])
        yield opened
    finally:
        os.close(to_browser[1])  # the browser leaves when nobody can send commands any more
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        watchdog.cancel()
        if opened is not None:
            opened.answers.close()


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
