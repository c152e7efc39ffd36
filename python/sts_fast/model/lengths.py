"""Models whose activations depend on the length of their sequence, such as those with longrope or dynamic NTK.

Two prompts of such a model may share a batch, or a start that is run once, only where each would be computed with the
same frequencies alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from sts_fast.statistics import IntArray

Regime = tuple[int, int]


@dataclass(frozen=True)
class LengthRule:
    """The lengths of sequences whose tokens are computed alike.

    switches:   beyond each of these lengths, all tokens are computed in another way
    each_above: beyond this length, every length has a way of its own; None: there is no such length
    """

    switches: tuple[int, ...] = ()
    each_above: int | None = None

    def regime(self, length: int) -> Regime:
        """Equal for two lengths whose tokens are computed alike."""
        own = length if self.each_above is not None and length > self.each_above else 0
        return sum(length > switch for switch in self.switches), own

    def needed(self, ids: IntArray, end: int) -> IntArray:
        """The first `end` tokens of a sequence; all of it where the rest decides how these are computed."""
        return ids[:end] if not end or self.regime(end) == self.regime(len(ids)) else ids

    def groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices of the lengths by their regime."""
        of_regime: dict[Regime, list[int]] = {}
        for index, length in enumerate(lengths):
            of_regime.setdefault(self.regime(length), []).append(index)
        return list(of_regime.values())


# Of a model whose activations do not depend on the tokens that follow, and of one where any token added changes them.
ANY_LENGTH = LengthRule()
EACH_LENGTH = LengthRule(each_above=0)


def length_rule(config: Any) -> LengthRule:
    """The rule that the rotary embeddings of a model's text config name; others are found by ForwardPasses' check."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # Models with several kinds of layers have rotary embeddings for each kind.
    ropes = [rope for rope in (given, *given.values()) if isinstance(rope, dict)]
    most = getattr(config, "max_position_embeddings", None)
    switches, each_above = set(), None
    for rope in ropes:
        kind = rope.get("rope_type", rope.get("type"))
        trained = getattr(config, "original_max_position_embeddings", None)
        trained = trained or rope.get("original_max_position_embeddings") or most
        if kind in ("longrope", "su") and trained:
            switches.add(int(trained))
        elif kind == "dynamic" and most:
            each_above = int(most)
    return LengthRule(tuple(sorted(switches)), each_above)


def forget_lengths(model: torch.nn.Module) -> None:
    """Resets rotary embeddings that keep the frequencies of the longest sequence that they have seen."""
    for module in model.modules():
        longest = getattr(module, "original_max_seq_len", None)
        if longest is None:
            continue
        for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
            setattr(module, name, longest)
        for name, _ in list(module.named_buffers(recurse=False)):
            original = getattr(module, name.replace("inv_freq", "original_inv_freq"), None)
            if name.endswith("inv_freq") and "original" not in name and original is not None:
                module.register_buffer(name, original.clone().to(getattr(module, name).device), persistent=False)
