"""The files of an ablation: ablation.json and ablation.parquet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sts_fast import files
from sts_fast.ablate.findings import findings
from sts_fast.ablate.measure import CONTROLS, OUTCOMES, TOP, Measured
from sts_fast.files import Document
from sts_fast.forecast.run import save_beside
from sts_fast.statistics import mean_interval, resamples

if TYPE_CHECKING:
    import pyarrow as pa

    from sts_fast.statistics import Doubles

SCHEMA_VERSION = "1.0"
ABLATION_FILE = "ablation.json"
ANSWERS_FILE = "ablation.parquet"


@dataclass(frozen=True)
class Ablation:
    """Effect of zeroing features on each set's answers.

    document: content of ablation.json
    answers:  rows of ablation.parquet: per condition, draw, set and prompt the answer's loss (nats, summed over its
        n_answer tokens) and whether each of its tokens is the model's first choice
    """

    document: Document
    answers: pa.Table

    def to_dict(self) -> Document:
        return self.document

    def findings(self) -> list[str]:
        """The findings, in sentences."""
        return findings(self.document)

    def save(self, folder: str | Path) -> None:
        """Writes ablation.parquet and ablation.json, both or none; raises InputError where it cannot."""
        import pyarrow.parquet as pq

        folder = Path(folder)
        files.prepare_folder(folder)
        validate_ablation(self.document)
        with files.atomic_path(folder / ANSWERS_FILE) as path:
            pq.write_table(self.answers, path, compression="zstd")
            save_beside(folder, ABLATION_FILE, self.document)


def outcome_of(measured: Measured, kind: str, seed: int) -> Document:
    """A set's part of the document; every interval is a bootstrap over its prompts, the same for all numbers."""
    prompt_set = measured.prompt_set
    n = len(prompt_set.prompts)
    shares = resamples(n, seed, prompt_set.name) / n
    before = measured.outcomes()
    changes = {}
    for name in (TOP, *CONTROLS):
        after = measured.outcomes(name)
        changes[name] = {outcome: after[outcome] - before[outcome] for outcome in OUTCOMES}

    def summed_up(values: Doubles) -> Document:
        """values: [n_prompts]"""
        return {"value": float(values.mean()), "ci": list(mean_interval(values, shares))}

    conditions: Document = {}
    for name, change in changes.items():
        conditions[name] = {"removed": float(measured.removed[name].mean())}
        for outcome in OUTCOMES:
            entry = summed_up(change[outcome].mean(axis=0))
            entry["draws"] = change[outcome].mean(axis=1).tolist()
            if name != TOP:
                entry["top_less_this"] = summed_up(changes[TOP][outcome][0] - change[outcome].mean(axis=0))
            conditions[name][outcome] = entry
    return {
        "name": prompt_set.name,
        "kind": kind,
        "n_prompts": n,
        "before": {outcome: float(before[outcome].mean()) for outcome in OUTCOMES},
        "conditions": conditions,
    }


def answers_table(measured: Sequence[Measured], kinds: Sequence[str]) -> pa.Table:
    """One row per condition, draw, set and prompt."""
    import pyarrow as pa

    tables = []
    for answers, kind in zip(measured, kinds, strict=True):
        n = len(answers.prompt_set.prompts)
        for condition, nll in answers.nll.items():
            for i in range(len(nll)):
                tables.append(
                    pa.table(
                        {
                            "condition": [condition] * n,
                            "draw": pa.array([i] * n, pa.int64()),
                            "kind": [kind] * n,
                            "set": [answers.prompt_set.name] * n,
                            "id": [prompt.id for prompt in answers.prompt_set.prompts],
                            "answer_nll_sum": nll[i] * answers.n_answer,
                            "n_answer": answers.n_answer,
                            "answer_exact": answers.exact[condition][i],
                        }
                    )
                )
    return pa.concat_tables(tables)


def ablation_schema() -> Document:
    """The JSON schema of ablation.json."""
    return files.load_schema("ablate/ablation.schema.json")


def validate_ablation(document: Document) -> None:
    """Raises jsonschema.ValidationError where a document is not a valid ablation.json."""
    files.check_document(document, ablation_schema())
