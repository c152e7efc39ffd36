"""A Hugging Face decoder, run up to the places that are read."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sts_fast.data.prompts import Prompt, PromptSet
from sts_fast.data.sets import Kind
from sts_fast.errors import InputError
from sts_fast.model import weights
from sts_fast.model.checkpoint import Checkpoint, checkpoint_of
from sts_fast.model.forward import ForwardPasses, PassRecord, Read, Sequences, run_batches
from sts_fast.model.hooks import Hook, find_hooks
from sts_fast.model.layer_trace import input_device
from sts_fast.model.lengths import forget_lengths, length_rule
from sts_fast.model.loading import Request, absent_text, load
from sts_fast.model.memory import running
from sts_fast.model.packing import check_vocabulary
from sts_fast.model.reader import PairedRows, Reader
from sts_fast.model.weights import DeviceMap
from sts_fast.ops.devices import moved
from sts_fast.places import layer_of, split_name

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from transformers import PretrainedConfig

    from sts_fast.statistics import Doubles, IntArray

# An attention sink's residual norm exceeds the median of its sequence by this factor.
SINK_NORM_RATIO = 10.0
# With these in its config, a layer's output depends on the number of layers: the model is loaded whole.
DEPTH_OPTIONS = ("scale_depth", "num_kv_shared_layers")


class _Reached(Exception):
    """Raised by the last hook to leave the model's forward: nothing after it is needed."""


class LanguageModel(Reader):
    """A causal language model, read at one or more places in one forward pass.

    model:   any Hugging Face decoder, in memory; it is run up to the last of its hooks
    places:  hook names as `find_hooks` knows them, or the index of a layer for its output
    name:    its name in errors
    source:  folder or hub id that it was loaded from, if any
    hooks:   the places found in the model, in the order of `places`
    passes:  its forward passes, with their strategy, size and number
    context_length: most tokens of a prompt; None where the model's config sets no limit
    dtype:   of its weights
    revision: commit on the hub, if it came from there

    Raises InputError where the model has no such place.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *places: str | int,
        name: str = "the model",
        source: str | Path | None = None,
    ) -> None:
        config = model.config.get_text_config()  # type: ignore[union-attr, operator]
        self.model, self.name, self.source = model.eval(), name, source
        self.context_length: int | None = getattr(config, "max_position_embeddings", None)
        self.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        self.revision: str | None = getattr(model.config, "_commit_hash", None)
        self.device = input_device(model)
        self.hooks: list[Hook] = find_hooks(model, places, name=name)
        self.lengths = length_rule(config)
        self.passes = ForwardPasses(self)

    def rows(self, kind: Kind, prompt_set: PromptSet, other: Reader | None = None) -> Iterator[list[PairedRows]]:
        if not isinstance(other, LanguageModel | None):
            raise TypeError("the model after training is read by a LanguageModel")
        return capture(self, prompt_set.prompts, other=other)

    def settle(self, sets: Sequence[PromptSet]) -> None:
        """Chooses how prompts are run by the longest of several sets, whichever of them is read first."""
        for ids, read in (("base_ids", "positions"), ("demos_ids", "paired_demos")):

            def length(prompt: Prompt, ids: str = ids, read: str = read) -> int:
                return len(getattr(prompt, ids)) if len(getattr(prompt, read)) else 0

            longest = max(sets, key=lambda of: max(map(length, of.prompts), default=0))
            draw = max(longest.prompts, key=length).draw
            prompts = [prompt for prompt in longest.prompts if prompt.draw == draw]
            if any(map(length, prompts)):
                self.passes.prepare([getattr(p, ids) for p in prompts], [getattr(p, read) for p in prompts])

    def sample(self, prompt_set: PromptSet, beside: Sequence[str], n_tokens: int) -> dict[str, torch.Tensor]:
        import torch

        chosen: list[Prompt] = []
        for prompt in prompt_set.prompts:
            if sum(len(earlier.base_ids) for earlier in chosen) + len(prompt.base_ids) > 2 * n_tokens and chosen:
                break
            chosen.append(prompt)
        places = sorted({*(hook.name for hook in self.hooks), *filter(self._has, beside)})
        reader = LanguageModel(self.model, *places, name=self.name)
        rows: dict[str, dict[int, torch.Tensor]] = {place: {} for place in places}
        for batch in batches([len(prompt.base_ids) for prompt in chosen], 2 * n_tokens):
            of_places = reader.residuals([chosen[i].base_ids for i in batch])
            seen = dict(zip(places, of_places, strict=True))
            for row, i in enumerate(batch):
                read = torch.from_numpy(chosen[i].positions.astype(np.int64))
                kept = torch.ones(len(read), dtype=torch.bool)
                for hook in self.hooks:
                    norms = seen[hook.name][row].float().norm(dim=-1).cpu()
                    kept &= norms[read] <= SINK_NORM_RATIO * norms.median()
                for place in places:
                    rows[place][i] = seen[place][row].cpu()[read[kept]].float()
        return {place: torch.cat([of[i] for i in range(len(chosen))])[:n_tokens] for place, of in rows.items()}

    def _has(self, place: str) -> bool:
        """True if the model has the place, and runs it for the hooks anyway."""
        layers = [hook.layer for hook in self.hooks if hook.layer is not None]
        layer = split_name(place)[1]
        if layer is None or layer > max(layers, default=-1):
            return False
        try:
            return bool(find_hooks(self.model, [place], name=self.name))
        except InputError:  # a forecast does not need it
            return False

    def weights_sha256(self, hook: Hook | None = None) -> str:
        read = self.hooks if hook is None else [hook]
        layers = [hook_read.layer for hook_read in read if hook_read.layer is not None]
        return weights.weights_sha256(self.model, max(layers) if len(layers) == len(read) else None)

    def unembedding(self) -> torch.Tensor | None:
        return weights.unembedding(self.model, self.source)

    def forward_passes(self) -> PassRecord:
        return self.passes.summary()

    def say_passes(self) -> None:
        self.passes.say_summary()

    def residuals(self, sequences: Sequence[IntArray]) -> list[list[torch.Tensor]]:
        """Activations by hook and sequence, from one forward pass with padding on the right.

        There is one more pass for each further regime of the sequences' lengths; see LengthRule.
        Each is [n_tokens, d_in] in the model's dtype, on the hook's device. In a causal model, padding on the right
        changes no token before it. It needs no mask, which would slow attention down.
        """
        of_sequences: dict[int, list[torch.Tensor]] = {}
        for group in self.lengths.groups([len(sequence) for sequence in sequences]):
            ids = padded_ids(self.model, [sequences[i] for i in group], name=self.name)
            of_hooks = self.run(input_ids=ids.to(self.device), use_cache=False)
            of_sequences |= {i: [rows[row, : len(sequences[i])] for rows in of_hooks] for row, i in enumerate(group)}
        return [[of_sequences[i][hook] for i in range(len(sequences))] for hook in range(len(self.hooks))]

    def run(self, **inputs: Any) -> list[torch.Tensor]:
        """Activations by hook, each [n_sequences, n_tokens, d_in], from one forward pass that stops at the last hook.

        inputs: arguments of the model's forward
        Raises InputError where the model does not run a hook, or fails.
        """
        import torch

        seen: dict[int, torch.Tensor] = {}

        def saw(i: int, value: torch.Tensor) -> None:
            if len(seen) + (i not in seen) == len(self.hooks):
                seen[i] = value
                raise _Reached
            seen[i] = value.clone()  # later modules may write into it

        if self.lengths.each_above is not None:
            forget_lengths(self.model)
        handles = [hook.attach(self.model, partial(saw, i)) for i, hook in enumerate(self.hooks)]
        try:
            with running(self.name), suppress(_Reached), torch.inference_mode():
                self.model(**inputs)
        finally:
            for handle in handles:
                handle.remove()
        for i, hook in enumerate(self.hooks):
            if i not in seen:
                raise InputError(f"{self.name} never runs {hook.path}: read another module")
        return [seen[i] for i in range(len(self.hooks))]


def padded_ids(model: torch.nn.Module, sequences: Sequence[IntArray], *, name: str = "the model") -> torch.Tensor:
    """[n_sequences, longest] int64 token ids on the CPU, padded with zeros on the right.

    name: the model's name in errors
    Raises InputError for a token that the model's embedding does not have.
    """
    import torch

    check_vocabulary(model, sequences, name=name)
    ids = torch.zeros((len(sequences), max(map(len, sequences))), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.from_numpy(sequence.astype(np.int64))
    return ids


def capture(
    decoder: LanguageModel, prompts: Sequence[Prompt], *, other: LanguageModel | None = None, n_done: int = 0
) -> Iterator[list[PairedRows]]:
    """Runs prompts through the decoder, shortest first, and yields the rows of each batch by hook.

    other:  second model, in which each token is paired with itself (the true shift after training) instead of with
            demonstrations; demos_ids is ignored then
    n_done: number of prompts to skip, the first ones in the order of yielding

    Attention sinks are left out, and so are pairs that contain one. A token is a sink where its norm at the hook
    exceeds 10 times the median of its sequence up to the last token read. `decoder.passes` decides how prompts are
    batched; those behind one draw of demonstrations run together, because they share their start, the first draw
    first. A prompt that gives NaN or infinity is run again alone; raises InputError where it does so again.
    """
    of_draws: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        of_draws.setdefault(prompt.draw, []).append(i)
    for _, of_draw in sorted(of_draws.items()):
        behind = [prompts[i] for i in of_draw]
        if n_done < len(behind):
            for of_hooks in _capture_draw(decoder, behind, other, n_done):
                yield [rows.at(np.asarray(of_draw)) for rows in of_hooks]
        n_done = max(0, n_done - len(behind))


def _capture_draw(
    decoder: LanguageModel, prompts: Sequence[Prompt], other: LanguageModel | None, n_done: int
) -> Iterator[list[PairedRows]]:
    ids, positions = [p.base_ids for p in prompts], [p.positions for p in prompts]
    sides, partners = [decoder.passes.prepare(ids, positions)], [(p.paired[:0], p.paired[:0]) for p in prompts]
    if other is not None:
        sides.append(other.passes.prepare(ids, positions))
        partners = [(p.positions, p.positions) for p in prompts]
    elif prompts and all(len(p.demos_ids) for p in prompts):
        sides.append(decoder.passes.prepare([p.demos_ids for p in prompts], [p.paired_demos for p in prompts]))
        partners = [(p.paired, p.paired_demos) for p in prompts]
    for batch, reads in run_batches(*sides, n_done=n_done):
        for side, of_side in zip(sides, reads, strict=True):
            _mend(side, batch, of_side, prompts)
        yield [rows_read(hook, batch, prompts, partners, reads) for hook in range(len(decoder.hooks))]


def _mend(side: Sequences, batch: list[int], reads: list[Read], prompts: Sequence[Prompt]) -> None:
    """Runs the prompts that gave NaN or infinity again, each alone, because numbers may overflow in a batch only.

    Raises InputError where one gives them alone, too.
    """
    for slot, index in enumerate(batch):
        if not any(np.isnan(norms).any() for norms in reads[slot].norms):
            continue
        model = side.passes.runnable
        reads[slot] = side.passes.alone(side.ids[index], side.positions[index])
        for hook, norms in zip(model.hooks, reads[slot].norms, strict=True):
            if np.isnan(norms).any():
                raise InputError(
                    f"{model.name} gives NaN or infinity {hook.where} for example {prompts[index].id}: "
                    "try --dtype float32"
                )
        side.passes.say(
            f"{model.name} gave NaN or infinity for example {prompts[index].id} in a batch, but not alone: it is used"
        )


def rows_read(
    hook: int,
    batch: list[int],
    prompts: Sequence[Prompt],
    partners: Sequence[tuple[IntArray, IntArray]],
    reads: list[list[Read]],
) -> PairedRows:
    """One hook's rows at the tokens that are read, without the attention sinks."""
    base, demos, kept, kept_paired, pair_at = [], [], [], [], []
    n_read = 0
    for index, *of_sides in zip(batch, *reads, strict=True):
        positions, (here, there) = prompts[index].positions, partners[index]
        rows, others = of_sides[0].rows[hook], of_sides[-1].rows[hook]
        sinks, other_sinks = (attention_sinks(read.norms[hook]) for read in (of_sides[0], of_sides[-1]))
        kept.append(~sinks[positions])
        kept_paired.append(~(sinks[here] | other_sinks[there]))
        base.append(_rows_at(rows, np.flatnonzero(kept[-1])))
        # Of the tokens that are read, those before one of a pair stand before it in `base`.
        in_pair = np.flatnonzero(np.isin(positions, here))[kept_paired[-1]]
        pair_at.append(n_read + (np.cumsum(kept[-1]) - 1)[in_pair])
        n_read += int(kept[-1].sum())
        demos.append(_rows_at(others, np.flatnonzero(kept_paired[-1])))
    return PairedRows(
        prompts=batch,
        base=_for_core(base),
        base_of=np.repeat(batch, [len(rows) for rows in base]),
        demos=_for_core(demos),
        pair_at=np.concatenate([np.zeros(0, np.int64), *pair_at]),
        kept=kept,
        kept_paired=kept_paired,
    )


def attention_sinks(norms: Doubles) -> NDArray[np.bool_]:
    """[n_tokens] bool, true for tokens whose norm exceeds 10 times the median of norms [n_tokens] of one sequence."""
    return norms > SINK_NORM_RATIO * np.median(norms) if len(norms) else np.zeros(0, bool)


def _rows_at(rows: torch.Tensor, at: NDArray[np.int64]) -> torch.Tensor:
    import torch

    return rows[moved(torch.from_numpy(at), rows.device)]


def _for_core(rows: list[torch.Tensor]) -> torch.Tensor:
    import torch

    joined = torch.cat(rows)
    if joined.device.type != "cpu":
        return joined  # features are computed where they are
    return joined if joined.dtype in (torch.float32, torch.bfloat16) else joined.float()


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Yields batches of indices, shortest sequences first and equal lengths in order.

    A batch padded to its longest sequence has at most batch_tokens tokens, unless it is a single sequence.
    """
    batch: list[int] = []
    for index in np.argsort(lengths, kind="stable").tolist():
        if batch and (len(batch) + 1) * lengths[index] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def load_decoder(
    source: str | Path | Checkpoint,
    *places: str | int,
    dtype: str = "auto",
    device: str = "auto",
    device_map: DeviceMap | None = None,
) -> LanguageModel:
    """Loads a model up to the last layer that is read, without the layers above and the head.

    The few architectures whose layers depend on the number of layers (DEPTH_OPTIONS) are loaded whole, and so is a
    model that is read outside its layers. An adapter is merged into its base, which keeps its head for that.

    source: local folder or hub id, GGUF file, folder of an adapter, or any of them as a Checkpoint
    places: places to read; see LanguageModel
    dtype:  'float32', 'bfloat16', 'float16', or 'auto': float32 on the CPU, the checkpoint's own elsewhere
    device: 'cpu', 'cuda', 'cuda:1', ..., or 'auto': CUDA if available
    device_map: spreads the model over devices instead; see weights.Placement

    Raises InputError where the model cannot be loaded, lacks weights that are read, has weights that were not
    understood, or has no such place.
    """
    from transformers import AutoModel, AutoModelForCausalLM

    checkpoint = checkpoint_of(source)
    config = copy.deepcopy(checkpoint.config)
    text_config = config.get_text_config()
    layers = [layer_of(place, text_config.num_hidden_layers, name=str(checkpoint)) for place in places]
    last = max((layer for layer in layers if layer is not None), default=-1)
    if None not in layers and not any(getattr(text_config, name, None) for name in DEPTH_OPTIONS):
        _truncate(text_config, last + 1)
    request = Request(text_config.num_hidden_layers, dtype, device, device_map)
    loaded = load(checkpoint, AutoModel if checkpoint.adapter is None else AutoModelForCausalLM, config, request)
    decoder = LanguageModel(loaded.model, *places, name=str(checkpoint), source=checkpoint.folder)
    for file, names in loaded.absent.items():
        _check_never_run(decoder, checkpoint, file, names)
    return decoder


def _check_never_run(decoder: LanguageModel, checkpoint: Checkpoint, file: str, names: list[str]) -> None:
    """Raises InputError where weights whose file is not there are needed to reach the hooks."""

    def needed(module: Any, args: Any) -> None:
        raise InputError(absent_text(checkpoint, file, names))

    parts = {name.rpartition(".")[0] for name in names}
    handles = [decoder.model.get_submodule(part).register_forward_pre_hook(needed) for part in parts]
    try:
        decoder.residuals([np.zeros(2, np.int32)])
    finally:
        for handle in handles:
            handle.remove()


def load_language_model(
    source: str | Path | Checkpoint,
    *,
    dtype: str = "auto",
    device: str = "auto",
    device_map: DeviceMap | None = None,
) -> torch.nn.Module:
    """Loads a whole causal language model, with its head; options and errors as for `load_decoder`."""
    from transformers import AutoModelForCausalLM

    checkpoint = checkpoint_of(source)
    config = copy.deepcopy(checkpoint.config)
    request = Request(config.get_text_config().num_hidden_layers, dtype, device, device_map)
    loaded = load(checkpoint, AutoModelForCausalLM, config, request)
    for file, names in loaded.absent.items():
        raise InputError(absent_text(checkpoint, file, names))
    return loaded.model


def _truncate(config: PretrainedConfig, n_layers: int) -> None:
    full = config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == full:  # one entry per layer, such as layer_types
            setattr(config, name, value[:n_layers])
    config.num_hidden_layers = n_layers
