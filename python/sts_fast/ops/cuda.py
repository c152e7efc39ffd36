"""The CUDA ops: names, arguments and results of sts_fast.ops._cpu, on torch tensors of one device.

Memory is torch's, kernels run on its current stream. For given arguments, precision and device the results are the
same, bit for bit; unlike the CPU's they depend on how rows are split into calls, by rounding in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from sts_fast.ops import cuda_kernels, device_call
from sts_fast.ops.cuda_kernels import load
from sts_fast.ops.device_call import MOST_ROWS_OF_A_CALL, DeviceCall, described, is_capturing
from sts_fast.ops.device_encoder import Encoder
from sts_fast.ops.devices import moved
from sts_fast.sae.rows import check_array

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

MOST_ROWS = 1 << 16  # of one launch
FIRST_STRIP = 8192  # features whose k largest values bound the row's, at least an eighth of all
MOST_DENSE_WEIGHTS = 64  # more weights or targets than that are applied to the active features one by one
PROMPT_WINDOW = 1 << 16  # features of a prompt that one block sums
MAIN_LOOP = "automatic"  # or "sm80", which runs on every GPU, or "sm90"
main_loops: dict[torch.device, str] = {}  # of devices, where it is another one

_NO_KEY = (1 << 63) - 1

Op = TypeVar("Op", bound=Callable[..., Any])


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Kernels start on torch's current device, which need not be that of the tensors."""
    import torch

    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _launcher(device: torch.device) -> Any:
    """Starts kernels on torch's current stream of a device."""
    import torch

    loop = main_loops.get(device, MAIN_LOOP)
    if device.type != "cuda":
        return load().Device(0, 0, loop)
    stream = torch.cuda.current_stream(device)
    return load().Device(stream.device.index, stream.cuda_stream, loop)


def _on_its_device(op: Op) -> Op:
    @wraps(op)
    def run(encoder: Encoder, *args: Any, **kwargs: Any) -> Any:
        with _current(encoder.device):
            return op(encoder, *args, **kwargs)

    return cast(Op, run)


@_on_its_device
def accumulate_shift(encoder: Encoder, base: torch.Tensor, other: torch.Tensor, **given: Any) -> None:
    """See device_call; K of row weights is any number."""
    device_call.accumulate_shift(_Call, encoder, base, other, **given)


@_on_its_device
def accumulate_moments(encoder: Encoder, acts: torch.Tensor, targets: Any = None, **given: Any) -> None:
    """See device_call; K of targets is any number."""
    device_call.accumulate_moments(_Call, encoder, acts, targets, **given)


@_on_its_device
def encode_sparse(
    encoder: Encoder, acts: torch.Tensor, columns: NDArray[np.int64] | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As _cpu.encode_sparse, tensors on the device; waits for the device, since their sizes are part of the result."""
    import torch

    call = _Call(encoder, [acts], ("acts",), columns)
    keys = [torch.zeros(0, dtype=torch.int64, device=encoder.device)]
    values = [torch.zeros(0, dtype=torch.float32, device=encoder.device)]
    for block_keys, block_values in call.sparse_blocks():
        order = torch.sort(block_keys)
        keys.append(order.values)
        values.append(block_values[order.indices])
    call.raise_faults()
    all_keys = torch.cat(keys)
    indices = (all_keys & 0xFFFFFFFF).int()
    if columns is not None and not encoder.selects_top_k and len(columns):
        indices = call.columns_tensor[indices.long()].int()
    edges = torch.arange(len(acts) + 1, device=encoder.device) << 32
    return torch.searchsorted(all_keys, edges), indices, torch.cat(values)


def sum_by_prompt(
    base: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    base_starts: NDArray[np.int64],
    other: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    other_starts: NDArray[np.int64],
    pair_at: NDArray[np.int64],
    *,
    d_sae: int,
) -> tuple[torch.Tensor, ...]:
    """As _cpu.sum_by_prompt, and the same bit for bit; base and other, and the sums, are tensors on one device.

    base_starts, other_starts and pair_at are numpy arrays. Fewer than 2^31 rows of each and prompts; any number of
    entries. Waits for the device once, since the size of the sums is part of the result.
    """
    import torch

    if not 0 < d_sae <= np.iinfo(np.int32).max:
        raise ValueError(f"d_sae must lie between 1 and 2^31 - 1, got {d_sae}")
    device = _check_sparse(base, None, "base")
    _check_sparse(other, device, "other")
    _check_starts(base_starts, len(base[0]) - 1, "base_starts")
    _check_starts(other_starts, len(other[0]) - 1, "other_starts")
    _check_pairs(base_starts, other_starts, pair_at)
    n_prompts = len(base_starts) - 1
    with _current(device):
        on_host = [base_starts, other_starts, pair_at]
        numbers = moved(torch.from_numpy(np.concatenate(on_host)), device)
        of_base, of_other, pairs = torch.split(numbers, [len(part) for part in on_host])
        launcher = _launcher(device)
        tokens = load().PromptTokens(base, of_base, other, of_other, pairs, d_sae, PROMPT_WINDOW)
        status = torch.full((4,), load().fine, dtype=torch.int64, device=device)
        load().check_sparse(launcher, base, d_sae, status, 0)
        load().check_sparse(launcher, other, d_sae, status, 2)
        counts = torch.zeros(n_prompts * tokens.n_windows + 1, dtype=torch.int64, device=device)
        if n_prompts:
            load().count_by_prompt(launcher, tokens, counts[1:], status)
        first_entries = counts.cumsum(0)
        *faults, n_entries = torch.cat([status, first_entries[-1:]]).tolist()
        _raise_faults_of_sparse(faults, d_sae)
        ints, doubles, floats = torch.int32, torch.float64, torch.float32
        dtypes = (ints, ints, doubles, doubles, doubles, doubles, floats, ints)
        sums = tuple(torch.empty(n_entries, dtype=dtype, device=device) for dtype in dtypes)
        if n_entries:
            load().sum_by_prompt(launcher, tokens, first_entries, sums)
        return first_entries[:: tokens.n_windows].contiguous(), *sums


class _Call(DeviceCall):
    """One call of an op: its rows, block by block, and the faults that its kernels report."""

    def __init__(
        self, encoder: Encoder, members: list[torch.Tensor], names: tuple[str, ...], columns: NDArray[np.int64] | None
    ) -> None:
        import torch

        super().__init__(encoder, members, names, columns)
        # A word per member for its first bad row.
        self.status = torch.full((len(members),), load().fine, dtype=torch.int64, device=encoder.device)
        self.device = _launcher(encoder.device)

    def run(self, sums: list[torch.Tensor | None], rows: torch.Tensor | None, weighted: torch.Tensor | None) -> None:
        """Adds all rows, or none where a row is at fault."""
        if self.n_tokens and self.n_columns:
            if self.encoder.selects_top_k:
                self._run_entries(self._top_k_entries(), sums, rows, weighted)
            elif rows is not None and rows.shape[1] > MOST_DENSE_WEIGHTS:
                self._run_entries(self._threshold_entries(), sums, rows, weighted)
            else:
                self._run_columns(sums, rows, weighted)
        self.raise_faults()

    def raise_faults(self) -> None:
        """Raises ValueError for a faulty row; waits for the device, except while a CUDA graph is captured."""

        if is_capturing(self.encoder.device):
            return
        for member, bad in enumerate(self.status.tolist()):
            if bad != load().fine:
                raise self.fault(member, bad)

    def _run_columns(
        self, sums: list[torch.Tensor | None], rows: torch.Tensor | None, weighted: torch.Tensor | None
    ) -> None:
        import torch

        paired = len(self.members) == 2
        W, vectors = self.encoder.strip(0, self.n_columns)
        width = load().row_weights
        accumulate = load().accumulate_shift if paired else load().accumulate_moments
        n_passes = 1 if rows is None else max(1, -(-rows.shape[1] // width))
        for start, prepared in self._prepared_blocks():
            product = load().Product(W, *prepared)
            n = min(self.n_tokens - start, self.rows_per_block)
            shape = (
                load().shift_slab(self.device, product, rows is not None)
                if paired
                else load().moments_slab(self.device, product)
            )
            slab = torch.empty((*shape, self.n_columns), dtype=torch.float64, device=self.encoder.device)
            for p in range(n_passes):
                targets: list[Any] = list(sums) if p == 0 else [None] * len(sums)
                weights = None
                if rows is not None and weighted is not None:
                    part = rows[start : start + n, p * width : (p + 1) * width]
                    weights = torch.zeros((n, width), dtype=torch.float32, device=self.encoder.device)
                    weights[:, : part.shape[1]] = part
                    targets += [(weighted, p * width + k) for k in range(part.shape[1])]
                accumulate(self.device, product, vectors, weights, slab, tuple(targets), self.status)

    def _run_entries(
        self,
        blocks: Iterator[tuple[slice, torch.Tensor, torch.Tensor]],
        sums: list[torch.Tensor | None],
        rows: torch.Tensor | None,
        weighted: torch.Tensor | None,
    ) -> None:
        """Sums of active features one by one: (rows of the block, column << 32 | token << 1 | member, value)."""
        import torch

        paired = len(self.members) == 2
        edges = torch.arange(self.n_columns + 1, device=self.encoder.device) << 32
        for block, keys, values in blocks:
            order = torch.sort(keys)
            entries, starts = values[order.indices], torch.searchsorted(order.values, edges)
            weights = None if rows is None else rows[block]
            load().fold_entries(
                self.device, paired, order.values, entries, starts, weights, weighted, tuple(sums), self.status
            )

    def _top_k_entries(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        import torch

        for start, lists in self._top_k_blocks()[0]:
            keys = []
            for member, (columns, _, counts) in enumerate(lists):
                column, token = self._placed(columns, counts)
                keys.append(torch.where(column < 0, _NO_KEY, column << 32 | token << 1 | member).flatten())
            block = slice(start, start + len(lists[0][2]))
            yield block, torch.cat(keys), torch.cat([values.flatten() for _, values, _ in lists])

    def _threshold_entries(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        import torch

        for start, prepared in self._prepared_blocks():
            entries = [self._append(acts, 0) for acts in prepared]
            keys = [(keys & 0xFFFFFFFF) << 32 | keys >> 32 << 1 | member for member, (keys, _) in enumerate(entries)]
            block = slice(start, start + self.rows_per_block)
            yield block, torch.cat(keys), torch.cat([values for _, values in entries])

    def sparse_blocks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(token << 32 | column, value) of every active feature; columns count among those wanted, unless top k."""
        if not self.n_tokens or not self.n_columns:
            return
        if self.encoder.selects_top_k:
            blocks, complete = self._top_k_blocks()
            for start, [(columns, values, counts)] in blocks:
                column, token = self._placed(columns, counts)
                block_keys, block_values = ((start + token) << 32 | columns).flatten(), values.flatten()
                if not complete or self.columns is not None:
                    there = (column >= 0).flatten().nonzero()[:, 0]
                    block_keys, block_values = block_keys[there], block_values[there]
                yield block_keys, block_values
            return
        for start, [acts] in self._prepared_blocks():
            yield self._append(acts, start)

    def _append(self, acts: Any, first_token: int) -> tuple[torch.Tensor, torch.Tensor]:
        """((first_token + row) << 32 | column, value) of a block's active features, in any order."""
        import torch

        W, vectors = self.encoder.strip(0, self.n_columns)
        product = load().Product(W, acts)
        n, device = product.n_tokens, self.encoder.device
        capacity = min(n * self.n_columns, max(n * 96, 1 << 16))
        while True:
            keys = torch.empty(capacity, dtype=torch.int64, device=device)
            values = torch.empty(capacity, dtype=torch.float32, device=device)
            count = torch.zeros(1, dtype=torch.int64, device=device)
            load().encode_sparse(self.device, product, vectors, first_token, keys, values, count)
            n_found = int(count)
            if n_found <= capacity:
                return keys[:n_found], values[:n_found]
            capacity = n_found

    def _placed(self, columns: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """([n, k] place of each listed feature among those wanted or -1, [n, 1] row)."""
        import torch

        n, k = columns.shape
        there = torch.arange(k, device=columns.device) < counts[:, None]
        place = columns.long()
        if self.columns is not None:
            at = torch.searchsorted(self.columns_tensor, place).clamp(max=self.n_columns - 1)
            there &= self.columns_tensor[at] == place
            place = at
        return torch.where(there, place, -1), torch.arange(n, device=columns.device)[:, None]

    def _top_k_blocks(self) -> tuple[list[tuple[int, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]], bool]:
        """Of the rows' k largest values (first row, for each member (columns [n, k], values [n, k], counts [n])).

        Whether all rows have k of them comes with it. All blocks are started before the one look at what they found;
        a CUDA graph that is captured cannot look, and has every strip searched.
        """
        import torch

        encoder, device = self.encoder, self.encoder.device
        strip = min(encoder.d_sae, max(FIRST_STRIP, encoder.d_sae // 8))
        starts = self._starts(strip * 4, _bytes_of_strips(device))
        full = torch.full((len(starts),), load().fine, dtype=torch.int64, device=device)
        captured, blocks = is_capturing(device), []
        for block, start in enumerate(starts):
            n, prepared = min(self.n_tokens - start, self.rows_per_block), self._prepared(start)
            blocks.append((start, [self._row_top_k(rows, n, strip, full, block, dense=captured) for rows in prepared]))
        if captured:
            return blocks, False
        n_listed = torch.stack([counts.sum() for _, lists in blocks for *_, counts in lists]).sum()
        *states, n_found = torch.cat([full, n_listed[None]]).tolist()
        for block, state in enumerate(states):
            if state != load().fine:
                # A row of unusual values: every strip is then written out and searched.
                start, lists = blocks[block]
                n, prepared = len(lists[0][2]), self._prepared(start)
                lists[:] = [self._row_top_k(rows, n, strip, full, block, dense=True) for rows in prepared]
        complete = all(state == load().fine for state in states)
        return blocks, complete and n_found == self.n_tokens * encoder.k * len(self.members)

    def _row_top_k(self, rows: Any, n: int, strip: int, full: torch.Tensor, block: int, *, dense: bool) -> Any:
        """The k largest of each row; those of the first strip are a lower bound, which few of the rest pass.

        Where more do than a row's list holds, full[block] is lowered.
        """
        import torch

        encoder, device = self.encoder, self.encoder.device
        k, absolute = encoder.k, encoder.activation == "abstopk"
        capacity = k + 2 * k * -(-encoder.d_sae // strip) + 64

        def new_lists(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            columns = torch.empty((n, size), dtype=torch.int32, device=device)
            counts = torch.zeros(n, dtype=torch.int32, device=device)
            return columns, torch.empty((n, size), dtype=torch.float32, device=device), counts

        def select(lists: Any, pre: Any, first: int, size: int) -> Any:
            selected = new_lists(size)
            load().select_top_k(self.device, n, k, absolute, lists, pre, first, selected, bounds, full, block)
            return selected

        bounds = torch.empty(n, dtype=torch.float32, device=device)
        pre = torch.empty((n, strip), dtype=torch.float32, device=device)
        lists: Any = None
        for first in range(0, encoder.d_sae if dense else strip, strip):
            W, vectors = encoder.strip(first, min(first + strip, encoder.d_sae))
            part = pre.flatten()[: n * min(strip, encoder.d_sae - first)].view(n, -1)
            load().encode_dense(self.device, load().Product(W, rows), vectors, part)
            lists = select(lists, part, first, k if dense else capacity)
        if not dense and strip < encoder.d_sae:
            W, vectors = encoder.strip(strip, encoder.d_sae)
            product = load().Product(W, rows)
            load().append_candidates(self.device, product, vectors, absolute, bounds, lists, strip)
            lists = select(lists, None, 0, k)
        columns, values, counts = lists
        return columns[:, :k].contiguous(), values[:, :k].contiguous(), counts

    def _prepared_blocks(self) -> Iterator[tuple[int, list[Any]]]:
        """(first row, the members' rows prepared for the products), in blocks that bound the workspace."""
        for start in self._starts():
            yield start, self._prepared(start)

    def _starts(self, bytes_per_row: int = 0, workspace: int | None = None) -> range:
        """The first rows of blocks of rows_per_block, for which the workspace has `bytes_per_row`."""
        import torch

        encoder = self.encoder
        word_of_row = 4 if encoder.precision == "fp32" else 2
        # Paired operands are split in the same way.
        exact = encoder.input_norm == "none" and all(acts.dtype == torch.bfloat16 for acts in self.members)
        self.split = encoder.precision == "bf16x2" and not exact
        self.direct = [not self.split and self._is_direct(acts) for acts in self.members]
        copied = encoder.depth * word_of_row * (2 if self.split else 1) * len(self.members)
        rows = (workspace or cuda_kernels.WORKSPACE_BYTES) // max(bytes_per_row, 0 if all(self.direct) else copied, 1)
        self.rows_per_block = max(256, min(rows // 256 * 256, MOST_ROWS))
        if self.n_tokens > self.rows_per_block or any(self.direct):
            # Nothing is added before every row has been checked.
            for word, acts in enumerate(self.members):
                self._prepare(acts, None, None, 0, word)
        return range(0, self.n_tokens, self.rows_per_block)

    def _prepared(self, start: int) -> list[Any]:
        """The members' rows of the block that begins at `start`."""
        import torch

        encoder, prepared = self.encoder, []
        for word, acts in enumerate(self.members):
            part = acts[start : start + self.rows_per_block]
            if self.direct[word]:
                prepared.append(load().PreparedRows(part))
                continue
            hi = torch.empty(
                (len(part), encoder.depth),
                dtype=torch.float32 if encoder.precision == "fp32" else torch.bfloat16,
                device=encoder.device,
            )
            lo = torch.empty_like(hi) if self.split else None
            self._prepare(part, hi, lo, start, word)
            prepared.append(load().PreparedRows(hi, lo))
        return prepared

    def _is_direct(self, acts: torch.Tensor) -> bool:
        import torch

        encoder = self.encoder
        as_is = acts.dtype == torch.bfloat16 and encoder.precision != "fp32" and encoder.input_norm == "none"
        return as_is and encoder.d_in == encoder.depth and acts.stride(0) % 8 == 0 and acts.data_ptr() % 16 == 0

    def _prepare(self, acts: torch.Tensor, hi: Any, lo: Any, first_row: int, word: int) -> None:
        norm = self.encoder.input_norm
        load().prepare_rows(self.device, acts, norm, hi, lo, self.encoder.depth, first_row, self.status, word)


def _check_sparse(rows: Any, device: torch.device | None, name: str) -> torch.device:
    """The device of compressed sparse rows, the given one if any; their numbers are checked by a kernel."""
    import torch

    if len(rows) != 3:
        raise ValueError(f"{name} must be (indptr, indices, values)")
    dtypes = {"indptr": torch.int64, "indices": torch.int32, "values": torch.float32}
    for part, (kind, dtype) in zip(rows, dtypes.items(), strict=True):
        if not isinstance(part, torch.Tensor) or part.dtype != dtype or device not in (None, part.device):
            place = "" if device is None else f" on {device}"
            raise ValueError(f"{name}_{kind} must be a tensor of {dtype}{place}, got {described(part)}")
        device = part.device
        if part.ndim != 1:
            raise ValueError(f"{name}_{kind} must have 1 dimension, got {part.ndim}")
        if kind == "indptr" and len(part) > MOST_ROWS_OF_A_CALL:
            raise ValueError(
                f"{name} must have fewer than 2^31 rows in one call, got {len(part) - 1}: pass it in parts"
            )
        if not part.is_contiguous():
            raise ValueError(f"{name}_{kind} must be C-contiguous")
    assert device is not None
    if not len(rows[0]):
        raise ValueError(f"{name}_indptr must have an entry for each row and one more, got none")
    if len(rows[1]) != len(rows[2]):
        raise ValueError(f"{name}_values must have {len(rows[1])} entries, got {len(rows[2])}")
    return device


def _check_starts(starts: Any, n_rows: int, name: str) -> None:
    _check_numbers(starts, name)
    if not len(starts):
        raise ValueError(f"{name} must have an entry for each prompt and one more, got none")
    if len(starts) > MOST_ROWS_OF_A_CALL:
        raise ValueError(f"{name} must be those of fewer than 2^31 prompts, got {len(starts) - 1}: pass them in parts")
    if starts[0] != 0 or starts[-1] != n_rows or (np.diff(starts) < 0).any():
        raise ValueError(f"{name} must ascend from 0 to the number of rows, {n_rows}")


def _check_pairs(base_starts: Any, other_starts: Any, pair_at: Any) -> None:
    _check_numbers(pair_at, "pair_at")
    if len(other_starts) != len(base_starts):
        raise ValueError(f"other_starts must have {len(base_starts)} entries, got {len(other_starts)}")
    if len(pair_at) != other_starts[-1]:
        raise ValueError(f"pair_at must have {other_starts[-1]} entries, got {len(pair_at)}")
    begin, end = (np.repeat(edges, np.diff(other_starts)) for edges in (base_starts[:-1], base_starts[1:]))
    outside = (pair_at < begin) | (pair_at >= end)
    if outside.any():
        raise ValueError(f"pair_at must name a row of the same prompt, which pair {int(outside.argmax())} does not")


def _check_numbers(values: Any, name: str) -> None:
    if not isinstance(values, np.ndarray) or values.dtype != np.int64:
        described = values.dtype if isinstance(values, np.ndarray) else type(values).__name__
        raise ValueError(f"{name} must be a numpy array of int64, got {described}")
    check_array(values, name)
    if values.ndim != 1:
        raise ValueError(f"{name} must have 1 dimension, got {values.ndim}")


def _raise_faults_of_sparse(faults: list[int], d_sae: int) -> None:
    """Raises ValueError where check_sparse found a fault: (base_indptr, base_indices, other_indptr, other_indices)."""
    for name, (in_indptr, in_indices) in (("base", faults[:2]), ("other", faults[2:])):
        if in_indptr != load().fine:
            raise ValueError(
                f"{name}_indptr must ascend from 0 to the number of entries, which row {in_indptr} does not"
            )
        if in_indices != load().fine:
            raise ValueError(
                f"{name}_indices must ascend within a row and lie below d_sae, {d_sae}, which row {in_indices} does not"
            )


def _bytes_of_strips(device: torch.device) -> int:
    """Workspace for pre-activations: where there is room, more rows of TopK at a time; the device alone decides."""
    import torch

    large = device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory >= 20 << 30
    return cuda_kernels.WORKSPACE_BYTES * (8 if large else 1)
