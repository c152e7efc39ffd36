"""Gradients by bergson 2.5, of single examples or of a whole set; `pip install bergson` brings it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from bergson import CollectorComputer, GradientProcessor, InMemoryCollector
from bergson.config.config import IndexConfig, PreprocessConfig
from datasets import Dataset

from sts_fast.data.prompts import Prompt

DIMENSIONS, TOKENS = 16, 2048


def projected(model: Any, prompts: Sequence[Prompt]) -> np.ndarray:
    """[n_prompts, n] gradient of each answer's mean loss, projected to 16 x 16 a matrix."""
    return _collected(model, prompts, DIMENSIONS, PreprocessConfig())


def mean_gradient(model: Any, prompts: Sequence[Prompt]) -> np.ndarray:
    """[n] the mean over prompts of the whole gradient of each answer's mean loss, with respect to linear layers."""
    return _collected(model, prompts, 0, PreprocessConfig(aggregation="mean"))[0]


def _collected(model: Any, prompts: Sequence[Prompt], dimensions: int, preprocess: PreprocessConfig) -> np.ndarray:
    rows = []
    for prompt in prompts:
        labels = np.full(len(prompt.base_ids), -100)
        labels[prompt.positions] = prompt.base_ids[prompt.positions]
        rows.append({"input_ids": prompt.base_ids.tolist(), "labels": labels.tolist(), "length": len(labels)})
    data = Dataset.from_list(rows)
    size = max(1, TOKENS // max(row["length"] for row in rows))
    batches = [list(range(start, min(start + size, len(rows)))) for start in range(0, len(rows), size)]
    with tempfile.TemporaryDirectory() as work:
        config = IndexConfig(
            run_path=f"{work}/run", projection_dim=dimensions, loss_reduction="mean", token_batch_size=TOKENS
        )
        config.partial_run_path.mkdir()
        collector = InMemoryCollector(
            model=model.base_model,
            data=data,
            cfg=config,
            processor=GradientProcessor(projection_dim=dimensions or None),
            preprocess_cfg=preprocess,
        )
        computer = CollectorComputer(model=model, data=data, collector=collector, batches=batches, cfg=config)
        computer.run_with_collector_hooks(desc="gradients")
        return np.concatenate([part.double().numpy() for _, part in sorted(collector.gradients.items())], axis=1)
