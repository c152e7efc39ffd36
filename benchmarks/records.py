"""results/<machine>.json: what was measured, where and when. A measurement made again replaces the one before."""

from __future__ import annotations

import json
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sts_fast.ops import _cpu

RESULTS = Path(__file__).parent / "results"
KIND = "ops"
KEYS = ("op", "d_in", "d_sae", "rows", "threads")


def machine(device: str) -> dict[str, Any]:
    """What the numbers depend on, and nothing that names this one machine."""
    return {
        "processor": processor() if device == "cpu" else torch.cuda.get_device_name(device),
        "cores": os.cpu_count(),
        "instruction_set": _cpu.instruction_set() if device == "cpu" else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: version(package) for package in ("sts-fast", "torch", "numpy", "sae-lens")},
    }


def processor() -> str:
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def path_of(about: dict[str, Any]) -> Path:
    """results/<machine>.json."""
    words = [about["processor"], about["instruction_set"] or "", f"{about['cores']} cores"]
    return RESULTS / (re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-") + ".json")


def load(path: Path) -> dict[str, Any]:
    """The document, or an empty one where there is no such file. Raises ValueError for a file of another kind."""
    if not path.exists():
        return {"kind": KIND, "machine": {}, "timings": [], "memory": []}
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if document.get("kind") != KIND:
        raise ValueError(f"{path} has no timings of ops: give another file to --results")
    return document


def add(path: Path, about: dict[str, Any], kind: str, record: dict[str, Any]) -> None:
    """Puts a record among the "timings" or "memory" of the file, which is replaced as a whole."""
    document = load(path)
    document["machine"] = about
    others = [other for other in document[kind] if any(other.get(key) != record.get(key) for key in KEYS)]
    document[kind] = sorted([*others, record], key=lambda each: [str(each["op"]), *(each.get(k, 0) for k in KEYS[1:])])
    write(path, document)


def write(path: Path, document: dict[str, Any]) -> None:
    """Replaces the file as a whole; numbers to five digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(rounded(document), indent=1) + "\n", encoding="utf-8")
    new.replace(path)


def rounded(value: Any) -> Any:
    """Numbers to five digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
