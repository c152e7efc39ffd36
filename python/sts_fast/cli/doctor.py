"""sts-fast doctor."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from typing import Annotated, Any

import numpy as np
from rich.markup import escape

from sts_fast._version import __version__
from sts_fast.cli.console import Table, out
from sts_fast.cli.options import AsJson
from sts_fast.data.options import Option
from sts_fast.errors import InputError
from sts_fast.ops import _cpu, cuda_kernels
from sts_fast.ops.encode import encode
from sts_fast.sae import SAE, load_sae
from sts_fast.sae.summary import summary


def doctor(
    sae: Annotated[str | None, Option("Also read this SAE and show what was understood.")] = None,
    layer: Annotated[int | None, Option("Read after this layer.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what is installed, which backend is used and what was understood of an SAE, and check the core."""
    facts: dict[str, Any] = {
        "sts-fast": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("numpy", "torch", "transformers", "safetensors", "pyarrow", "sae-lens")},
        "CPU core": f"{_cpu.instruction_set()}, {_cpu.get_num_threads()} threads",
        "CUDA core": cuda_kernels.missing_reason() or "ready",
        "self-check": _self_check(),
    }
    if sae is not None:
        facts |= summary(load_sae(sae, layer=layer))
    if as_json:
        import json

        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
        return
    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(f"[bold]{name}[/bold]", escape(str(value)))
    out.print(table)
    if not facts["self-check"].startswith("ok"):
        raise InputError("the core fails its self-check on this machine: please report this with the output above")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


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
