"""The identity of a profile: the model, the SAE and the prompts that decide its numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sts_fast.data.prompts import PromptSet
from sts_fast.data.sets import Kind, Sampling
from sts_fast.files import Document
from sts_fast.model.reader import Reader
from sts_fast.sae import SAE

if TYPE_CHECKING:
    from sts_fast.statistics import IntArray


@dataclass(frozen=True)
class Identity:
    """What a profile was made of.

    set, kind: the name of the set, and whether it is a training set or a domain
    model:     name, dtype, revision, weights_sha256 (of the weights up to the hook), module and side of the hook
    sae:       source, architecture, d_in, d_sae, k, hook_name, fingerprint, and its name at neuronpedia or None
    sampling:  shots, demo_draws, tokens, limit and seed of the prompts
    tuned:     of a model after training that is read beside it, as `model`; None where there is none
    prompts_sha256: of what the prompts send without demonstrations, and of the tokens that are read
    shown_sha256: the same of what they send with demonstrations; None where there are none
    """

    set: str
    kind: str
    model: Document
    sae: Document
    sampling: Document
    tuned: Document | None
    prompts_sha256: str
    shown_sha256: str | None

    @property
    def key(self) -> str:
        """Hexadecimal digest of all that decides a profile's numbers: not of names and places."""
        return self._digest((self.model, self.tuned), self.shown_sha256)

    @property
    def plain_key(self) -> str:
        """The key of the same prompts without demonstrations, read in the one model."""
        return self._digest((self.model, None), None)

    def _digest(self, models: tuple[Document | None, ...], shown: str | None) -> str:
        read = ("weights_sha256", "dtype", "module", "side")
        decisive = {
            "models": [None if model is None else [model[name] for name in read] for model in models],
            "sae": self.sae["fingerprint"],
            "prompts": [self.prompts_sha256, shown],
        }
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def identity_of(
    reader: Reader, tuned: Reader | None, sae: SAE, kind: Kind, prompt_set: PromptSet, sampling: Sampling
) -> Identity:
    """The identity of a profile that is still to be made."""
    prompts_sha256, shown_sha256 = digests_of(prompt_set)
    return Identity(
        set=prompt_set.name,
        kind=kind,
        model=_model(reader, sae),
        tuned=None if tuned is None else _model(tuned, sae),
        sae=sae_document(sae) | {"fingerprint": sae.fingerprint, "neuronpedia": sae.metadata.get("neuronpedia_id")},
        sampling={
            "shots": sampling.shots if kind == "train" else sampling.domain_shots,
            "demo_draws": sampling.demo_draws,
            "tokens": sampling.tokens,
            "limit": sampling.limit,
            "seed": sampling.seed,
        },
        prompts_sha256=prompts_sha256,
        shown_sha256=shown_sha256,
    )


def digests_of(prompt_set: PromptSet) -> tuple[str, str | None]:
    """Of what the prompts send and read without demonstrations, and with them; None where there are none."""
    prompts = prompt_set.prompts
    shown = any(len(prompt.demos_ids) for prompt in prompts)
    return (
        _sha256(prompt.read_plain for prompt in prompts),
        _sha256([(prompt.demos_ids, prompt.paired, prompt.paired_demos) for prompt in prompts]) if shown else None,
    )


def sae_document(sae: SAE) -> Document:
    """Describes an SAE: its source, architecture, sizes and hook."""
    return {
        "source": sae.source,
        "architecture": sae.architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "k": sae.k or None,
        "hook_name": sae.hook_name,
    }


def _model(reader: Reader, sae: SAE) -> Document:
    hook = reader.hook(sae)
    return {
        "name": reader.name,
        "dtype": reader.dtype,
        "revision": reader.revision,
        "weights_sha256": reader.weights_sha256(hook),
        "module": hook.path,
        "side": hook.side,
    }


def _sha256(of_prompts: Iterable[Sequence[IntArray]]) -> str:
    digest = hashlib.sha256()
    for arrays in of_prompts:
        for numbers in arrays:
            digest.update(f"{len(numbers)} ".encode() + numbers.astype("<i4").tobytes())
    return digest.hexdigest()
