"""The residual stream of a Hugging Face decoder, up to the layer that is read and no further."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sts_fast.errors import InputError
from sts_fast.prompts import Prompt

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    IntArray = NDArray[np.int32]

# An attention sink's residual norm stands this far over the median of its sequence.
SINK_NORM_RATIO = 10.0
# With these in its config, a layer's output depends on how many layers there are: the model is loaded whole.
DEPTH_OPTIONS = ("scale_depth", "num_kv_shared_layers")
OTHER_TOWERS = ("vision", "visual", "audio", "expert", "encoder")


class _Reached(Exception):
    """Raised by the hook to leave the model's forward: nothing after the layer is needed."""


@dataclass(frozen=True)
class PairedRows:
    """Residual rows of some prompts, at the tokens that are read.

    prompts:    index of each prompt in the list that was captured
    base:       [n_read, d_in], tokens of the prompts without demonstrations
    base_of:    [n_read] int64, which prompt (index in the list) each row belongs to
    paired:     [n_pairs, d_in], those rows of `base` that have a partner with demonstrations
    demos:      [n_pairs, d_in], their partners, row by row
    paired_of:  [n_pairs] int64, which prompt each pair belongs to
    kept, kept_paired: per prompt, which of its `positions` and of its `paired` were not attention sinks
    """

    prompts: list[int]
    base: torch.Tensor
    base_of: NDArray[np.int64]
    paired: torch.Tensor
    demos: torch.Tensor
    paired_of: NDArray[np.int64]
    kept: list[NDArray[np.bool_]]
    kept_paired: list[NDArray[np.bool_]]


class Decoder:
    """A causal language model, read after one of its layers.

    model:   any Hugging Face decoder, in memory; only layers 0 to `layer` are run
    layer:   index of the decoder layer whose output is read
    name:    how errors call it
    context_length: most tokens a prompt may have; None where the model's config sets no limit

    Raises InputError where the model has no such layer.
    """

    def __init__(self, model: torch.nn.Module, layer: int, *, name: str = "the model") -> None:
        config = model.config.get_text_config()  # type: ignore[union-attr, operator]
        self.model, self.layer, self.name = model.eval(), layer, name
        self.d_in: int = config.hidden_size
        self.context_length: int | None = getattr(config, "max_position_embeddings", None)
        self.device = next(model.parameters()).device
        layers = _decoder_layers(model, config.num_hidden_layers)
        if not 0 <= layer < len(layers):
            raise InputError(f"{name} has layers 0 to {len(layers) - 1}, but layer {layer} is to be read")
        self._block = layers[layer]

    def residuals(self, sequences: Sequence[IntArray]) -> list[torch.Tensor]:
        """The residual stream after the layer for each sequence, from one forward pass with padding on the right.

        Each is [n_tokens, d_in] in the model's dtype and on its device. A causal model never looks to the right, so
        padding there changes no token before it, and needs no mask (which would slow attention down).
        """
        ids = padded_ids(self.model, sequences, name=self.name)
        rows = self.run(input_ids=ids.to(self.device), use_cache=False)
        return [rows[row, : len(sequence)] for row, sequence in enumerate(sequences)]

    def run(self, **inputs: Any) -> torch.Tensor:
        """[n_sequences, n_tokens, d_in] what the layer gives for these inputs of the model; nothing above it is run."""
        import torch

        captured: list[torch.Tensor] = []

        def hook(module: Any, args: Any, output: Any) -> None:
            captured.append(output[0] if isinstance(output, tuple) else output)
            raise _Reached

        handle = self._block.register_forward_hook(hook)
        try:
            with torch.inference_mode():
                self.model(**inputs)
        except _Reached:
            pass
        finally:
            handle.remove()
        return captured[0]


def padded_ids(model: torch.nn.Module, sequences: Sequence[IntArray], *, name: str = "the model") -> torch.Tensor:
    """[n_sequences, longest] int64 token ids, on the CPU, filled up with zeros on the right.

    name: how errors call the model. Raises InputError for a token that the model's embedding does not have.
    """
    import torch

    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    largest = max((int(sequence.max(initial=0)) for sequence in sequences), default=0)
    if embedding is not None and largest >= embedding.weight.shape[0]:
        raise InputError(
            f"{name} knows {embedding.weight.shape[0]} tokens, but its tokenizer gives token id {largest}: "
            "the tokenizer belongs to another model"
        )
    ids = torch.zeros((len(sequences), max(map(len, sequences))), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.from_numpy(sequence.astype(np.int64))
    return ids


def capture(
    decoder: Decoder, prompts: Sequence[Prompt], *, batch_tokens: int, other: Decoder | None = None
) -> Iterator[PairedRows]:
    """Runs prompts through the decoder, shortest first, and yields the rows read, a batch at a time.

    batch_tokens: most tokens of a padded batch; a prompt longer than that runs alone
    other: pairs each token with itself in this second model (the true shift after training) instead of with
        demonstrations; demos_ids is not looked at then

    Attention sinks (a residual norm over 10 times the median of the sequence) are left out, and so is a pair of which
    either token is one. Raises InputError where the model returns NaN or infinity.
    """
    import torch

    lengths = [len(p.base_ids) if other else max(len(p.base_ids), len(p.demos_ids)) for p in prompts]
    for batch in batches(lengths, batch_tokens):
        chosen = [prompts[i] for i in batch]
        base_residuals = decoder.residuals([p.base_ids for p in chosen])
        if other is not None:
            other_residuals = other.residuals([p.base_ids for p in chosen])
            pairs = [(p.positions, p.positions) for p in chosen]
        elif all(len(p.demos_ids) for p in chosen):
            other_residuals = decoder.residuals([p.demos_ids for p in chosen])
            pairs = [(p.paired, p.paired_demos) for p in chosen]
        else:
            other_residuals = [residual[:0] for residual in base_residuals]
            pairs = [(p.paired[:0], p.paired[:0]) for p in chosen]

        base, paired, demos, kept, kept_paired = [], [], [], [], []
        for prompt, (here, there), residual, other_residual in zip(
            chosen, pairs, base_residuals, other_residuals, strict=True
        ):
            for rows, model in ((residual, decoder), (other_residual, other or decoder)):
                if not bool(torch.isfinite(rows).all()):
                    raise InputError(
                        f"{model.name} gives NaN or infinity after layer {model.layer} for example {prompt.id}: "
                        "try --dtype float32"
                    )
            sinks, other_sinks = attention_sinks(residual), attention_sinks(other_residual)
            kept.append(~sinks[prompt.positions])
            kept_paired.append(~(sinks[here] | other_sinks[there]))
            base.append(residual[torch.from_numpy(prompt.positions[kept[-1]].astype(np.int64))])
            paired.append(residual[torch.from_numpy(here[kept_paired[-1]].astype(np.int64))])
            demos.append(other_residual[torch.from_numpy(there[kept_paired[-1]].astype(np.int64))])
        yield PairedRows(
            prompts=batch,
            base=_for_core(base),
            base_of=np.repeat(batch, [len(rows) for rows in base]),
            paired=_for_core(paired),
            demos=_for_core(demos),
            paired_of=np.repeat(batch, [len(rows) for rows in paired]),
            kept=kept,
            kept_paired=kept_paired,
        )


def attention_sinks(residual: torch.Tensor) -> NDArray[np.bool_]:
    """[n_tokens] which tokens of one sequence [n_tokens, d_in] have a norm over 10 times the sequence's median."""
    import torch

    norms = torch.linalg.vector_norm(residual.float(), dim=-1).double().cpu().numpy()
    return norms > SINK_NORM_RATIO * np.median(norms) if len(norms) else np.zeros(0, bool)


def _for_core(rows: list[torch.Tensor]) -> torch.Tensor:
    import torch

    joined = torch.cat(rows).cpu()
    return joined if joined.dtype in (torch.float32, torch.bfloat16) else joined.float()


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches whose padded size stays within batch_tokens, shortest first, equal lengths in order."""
    batch: list[int] = []
    for index in np.argsort(lengths, kind="stable").tolist():
        if batch and (len(batch) + 1) * lengths[index] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def load_decoder(source: str | Path, layer: int, *, dtype: str = "auto", device: str = "auto") -> Decoder:
    """Loads layers 0 to `layer` of a model; what lies above them, and the head, is never read into memory.

    The few architectures whose layers depend on how many there are (DEPTH_OPTIONS) are loaded whole.

    source: local folder or hub id
    dtype:  'float32', 'bfloat16', 'float16', or 'auto': float32 on the CPU, the checkpoint's own elsewhere
    device: 'cpu', 'cuda', 'cuda:1', ..., or 'auto': CUDA where there is one

    Raises InputError where the model cannot be loaded, lacks weights, or has no such layer.
    """
    from transformers import AutoModel

    config = load_config(source)
    n_layers = config.get_text_config().num_hidden_layers
    if not 0 <= layer < n_layers:
        raise InputError(f"{source} has layers 0 to {n_layers - 1}, but layer {layer} is to be read")
    text_config = config.get_text_config()
    if not any(getattr(text_config, name, None) for name in DEPTH_OPTIONS):
        _truncate(text_config, layer + 1)
    model = _load(AutoModel, source, config, dtype, device)
    return Decoder(model, layer, name=str(source))


def load_language_model(source: str | Path, *, dtype: str = "auto", device: str = "auto") -> torch.nn.Module:
    """Loads a whole causal language model, with its head; options and errors as for `load_decoder`."""
    from transformers import AutoModelForCausalLM

    return _load(AutoModelForCausalLM, source, load_config(source), dtype, device)


def _load(auto_class: Any, source: str | Path, config: PretrainedConfig, dtype: str, device: str) -> torch.nn.Module:
    import torch

    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise InputError(f"--device is auto, cpu, cuda or cuda:N, not '{device}'")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto" and device == "cpu":
        dtype = "float32"
    with _loading(source):
        model, info = auto_class.from_pretrained(
            source, config=config, dtype=dtype if dtype == "auto" else getattr(torch, dtype), output_loading_info=True
        )
    if info["missing_keys"]:
        raise InputError(
            f"{source} lacks the weights {', '.join(sorted(info['missing_keys'])[:3])}: the checkpoint is incomplete"
        )
    try:
        model = model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"{source} cannot be moved to the device '{device}': {_first_line(error)}") from error
    loaded: torch.nn.Module = model.eval()
    return loaded


def unembedding(model: torch.nn.Module, source: str | Path | None) -> torch.Tensor | None:
    """[vocabulary, d_in] the matrix that turns residuals into logits; None where it cannot be found.

    model: a model in memory, whole or truncated; source: the folder or hub id that a truncated one was loaded from
    """
    from safetensors import safe_open
    from transformers.utils.hub import cached_file

    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None and model.config.get_text_config().tie_word_embeddings:  # type: ignore[union-attr, operator]
        head = model.get_input_embeddings()  # type: ignore[operator]
    if head is not None:
        return head.weight.detach().cpu()  # type: ignore[no-any-return]
    if source is None:
        return None

    def find(name: str) -> str | None:
        found: str | None = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        return found

    index = find("model.safetensors.index.json")
    shards = json.loads(Path(index).read_text())["weight_map"] if index else {}
    for name in ("lm_head.weight", "embed_out.weight"):
        file = find(shards.get(name, "model.safetensors")) if not shards or name in shards else None
        if file is not None:
            with safe_open(file, framework="pt") as weights:
                if name in weights.keys():  # noqa: SIM118
                    return weights.get_tensor(name)  # type: ignore[no-any-return]
    return None


def load_config(source: str | Path) -> PretrainedConfig:
    """A model's config, from a local folder or the hub. Raises InputError where there is none."""
    from transformers import AutoConfig

    with _loading(source):
        config: PretrainedConfig = AutoConfig.from_pretrained(source)
    return config


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """A model's tokenizer, from a local folder or the hub. Raises InputError where there is none."""
    from transformers import AutoTokenizer

    with _loading(source):
        return AutoTokenizer.from_pretrained(source)


@contextmanager
def _loading(source: str | Path) -> Iterator[None]:
    """Turns whatever transformers raises into one sentence, and keeps its report on the layers left out to itself."""
    from transformers.utils import logging as transformers_logging

    if str(source).startswith(("/", ".", "~")) and not Path(source).is_dir():
        raise InputError(f"there is no model folder {source}: give a folder with config.json, or a hub id")
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    except Exception as error:  # OSError, ValueError, SafetensorError, RuntimeError, pickle errors, ...
        raise InputError(f"cannot load the model {source}: {_first_line(error)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _truncate(config: PretrainedConfig, n_layers: int) -> None:
    full = config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == full:  # one entry per layer, such as layer_types
            setattr(config, name, value[:n_layers])
    config.num_hidden_layers = n_layers


def _decoder_layers(model: torch.nn.Module, n_layers: int) -> torch.nn.ModuleList:
    """The list of decoder layers: the outermost ModuleList of that length outside vision, audio and experts."""
    import torch

    found = [
        (name.count("."), name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList)
        and len(module) == n_layers
        and not any(tower in name for tower in OTHER_TOWERS)
    ]
    if not found:
        raise InputError(f"no list of {n_layers} decoder layers was found in {type(model).__name__}")
    return min(found, key=lambda item: item[:2])[2]
