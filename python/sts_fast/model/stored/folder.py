"""A folder of captured activations, read instead of the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sts_fast.data.examples import Example
from sts_fast.data.options import annotations_of
from sts_fast.data.prompts import PromptSet
from sts_fast.data.sets import Kind, Sampling
from sts_fast.data.template import PromptTemplate
from sts_fast.errors import InputError
from sts_fast.model.checkpoint import Checkpoint
from sts_fast.model.forward import PassRecord
from sts_fast.model.hooks import Hook
from sts_fast.model.reader import PairedRows, Reader
from sts_fast.model.sae_check import check_width
from sts_fast.model.stored.index import (
    MODEL_FOLDER,
    PROMPTS_FILE,
    Index,
    Shard,
    StoredSet,
    damaged,
    examples_sha256,
    read_prompts,
    starts_with_bos,
)
from sts_fast.model.stored.shards import check_rows, load_tensors, mask_of
from sts_fast.ops.devices import device_named
from sts_fast.places import split_name
from sts_fast.sae import SAE

if TYPE_CHECKING:
    import torch


class Activations(Reader):
    """A folder of captured activations, which replaces the model that computed them.

    name, dtype, revision, context_length: of the model, see Reader
    hooks:  the hooks that are read, in the order of the SAEs given to `read_at`; before that, all captured ones
    device: device of the rows, as for `load_decoder`; trust_remote_code: of the model's config, see Checkpoint

    Raises InputError where the folder is damaged, or was written by another version.
    """

    def __init__(self, folder: str | Path, *, device: str = "cpu", trust_remote_code: bool = False) -> None:
        self.folder = Path(folder)
        self._index = Index.load(self.folder)
        self.hooks, self._stored = self._index.hooks, list(range(len(self._index.hooks)))
        self.name, self.dtype = str(self._index.model["name"]), str(self._index.model["dtype"])
        self.revision: str | None = self._index.model.get("revision")
        if not (self.folder / MODEL_FOLDER).is_dir():
            raise InputError(
                f"{self.folder} lacks the folder {MODEL_FOLDER} with the model's config and tokenizer: put them there, "
                "or capture again"
            )
        config = Checkpoint(self.folder / MODEL_FOLDER, trust_remote_code=trust_remote_code).config
        self.context_length: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
        self._device = device
        self._chosen: dict[tuple[Kind, str], tuple[StoredSet, PromptSet]] = {}

    def summary(self) -> str:
        """Description of the captured prompts, hooks and size in words."""
        n_prompts = sum(stored_set.n_prompts for stored_set in self._index.sets)
        n_bytes = sum(path.stat().st_size for path in self.folder.rglob("*.safetensors"))
        hooks = ", ".join(hook.name for hook in self._index.hooks)
        return f"{n_prompts:,} prompts of {len(self._index.sets)} sets at {hooks} ({n_bytes / 1e6:,.0f} MB)"

    def read_at(self, saes: Sequence[SAE]) -> None:
        """Selects the SAEs' hooks. Raises InputError where one was not captured, or has another width."""
        self.hooks, self._stored = [], []
        captured = self._index.hooks
        for sae in saes:
            same = (i for i, hook in enumerate(captured) if split_name(hook.name) == split_name(sae.hook_name))
            at = next(same, None)
            if at is None:
                raise InputError(
                    f"the SAE {sae.source} reads at {sae.hook_name}, but {self.folder} contains "
                    f"{', '.join(hook.name for hook in captured)}: capture again with --hook {sae.hook_name}"
                )
            check_width(sae, captured[at], self.name)
            if sae.hook_name not in [hook.name for hook in self.hooks]:
                self.hooks.append(replace(captured[at], name=sae.hook_name))
                self._stored.append(at)

    def _check_sampling(self, sampling: Sampling, *, domain_shots: bool) -> None:
        """Raises InputError where prompts were sampled with other settings; domain_shots: also compare domain_shots."""
        for name in annotations_of(Sampling):
            chosen = getattr(sampling, name)
            captured = self._index.settings.get(name, chosen)
            if chosen != captured and (domain_shots or name != "domain_shots"):
                option = "--" + name.replace("_", "-")
                captured = 0 if captured is None else captured
                raise InputError(
                    f"{self.folder} was captured with {option} {captured}, not {0 if chosen is None else chosen}: "
                    f"give {option} {captured}, or capture again"
                )

    def check_template(self, template: PromptTemplate, sae: SAE) -> None:
        """Raises InputError where the prompts have BOS and the SAE's training texts had none, or the reverse."""
        starts = starts_with_bos(template)
        if self._index.settings.get("starts_with_bos", starts) != starts:
            raise InputError(
                f"the prompts in {self.folder} start {'without' if starts else 'with'} BOS, but the SAE {sae.source} "
                f"was trained on texts {'with' if starts else 'without'} it: capture again with --sae {sae.source}"
            )

    def prompts(
        self,
        kind: Kind,
        name: str,
        examples: Sequence[Example],
        demos: Sequence[Example] | None,
        sampling: Sampling,
        *,
        show: bool,
    ) -> PromptSet:
        """The prompts of a set as captured; a training set may have another name now.

        show: with demonstrations
        Raises InputError where the set was not captured, or only in part, or without the demonstrations, or from other
        examples, or with other settings of the sampling.
        """
        self._check_sampling(sampling, domain_shots=kind == "domain")
        of_kind = [stored_set for stored_set in self._index.sets if stored_set.kind == kind]
        digest = examples_sha256(examples)
        chosen = next((stored_set for stored_set in of_kind if stored_set.name == name), None)
        if chosen is None and kind == "train":
            chosen = next((stored_set for stored_set in of_kind if stored_set.examples_sha256 == digest), None)
        if chosen is None:
            title = "training set" if kind == "train" else "domain"
            raise InputError(
                f"the {title} '{name}' was not captured in {self.folder}, which contains "
                f"{', '.join(stored_set.name for stored_set in of_kind) or 'none'}: capture again with it"
            )
        for subject, captured, given in (
            ("examples", chosen.examples_sha256, digest),
            ("demonstrations", chosen.demos_sha256, "own" if demos is None else examples_sha256(demos)),
        ):
            if captured is not None and captured != given:
                raise InputError(
                    f"{chosen.title} was captured in {self.folder} with other {subject}: give the same, or capture "
                    "again"
                )
        if sorted(i for shard in chosen.shards or [] for i in shard.prompts) != list(range(chosen.n_prompts)):
            raise InputError(
                f"{self.folder} has {chosen.n_captured} of the {chosen.n_prompts} prompts of {chosen.title}: run the "
                "same sts-fast capture again to finish it"
            )
        prompts = read_prompts(self.folder / chosen.folder / PROMPTS_FILE, chosen)
        if show and not all(len(prompt.demos_ids) for prompt in prompts):
            remedy = "--dims active" if kind == "train" else "--estimators act"
            raise InputError(
                f"{chosen.title} was captured in {self.folder} without demonstrations: give {remedy}, or capture again "
                "with them"
            )
        if not show:
            prompts = [
                replace(p, demos_ids=p.demos_ids[:0], paired=p.paired[:0], paired_demos=p.paired_demos[:0], draw=0)
                for p in prompts
            ]
        prompt_set = PromptSet(
            name, prompts, chosen.n_too_long, chosen.n_unanswered, chosen.warnings, chosen.shown if show else ()
        )
        self._chosen[kind, name] = chosen, prompt_set
        return prompt_set

    def rows(self, kind: Kind, prompt_set: PromptSet, other: Reader | None = None) -> Iterator[list[PairedRows]]:
        """Yields the rows of a set, as `capture` did, one shard at a time, for each hook.

        prompt_set: as returned by `prompts`
        Raises InputError where a shard is damaged, and TypeError with another reader.
        """
        if other is not None:
            raise TypeError("stored activations are not paired with another model's")
        chosen, _ = self._chosen[kind, prompt_set.name]
        for shard in chosen.shards or []:
            yield self._read_shard(shard, prompt_set, self._stored, self.hooks)

    def sample(self, prompt_set: PromptSet, beside: Sequence[str], n_tokens: int) -> dict[str, torch.Tensor]:
        """Rows of a training set's first tokens at every captured hook; see Reader."""
        import torch

        chosen, _ = self._chosen["train", prompt_set.name]
        captured = self._index.hooks
        parts: list[list[torch.Tensor]] = [[] for _ in captured]
        for shard in chosen.shards or []:
            if parts[0] and sum(map(len, parts[0])) >= n_tokens:
                break
            of_hooks = self._read_shard(shard, prompt_set, list(range(len(captured))), captured)
            kept = [np.concatenate(rows.kept) for rows in of_hooks]
            everywhere = np.logical_and.reduce(kept)
            for part, rows, of_hook in zip(parts, of_hooks, kept, strict=True):
                part.append(rows.base[torch.from_numpy(everywhere[of_hook]).to(rows.base.device)].float().cpu())
        by_place = {hook.name: torch.cat(part)[:n_tokens] for hook, part in zip(captured, parts, strict=True)}
        requested = zip(self.hooks, self._stored, strict=True)
        return {**by_place, **{hook.name: by_place[captured[at].name] for hook, at in requested}}

    def weights_sha256(self, hook: Hook | None = None) -> str | None:
        digest: str | None = self._index.model.get("weights_sha256")
        return digest

    def unembedding(self) -> None:
        return None

    def forward_passes(self) -> PassRecord:
        return {
            "strategy": None,
            "why": "activations were read from files",
            "batch_tokens": None,
            "n_passes": 0,
            "n_tokens": 0,
            "seconds": 0.0,
            "tokens_per_second": None,
        }

    def say_passes(self) -> None:
        pass

    def _read_shard(
        self, shard: Shard, prompt_set: PromptSet, stored: Sequence[int], hooks: Sequence[Hook]
    ) -> list[PairedRows]:
        shard.check(self.folder)
        path = self.folder / shard.file
        prompts = [prompt_set.prompts[i] for i in shard.prompts]
        shows = bool(prompts) and all(len(prompt.demos_ids) for prompt in prompts)
        names = ["base", "kept", *(("demos", "kept_paired") if shows else ())]
        tensors = load_tensors(path, [f"{name}.{i}" for i in stored for name in names])
        of_hooks = []
        for i, hook in zip(stored, hooks, strict=True):
            base, kept = tensors[f"base.{i}"], mask_of(path, f"kept.{i}", tensors, [len(p.positions) for p in prompts])
            demos, kept_paired = base[:0], [np.zeros(0, bool)] * len(prompts)
            if shows:
                demos = tensors[f"demos.{i}"]
                kept_paired = mask_of(path, f"kept_paired.{i}", tensors, [len(p.paired) for p in prompts])
            pairs = [
                np.isin(p.positions[of_prompt], p.paired[of_pairs])
                for p, of_prompt, of_pairs in zip(prompts, kept, kept_paired, strict=True)
            ]
            n_pairs = [int(of_pairs.sum()) for of_pairs in kept_paired]
            if n_pairs != [int(of_prompt.sum()) for of_prompt in pairs]:
                raise damaged(path, f"kept_paired.{i} keeps tokens that kept.{i} leaves out")
            n_read = [int(of_prompt.sum()) for of_prompt in kept]
            for name, rows, n in (("base", base, sum(n_read)), ("demos", demos, sum(n_pairs))):
                check_rows(path, f"{name}.{i}", rows, n, hook.d_in)
            base, demos = self._for_core(base), self._for_core(demos)
            in_pairs = np.flatnonzero(np.concatenate([np.zeros(0, bool), *pairs]))
            of_hooks.append(
                PairedRows(
                    prompts=shard.prompts,
                    base=base,
                    base_of=np.repeat(np.asarray(shard.prompts, np.int64), n_read),
                    demos=demos,
                    pair_at=in_pairs,
                    kept=kept,
                    kept_paired=kept_paired,
                )
            )
        return of_hooks

    def _for_core(self, rows: torch.Tensor) -> torch.Tensor:
        import torch

        rows = rows.to(device_named(self._device))
        return rows if rows.dtype in (torch.float32, torch.bfloat16) else rows.float()
