"""sts-fast doctor."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from typing import Annotated, Any

import numpy as np
from rich.markup import escape

from sts_fast import files
from sts_fast._version import __version__
from sts_fast.cli.arguments import Places
from sts_fast.cli.console import Table, out
from sts_fast.cli.forecast import How, Sources, Tuned
from sts_fast.cli.forecast import outlook as forecast_outlook
from sts_fast.cli.options import AsJson, Demos, Fixed
from sts_fast.cli.tables import print_outlook
from sts_fast.data.options import Option
from sts_fast.errors import InputError
from sts_fast.forecast.cost import Outlook
from sts_fast.forecast.options import Settings
from sts_fast.ops import _cpu
from sts_fast.ops.devices import device_named, name_of
from sts_fast.ops.encode import encode
from sts_fast.ops.verified import verdict
from sts_fast.sae import SAE
from sts_fast.sae.summary import summary


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A forecast whose inputs are looked at; all of it, an SAE alone, or nothing."""

    model: Annotated[str | None, Option("Also tell what a forecast with this model would read, and its cost.")] = None
    sae: Annotated[list[str] | None, Option("Also read this SAE and show what was understood; repeatable.")] = None
    train: Annotated[list[str] | None, Option("Training set of that forecast, as for score.")] = None
    domains: Annotated[list[str] | None, Option("Domains of that forecast, as for score.")] = None
    demos: Demos = None
    tuned: Tuned = None


def doctor(
    planned: Planned,
    settings: Settings,
    places: Places,
    how: Annotated[How, Fixed(dry_run=True)],
    as_json: AsJson = False,
) -> None:
    """Show what is installed, and what is understood of an SAE or of everything that a forecast reads; run nothing."""
    facts: dict[str, Any] = {
        "sts-fast": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("numpy", "torch", "transformers", "safetensors", "pyarrow", "sae-lens")},
        "CPU core": f"{_cpu.instruction_set()}, {_cpu.get_num_threads()} threads",
        "GPU": _gpu(),
        "self-check": _self_check(),
    }
    saes = places.load(planned.sae or [], settings.sae_dtype)
    outlook = _outlook(planned, settings, places, how)
    if as_json:
        of_saes: dict[str, Any] = summary(saes[0]) if len(saes) == 1 else {"SAEs": [summary(sae) for sae in saes]}
        forecast = {} if outlook is None else {"forecast": outlook.to_dict()}
        sys.stdout.write(files.to_json({**facts, **(of_saes if saes else {}), **forecast}))
        return
    for of in (facts, *map(summary, saes)):
        table = Table(show_header=False, box=None)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in of.items():
            table.add_row(f"[bold]{name}[/bold]", escape(str(value)))
        out.print(table)
    if not facts["self-check"].startswith("ok"):
        raise InputError("the core fails its self-check on this machine: please report this with the output above")
    if outlook is not None:
        out.print()
        print_outlook(outlook, as_json=False)


def _outlook(planned: Planned, settings: Settings, places: Places, how: How) -> Outlook | None:
    """The outlook that score --dry-run prints; None where no forecast was named."""
    if planned.model is None and not planned.train and not planned.domains:
        return None
    for option, given in (("model", planned.model), ("sae", planned.sae), ("train", planned.train)):
        if not given:
            raise InputError(f"to tell what a forecast would read, give --{option} too")
    sources = Sources(
        model=planned.model, sae=planned.sae or [], train=planned.train or [], domains=planned.domains or [],
        demos=planned.demos, tuned=planned.tuned,
    )  # fmt: skip
    return forecast_outlook(sources, {"train": sources.train}, settings, places, how)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _gpu() -> str:
    """The device that --device auto takes, and what computes features there."""
    device = device_named("auto")
    if device.type == "cpu":
        return f"none that torch {_version('torch')} sees"
    if device.type != "cuda":
        return f"{name_of(device)}, features by torch"
    found = verdict(device)
    by = "torch" if found.loop is None else f"our kernels ({found.loop} main loop)"
    return f"{name_of(device)}, features by {by}{f': {found.why}' if found.why else ''}"


def _self_check() -> str:
    """Encodes random activations and compares with the equation in float64."""
    rng = np.random.default_rng(0)
    W_enc, b_enc = rng.normal(size=(48, 200)).astype(np.float32), rng.normal(size=200).astype(np.float32)
    acts = rng.normal(size=(33, 48)).astype(np.float32)
    sae = SAE(architecture="standard", W_enc=W_enc, b_enc=b_enc, b_dec=np.zeros(48, np.float32))
    features = encode(sae, acts)
    dense = np.zeros((33, 200))
    dense[np.repeat(np.arange(33), np.diff(features.indptr)), features.indices] = features.values
    expected = np.maximum(acts.astype(np.float64) @ W_enc.astype(np.float64) + b_enc, 0)
    difference = float(np.abs(dense - expected).max() / expected.max())
    return f"{'ok' if difference < 1e-5 else 'FAILED'} (largest relative difference from float64 {difference:.1e})"
