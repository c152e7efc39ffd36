"""Hidden states that vLLM wrote to files, one file a request, taken instead of the model's own passes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sts_fast import files
from sts_fast.data.prompts import Prompt, PromptSet
from sts_fast.data.sets import Kind
from sts_fast.errors import InputError, listed, one_line
from sts_fast.model.forward import Read
from sts_fast.model.hooks import Hook
from sts_fast.model.language_model import rows_read
from sts_fast.model.packing import row_norms
from sts_fast.model.reader import PairedRows
from sts_fast.places import split_name

if TYPE_CHECKING:
    import torch

    from sts_fast.statistics import IntArray

REQUESTS_FILE = "prompts.jsonl"
# vLLM's number of the embedding; its number k is the residual stream after k layers.
EMBEDDING = 0
# The rows of an embedding are the same wherever a token stands; relative difference above which they are not. The first
# numbers of a row suffice to see it.
SAME, N_COMPARED = 1e-3, 64
# Prompts that start alike have the same rows there, but for the rounding of other batches: of nine tokens in ten, the
# most that they may differ, relative to their norm.
ROUNDING, MOST_TOKENS = 0.3, 0.9
# Tokens that a prompt repeats, from which number on a layer can be told from the embedding.
LEAST_REPEATED = 4
# Files of other tokens that are compared with the requests that are missing.
MOST_COMPARED = 20
# Tokens that a server generates where a request does not say how many.
MOST_OUTPUT = 16
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
AS_IDS = "send the token ids, not their text"
WHOLE = "start the server with --no-enable-prefix-caching and --no-enable-chunked-prefill, and export again"


@dataclass(frozen=True)
class Request:
    """One sequence of tokens [n_tokens] int32, as it is sent to an inference server; id says whose it is."""

    id: str
    ids: IntArray

    @classmethod
    def of(cls, sets: Iterable[tuple[Kind, PromptSet]]) -> list[Request]:
        """The requests of all prompts that are read, without and with demonstrations; equal tokens are sent once."""
        requests: dict[bytes, Request] = {}
        for kind, prompt_set in sets:
            for prompt in prompt_set.prompts:
                for side, ids, read in (
                    ("base", prompt.base_ids, prompt.positions),
                    ("demos", prompt.demos_ids, prompt.paired_demos),
                ):
                    if len(read):
                        name = f"{kind}/{prompt_set.name}/{prompt.id}/{side}"
                        requests.setdefault(_key(ids), cls(name, ids))
        return list(requests.values())


@dataclass(frozen=True)
class Requests:
    """What an inference server is asked for.

    layers: to be exported, as vLLM numbers them: the embedding, by which the numbering is checked, and those of the
            hooks
    """

    requests: list[Request]
    layers: list[int]

    def save(self, path: str | Path) -> None:
        """Writes one line {"id", "prompt_token_ids"} for each request."""
        lines = (json.dumps({"id": one.id, "prompt_token_ids": one.ids.tolist()}) + "\n" for one in self.requests)
        with files.atomic_path(path) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")

    def summary(self) -> str:
        n_tokens = sum(len(one.ids) for one in self.requests)
        return f"{len(self.requests):,} requests of {n_tokens:,} tokens"


def layer_number(hook: str) -> int:
    """vLLM's number of the layer whose hidden states are a hook's.

    Raises InputError for a place inside a layer, which is not exported.
    """
    place, layer = split_name(hook)
    if layer is None or place not in ("resid_pre", "resid_post"):
        raise InputError(
            f"inference servers export the residual stream between layers, not {hook}: capture it with the model itself"
        )
    return layer if place == "resid_pre" else layer + 1


class Export:
    """The files of an export, checked before any of their rows is read.

    folder:   searched for *.safetensors with `hidden_states` [n_tokens, n_layers, d] and `token_ids` [n_tokens]
    hooks:    places to read
    requests: all that will be read; each is found by its tokens, whatever its file is called
    layers:   the exported layers as vLLM numbers them, ascending
    dtype:    of the rows

    Raises InputError where requests, rows or layers are missing, or the tokens are others.
    """

    def __init__(self, folder: Path, hooks: list[Hook], requests: Sequence[Request], layers: Sequence[int]) -> None:
        self.folder, self.hooks, self.requests, self.layers = folder, hooks, requests, list(layers)
        self.dtype = ""
        self._paths: dict[bytes, Path] = {}
        self._embedding: dict[int, tuple[torch.Tensor, Path]] = {}
        self._before: dict[tuple[str, int], tuple[IntArray, torch.Tensor, Path]] = {}
        if self.layers != sorted({*self.layers}):
            raise InputError(
                f"--export-layer {listed(self.layers)} is not ascending, but a model's layers are exported in their "
                "order: give it so"
            )
        for hook in self.hooks:
            if (number := layer_number(hook.name)) not in self.layers:
                raise InputError(
                    f"{hook.name} is layer {number} of an export, of which --export-layer names "
                    f"{listed(self.layers)}: export it too"
                )
        wanted = {_key(one.ids) for one in self.requests}
        others: dict[Path, IntArray] = {}
        for path in sorted(self.folder.rglob("*.safetensors")):
            ids, shape, dtype = _outline(path)
            key = _key(ids)
            if key not in wanted:
                others[path] = ids
                continue
            if key in self._paths:
                raise InputError(f"{self._paths[key]} and {path} are of the same tokens: delete the older")
            self._check_outline(path, len(ids), shape, dtype)
            self._paths[key] = path
        missing = [one for one in self.requests if _key(one.ids) not in self._paths]
        if missing:
            raise InputError(self._missing(missing, others))

    def _check_outline(self, path: Path, n_tokens: int, shape: list[int], dtype: str) -> None:
        if len(shape) != 3 or shape[1] != len(self.layers):
            raise InputError(
                f"hidden_states of {path} is {shape}, not [n_tokens, {len(self.layers)}, d]: name the exported layers "
                f"({listed(self.layers)} are expected) with --export-layer"
            )
        if shape[0] != n_tokens:
            raise InputError(f"{path} has rows of {shape[0]} of its {n_tokens} tokens: {WHOLE}")
        for hook in self.hooks:
            if hook.d_in != shape[2]:
                raise InputError(
                    f"{path} has {shape[2]} numbers per token, but the model has {hook.d_in} {hook.where}: it is the "
                    "export of another model"
                )
        if dtype not in DTYPES:
            raise InputError(
                f"hidden_states of {path} is {dtype}, not {listed(DTYPES)}: start the server with --dtype bfloat16, "
                "and export again"
            )
        if self.dtype not in ("", DTYPES[dtype]):
            raise InputError(
                f"{path} is {DTYPES[dtype]}, but files before it are {self.dtype}: they are of two servers, so export "
                "to an empty folder"
            )
        self.dtype = DTYPES[dtype]

    def _missing(self, missing: Sequence[Request], others: dict[Path, IntArray]) -> str:
        """What is amiss, in one sentence; files of other tokens tell more about it."""
        pairs = [(path, ids, one) for path, ids in islice(others.items(), MOST_COMPARED) for one in missing]
        shortest, longest = (take(len(one.ids) for one in missing) for take in (min, max))
        differences = (_difference(ids, one.ids, shortest, longest) for _, ids, one in pairs)
        likenesses = (_likeness(ids, one.ids) for _, ids, one in pairs)
        for told, (path, _, one) in chain(zip(differences, pairs, strict=True), zip(likenesses, pairs, strict=True)):
            if told is not None:
                return f"{path} {told[0]} of the request {one.id}: {told[1]}"
        n = f"{len(missing)} of {len(self.requests)} requests"
        if not self._paths and not others:
            return f"{self.folder} contains no .safetensors of a server: send {REQUESTS_FILE} to it first"
        return f"{self.folder} lacks {n}, such as {missing[0].id}: send {REQUESTS_FILE} again, and wait for the last"

    def weights_sha256(self) -> None:
        """Nothing is known of the weights."""

    def rows(self, prompts: Sequence[Prompt]) -> Iterator[list[PairedRows]]:
        """Yields the rows of one prompt after the other, by hook, without attention sinks, as `capture` does.

        Raises InputError where rows are not finite, or seem to be of other tokens or layers.
        """
        shows = bool(prompts) and all(len(prompt.demos_ids) for prompt in prompts)
        for index, prompt in enumerate(prompts):
            sides = [self._read(prompt.base_ids, prompt.positions, ("base", 0))]
            partners = prompt.paired[:0], prompt.paired[:0]
            if shows:
                sides.append(self._read(prompt.demos_ids, prompt.paired_demos, ("demos", prompt.draw)))
                partners = prompt.paired, prompt.paired_demos
            of_hooks = [
                rows_read(hook, [0], [prompt], [partners], [[side] for side in sides])
                for hook in range(len(self.hooks))
            ]
            yield [rows.at(np.asarray([index])) for rows in of_hooks]

    def _read(self, ids: IntArray, positions: IntArray, start: tuple[str, int]) -> Read:
        """A sequence's rows. start: equal for sequences that begin alike"""
        import torch
        from safetensors.torch import load_file

        slots = [self.layers.index(layer_number(hook.name)) for hook in self.hooks]
        if not len(positions):
            empty = [torch.zeros(0, hook.d_in, dtype=getattr(torch, self.dtype)) for hook in self.hooks]
            return Read(empty, [np.zeros(0) for _ in self.hooks])
        path, end = self._paths[_key(ids)], int(positions.max()) + 1
        ids, hidden = ids[:end], load_file(path)["hidden_states"][:end]
        norms = [row_norms(hidden[:, slot]).numpy() for slot in slots]
        for hook, of_hook in zip(self.hooks, norms, strict=True):
            if np.isnan(of_hook).any():
                at = int(np.flatnonzero(np.isnan(of_hook))[0])
                raise InputError(
                    f"{path} has NaN or infinity {hook.where} at token {at}: start the server with --dtype bfloat16 or "
                    "float32, and export again"
                )
            if (of_hook == 0).any():
                at = int(np.flatnonzero(of_hook == 0)[0])
                raise InputError(f"{path} has only zeros {hook.where} at token {at}, which was not computed: {WHOLE}")
        self._check_start(path, ids, hidden, start)
        self._check_numbering(path, ids, hidden)
        return Read([hidden[positions, slot] for slot in slots], norms)

    def _check_start(self, path: Path, ids: IntArray, hidden: torch.Tensor, start: tuple[str, int]) -> None:
        """Raises InputError where rows differ at the tokens that two sequences start with."""
        n, rows, other = max(
            ((_n_alike(ids, earlier), rows, other) for earlier, rows, other in self._before.values()),
            key=lambda one: one[0],
            default=(0, hidden, path),
        )
        self._before[start] = ids, hidden, path
        if n and float(_relative(hidden[:n], rows[:n]).quantile(MOST_TOKENS, dim=0).max()) > ROUNDING:
            raise InputError(f"{path} and {other} start with the same {n} tokens, but have other rows there: {WHOLE}")

    def _check_numbering(self, path: Path, ids: IntArray, hidden: torch.Tensor) -> None:
        """Raises InputError where layer 0 depends on more than the token, or another one on nothing else."""
        import torch

        tokens, first, token_of = np.unique(ids, return_index=True, return_inverse=True)
        repeated = np.flatnonzero(first[token_of] != np.arange(len(ids)))
        for slot, layer in enumerate(self.layers):
            rows = hidden[:, slot, :N_COMPARED].float()
            if layer == EMBEDDING:
                known = [
                    self._embedding.setdefault(token, (rows[at].clone(), path))
                    for token, at in zip(tokens.tolist(), first, strict=True)
                ]
                apart = _relative(rows, torch.stack([row for row, _ in known])[token_of]) > SAME
                if bool(apart.any()):
                    at = int(apart.nonzero()[0, 0])
                    raise InputError(
                        f"layer {EMBEDDING} of {path} has other numbers for token {ids[at]} at position {at} than "
                        f"{known[token_of[at]][1]} had, so it is not the embedding: name the exported layers with "
                        f"--export-layer, or, if these are {listed(self.layers)}, {WHOLE}"
                    )
            elif len(repeated) >= LEAST_REPEATED:
                apart = _relative(rows[repeated], rows[first[token_of[repeated]]]) > SAME
                if not bool(apart.any()):
                    raise InputError(
                        f"layer {layer} of {path} has the same numbers wherever a token stands, so it is the embedding "
                        f"(layer {EMBEDDING}): name the exported layers with --export-layer"
                    )


def _key(ids: IntArray) -> bytes:
    return np.ascontiguousarray(ids, np.int32).tobytes()


def _relative(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Distance of each row [..., d] from another, relative to the other's norm."""
    import torch

    rows, others = rows.float(), others.float()
    apart: torch.Tensor = torch.linalg.vector_norm(rows - others, dim=-1)
    apart /= torch.linalg.vector_norm(others, dim=-1).clamp(min=1e-30)
    return apart


def _outline(path: Path) -> tuple[IntArray, list[int], str]:
    """Token ids, and shape and dtype of the hidden states, of one request's file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            ids, hidden = file.get_tensor("token_ids"), file.get_slice("hidden_states")
            return ids.flatten().numpy().astype(np.int32), hidden.get_shape(), hidden.get_dtype()
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} is no whole file of vLLM's ExampleHiddenStatesConnector ({one_line(error)}): wait until the "
            "server has written it, or delete it and export again"
        ) from error


def _difference(ids: IntArray, wanted: IntArray, shortest: int, longest: int) -> tuple[str, str] | None:
    """What a server did to the tokens of a request, and the remedy; None where it may have been anything.

    shortest, longest: tokens of these requests that are missing; a server that cuts prompts leaves short ones whole
    """
    n, n_wanted = len(ids), len(wanted)
    if n == n_wanted + 1 and (ids[1:] == wanted).all():
        return f"has {'BOS twice' if ids[0] == ids[1] else 'one token more'} at the start of the tokens", AS_IDS
    if n == n_wanted - 1 and (ids == wanted[1:]).all():
        return "lacks the first of the tokens", AS_IDS
    if 0 < n < shortest and ((ids == wanted[:n]).all() or (ids == wanted[-n:]).all()):
        remedy = f"give the server --max-model-len {longest + 1} or more, and leave truncate_prompt_tokens out"
        return f"has only {n} of the {n_wanted} tokens", remedy
    if n_wanted < n <= n_wanted + MOST_OUTPUT and (ids[:n_wanted] == wanted).all():
        return (
            f"has {n - n_wanted} tokens more than the {n_wanted}",
            "export again with max_tokens 1, or without include_output_tokens",
        )
    return None


def _likeness(ids: IntArray, wanted: IntArray) -> tuple[str, str] | None:
    """Where the tokens of a file differ from those of a request that start and end much like them, and the remedy."""
    at = _n_alike(ids, wanted)
    if at + _n_alike(ids[::-1], wanted[::-1]) <= len(wanted) // 2:
        return None
    return f"has other tokens from position {at} on than those", f"{AS_IDS}, of a {REQUESTS_FILE} of these options"


def _n_alike(ids: IntArray, others: IntArray) -> int:
    """Number of tokens with which both sequences start."""
    n = min(len(ids), len(others))
    differs = np.flatnonzero(ids[:n] != others[:n])
    return int(differs[0]) if len(differs) else n
