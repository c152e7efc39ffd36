"""Memory that load_sae takes for a wide SAE: the peak of a process of its own, against the size of its encoder.

    python benchmarks/bench_sae_memory.py [--d-in 4096] [--d-sae 131072]

Writes SAEs of that size in several layouts, loads each in a fresh process, and prints the growth of its resident set
from before load_sae to its peak, mapped pages counted, once after loading and once after all of W_enc was read. A
quarter of the width is first checked value by value.
"""

from __future__ import annotations

import argparse
import json
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

source, dtype, check = sys.argv[1], sys.argv[2], sys.argv[3] == "check"
load = lambda: sts_fast.load_sae(source, dtype=None if dtype == "file" else dtype, layer=3)
open("/proc/self/clear_refs", "w").write("5")
before, started = resident("VmRSS"), time.perf_counter()
sae = load()
seconds, loaded = time.perf_counter() - started, resident("VmHWM") - before
if check:
    column = torch.arange(sae.d_sae, dtype=torch.float32) % 97
    for i in range(sae.d_in):
        assert torch.equal(sae.W_enc[i], (column + i % 13).to(sae.W_enc.dtype)), i
else:
    for part in sae.W_enc.split(64) if sae.W_enc.stride(1) == 1 else sae.W_enc.T.split(64):
        part.sum(dtype=torch.float64)
print(json.dumps({"loaded": loaded, "read": resident("VmHWM") - before, "encoder": sae.W_enc.nbytes, "s": seconds}))
"""


def encoder(d_in: int, d_sae: int, dtype: torch.dtype) -> torch.Tensor:
    """[d_in, d_sae] of numbers that tell their row and column."""
    W = torch.empty(d_in, d_sae, dtype=dtype)
    column = torch.arange(d_sae, dtype=torch.float32) % 97
    for i in range(d_in):
        W[i] = (column + i % 13).to(dtype)
    return W


def write(folder: Path, layout: str, d_in: int, d_sae: int) -> Path:
    from safetensors.torch import save_file

    dtype = torch.bfloat16 if "bfloat16" in layout else torch.float32
    W_enc, b_enc, b_dec = encoder(d_in, d_sae, dtype), torch.zeros(d_sae, dtype=dtype), torch.zeros(d_in, dtype=dtype)
    W_dec = torch.ones(d_sae, d_in, dtype=dtype)
    if layout.startswith("SAELens"):
        config = {"architecture": "topk", "k": 50, "rescale_acts_by_decoder_norm": True, "d_in": d_in, "d_sae": d_sae}
        (folder / "cfg.json").write_text(json.dumps(config))
        save_file({"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}, folder / "sae_weights.safetensors")
        return folder
    folder = folder / "SAE-Res-Model-W128K-L0_50"
    folder.mkdir()
    state = {"W_enc": W_enc.T.contiguous(), "b_enc": b_enc, "b_dec": b_dec}
    del W_enc
    state["W_dec"] = W_dec.T.contiguous()
    torch.save(state, folder / "layer3.sae.pt")
    return folder / "layer3.sae.pt"


def measured(source: Path, dtype: str, *, check: bool) -> dict[str, float]:
    child = [sys.executable, "-c", CHILD, str(source), dtype, "check" if check else "time"]
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
            (Path(folder) / "check").mkdir()
            (Path(folder) / "whole").mkdir()
            small = write(Path(folder) / "check", layout, options.d_in // 2, options.d_sae // 2)
            for dtype in dtypes:
                measured(small, dtype, check=True)
            small = Path(folder) / "check"
            for path in sorted(small.rglob("*"), reverse=True):
                path.unlink() if path.is_file() else path.rmdir()
            source = write(Path(folder) / "whole", layout, options.d_in, options.d_sae)
            for dtype in dtypes:
                figures = measured(source, dtype, check=False)
                size = figures["encoder"]
                print(
                    f"{layout:30} {dtype:9} {size / 1e6:6.0f} MB {figures['loaded'] / size:7.2f}x "
                    f"{figures['read'] / size:7.2f}x {figures['s']:8.1f}"
                )


if __name__ == "__main__":
    main()
