"""Readers of prompts for a forecast: a language model, or activations that were captured of one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from sts_fast.data.prompts import PromptSet
from sts_fast.data.sets import Kind
from sts_fast.model.forward import PassRecord
from sts_fast.model.hooks import Hook
from sts_fast.sae import SAE

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray


@dataclass(frozen=True)
class PairedRows:
    """One hook's rows of some prompts, at the tokens that are read.

    prompts:    index of each prompt in the list that was captured
    base:       [n_read, d_in], tokens of the prompts without demonstrations, prompt by prompt
    base_of:    [n_read] int64, which prompt (index in the list) each row belongs to
    demos:      [n_pairs, d_in], tokens with demonstrations that are tokens of `base` too
    pair_at:    [n_pairs] int64, the row of `base` with the same token
    kept, kept_paired: per prompt, which of its `positions` and of its `paired` were not attention sinks
    """

    prompts: list[int]
    base: torch.Tensor
    base_of: NDArray[np.int64]
    demos: torch.Tensor
    pair_at: NDArray[np.int64]
    kept: list[NDArray[np.bool_]]
    kept_paired: list[NDArray[np.bool_]]

    def at(self, indices: NDArray[np.int64]) -> PairedRows:
        """The same rows, where the prompts of this list are those at `indices` of another."""
        return replace(
            self,
            prompts=indices[self.prompts].tolist(),
            base_of=indices[self.base_of],
        )

    @property
    def paired(self) -> torch.Tensor:
        """[n_pairs, d_in] those rows of `base` that have a partner with demonstrations, in the order of `demos`."""
        import torch

        return self.base[torch.from_numpy(self.pair_at).to(self.base.device)]

    @property
    def paired_of(self) -> NDArray[np.int64]:
        """[n_pairs] which prompt each pair belongs to."""
        return self.base_of[self.pair_at]


class Reader(Protocol):
    """Reads prompts at the places of some SAEs; LanguageModel and stored.Activations are readers.

    name, dtype, revision: of the model; revision is its commit on the hub, where that is known
    context_length: most tokens a prompt may have; None where the model sets no limit
    hooks: the places that are read
    """

    name: str
    dtype: str
    revision: str | None
    context_length: int | None
    hooks: list[Hook]

    def hook(self, sae: SAE) -> Hook:
        """The place that an SAE reads."""
        return next(hook for hook in self.hooks if hook.name == sae.hook_name)

    def rows(self, kind: Kind, prompt_set: PromptSet, other: Reader | None = None) -> Iterator[list[PairedRows]]:
        """Rows of a set of `Session.prompts`, a batch at a time, for each hook.

        other: the model after training, whose rows are paired with these instead of those with demonstrations

        Raises InputError where the model gives NaN, does not fit into memory, or what was captured is damaged.
        """

    def sample(self, prompt_set: PromptSet, beside: Sequence[str], n_tokens: int) -> dict[str, torch.Tensor]:
        """By place [<= n_tokens, d] float32: the first tokens of a training set, the same ones at each place.

        beside: further places, left out where they are not at hand. No token is an attention sink.
        """

    def weights_sha256(self, hook: Hook | None = None) -> str | None:
        """SHA-256 of the weights that are run to read a hook, or all hooks; None where it is not known."""

    def unembedding(self) -> torch.Tensor | None:
        """[vocabulary, d_in] the matrix that turns residuals into logits; None where it is not at hand."""

    def forward_passes(self) -> PassRecord:
        """Record of how forward passes were run, and of their number."""

    def say_passes(self) -> None:
        """Says the same in one line, if there were any."""
