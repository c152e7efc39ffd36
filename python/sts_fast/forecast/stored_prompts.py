"""Prompts as a run sent them, from its prompts.parquet."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sts_fast.data.prompts import Prompt, PromptSet

if TYPE_CHECKING:
    import pyarrow as pa

# Stages whose prompts read their answers: of the training set and of the domains, those at the hook first.
ANSWER_STAGES = (("signed_train", "signed"), ("trial_train", "trial"), (None, "answer"))
IDS = ("base_ids", "demos_ids", "positions", "paired", "paired_demos")


def sets_of_stage(prompts: pa.Table, stage: str) -> list[PromptSet]:
    """The sets of one stage, in their order; empty where the run has no such stage."""
    import pyarrow.compute as pc

    of_sets: dict[str, list[Prompt]] = {}
    columns = ["domain", "id", "question", *IDS, "n_special", "draw"]
    for row in prompts.filter(pc.equal(prompts["stage"], stage)).select(columns).to_pylist():
        base, demos, positions, paired, paired_demos = (np.asarray(row[name], np.int32) for name in IDS)
        of_sets.setdefault(row["domain"], []).append(
            Prompt(
                row["id"], base, demos, positions, paired, paired_demos, row["n_special"], question=row["question"],
                draw=row["draw"],
            )
        )  # fmt: skip
    return [PromptSet(name, of_set, 0, 0) for name, of_set in of_sets.items()]


def answered_sets(prompts: pa.Table) -> tuple[list[PromptSet], list[PromptSet]]:
    """The training set and the domains whose answers a run read; empty where it read none."""
    for of_train, of_domains in ANSWER_STAGES:
        if domains := sets_of_stage(prompts, of_domains):
            return ([] if of_train is None else sets_of_stage(prompts, of_train)), domains
    return [], []
