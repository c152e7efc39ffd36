"""What sts_fast.ops.cuda is made of: launchers of kernels over torch tensors, which they take as pointers.

Each starts kernels on the device's stream and returns. Tensors lie on that device and are contiguous; sts_fast.ops.cuda
checks what users give. csrc/cuda/ops.h says what each does, in shapes and dtypes.
"""

from typing import Any

depth_multiple: int
row_weights: int
fine: int

class Device:
    def __init__(self, index: int, stream: int, loop: str) -> None:
        """loop: the product's main loop, "automatic" or one of main_loops(index). Raises ValueError for another."""
    @property
    def n_multiprocessors(self) -> int: ...

class PreparedRows:
    def __init__(self, hi: Any, lo: Any = None) -> None:
        """hi, lo: [n_rows, depth] bfloat16, or hi float32; any row stride."""

class Product:
    def __init__(self, W: PreparedRows, base: PreparedRows, other: PreparedRows | None = None) -> None: ...
    @property
    def n_tokens(self) -> int: ...

class Vectors:
    def __init__(self, scale: Any, bias: Any, gate: Any, gated: bool) -> None: ...

Lists = tuple[Any, Any, Any]  # columns [n_rows, capacity] int32, values float32 likewise, counts [n_rows] int32

def device_count() -> int: ...
def missing_reason() -> str | None:
    """Why the CUDA ops cannot serve here, in words; None where they can."""

def main_loops(index: int) -> tuple[str, ...]:
    """("sm80",), which runs on every GPU, and "sm90" where this build, the device and its driver have it."""

def prepare_rows(
    device: Device, acts: Any, input_norm: str, hi: Any, lo: Any, depth: int, first_row: int, status: Any, word: int
) -> None: ...
def shift_slab(device: Device, product: Product, weighted: bool) -> tuple[int, int]: ...
def moments_slab(device: Device, product: Product) -> tuple[int, int]: ...
def accumulate_shift(
    device: Device, product: Product, vectors: Vectors, weights: Any, slab: Any, targets: tuple[Any, ...], status: Any
) -> None: ...
def accumulate_moments(
    device: Device, product: Product, vectors: Vectors, weights: Any, slab: Any, targets: tuple[Any, ...], status: Any
) -> None: ...
def encode_sparse(
    device: Device, product: Product, vectors: Vectors, first_token: int, keys: Any, values: Any, count: Any
) -> None: ...
def encode_dense(device: Device, product: Product, vectors: Vectors, pre: Any) -> None: ...
def append_candidates(
    device: Device,
    product: Product,
    vectors: Vectors,
    absolute: bool,
    bounds: Any,
    lists: Lists,
    first_feature: int,
) -> None: ...
def select_top_k(
    device: Device,
    n_rows: int,
    k: int,
    absolute: bool,
    lists: Lists | None,
    pre: Any,
    first_feature: int,
    selected: Lists,
    bounds: Any,
    status: Any,
    word: int,
) -> None: ...
def fold_entries(
    device: Device,
    paired: bool,
    keys: Any,
    values: Any,
    starts: Any,
    rows: Any,
    weighted: Any,
    targets: tuple[Any, ...],
    status: Any,
) -> None: ...

class PromptTokens:
    def __init__(
        self,
        base: tuple[Any, Any, Any],
        base_starts: Any,
        other: tuple[Any, Any, Any],
        other_starts: Any,
        pair_at: Any,
        d_sae: int,
        window: int,
    ) -> None:
        """base, other: (indptr, indices, values). The tensors must outlive it."""
    @property
    def n_windows(self) -> int: ...

def check_sparse(device: Device, rows: tuple[Any, Any, Any], d_sae: int, status: Any, word: int) -> None: ...
def count_by_prompt(device: Device, tokens: PromptTokens, counts: Any, status: Any) -> None: ...
def sum_by_prompt(device: Device, tokens: PromptTokens, first_entries: Any, sums: tuple[Any, ...]) -> None: ...
