"""Adapters of PEFT (LoRA, DoRA, rsLoRA, IA3 and what else can be merged), merged into the weights of their base."""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING, Any

from sts_fast.errors import InputError, listed
from sts_fast.model.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch

PREFIX = "base_model.model."
# Options of LoRA with which it does more than change weights.
NOT_MERGED = {
    "alora_invocation_tokens": "works behind its invocation tokens only",
    "layer_replication": "repeats layers of its base",
}
COPIES = re.compile(r"\.(modules_to_save|original_module)\b")


def merge(checkpoint: Checkpoint, model: Any, n_layers: int) -> torch.nn.Module:
    """The base with the adapter merged into its weights.

    checkpoint: of the adapter
    model:    its base, a causal language model with its head and the first n_layers of its layers; changed in place

    The adapter's tensors for layers above are left out. Raises InputError where the adapter cannot be merged, or has
    tensors that the base has no place for, or the other way round.
    """
    import peft

    with warnings.catch_warnings(), checkpoint.loading():
        warnings.simplefilter("ignore")  # what PEFT warns of is checked here
        config = peft.PeftConfig.from_pretrained(checkpoint.folder)
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        reasons = {f"{kind} with {key}": why for key, why in NOT_MERGED.items() if getattr(config, key, None)}
        if config.is_prompt_learning or kind in ("ADAPTION_PROMPT", "XLORA"):
            reasons[kind] = "adds to prompts or layers"
        if kind == "BOFT":
            reasons[kind] = "compiles CUDA code when it is read"
        for name, why in reasons.items():
            raise InputError(
                f"{checkpoint} is an adapter of the kind {name}, which {why} and cannot be merged into weights: give "
                "one that changes weights, such as plain LoRA"
            )
        if any(parameter.is_meta for parameter in model.parameters()):
            raise InputError(
                f"the adapter {checkpoint} cannot be merged into weights on disk: merge it with PEFT's "
                "merge_and_unload and give the merged model, or leave out --device-map"
            )
        tensors = peft.utils.load_peft_weights(checkpoint.folder, device="cpu")
        kept = {name: tensor for name, tensor in tensors.items() if (_layer(name) or 0) < n_layers}
        if not kept:
            if not tensors:
                raise InputError(f"the adapter {checkpoint} has no tensors: copy it again")
            return model  # type: ignore[no-any-return]  # it changes none of the layers that are read
        _resize(model, kept)
        # An adapter of the decoder without its head names the modules from there.
        parts = {name for name, _ in model.named_children()}
        target = model if any(_plain(name).partition(".")[0] in parts for name in kept) else model.base_model
        wrapped = peft.PeftModel.from_pretrained(target, checkpoint.folder, config=config)
        loaded: Any = peft.set_peft_model_state_dict(wrapped, kept)
        # Where tokens were added, PEFT saves modules that are trained whole more than once.
        copies = {name for name in tensors if COPIES.search(name) and COPIES.sub("", name) in tensors}
        strange = sorted(set(loaded.unexpected_keys) - copies)
        if strange:
            raise InputError(
                f"the adapter {checkpoint} has tensors that its base {checkpoint.base} has no place for, such as "
                f"{listed(strange[:3])}: it belongs to another model"
            )
        own = {_plain(name) for name in peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)}
        missing = sorted(own - {_plain(name) for name in kept})
        if missing:
            raise InputError(
                f"the adapter {checkpoint} lacks tensors that its config names, such as {listed(missing[:3])}: copy it "
                "again"
            )
        merged = wrapped.merge_and_unload(progressbar=False, safe_merge=True)
    for parameter in merged.parameters():
        parameter.requires_grad_(False)
    return model if target is not model else merged  # type: ignore[no-any-return]


def _plain(name: str) -> str:
    return name.removeprefix(PREFIX)


def _layer(name: str) -> int | None:
    """Index of the decoder layer; None for a tensor outside of the layers."""
    number = re.search(r"\.(\d+)\.", name)
    return int(number[1]) if number else None


def _resize(model: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Gives the base as many tokens as the adapter's own embedding has, where tokens were added for the training."""
    embedding = model.get_input_embeddings()
    path = next(name for name, module in model.named_modules() if module is embedding)
    for name, tensor in tensors.items():
        if _plain(name).endswith(f"{path.rpartition('.')[2]}.weight") and tensor.ndim == 2:
            if len(tensor) != len(embedding.weight) and tensor.shape[1] == embedding.weight.shape[1]:
                model.resize_token_embeddings(len(tensor), mean_resizing=False)
            return
