"""Trains the organism from a seed: its language model, then its SAE."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sts_fast import files
from sts_fast.demo.organism import autoencoder
from sts_fast.demo.organism import model as language_model
from sts_fast.demo.organism.tuning import measure
from sts_fast.demo.organism.world import WORLD, World
from sts_fast.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM

    from sts_fast.data.prompts import Progress

FIGURES_FILE = "figures.json"
LAYER = 1  # the SAE reads the residual stream after the second of the model's four layers
SHOTS = 4
N_QUESTIONS = 32  # of each domain
MIN_FEW_SHOT_ACCURACY = 0.8
N_SAE_ROWS = 150_000
DOCUMENT_EXAMPLES = 5


@language_model.one_thread()
def train(
    seed: int,
    folder: str | Path,
    progress: Progress | None = None,
    *,
    n_steps: int = language_model.N_STEPS,
    n_sae_steps: int = autoencoder.N_STEPS,
    world: World = WORLD,
) -> dict[str, Any]:
    """Trains model and SAE, writes `model/`, `sae/` and figures.json, and returns the contents of figures.json.

    An existing folder is replaced. The same seed gives the same organism on the same machine, in about six minutes of
    one core.

    progress: called with (stage, steps done, steps in all)

    Raises InputError, and writes nothing, where the model has not learnt to use demonstrations (its accuracy with four
    of them, over all domains, must exceed 0.8) or the folder is not writable.
    """
    report_progress = progress or (lambda stage, done, total: None)
    model = language_model.train_language_model(seed, report_progress, n_steps, world)
    tokenizer = language_model.make_tokenizer(world)
    few_shot = measure(model, tokenizer, list(world.domains), shots=SHOTS, n=N_QUESTIONS, world=world)
    accuracy = float(few_shot.accuracy.mean())
    if accuracy <= MIN_FEW_SHOT_ACCURACY:
        raise InputError(
            f"the model of seed {seed} answers {accuracy:.0%} of the questions with {SHOTS} demonstrations, but the "
            f"demo needs over {MIN_FEW_SHOT_ACCURACY:.0%}: take another seed"
        )
    zero_shot = measure(model, tokenizer, list(world.domains), n=N_QUESTIONS, world=world)
    rng = np.random.default_rng([seed, 1])
    rows = _residual_rows(model, N_SAE_ROWS, rng, world)
    sae = autoencoder.train_sae(rows, seed, report_progress, n_sae_steps)
    figures = {
        "seed": seed,
        "n_steps": n_steps,
        "n_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "zero_shot_accuracy": float(zero_shot.accuracy.mean()),
        "few_shot_accuracy": accuracy,
        "shots": SHOTS,
        "sae": autoencoder.quality(sae, _residual_rows(model, 20_000, rng, world)),
    }
    with files.atomic_folder(folder) as temporary:
        language_model.save_model(model, temporary / "model", world)
        autoencoder.save_sae(sae, temporary / "sae", layer=LAYER, model_name="sts-fast-organism")
        (temporary / FIGURES_FILE).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


def _residual_rows(
    model: LlamaForCausalLM, n_rows: int, rng: np.random.Generator, world: World = WORLD
) -> torch.Tensor:
    """[at least n_rows, d_in] the residual stream after LAYER, at every token of new documents except <s>."""
    import torch

    rows: list[torch.Tensor] = []
    with torch.inference_mode():
        while sum(map(len, rows)) < n_rows:
            ids = language_model.document_ids(64, DOCUMENT_EXAMPLES, rng, world)
            hidden = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[LAYER + 1]
            rows.append(hidden[:, 1:].flatten(0, 1))
    return torch.cat(rows).clone()
