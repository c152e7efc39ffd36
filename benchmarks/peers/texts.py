"""The features of every token of many texts: ours, and delphi's cache of latents, with the demo's model and SAE."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.bench_encode import Check, Entries, Lap
from benchmarks.cases import Case, Contestant, Size
from benchmarks.peers.encode import sparse_coder
from benchmarks.peers.question import Question, peer
from sts_fast import SparseFeatures, encode, load_sae
from sts_fast.demo import organism
from sts_fast.model.language_model import LanguageModel

LAYER, BATCH, EXAMPLES = 1, 64, 5
N_TEXTS, N_CHECKED = 2048, 4096


class DemoCase(Case):
    """The demo's TopK SAE, and as activations the residuals of these texts in a forward pass of their own."""

    def __init__(self, model: Any, ids: torch.Tensor) -> None:
        self.sae = load_sae(organism.weights_folder() / "sae")
        self.W_enc, self.b_enc, self.b_dec = (
            torch.as_tensor(part) for part in (self.sae.W_enc, self.sae.b_enc, self.sae.b_dec)
        )
        self.architecture, self.device, self.tolerance, self.threshold = "topk", "cpu", 1e-5, None
        with torch.no_grad():
            hidden = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[LAYER + 1]
        self.base = hidden.flatten(0, 1)
        self.size = Size(self.sae.d_in, self.sae.d_sae, len(self.base))


def texts(n: int = N_TEXTS) -> Question:
    model, tokenizer = organism.load_model(organism.weights_folder() / "model")
    ids = token_ids(tokenizer, n)
    case = DemoCase(model, ids)
    check = Check(case, columns=np.arange(case.size.d_sae), n_rows=N_CHECKED)
    return Question(
        f"The features of each token of {n:,} texts of {ids.shape[1]} tokens; the demo's model and TopK SAE, read "
        f"after layer {LAYER}, {BATCH} texts at a time",
        (ids,),
        (ids[:BATCH],),
        [
            Contestant("sts_fast", partial(ours, LanguageModel(model, LAYER), case)),
            peer("delphi", partial(delphi, model, case)),
        ],
        lambda name, result, inputs: check(name, result, (case.base,)),
    )


def token_ids(tokenizer: Any, n: int) -> torch.Tensor:
    """[n, n_tokens] conversations of EXAMPLES questions and answers, of all domains in turn."""
    rounds = -(-n // len(organism.DOMAINS))
    pools = [organism.examples(domain, rounds + EXAMPLES, seed=3) for domain in organism.DOMAINS]
    conversations = [
        [
            {"role": role, "content": content}
            for example in pool[i : i + EXAMPLES]
            for role, content in (("user", example.question), ("assistant", example.answer))
        ]
        for i in range(rounds)
        for pool in pools
    ]
    return torch.tensor(tokenizer.apply_chat_template(conversations[:n], return_dict=False))


def ours(reader: LanguageModel, case: Case, ids: torch.Tensor, lap: Lap) -> SparseFeatures:
    batches = [encode(case.sae, reader.run(input_ids=batch, use_cache=False)[0]).parts for batch in ids.split(BATCH)]
    indptr, indices, values = zip(*batches, strict=True)
    counts = np.concatenate([[0], *map(np.diff, indptr)])
    return SparseFeatures(np.cumsum(counts), np.concatenate(indices), np.concatenate(values), case.size.d_sae)


def delphi(model: Any, case: Case) -> Callable[[torch.Tensor, Lap], Entries]:
    from delphi.latents.cache import LatentCache
    from delphi.sparse_coders.load_sparsify import sae_dense_latents

    hook, of_rows = f"layers.{LAYER}", partial(sae_dense_latents, sae=sparse_coder(case))

    def run(ids: torch.Tensor, lap: Lap) -> Entries:
        latents = LatentCache(model.base_model, {hook: of_rows}, batch_size=BATCH)
        latents.run(ids.numel(), ids)
        text, token, feature = latents.cache.latent_locations[hook].T
        return Entries(text * ids.shape[1] + token, feature, latents.cache.latent_activations[hook])

    return run
