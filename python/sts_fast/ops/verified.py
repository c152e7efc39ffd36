"""Our CUDA kernels, held against torch on a device before they serve there for the first time.

    python -m sts_fast.ops.verified cuda:0      what the check does, in a process of its own: a line of JSON per case

The verdict is kept for a driver, device and build. STS_KERNELS=trust leaves the check out, check makes it again, and
off gives every GPU to the torch backend.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from sts_fast import files
from sts_fast.errors import InputError, one_line
from sts_fast.ops import cuda, cuda_kernels, torch_backend
from sts_fast.ops.device_encoder import PRECISIONS, Encoder, prepare_weights
from sts_fast.ops.devices import device_named, name_of

if TYPE_CHECKING:
    import torch

# Seconds until the process has loaded torch and found the device, and from then on to each next case.
START_SECONDS, CASE_SECONDS = 180, 60
N_TOKENS, D_IN, D_SAE = 300, 70, 650  # tails of every tile, two clusters of features and of tokens
TOP_K = 20
ACTIVATIONS = ("relu", "jumprelu", "gated", "topk", "abstopk")


@dataclass(frozen=True)
class Verdict:
    """Which main loop of the kernels serves a device: "automatic", "sm80", or None for none; why not the first one."""

    loop: str | None
    why: str = ""


@cache
def verdict(device: torch.device) -> Verdict:
    """Of the kernels on a CUDA device; checks them where that is not known, and warns once where they differ.

    Raises InputError for an unknown STS_KERNELS.
    """
    mode = os.environ.get("STS_KERNELS", "")
    if mode not in ("", "trust", "check", "off"):
        raise InputError(f"STS_KERNELS is trust, check or off, not '{mode}'")
    if (reason := cuda_kernels.missing_reason()) is not None:
        return Verdict(None, reason)
    if mode in ("trust", "off"):
        return Verdict("automatic") if mode == "trust" else Verdict(None, "STS_KERNELS=off")
    kept = _kept_at(device)
    found = None if mode == "check" else _read(kept)
    if found is None:
        found = checked([sys.executable, "-m", "sts_fast.ops.verified", str(device)])
        if not _is_passing(found.why):
            _write(kept, found)
    if found.why:
        served = "torch" if found.loop is None else f"their {found.loop} loop"
        warnings.warn(
            f"sts-fast's CUDA kernels fail their check on {name_of(device)}, {served} computes instead: {found.why}. "
            "Please report this with what sts-fast doctor prints",
            RuntimeWarning,
            stacklevel=2,
        )
    cuda.main_loops[device] = found.loop or "automatic"
    return found


def checked(command: Sequence[str]) -> Verdict:
    """What a process that prints `cases` finds; it and its children are killed where it hangs."""
    why = ""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        said: list[str] = []
        errors = threading.Thread(target=lambda out: said.extend(out), args=[process.stderr], daemon=True)
        errors.start()
        at = "its start"
        try:
            for line in _lines(process.stdout):
                found = json.loads(line)
                at = found["case"]
                if "verdict" in found:
                    return Verdict(**found["verdict"])
            process.wait(CASE_SECONDS)
            errors.join(1)
            last = next((line for line in reversed(said) if line.strip()), f"exit code {process.returncode}")
            why = f"their check failed after {at}: {one_line(last)}"
        except (queue.Empty, subprocess.TimeoutExpired):
            why = f"their check did not go on after {at}"
        except ValueError:
            why = f"their check printed what is no JSON after {at}"
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
    return Verdict(None, why)


def cases(device: torch.device) -> Iterator[dict[str, Any]]:
    """The check itself: {"case": name} before each case, and at last {"case": "all", "verdict": a Verdict's fields}."""
    yield {"case": "the first one"}
    why: list[str] = []
    loops = ["automatic"]
    if device.type == "cuda":
        import torch

        loops += ["sm80"] if torch.cuda.get_device_capability(device) == (9, 0) else []
    for loop in loops:
        differing = ""
        for name, differs in _compared(device, loop):
            if differs is None:
                yield {"case": name}
            elif differs:
                differing = f"{name}: {differs}"
                break
        if not differing:
            yield {"case": "all", "verdict": asdict(Verdict(loop, "; ".join(why)))}
            return
        why.append(differing)
    yield {"case": "all", "verdict": asdict(Verdict(None, "; ".join(why)))}


def _compared(device: torch.device, loop: str) -> Iterator[tuple[str, str | None]]:
    """(case, None) before it is run and then (case, what differs or ""), for all activations, precisions and dtypes."""
    import torch

    before = cuda.main_loops.get(device)
    cuda.main_loops[device] = loop
    try:
        for activation in ACTIVATIONS:
            for precision in PRECISIONS:
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    name = f"{loop} loop, {activation}, {precision}, rows of {str(dtype).removeprefix('torch.')}"
                    yield name, None
                    try:
                        yield name, _difference(device, activation, precision, dtype)
                    except (RuntimeError, ValueError) as error:
                        yield name, one_line(error)
    finally:
        cuda.main_loops.pop(device)
        if before is not None:
            cuda.main_loops[device] = before


def _difference(device: torch.device, activation: str, precision: str, dtype: torch.dtype) -> str:
    """What the kernels say that torch does not, in words; numbers are such that products are exact in float32."""
    import torch

    seed = sum(f"{activation} {precision}".encode())
    rng = np.random.default_rng(seed)

    def whole(bits: int, *shape: int) -> Any:
        return rng.integers(-(2**bits), 2**bits, shape, endpoint=True).astype(np.float32)

    # Twelve bits need both of bfloat16's terms, of weights or of rows.
    of_rows, of_weights = ((11, 4) if seed % 2 else (4, 11)) if dtype == torch.float32 else (4, 11)
    weights = prepare_weights(whole(of_weights, D_IN, D_SAE), np.zeros(D_IN, np.float32), device, precision)
    encoder = Encoder(
        weights,
        whole(13, D_SAE) - 2**13,
        d_in=D_IN,
        precision=precision,
        activation=activation,
        scale=2.0 ** whole(1, D_SAE),
        threshold=whole(12, D_SAE) if activation == "jumprelu" else None,
        gate_bias=whole(12, D_SAE) if activation == "gated" else None,
        k=TOP_K if activation.endswith("topk") else 0,
    )
    base, other = (torch.from_numpy(whole(of_rows, N_TOKENS, D_IN)).to(device, dtype) for _ in range(2))
    numbers = rng.standard_normal((N_TOKENS, 3))
    return next((found for op in (_sparse, _shift, _moments) if (found := op(encoder, base, other, numbers))), "")


def _sparse(encoder: Encoder, base: torch.Tensor, other: torch.Tensor, numbers: Any) -> str:
    found = (ops.encode_sparse(encoder, base) for ops in (cuda, torch_backend))
    for part, ours, theirs in zip(("indptr", "indices", "values"), *found, strict=True):
        if ours.shape != theirs.shape or not bool((ours == theirs).all()):
            return f"encode_sparse finds other {part}"
    return ""


def _shift(encoder: Encoder, base: torch.Tensor, other: torch.Tensor, numbers: Any) -> str:
    def run(ops: Any) -> dict[str, torch.Tensor]:
        sums = _zeros(encoder, ("sum_sq_shift", "sum_base", "sum_other", "sum_sq_base", "sum_sq_other"))
        sums |= _zeros(encoder, ("n_fired_base", "n_fired_other")) | _zeros(encoder, ("weighted_sq_shift",), 3)
        ops.accumulate_shift(encoder, base, other, row_weights=np.abs(numbers), **sums)
        return sums

    return _differing("accumulate_shift", run)


def _moments(encoder: Encoder, base: torch.Tensor, other: torch.Tensor, numbers: Any) -> str:
    def run(ops: Any) -> dict[str, torch.Tensor]:
        sums = _zeros(encoder, ("sum_h", "sum_sq_h", "n_fired")) | _zeros(encoder, ("sum_hy",), 3)
        ops.accumulate_moments(encoder, base, numbers, **sums)
        return sums

    return _differing("accumulate_moments", run)


def _zeros(encoder: Encoder, names: Sequence[str], n: int | None = None) -> dict[str, torch.Tensor]:
    import torch

    shape = (encoder.d_sae,) if n is None else (encoder.d_sae, n)
    dtypes = {name: torch.int64 if name.startswith("n_fired") else torch.float64 for name in names}
    return {name: torch.zeros(shape, dtype=dtype, device=encoder.device) for name, dtype in dtypes.items()}


def _differing(op: str, run: Callable[[Any], dict[str, torch.Tensor]]) -> str:
    ours, theirs = run(cuda), run(torch_backend)
    for name, expected in theirs.items():
        allowed = 0.0 if name.startswith("n_fired") else 1e-4 * float(expected.abs().max())
        error = float((ours[name] - expected).abs().max())
        if not error <= allowed:  # so that what is not a number differs
            return f"{op} gives another {name}, off by {error:.3g} of {float(expected.abs().max()):.3g}"
    return ""


def _lines(out: IO[str]) -> Iterator[str]:
    """Lines as they come; raises queue.Empty where one does not come in time."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in out:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    seconds = START_SECONDS
    while (line := lines.get(timeout=seconds)) is not None:
        yield line
        seconds = CASE_SECONDS


def _is_passing(why: str) -> bool:
    """Whether a reason may be gone next time: what other processes hold of the device's memory."""
    return "out of memory" in why.lower() or "its start" in why


def _kept_at(device: torch.device) -> Path:
    import torch

    driver = Path("/proc/driver/nvidia/version")
    described = [name_of(device), torch.__version__, driver.read_text("utf-8") if driver.exists() else ""]
    library = Path(str(cuda_kernels.load().__file__)).read_bytes()
    key = hashlib.sha256("\n".join(described).encode() + library).hexdigest()[:32]
    return files.caches() / "kernels" / f"{key}.json"


def _read(path: Path) -> Verdict | None:
    try:
        found = json.loads(path.read_text("utf-8"))
        return Verdict(found["loop"], found["why"]) if found["loop"] in ("automatic", "sm80", None) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, found: Verdict) -> None:
    with suppress(OSError, InputError):  # a home that cannot be written costs a check each time
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.atomic_path(path) as temporary:
            temporary.write_text(json.dumps(asdict(found)), encoding="utf-8")


def main(device: str, out: IO[str]) -> None:
    """Writes the cases of a device as lines of JSON, as they come."""
    for case in cases(device_named(device)):
        out.write(f"{json.dumps(case)}\n")
        out.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.stdout)
