"""The compiled CUDA module, or the reason why it cannot be used here."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sts_fast.ops import _cuda as kernels
else:
    kernels: Any = None

WORKSPACE_BYTES = 64 << 20  # of each kind: prepared rows, dense strips, lists of candidates


def missing_reason() -> str | None:
    """The reason why the CUDA ops cannot be used here, in words; None where they can."""
    if find_spec("sts_fast.ops._cuda") is None:
        return "this build has no CUDA module: install it with nvcc and -C cmake.define.STS_CUDA=ON"
    try:
        from sts_fast.ops import _cuda
    except ImportError as error:
        return f"the CUDA module does not load: {error}"
    return _cuda.missing_reason()


def load() -> Any:
    """The compiled module; it exists wherever missing_reason() is None."""
    global kernels
    if kernels is None:
        from sts_fast.ops import _cuda

        kernels = _cuda
    return kernels
