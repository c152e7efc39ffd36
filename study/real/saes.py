"""TopK SAEs of the real model: the rows that they are trained on, their training and their quality."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sts_fast.demo.organism.autoencoder import TopK, quality, save_sae, train_sae
from study.real.measure import BATCH_TOKENS, Asking, measure
from study.real.model import ATTENTION, keep_freed_memory, load_model
from study.real.runs import Tell, read_json, write_json
from study.real.sets import DEMONSTRATIONS, LONGEST_TEXT, N_DOMAIN, read_rows
from study.real.sources import shuffled
from study.real.training import products

LAYERS = (7, 15, 22)
D_IN, D_SAE, K = 576, 4608, 32
BATCH, EPOCHS, LEARNING_RATE = 2048, 2, 8e-4
N_HELD_OUT = 16_384  # rows that an SAE is judged on and not trained on
SINK = 10.0  # a row of so many times the median norm is an attention sink, which nobody reads
REPLACED_IN = ("gsm8k", "pubmedqa", "tinystories", "pro law", "humaneval", "coqa")  # domains, for the rise of the loss


def make_saes(work: Path, tell: Tell) -> dict[str, Any]:
    """Trains an SAE a layer, in `sae/LAYER`; returns what each explains of rows that it was not trained on."""
    torch.set_num_threads(1)
    keep_freed_memory()
    if not rows_path(work, LAYERS[-1]).exists():
        make_rows(work, tell)
    found = {}
    for layer in LAYERS:
        path = work / "sae" / f"{layer}.json"
        if not path.exists():
            write_json(path, make_sae(work, layer, tell))
        found[str(layer)] = read_json(path)
    return found


def make_sae(work: Path, layer: int, tell: Tell) -> dict[str, Any]:
    """Trains the SAE of one layer and saves it; returns its quality on rows that it was not trained on."""
    rows = torch.from_numpy(np.fromfile(rows_path(work, layer), np.float32)).reshape(-1, D_IN)
    held_out, rows = rows[:N_HELD_OUT], rows[N_HELD_OUT:]
    n_steps = EPOCHS * len(rows) // BATCH

    def progress(stage: str, done: int, total: int) -> None:
        if done % 100 == 0:
            tell(f"SAE after layer {layer}: step {done} of {total}")

    with products() as precision:
        sae = train_sae(rows, 0, progress, n_steps, d_sae=D_SAE, k=K, batch=BATCH, learning_rate=LEARNING_RATE)
    save_sae(sae, work / "sae" / str(layer), layer=layer, model_name="SmolLM2-135M-Instruct", prepend_bos=False)
    with torch.inference_mode():
        about = quality(sae, held_out)
    found = {
        "rows": len(rows),
        "precision": precision,
        "fvu": round(about["fvu"], 4),
        "l0": round(about["l0"], 2),
        "share_alive": round(1 - about["n_dead"] / D_SAE, 4),
        "loss_before_and_replaced": losses_replaced(work, sae, layer),
    }
    tell(f"SAE after layer {layer}: {found}")
    return found


def rows_path(work: Path, layer: int) -> Path:
    return work / "rows" / f"{layer}.float32"


def make_rows(work: Path, tell: Tell) -> None:
    """Writes the residual stream after each of LAYERS, [n_tokens, D_IN] float32, batches of texts in a drawn order.

    Special tokens, first tokens and attention sinks are left out. Products as in the trainings.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    texts = [row["text"] for row in read_rows(work / "texts.jsonl")]
    sequences = [tokenizer(text, add_special_tokens=False).input_ids[:LONGEST_TEXT] for text in texts]
    model = AutoModelForCausalLM.from_pretrained(
        work / "model", num_hidden_layers=max(LAYERS) + 1, dtype=torch.float32, attn_implementation=ATTENTION
    ).model.eval()
    model.norm = torch.nn.Identity()
    special = torch.tensor(sorted(tokenizer.all_special_ids))
    paths = [rows_path(work, layer) for layer in LAYERS]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack, torch.inference_mode(), products():
        files = [stack.enter_context(path.with_suffix(".tmp").open("wb")) for path in paths]
        batches = shuffled(list(_batches(sequences)), "rows")
        for i, batch in enumerate(batches):
            ids, mask = _padded(batch, tokenizer.pad_token_id)
            hidden = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
            keep = mask.bool() & ~torch.isin(ids, special)
            keep[:, 0] = False  # without a BOS token, the first one is the sink
            of_layers = torch.stack([hidden[layer + 1][keep] for layer in LAYERS])
            norms = of_layers.norm(dim=2)
            calm = (norms < SINK * norms.median(dim=1, keepdim=True).values).all(dim=0)
            for file, rows in zip(files, of_layers, strict=True):
                file.write(rows[calm].numpy().tobytes())
            if i % 20 == 19:
                tell(f"read {i + 1} of {len(batches)} batches for the SAEs")
    for path in paths:
        path.with_suffix(".tmp").replace(path)


def _batches(sequences: list[list[int]]) -> Iterator[list[list[int]]]:
    """Sequences of like length, at most BATCH_TOKENS with their padding."""
    ordered, start = sorted(sequences, key=len), 0
    while start < len(ordered):
        stop = start + 1
        while stop < len(ordered) and (stop + 1 - start) * len(ordered[stop]) <= BATCH_TOKENS:
            stop += 1
        yield ordered[start:stop]
        start = stop


def _padded(batch: list[list[int]], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), both [n, longest]."""
    ids = torch.full((len(batch), max(map(len, batch))), padding)
    mask = torch.zeros_like(ids)
    for i, sequence in enumerate(batch):
        ids[i, : len(sequence)] = torch.tensor(sequence)
        mask[i, : len(sequence)] = 1
    return ids, mask


def losses_replaced(work: Path, sae: TopK, layer: int) -> dict[str, tuple[float, float]]:
    """Domain -> mean loss of an answer's token, before and with the stream at the hook replaced by its reconstruction.

    Attention sinks pass unchanged: the SAE was never shown any.
    """
    model, tokenizer = load_model(work / "model")
    asking = Asking(tokenizer)

    def replace(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        norms = output.norm(dim=2, keepdim=True)
        return torch.where(norms < SINK * norms.median(), sae.decode(sae.encode(output)), output)

    found = {}
    for name in REPLACED_IN:
        rows = read_rows(work / "domains" / f"{name}.jsonl")[DEMONSTRATIONS:][:N_DOMAIN]
        before = np.mean(measure(model, asking, rows)["loss"])
        handle = model.model.layers[layer].register_forward_hook(replace)
        after = np.mean(measure(model, asking, rows)["loss"])
        handle.remove()
        found[name] = (round(float(before), 4), round(float(after), 4))
    return found
