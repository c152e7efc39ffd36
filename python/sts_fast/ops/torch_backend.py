"""The ops of sts_fast.ops._cpu in plain torch, for every device that torch computes on, with or without our kernels.

Rows and features are taken in tiles, so that beside the result at most WORKSPACE_BYTES are needed and no dense
[n_tokens, d_sae] exists. A tile's sums over GROUP rows are float32; these are added in float64, on the CPU where the
device has none. For given arguments, precision, device and torch the results are the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import numpy as np

from sts_fast.ops import device_call
from sts_fast.ops.device_call import DeviceCall
from sts_fast.ops.device_encoder import Encoder
from sts_fast.ops.devices import device_of_doubles

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

WORKSPACE_BYTES = 64 << 20  # half of it for rows, half for tiles
GROUP = 256  # rows whose sums are float32
MOST_ROWS = 8 * GROUP  # of a tile
MOST_ROWS_LISTED = 2 * GROUP  # of tiles whose active features are listed, some 50 bytes for each
MOST_WEIGHTS = 64  # row weights that are applied at a time

Op = TypeVar("Op", bound=Callable[..., Any])
Terms = list[Any]  # rows [n, d_in] as one tensor or the sum of two


def _in_plain_arithmetic(op: Op) -> Op:
    """Without gradients, autocast or products of fewer bits, whatever the caller has set."""

    @wraps(op)
    def run(encoder: Encoder, *args: Any, **kwargs: Any) -> Any:
        import torch

        with torch.no_grad(), torch.autocast(encoder.device.type, enabled=False), _full_products():
            return op(encoder, *args, **kwargs)

    return cast(Op, run)


@contextmanager
def _full_products() -> Iterator[None]:
    import torch

    before = torch.get_float32_matmul_precision()
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@_in_plain_arithmetic
def accumulate_shift(encoder: Encoder, base: torch.Tensor, other: torch.Tensor, **given: Any) -> None:
    """See device_call."""
    device_call.accumulate_shift(_Call, encoder, base, other, **given)


@_in_plain_arithmetic
def accumulate_moments(encoder: Encoder, acts: torch.Tensor, targets: Any = None, **given: Any) -> None:
    """See device_call."""
    device_call.accumulate_moments(_Call, encoder, acts, targets, **given)


@_in_plain_arithmetic
def encode_sparse(
    encoder: Encoder, acts: torch.Tensor, columns: NDArray[np.int64] | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As _cpu.encode_sparse, tensors on the device."""
    import torch

    call = _Call(encoder, [acts], ("acts",), columns)
    call.check_rows()
    device = encoder.device
    counts = [torch.zeros(1 if call.n_columns else len(acts) + 1, dtype=torch.int64, device=device)]
    indices, values = [torch.zeros(0, dtype=torch.int32, device=device)], [torch.zeros(0, device=device)]
    for entries in call.entries():
        counts.append(entries.counts)
        indices.append(entries.columns.int())
        values.append(entries.values)
    return torch.cat(counts).cumsum(0), torch.cat(indices), torch.cat(values)


def precision_on(device: torch.device, precision: str) -> str:
    """The precision that stands for another one here: where bfloat16 has no float32 products, "fp32" for "bf16x2"."""
    return "fp32" if precision == "bf16x2" and not _has_wide_products(device) else precision


class _Entries(NamedTuple):
    """Active features of n rows, row by row: counts [n] int64 of each row; columns int64, ascending; values float32."""

    counts: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor


class _Call(DeviceCall):
    @property
    def sums_on(self) -> torch.device:
        return device_of_doubles(self.encoder.device)

    def run(self, sums: list[torch.Tensor | None], rows: torch.Tensor | None, weighted: torch.Tensor | None) -> None:
        self.check_rows()
        for block, members in self._blocks():
            weights = None if rows is None else rows[block].float().to(self.encoder.device)
            for columns, tiles in self._tiles(members):
                self._add(tiles, [None if of is None else of[columns] for of in sums], weights,
                          None if weighted is None else weighted[columns])  # fmt: skip

    def check_rows(self) -> None:
        """Raises ValueError for the first row that is not finite."""
        import torch

        for member, acts in enumerate(self.members):
            parts = torch.split(acts, max(1, WORKSPACE_BYTES // 4 // max(1, self.encoder.d_in)))
            if not bool(torch.stack([torch.isfinite(part).all() for part in parts]).all()):
                raise self.fault(member, int(torch.cat([~torch.isfinite(part).all(1) for part in parts]).nonzero()[0]))

    def entries(self) -> Iterator[_Entries]:
        """The wanted active features, block by block of rows."""
        import torch

        for _, (terms,) in self._blocks(MOST_ROWS_LISTED):
            if self.encoder.selects_top_k:
                column, values = self._top_k(terms)
                _, there = self._placed(column, values)
                yield _Entries(there.sum(1), column[there], values[there])
                continue
            found = []
            for columns, (h,) in self._tiles([terms]):
                row, column = torch.nonzero(h, as_tuple=True)
                found.append((row, column + columns.start, h[row, column]))
            row, column, values = (torch.cat(parts) for parts in zip(*found, strict=True))
            order = torch.argsort(row, stable=True)
            wanted = column[order] if self.columns is None else self.columns_tensor[column[order]]
            yield _Entries(torch.bincount(row, minlength=len(terms[0])), wanted, values[order])

    # Rows, prepared for the products as one or two terms [n, d_in] whose sum they are.

    def _blocks(self, most_rows: int = MOST_ROWS) -> Iterator[tuple[slice, list[Terms]]]:
        """(rows, each member's terms), whole groups of rows first."""
        if not self.n_columns:
            return
        per_row = self.encoder.d_in * sum(self._bytes_copied(acts) for acts in self.members)
        size = max(GROUP, min(WORKSPACE_BYTES // 2 // max(per_row, 1) // GROUP * GROUP, most_rows))
        whole = self.n_tokens // GROUP * GROUP
        blocks = [slice(start, min(start + size, whole)) for start in range(0, whole, size)]
        if whole < self.n_tokens:
            blocks.append(slice(whole, self.n_tokens))
        for block in blocks:
            yield block, [self._terms(acts[block]) for acts in self.members]

    def _bytes_copied(self, acts: torch.Tensor) -> int:
        import torch

        if self.encoder.input_norm != "none":
            return 12
        is_direct = acts.dtype == (torch.float32 if self._multiplies_floats else torch.bfloat16)
        return 0 if is_direct and (self._multiplies_floats or self.encoder.precision != "bf16x2") else 8

    def _terms(self, acts: torch.Tensor) -> Terms:
        import torch

        precision = self.encoder.precision
        x = _normalised(acts, self.encoder.input_norm)
        if self._multiplies_floats:
            return [(x.bfloat16() if precision == "bf16" else x).float()]
        high = x.bfloat16()
        if precision == "bf16" or x.dtype == torch.bfloat16:
            return [high]
        return [high, (x.float() - high.float()).bfloat16()]

    @property
    def _multiplies_floats(self) -> bool:
        return self.encoder.precision == "fp32" or not _has_wide_products(self.encoder.device)

    # Tiles [n, n_columns] of the features of n rows.

    def _tiles(self, members: list[Terms]) -> Iterator[tuple[slice, list[torch.Tensor]]]:
        """(features, each member's tile), which the next one overwrites."""
        import torch

        n = len(members[0][0])
        lists = [self._top_k(terms) for terms in members] if self.encoder.selects_top_k else []
        placed = [(*self._placed(column, values), values) for column, values in lists]
        width = min(self._width(n, len(members)), self.n_columns)
        room = [torch.empty(n * (width + 1), device=self.encoder.device) for _ in members]
        for start in range(0, self.n_columns, width):
            columns = slice(start, min(start + width, self.n_columns))
            size = columns.stop - start
            if lists:  # what lies elsewhere is written into one column more
                tiles = [part[: n * (size + 1)].view(n, -1).zero_() for part in room]
                for tile, (place, there, values) in zip(tiles, placed, strict=True):
                    inside = there & (place >= start) & (place < columns.stop)
                    tile.scatter_(1, torch.where(inside, place - start, size), values)
                yield columns, [tile[:, :size] for tile in tiles]
            else:
                yield (
                    columns,
                    [
                        self._features(terms, columns, part[: n * size].view(n, size))
                        for terms, part in zip(members, room, strict=True)
                    ],
                )

    def _width(self, n: int, n_members: int) -> int:
        """Features of a tile of n rows."""
        encoder = self.encoder
        per_feature = n * 4 * (n_members + 2)
        if self._multiplies_floats and encoder.precision != "fp32":
            per_feature += encoder.d_in * 4 * (1 if encoder.lo is None else 2)
        width = max(1, WORKSPACE_BYTES // 2 // per_feature)
        return width // 64 * 64 or width

    def _product(self, terms: Terms, columns: slice, out: torch.Tensor) -> None:
        """Rows times W_enc, summed in float32."""
        import torch

        encoder = self.encoder
        W = encoder.hi[columns, : encoder.d_in]
        lo = None if encoder.lo is None else encoder.lo[columns, : encoder.d_in]
        if self._multiplies_floats:
            W = W.float() if lo is None else W.float().add_(lo)
            torch.mm(terms[0], W.T, out=out)
            return
        pairs = [(terms[0], W), *((term, W) for term in terms[1:])]
        pairs += [] if lo is None else [(terms[0], lo)]
        for i, (x, part) in enumerate(pairs):
            product = torch.mm(x, part.T, out_dtype=torch.float32)
            out.copy_(product) if i == 0 else out.add_(product)

    def _features(self, terms: Terms, columns: slice, h: torch.Tensor) -> torch.Tensor:
        import torch

        encoder = self.encoder
        scale, bias, gate = (values[columns] for values in encoder.vectors)
        self._product(terms, columns, h)
        closed = h <= -gate if encoder.activation == "gated" else None  # by x W itself
        torch.addcmul(bias, h, scale, out=h)
        if encoder.activation == "jumprelu":
            return h.masked_fill_(h <= gate, 0)
        h.clamp_(min=0)
        return h if closed is None else h.masked_fill_(closed, 0)

    # The k largest values of each row; among equals those of the lower features.

    def _top_k(self, terms: Terms) -> tuple[torch.Tensor, torch.Tensor]:
        """([n, k] int64 features, ascending in a row, [n, k] their values, 0 where the activation is none)."""
        import torch

        encoder, n = self.encoder, len(terms[0])
        width = min(self._width(n, 1), encoder.d_sae)
        room = torch.empty(n * width, device=encoder.device)
        keys = torch.empty((n, 0), dtype=torch.int64, device=encoder.device)
        for start in range(0, encoder.d_sae, width):
            columns = slice(start, min(start + width, encoder.d_sae))
            pre = room[: n * (columns.stop - start)].view(n, -1)
            self._product(terms, columns, pre)
            scale, bias, _ = (values[columns] for values in encoder.vectors)
            torch.addcmul(bias, pre, scale, out=pre)
            keys = torch.cat([keys, self._largest_keys(pre, start)], 1).sort(1, descending=True).values[:, : encoder.k]
        column, values = _of_keys(keys, signed=encoder.activation == "abstopk")
        column, order = column.sort(1)
        values = values.gather(1, order)
        return column, values if encoder.activation == "abstopk" else values.clamp_(min=0)

    def _largest_keys(self, pre: torch.Tensor, first: int) -> torch.Tensor:
        """[n, at most k] the keys of each row's largest values, in any order."""
        import torch

        k, width = min(self.encoder.k, pre.shape[1]), pre.shape[1]
        size = pre.abs() if self.encoder.activation == "abstopk" else pre
        found = torch.topk(size, min(k + 1, width), 1)
        column = found.indices[:, :k]
        keys = _keys(found.values[:, :k], column + first, pre.gather(1, column) < 0)
        if k == width:
            return keys
        # Which of equal values torch takes is left open.
        tied = (found.values[:, k - 1] == found.values[:, k]).nonzero()[:, 0]
        everywhere = torch.arange(first, first + width, device=pre.device)
        for rows in torch.split(tied, max(1, GROUP // 8)):
            all_keys = _keys(size[rows], everywhere, pre[rows] < 0)
            keys[rows] = all_keys.sort(1, descending=True).values[:, :k]
        return keys

    def _placed(self, column: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """([n, k] place of each listed feature among those wanted, [n, k] whether it is active and wanted)."""
        import torch

        there = values != 0
        if self.columns is None:
            return column, there
        place = torch.searchsorted(self.columns_tensor, column).clamp_(max=self.n_columns - 1)
        return place, there & (self.columns_tensor[place] == column)

    # Sums.

    def _add(
        self, tiles: list[torch.Tensor], sums: list[Any], weights: torch.Tensor | None, weighted: torch.Tensor | None
    ) -> None:
        """Adds the tiles' features to accumulators of these features; the tiles are overwritten."""
        import torch

        paired = len(tiles) == 2
        square = torch.empty_like(tiles[0], memory_format=torch.contiguous_format)
        of_shift, of_members = (sums[:1], sums[1:]) if paired else ([], sums)
        m = len(tiles)
        for i, h in enumerate(tiles):
            if of_members[0] is None:
                break
            self._fold(of_members[i], _grouped(h).sum(1))
            self._fold(of_members[m + i], _grouped(torch.mul(h, h, out=square)).sum(1))
            of_members[2 * m + i] += torch.count_nonzero(h, 0).to(self.sums_on)
        by_weights = tiles[0]
        if paired:
            by_weights = torch.sub(tiles[1], tiles[0], out=square)
            by_weights.mul_(by_weights)
            self._fold(of_shift[0], _grouped(by_weights).sum(1))
        if weights is not None and weighted is not None:
            for start in range(0, weights.shape[1], MOST_WEIGHTS):
                part = slice(start, start + MOST_WEIGHTS)
                of_groups = _grouped(by_weights).transpose(1, 2) @ _grouped(weights[:, part])
                self._fold(weighted[:, part], of_groups)

    def _fold(self, total: torch.Tensor, of_groups: torch.Tensor) -> None:
        total += of_groups.to(self.sums_on).double().sum(0)


def _grouped(values: torch.Tensor) -> torch.Tensor:
    """[n_groups, rows of a group, ...]"""
    return values.view(max(1, len(values) // GROUP), -1, values.shape[1])


def _normalised(acts: torch.Tensor, input_norm: str) -> torch.Tensor:
    import torch

    if input_norm == "none":
        return acts
    x, d_in = acts.float(), acts.shape[1]
    if input_norm == "layer_norm":
        x = x - x.mean(1, keepdim=True)
        x -= x.mean(1, keepdim=True)  # of a row far from 0, what float32 had lost of its mean
        divisor = x.norm(dim=1, keepdim=True) / max(d_in - 1, 1) ** 0.5 + 1e-5
    else:
        norms = x.norm(dim=1, keepdim=True)
        divisor = torch.where(norms == 0, 1, norms) / d_in**0.5
    normalised: torch.Tensor = x / divisor
    return normalised


# A key orders values, largest last, and among equals the higher feature first: the 32 bits of the value's size, made to
# order like whole numbers, 31 bits of the feature, and the sign.


def _keys(size: torch.Tensor, column: torch.Tensor, is_negative: torch.Tensor) -> torch.Tensor:
    import torch

    return _ordered(size.contiguous().view(torch.int32)).long() << 32 | (0x7FFFFFFF - column) << 1 | is_negative.long()


def _of_keys(keys: torch.Tensor, *, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(int64 features, float32 values), as given to _keys; signed: the values, and not their sizes."""
    import torch

    size = _ordered((keys >> 32).int()).view(torch.float32)
    column = 0x7FFFFFFF - ((keys & 0xFFFFFFFF) >> 1)
    return column, torch.where((keys & 1).bool(), -size, size) if signed else size


def _ordered(bits: torch.Tensor) -> torch.Tensor:
    """Bits of float32 numbers as int32 in the same order, and back."""
    import torch

    return torch.bitwise_xor(bits, (bits >> 31) & 0x7FFFFFFF)


@cache
def _has_wide_products(device: torch.device) -> bool:
    """Whether bfloat16 matrices have float32 products here; elsewhere they are multiplied as float32."""
    import torch

    if device.type != "cuda":
        return False
    ones = torch.ones((16, 16), dtype=torch.bfloat16, device=device)
    try:
        return torch.mm(ones, ones, out_dtype=torch.float32).dtype == torch.float32
    except (NotImplementedError, RuntimeError, TypeError):
        return False
