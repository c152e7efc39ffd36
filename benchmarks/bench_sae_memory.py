"""Memory that load_sae takes for a wide SAE: the peak of a process of its own, against the size of its encoder.

    python benchmarks/bench_sae_memory.py [--d-in 4096] [--d-sae 131072]

Writes SAEs of that size in several layouts, loads each in a fresh process, and prints the growth of its resident set
from before load_sae to its peak, mapped pages counted, once after loading and once after all of W_enc was read. An
SAE of an eighth of both widths is first checked value by value, and loaded by the measured process before, so that the
libraries' own pages are not counted; the large ones hold zeros.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

CHILD = """
import json, sys, time
import torch, sts_fast
from sts_fast.sae import detect, hub  # imported before memory is first measured

def resident(key):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))

source, dtype, small = sys.argv[1], sys.argv[2], sys.argv[3]
load = lambda place: sts_fast.load_sae(place, dtype=None if dtype == "file" else dtype, layer=3)
load(small)
open("/proc/self/clear_refs", "w").write("5")
before, started = resident("VmRSS"), time.perf_counter()
sae = load(source)
seconds, loaded = time.perf_counter() - started, resident("VmHWM") - before
if source == small:
    column = torch.arange(sae.d_sae, dtype=torch.float32) % 97
    for i in range(sae.d_in):
        assert torch.equal(sae.W_enc[i], (column + i % 13).to(sae.W_enc.dtype)), i
else:
    for part in sae.W_enc.split(4) if sae.W_enc.stride(1) == 1 else sae.W_enc.T.split(4):
        part.sum(dtype=torch.float64)
print(json.dumps({"loaded": loaded, "read": resident("VmHWM") - before, "encoder": sae.W_enc.nbytes, "s": seconds}))
"""


def encoder(d_in: int, d_sae: int, dtype: torch.dtype) -> torch.Tensor:
    """[d_in, d_sae] of numbers that tell their row and column."""
    column = torch.arange(d_sae, dtype=torch.float32) % 97
    return torch.stack([(column + i % 13).to(dtype) for i in range(d_in)])


def write(folder: Path, layout: str, d_in: int, d_sae: int, *, zeros: bool) -> Path:
    """zeros: the weights are, and take no room on disk where the layout allows it."""
    from safetensors.torch import save_file

    dtype = torch.bfloat16 if "bfloat16" in layout else torch.float32
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,)}
    if layout.startswith("SAELens"):
        config = {"architecture": "topk", "k": 50, "rescale_acts_by_decoder_norm": True, "d_in": d_in, "d_sae": d_sae}
        (folder / "cfg.json").write_text(json.dumps(config))
        weights = folder / "sae_weights.safetensors"
        if zeros:
            write_holes(weights, shapes, dtype)
        else:
            save_file(made_up(shapes, dtype), weights)
        return folder
    folder = folder / "SAE-Res-Model-W128K-L0_50"
    folder.mkdir()
    path = folder / "layer3.sae.pt"
    if zeros:
        torch.save({name: torch.zeros(shape[::-1], dtype=dtype) for name, shape in shapes.items()}, path)
    else:
        tensors = made_up(shapes, dtype)
        torch.save({**tensors, **{name: tensors[name].T.contiguous() for name in ("W_enc", "W_dec")}}, path)
    return path


def made_up(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    tensors = {name: torch.ones(shape, dtype=dtype) for name, shape in shapes.items()}
    return {**tensors, "W_enc": encoder(*shapes["W_enc"], dtype)}


def write_holes(path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    """A safetensors file of zeros that are a hole in the file."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": {4: "F32", 2: "BF16"}[dtype.itemsize], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def measured(source: Path, dtype: str, small: Path) -> dict[str, float]:
    """Memory and time of loading `source`; where that is the small one, its values are checked instead."""
    child = [sys.executable, "-c", CHILD, str(source), dtype, str(small)]
    ran = subprocess.run(child, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(ran.stderr)
    figures: dict[str, float] = json.loads(ran.stdout)
    return figures


def cases() -> Iterator[tuple[str, tuple[str, ...]]]:
    yield "SAELens safetensors float32", ("file", "bfloat16")
    yield "SAELens safetensors bfloat16", ("file", "float32")
    yield "Qwen-Scope .pt float32", ("file", "bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-in", type=int, default=4096)
    parser.add_argument("--d-sae", type=int, default=131072)
    parser.add_argument("--folder", type=Path, help="where to write the SAEs; a temporary folder by default")
    options = parser.parse_args()
    print(f"{'layout':30} {'held as':9} {'encoder':>9} {'loaded':>8} {'read':>8} {'seconds':>8}")
    for layout, dtypes in cases():
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            check, whole = Path(folder) / "check", Path(folder) / "whole"
            check.mkdir()
            whole.mkdir()
            small = write(check, layout, options.d_in // 8, options.d_sae // 8, zeros=False)
            for dtype in dtypes:
                measured(small, dtype, small)
            source = write(whole, layout, options.d_in, options.d_sae, zeros=True)
            for dtype in dtypes:
                figures = measured(source, dtype, small)
                size = figures["encoder"]
                print(
                    f"{layout:30} {dtype:9} {size / 1e6:6.0f} MB {figures['loaded'] / size:7.2f}x "
                    f"{figures['read'] / size:7.2f}x {figures['s']:8.1f}"
                )


if __name__ == "__main__":
    main()
