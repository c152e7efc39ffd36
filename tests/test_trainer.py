"""TransferMonitor in the trainers of Transformers and TRL, on the embedded model."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from sts_fast import InputError, load_sae, rollouts, score
from sts_fast.demo import organism
from sts_fast.outcomes.outcomes import read_outcomes
from sts_fast.report.numbers import percent, significant

pytestmark = pytest.mark.filterwarnings("ignore")  # the trainers warn of what is theirs

TRAIN, DOMAINS = "T3.next.b", ("T2.previous.c", "T0.reverse.a", "T1.swap.a")
N_TOP = 32


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A forecast for the embedded model, as `sts-fast score` writes it."""
    folder = tmp_path_factory.mktemp("forecast") / "run"
    forecast = score(
        model=organism.model_folder(),
        sae=organism.sae_folder(),
        train=organism.examples(TRAIN, 40, 0),
        domains={name: organism.examples(name, 40, 0) for name in DOMAINS},
        shots=4,
        domain_shots=4,
        top_n=N_TOP,
    )
    forecast.save(folder)
    return folder


@pytest.fixture(scope="module")
def questions() -> Any:
    from datasets import Dataset

    examples = organism.examples(TRAIN, 128, 1)
    return Dataset.from_list([{"prompt": example.question, "completion": f" {example.answer}"} for example in examples])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with organism.one_thread():
        yield


def monitor_of(run: Path | str, **options: Any) -> Any:
    from sts_fast.trainer import TransferMonitor  # brings transformers' trainers, which take seconds to import

    return TransferMonitor(run, **options)


def new_model() -> tuple[Any, Any]:
    model, tokenizer = organism.load_model()
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.unk_token
    return model, tokenizer


def sft(folder: Path, questions: Any, model: Any = None, **options: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    fresh, tokenizer = new_model()
    settings = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "dataset_num_proc": None,
        "seed": 3,
        **options,
    }
    return SFTTrainer(
        model=fresh if model is None else model,
        args=SFTConfig(**settings),
        train_dataset=questions,
        processing_class=tokenizer,
    )


def residuals(model: Any, ids: list[int]) -> torch.Tensor:
    """[n_tokens, d_in] what the SAE reads, from a whole forward pass."""
    with torch.no_grad():
        states = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    return states[organism.training.LAYER + 1][0].to(torch.bfloat16).double()


def dense_features(model: Any, ids: list[int], positions: list[int]) -> np.ndarray:
    """[n_read, d_sae] float64 TopK features, by the equation."""
    sae = load_sae(organism.sae_folder())
    W_enc, b_enc, b_dec = (torch.as_tensor(value).double() for value in (sae.W_enc, sae.b_enc, sae.b_dec))
    pre = (residuals(model, ids)[positions] - b_dec) @ W_enc + b_enc
    values, indices = pre.topk(sae.k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, indices, values.relu()).numpy()


def test_the_numbers_are_those_of_the_equations(run: Path, questions: Any, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    trainer = sft(tmp_path / "out", questions)
    base, _ = new_model()
    monitor = monitor_of(run, output=tmp_path / "watch", every=4, n_probes=400).attach(trainer)
    trainer.train()
    assert [found.step for found in monitor.history] == [4, 6]
    scores = json.loads((run / "scores.json").read_text())
    top = sorted(feature["index"] for feature in scores["shifted_features"])
    found = monitor.history[-1]
    rows = pq.read_table(run / "prompts.parquet").to_pylist()
    moved = {}
    for stage, name in (("shift", "train"), *(("score", domain) for domain in DOMAINS)):
        chosen = [row for row in rows if (row["stage"], row["domain"]) == (stage, name)]
        squares = [
            (dense_features(trainer.model, row["base_ids"], row["positions"])
             - dense_features(base, row["base_ids"], row["positions"])) ** 2
            for row in chosen
        ]  # fmt: skip
        moved[name] = np.concatenate(squares).mean(axis=0)
    assert found.shift == pytest.approx(moved["train"].sum(), rel=1e-4)
    largest = np.argsort(-moved["train"], kind="stable")[:N_TOP]
    assert found.overlap == pytest.approx(len(set(largest) & set(top)) / N_TOP, abs=1 / N_TOP)
    assert found.share_of_top_n == pytest.approx(moved["train"][top].sum() / moved["train"].sum(), rel=1e-4)
    for domain in DOMAINS:
        assert found.exposure[domain] == pytest.approx(moved[domain][top].sum(), rel=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_is_the_same_bit_for_bit(run: Path, questions: Any, tmp_path: Path, checkpointing: bool) -> None:
    states = []
    for watched in (False, True):
        model, _ = new_model()
        model.config.attention_dropout = 0.1  # draws random numbers
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1
        trainer = sft(tmp_path / f"{watched}", questions, model, gradient_checkpointing=checkpointing)
        if watched:
            monitor_of(run, output=tmp_path / "watch", every=1).attach(trainer)
        trainer.train()
        states.append(trainer.model.state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_it_logs_where_the_trainer_logs(run: Path, questions: Any, tmp_path: Path) -> None:
    from transformers import TrainerCallback

    seen: list[dict[str, float]] = []

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    trainer = sft(tmp_path / "out", questions)
    trainer.add_callback(Reporter())
    monitor_of(run, output=tmp_path / "watch", every=3).attach(trainer)
    trainer.train()
    reported = [logs for logs in seen if "transfer/overlap" in logs]
    assert len(reported) == 2
    assert {f"transfer/exposure/{domain}" for domain in DOMAINS} <= set(reported[0])
    assert sum("loss" in logs for logs in seen) == 3  # the trainer's own, undisturbed


def test_a_bare_callback_says_where_its_numbers_go(
    run: Path, questions: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = sft(tmp_path / "out", questions, max_steps=1)
    trainer.add_callback(monitor_of(run, output=tmp_path / "watch"))
    with caplog.at_level(logging.WARNING, "sts_fast.trainer"):
        trainer.train()
    assert "monitor.attach(trainer) does both" in caplog.text
    assert len(json.loads((tmp_path / "watch" / "training.json").read_text())["history"]) == 1


def test_it_stops_at_a_budget(run: Path, questions: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = sft(tmp_path / "out", questions)
    monitor = monitor_of(run, output=tmp_path / "watch", every=2, stop_when={DOMAINS[0]: 1e-6}).attach(trainer)
    with caplog.at_level(logging.WARNING, "sts_fast.trainer"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert [found.step for found in monitor.history] == [2]
    assert f"the exposure of '{DOMAINS[0]}'" in caplog.text


def test_all_processes_stop_together(run: Path, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(f"""
import os
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments
from sts_fast.demo import organism
from sts_fast.trainer import TransferMonitor

model, _ = organism.load_model()
rows = organism.model.document_ids(32, 2, __import__("numpy").random.default_rng(0))
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir={str(tmp_path / "out")!r}, max_steps=6, per_device_train_batch_size=2, learning_rate=1e-3,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    ),
    train_dataset=[{{"input_ids": row, "labels": row}} for row in rows],
)
budget = {{{DOMAINS[0]!r}: 1e-6}}
TransferMonitor({str(run)!r}, output={str(tmp_path / "watch")!r}, every=2, stop_when=budget).attach(trainer)
trainer.train()
Path({str(tmp_path)!r}, f"stopped {{os.environ['RANK']}}").write_text(str(trainer.state.global_step))
""")  # fmt: skip
    ran = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    stopped = {path.name: path.read_text() for path in tmp_path.glob("stopped *")}
    assert stopped == {"stopped 0": "2", "stopped 1": "2"}, ran.stderr[-2000:]


def test_the_run_it_leaves_is_reported_and_validated(run: Path, questions: Any, tmp_path: Path) -> None:
    trainer = sft(tmp_path / "out", questions)
    monitor = monitor_of(run, output=tmp_path / "watch", every=2, stop_when={DOMAINS[0]: 1e9}).attach(trainer)
    trainer.train()
    page = (tmp_path / "watch" / "report.html").read_text()
    assert "While it was trained" in page
    last = monitor.history[-1]
    for name, exposure in last.exposure.items():
        assert f'<bdi>{name}</bdi></th><td class="num">{significant(exposure)}</td>' in page
    assert f"{percent(last.overlap)} are in the" in page
    outcomes = read_outcomes(tmp_path / "watch" / "training.json")
    assert {name: outcome.change for name, outcome in outcomes.domains.items()} == last.exposure
    assert "not changes of accuracy" in outcomes.warnings[0]


def test_it_goes_on_from_a_checkpoint(run: Path, questions: Any, tmp_path: Path) -> None:
    whole = monitor_of(run, output=tmp_path / "whole", every=2)
    trainer = sft(tmp_path / "one", questions)
    whole.attach(trainer)
    trainer.train()

    saving = {"save_strategy": "steps", "save_steps": 2}
    first = sft(tmp_path / "two", questions, **saving)
    monitor_of(run, output=tmp_path / "halves", every=2).attach(first)
    stopper = monitor_of(run, output=tmp_path / "stopper", every=4, stop_when={DOMAINS[0]: 0.0})
    stopper.attach(first)
    first.train()
    assert first.state.global_step == 4
    second = sft(tmp_path / "two", questions, **saving)
    resumed = monitor_of(run, output=tmp_path / "halves", every=2).attach(second)
    second.train(resume_from_checkpoint=str(tmp_path / "two" / "checkpoint-4"))
    assert [found.step for found in resumed.history] == [2, 4, 6]
    for one, other in zip(whole.history, resumed.history, strict=True):
        assert one.exposure == other.exposure

    lost = sft(tmp_path / "two", questions, **saving)
    monitor_of(run, output=tmp_path / "empty", every=2).attach(lost)
    with pytest.raises(InputError, match="base activations"):
        lost.train(resume_from_checkpoint=str(tmp_path / "two" / "checkpoint-4"))


def test_adapters_are_watched_and_switched_off_to_find_the_base(run: Path, questions: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    def adapted() -> Any:
        torch.manual_seed(0)
        return get_peft_model(new_model()[0], LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))

    saving = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    states = []
    for watched in (False, True):
        trainer = sft(tmp_path / f"{watched}", questions, adapted(), **saving)
        if watched:
            monitor = monitor_of(run, output=tmp_path / "watch", every=2).attach(trainer)
        trainer.train()
        states.append(trainer.model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert [found.step for found in monitor.history] == [2, 4, 6]
    assert min(monitor.history[-1].exposure.values()) > 0

    # The base activations are lost, and found again without the adapter.
    second = sft(tmp_path / "True", questions, adapted(), **saving)
    resumed = monitor_of(run, output=tmp_path / "empty", every=2).attach(second)
    second.train(resume_from_checkpoint=str(tmp_path / "True" / "checkpoint-4"))
    assert resumed.history[-1].exposure == monitor.history[-1].exposure


def test_another_model_is_told(run: Path, questions: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, _ = new_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.5 * parameter.std() * torch.randn_like(parameter)
    trainer = sft(tmp_path / "out", questions, model, max_steps=1)
    monitor_of(run, output=tmp_path / "watch").attach(trainer)
    with caplog.at_level(logging.WARNING, "sts_fast.trainer"):
        trainer.train()
    assert "this model is not the one" in caplog.text


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"stop_when": {"law": 1.0}}, "forecasts nothing for 'law'"),
        ({"domains": ["law"]}, "forecasts nothing for 'law'"),
        ({"every": 0}, "every must be at least 1"),
        ({"n_probes": 3}, "n_probes"),
    ],
)
def test_what_cannot_be_watched_is_told_at_once(run: Path, tmp_path: Path, options: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        monitor_of(run, output=tmp_path / "watch", **options)


def test_sharded_parameters_are_refused(
    run: Path, questions: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = sft(tmp_path / "out", questions)
    monitor_of(run, output=tmp_path / "watch").attach(trainer)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="sharded over processes"):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)


def test_damaged_forecasts_are_told(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        monitor_of(tmp_path / "nothing", output=tmp_path / "watch")
    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged)
    (damaged / "prompts.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"prompts\.parquet cannot be read"):
        monitor_of(damaged, output=tmp_path / "watch")
    (damaged / "scores.json").write_text("{}")
    with pytest.raises(InputError, match=r"scores\.json is a file without a schema version"):
        monitor_of(damaged, output=tmp_path / "watch")


@pytest.mark.parametrize("name", ["trl_sft", "trl_grpo"])
def test_the_examples_run(name: str, tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "examples" / f"{name}.py"
    ran = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    history = json.loads((tmp_path / "training" / "training.json").read_text())["history"]
    assert f"step {history[-1]['step']}: " in ran.stdout
    assert (tmp_path / "training" / "scores.json").is_file()
    if name == "trl_grpo":
        assert "training stops at step 10" in ran.stderr
        logged = tmp_path / "checkpoints" / "completions"
        rows = [row for path in sorted(logged.iterdir()) for row in pq.read_table(path).to_pylist()]
        forecast = rollouts(
            model=organism.model_folder(),
            sae=organism.sae_folder(),
            rollouts=logged,
            domains={"T0.reverse.a": organism.examples("T0.reverse.a", 16, seed=0)},
            ways=("gradient",),
            estimators=("act",),
            domain_shots=4,
            top_n=32,
        )["gradient"]
        found = forecast.to_dict()["rollouts"]
        assert (found["n_completions"], found["advantages"]) == (len(rows), "recorded")
        assert found["n_groups"] == len({(row["step"], row["prompt"]) for row in rows})
        assert found["mean_reward"] == pytest.approx(np.mean([row["reward"] for row in rows]))
