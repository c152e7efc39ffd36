"""Tables of the measurements, for the terminal and between the markers of README.md."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import records

README, FRONT_PAGE = records.RESULTS.parent / "README.md", records.RESULTS.parents[1] / "README.md"
TITLES = {
    "shift": "Paired shift",
    "correlate": "Moments and cross-moments with K targets",
    "encode": "Sparse encode behind a threshold",
    "subset": "100 columns",
    "topk": "TopK encode, k = 64",
    "topk subset": "TopK encode of 100 columns",
}
HEADLINE = {  # op: the peers on the front page
    "shift": ["product", "authors' way", "torch.compile"],
    "encode": ["product"],
    "topk": ["product", "product, then torch.topk"],
    "subset": ["sts_fast, all columns", "torch, columns gathered before"],
}
BUSY = 0.2
OURS, PRODUCT = "sts_fast", "product"

Documents = list[tuple[Path, dict[str, Any]]]


def median(timing: dict[str, Any], contestant: str, field: str = "seconds") -> float:
    return float(statistics.median(timing["contestants"][contestant][field]))


def ratio(timing: dict[str, Any], contestant: str, other: str, field: str = "seconds") -> float:
    """Median over the rounds of the time of one contestant in that of the other, which ran beside it."""
    contestants = timing["contestants"]
    rounds = zip(contestants[contestant][field], contestants[other][field], strict=True)
    return float(statistics.median(a / b for a, b in rounds))


def lines_of(kind: str, record: dict[str, Any]) -> str:
    """One measurement for the terminal."""
    title = f"{record['op']}  {record['d_in']}x{record['d_sae']}, {record['rows']} rows, {record['threads']} threads"
    if kind == "memory":
        return "\n".join(
            [title, *(f"  {name:36}{extra / 1e6:10.1f} MB" for name, extra in record["extra_bytes"].items())]
        )
    first = next(iter(record["contestants"]))
    peak = f"of a measured peak of {record['peak_gflops']:.0f}" if record["peak_gflops"] else ""
    lines = [
        f"{title}; {others(record)}",
        f"  {'':36}{'ms':>10}{'CPU ms':>10}{'ratio':>8}{'by CPU':>8}{'error':>9}",
    ]
    for name, timed in record["contestants"].items():
        clock, cpu = median(record, name), median(record, name, "cpu_seconds")
        by_clock, by_cpu = ratio(record, name, first), ratio(record, name, first, "cpu_seconds")
        parts = {part: statistics.median(laps) * 1e3 for part, laps in timed["parts"].items()}
        lines.append(
            f"  {name:36}{clock * 1e3:10.2f}{cpu * 1e3:10.2f}{by_clock:8.3f}{by_cpu:8.3f}{timed['error']:9.0e}"
            + (f"  {', '.join(f'{part} {ms:.1f}' for part, ms in parts.items())}" if parts else "")
        )
    lines.append(f"  {gflops(record, first):.1f} GFLOP/s {peak}")
    return "\n".join(lines)


def gflops(timing: dict[str, Any], contestant: str) -> float:
    return float(timing["flops"] / median(timing, contestant) / 1e9)


def others(timing: dict[str, Any]) -> str:
    return f"other work took {timing['others']:.0%} of the processors"


def write() -> None:
    """Puts the tables into the README beside this file, and the headline into the one of the repository."""
    for page, text in pages():
        page.write_text(between_markers(page.read_text(encoding="utf-8"), text), encoding="utf-8")


def pages() -> list[tuple[Path, str]]:
    documents = [(path, records.load(path)) for path in sorted(records.RESULTS.glob("*.json")) if is_ours(path)]
    return [(README, tables(documents)), (FRONT_PAGE, headline(documents))]


def is_ours(path: Path) -> bool:
    return bool(json.loads(path.read_text(encoding="utf-8")).get("kind") == records.KIND)


def between_markers(page: str, text: str, what: str = "measured") -> str:
    """The page with the text between its markers. Raises ValueError where it has none."""
    new, n = re.subn(
        rf"(<!-- {what}[^>]*-->\n).*?(<!-- end of what was {what} -->)",
        lambda m: m[1] + text + m[2],
        page,
        flags=re.S,
    )
    if n != 1:
        raise ValueError(
            f"the page has no place for the tables: '<!-- {what} -->' and '<!-- end of what was {what} -->'"
        )
    return new


def tables(documents: Documents) -> str:
    text = ""
    for path, document in documents:
        about = document["machine"]
        versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "sae-lens", "numpy", "python"))
        text += f"\n## {about['processor']}, {about['cores']} cores, {about['instruction_set']}\n\n"
        text += f"{versions}; [all rounds and the peers' time in parts](results/{path.name}).\n"
        for op, title in TITLES.items():
            timings = [timing for timing in document["timings"] if timing["op"] == op]
            if timings:
                text += f"\n### {title}\n\n{conditions(timings)}\n\n{timing_table(timings)}{parts_table(timings)}"
        if document["memory"]:
            text += "\n### Peak extra memory\n\n`python -m benchmarks --measure memory`, in MB.\n"
        for op, title in TITLES.items():
            measured = [record for record in document["memory"] if record["op"] == op]
            if measured:
                text += f"\n{title}:\n\n{memory_table(measured)}"
    return text


def conditions(timings: list[dict[str, Any]]) -> str:
    busiest = max(timing["others"] for timing in timings)
    days = sorted({timing["date"][:10] for timing in timings})
    return (
        f"`python -m benchmarks --measure time --ops '{timings[0]['op']}'`, {' and '.join(days)}; "
        f"other work took up to {busiest:.0%} of the processors meanwhile"
        + (", so that only processor time says something." if busiest > BUSY else ".")
    )


def timing_table(timings: list[dict[str, Any]]) -> str:
    """Our time in bare products, and what each peer takes in times of ours; each by the clock / by processor time."""
    names = list(timings[0]["contestants"])
    ours = [name for name in names if name.startswith(OURS)]
    floor = [PRODUCT] if PRODUCT in names else []
    peers = [name for name in names if name not in ours + floor]
    if not floor:
        peers = ours[1:] + peers
    head = ["d_in × d_sae", "rows", "threads", "ms", "GFLOP/s", "of the FMA peak", "speed-up"]
    head += [f"{name} / {PRODUCT}" for name in ours for _ in floor]
    head += [f"{peer} / {partner(peer, ours)}" for peer in peers]
    rows = []
    for timing in timings:
        row = [*size_of(timing), f"{median(timing, ours[0]) * 1e3:.4g}", f"{gflops(timing, ours[0]):.0f}"]
        row += [share_of_peak(timing, ours[0]), scaling(timing, timings, ours[0])]
        row += [both(timing, name, PRODUCT) for name in ours for _ in floor]
        row += [both(timing, peer, partner(peer, ours)) for peer in peers]
        rows.append(row)
    return markdown(head, rows)


def partner(peer: str, ours: list[str]) -> str:
    """Which of ours does the same as a peer: the one of the same K, else the first."""
    return next((name for name in ours if name != peer and name.endswith(peer.rpartition(", ")[2])), ours[0])


def both(timing: dict[str, Any], contestant: str, other: str) -> str:
    return f"{times(ratio(timing, contestant, other))} / {times(ratio(timing, contestant, other, 'cpu_seconds'))}"


def share_of_peak(timing: dict[str, Any], contestant: str) -> str:
    """By the clock / by processor time, of multiply-adds in registers on as many threads."""
    if not timing["peak_gflops"]:
        return ""
    least = timing["flops"] / timing["peak_gflops"] / 1e9
    by_cpu = least * timing["threads"] / median(timing, contestant, "cpu_seconds")
    return f"{least / median(timing, contestant):.0%} / {by_cpu:.0%}"


def scaling(timing: dict[str, Any], timings: list[dict[str, Any]], contestant: str) -> str:
    """How many times faster than on one thread, by the clock; the two were timed one after the other."""
    same = [each for each in timings if size_of(each)[:2] == size_of(timing)[:2] and each["threads"] == 1]
    if timing["threads"] == 1 or not same:
        return ""
    return f"{median(same[0], contestant) / median(timing, contestant):.2f}"


def size_of(record: dict[str, Any]) -> list[str]:
    size = [f"{record['d_in']:,} × {record['d_sae']:,}", f"{record['rows']:,}"]
    return [*size, str(record["threads"])]


def parts_table(timings: list[dict[str, Any]]) -> str:
    """Milliseconds of each part of the peers' work; the first of the sizes alone would hide how they grow."""
    rows = []
    for timing in timings:
        for name, timed in timing["contestants"].items():
            parts = [f"{part} {statistics.median(laps) * 1e3:.4g}" for part, laps in timed["parts"].items()]
            if len(parts) > 1:
                rows.append([*size_of(timing), name, ", ".join(parts)])
    if not rows:
        return ""
    table = markdown(["d_in × d_sae", "rows", "threads", "peer", "ms of each part"], rows)
    return f"\n<details><summary>The peers' time in parts</summary>\n\n{table}\n</details>\n"


def memory_table(measured: list[dict[str, Any]]) -> str:
    names = list(measured[0]["extra_bytes"])
    rows = [[*size_of(record), *(f"{record['extra_bytes'][name] / 1e6:,.1f}" for name in names)] for record in measured]
    return markdown(["d_in × d_sae", "rows", "threads", *names], rows)


def headline(documents: Documents) -> str:
    """The ratios of the first machine that has them, on one thread: other work takes no processor time away there."""
    for _, document in documents:
        timings = [timing for timing in document["timings"] if timing["threads"] == 1]
        if any(timing["op"] == "shift" for timing in timings):
            about = document["machine"]
            n_sizes = len({(timing["d_in"], timing["d_sae"]) for timing in timings})
            return (
                f"\nMeasured on one thread of an {about['processor']} ({about['instruction_set']}) by "
                f"`python -m benchmarks`, over {n_sizes} sizes of SAE\n"
                "([each, with its memory and on more threads](benchmarks/README.md)):\n\n"
                f"{headline_table(timings)}\n"
            )
    return ""


def headline_table(timings: list[dict[str, Any]]) -> str:
    rows = []
    for op, peers in HEADLINE.items():
        of_op = [timing for timing in timings if timing["op"] == op]
        for peer in peers if of_op else []:
            ratios = [ratio(timing, peer, OURS, "cpu_seconds") for timing in of_op]
            rows.append([TITLES[op], peer, " to ".join(dict.fromkeys((times(min(ratios)), times(max(ratios)))))])
    return markdown(["sts_fast", "beside", "processor time, in times of ours"], rows)


def times(number: float) -> str:
    return f"{number:.2f}" if number < 10 else f"{number:.0f}"


def markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, ["---"] * len(head), *rows])
