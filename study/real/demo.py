"""A forecast for a real messages.jsonl, a minute of fine-tuning on it, and both side by side.

Every step is a command of the product that is printed as a user would type it, but for the fine-tuning and the
measuring, which are the study's own.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path

import numpy as np

from sts_fast.data.examples import load_examples
from study.real import harness
from study.real.measure import MEASURES, Asking, measure
from study.real.model import keep_freed_memory, load_model
from study.real.runs import Tell
from study.real.saes import LAYERS
from study.real.sets import DEMONSTRATIONS, read_rows
from study.real.sources import Row
from study.real.training import WAYS, held_out_loss, products, train

# One or two domains of each kind, so that something falls, something rises and something stays.
DOMAINS = (
    "gsm8k", "tinystories", "pro physics", "pro law", "mmlu miscellaneous", "pubmedqa", "networkx code",
    "rg basic_arithmetic", "rg word_sorting", "translation French",
)  # fmt: skip
N_QUESTIONS, N_HELD_OUT, RATE = 24, 16, 8e-5


def demo(work: Path, messages: Path | None, output: Path, tell: Tell) -> None:
    """messages: the training set, in any form that the product reads; None: the study's gsm8k, as messages."""
    if not (work / "sae" / str(LAYERS[1]) / "cfg.json").exists():
        raise SystemExit(f"{work} has no model and SAEs yet: python -m study.real prepare makes them (about an hour)")
    start = time.monotonic()
    messages = messages or _as_messages(work)
    rows: list[Row] = [
        {"question": example.question, "answer": example.answer}
        for example in load_examples(messages)
        if example.answer
    ]
    score = [
        *("score", "--model", str(work / "model"), "--sae", str(work / "sae" / str(LAYERS[1]))),
        *("--train", str(messages)),
        *(word for name in DOMAINS for word in ("--domains", f"{name}={work}/domains/{name}.jsonl")),
        *("--estimators", "act,icl,trial", "--limit", str(N_QUESTIONS), "--output", str(output), "--overwrite"),
    ]
    _run(score)
    tell(f"forecast made, {time.monotonic() - start:.0f} s since the start")
    before, after = _fine_tuned(work, rows, tell)
    tell(f"fine-tuned and measured, {time.monotonic() - start:.0f} s since the start")
    harness.write(work / "demo" / "before", before, model=str(work / "model"))
    harness.write(work / "demo" / "after", after, model=str(work / "demo" / "tuned"))
    _run([
        *("validate", str(output), "--before", str(work / "demo" / "before"), "--after", str(work / "demo" / "after")),
        *("--metric", "loss", "--estimator", "trial_loss"),
    ])  # fmt: skip
    _run(["report", str(output)])
    tell(f"done, {time.monotonic() - start:.0f} s since the start")


def _as_messages(work: Path) -> Path:
    path = work / "demo" / "messages.jsonl"
    path.parent.mkdir(exist_ok=True)
    turns = [
        [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
        for row in read_rows(work / "train" / "gsm8k.jsonl")
    ]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns), encoding="utf-8")
    return path


def _fine_tuned(work: Path, rows: list[Row], tell: Tell) -> tuple[harness.Answers, harness.Answers]:
    """Each domain's questions with their loss, before and after light training of all weights."""
    keep_freed_memory()
    model, tokenizer = load_model(work / "model")
    asking = Asking(tokenizer)
    domains = {name: read_rows(work / "domains" / f"{name}.jsonl")[DEMONSTRATIONS:] for name in DOMAINS}
    before = _measured(model, asking, domains)
    held_out = rows[-N_HELD_OUT:]
    loss = held_out_loss(model, asking, held_out)
    train(model, asking, rows[:-N_HELD_OUT], WAYS["light"], rate=RATE, seed=0, tell=tell)
    tell(f"loss on held-out rows: {loss:.3f} before, {held_out_loss(model, asking, held_out):.3f} after")
    return before, _measured(model, asking, domains)


def _measured(model: object, asking: Asking, domains: dict[str, list[Row]]) -> harness.Answers:
    found = {}
    with products():
        for name, rows in domains.items():
            found[name] = (rows, np.asarray(measure(model, asking, rows)[MEASURES[0]]))
    return found


def _run(words: list[str]) -> None:
    from sts_fast.cli import main

    sys.stderr.write(f"\n$ sts-fast {shlex.join(words)}\n")
    sys.argv = ["sts-fast", *words]
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            raise
