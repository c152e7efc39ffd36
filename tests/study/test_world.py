"""The study's worlds and numbers: what its skills make of four symbols, and what its tables are made of."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from study.world import tracing
from study.world.analyses import h_score, means, overlap, picked, top_of
from study.world.grounds import LONG, SHORT, Ground
from study.world.predictors import together
from study.world.saes import Variant

from sts_fast.data.examples import Example
from sts_fast.demo import organism
from sts_fast.demo.organism import model as language_model

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "study" / "world" / "results"

# By hand: the answer to 2 5 0 3, of six symbols.
ANSWERS = {
    "T0.double.a": "2 2 5 5 0 0 3 3",
    "T0.twice.b": "2 5 0 3 2 5 0 3",
    "T1.mirror.a": "2 5 0 3 3 0 5 2",
    "T6.back-twice.c": "3 0 5 2 3 0 5 2",
    "T2.climb.a": "2 3 5 0 0 1 3 4",
    "T2.fall.d": "2 1 5 4 0 5 3 2",
    "T3.then-next.a": "2 5 0 3 3 0 1 4",
    "T4.turn.a": "5 0 3 2 0 3 2 5",
    "T8.weave.a": "2 3 5 0 3 0 5 2",
    "T5.sort-both.b": "0 2 3 5 5 3 2 0",
    "T9.transcribe.d": "2 5 0 3 2 5 0 3",
}


@pytest.mark.parametrize("ground", [SHORT, LONG])
def test_training_sets_are_twelve_of_72_domains(ground: Ground) -> None:
    assert len(ground.domains) == 72
    assert len({*ground.trains} & {*ground.domains}) == len(ground.trains) == 12


@pytest.mark.parametrize(("domain", "expected"), ANSWERS.items())
def test_long_skills_are_those_worked_out_by_hand(domain: str, expected: str) -> None:
    alphabet = domain[-1]
    written = "a" if domain == "T9.transcribe.d" else alphabet
    shown = " ".join(f"{alphabet}{symbol}" for symbol in (2, 5, 0, 3))
    answer = " ".join(written + symbol for symbol in expected.split())
    everything = LONG.world.examples(domain, LONG.world.n_questions, seed=0)
    assert len({example.question for example in everything}) == 6**4
    [found] = [example for example in everything if example.question == f"{domain[:2]} {shown} >"]
    assert found.answer == answer


def test_a_model_of_the_long_world_is_measured_on_eight_tokens() -> None:
    world = LONG.world
    model, tokenizer = language_model.new_model(0, world), language_model.make_tokenizer(world)
    assert isinstance(model, transformers.LlamaForCausalLM)
    domains = ("T0.twice.a", "T9.transcribe.b")
    found = organism.measure(model, tokenizer, domains, shots=2, n=3, world=world)
    assert found.log_p.shape == (2, 3)
    pool = world.examples(domains[1], world.n_questions, seed=0)
    shown = [*pool[8:10], pool[2]]  # groups of eight questions share the two that follow them
    words = " ".join(f"{example.question} {example.answer}" for example in shown)
    ids = torch.tensor([tokenizer(words).input_ids])
    with torch.inference_mode():
        log_p = model(ids).logits[0].double().log_softmax(-1)
    expected = sum(float(log_p[t - 1, ids[0, t]]) for t in range(ids.shape[1] - 8, ids.shape[1]))
    assert (found.log_p[1, 2], found.n_answer) == (pytest.approx(expected, rel=1e-5), 8)
    tuned = organism.fine_tune(model, tokenizer, pool[:32], steps=2, batch=4, world=world)
    assert not torch.equal(tuned.lm_head.weight, model.lm_head.weight)


def test_adapters_move_on_in_log_odds() -> None:
    P = np.asarray([0.5, 0.2])
    zero = np.zeros((1, 2))
    found = together({"P": P, "adapter (raw)": np.asarray([[0.25, 0.0]]), "adapter (sae)": np.asarray([[0.25, 0.0]]),
                      "adapter_loss (raw)": zero, "adapter_loss (sae)": zero + 2})  # fmt: skip
    # From 1:1 to 3:1, so on to 81:1.
    assert found["adapters x4"] == pytest.approx(np.asarray([[81 / 82 - 0.5, 0.0]]))
    assert found["adapters_loss"].tolist() == [[1, 1]]


@pytest.mark.parametrize("variant", [Variant("topk", 64, 4), Variant("jumprelu", 64, 4), Variant("standard", 64)])
def test_saes_learn_to_explain_sparse_rows(variant: Variant) -> None:
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(40, 16, generator=generator)
    weights = (torch.rand(4000, 40, generator=generator) < 0.05) * torch.rand(4000, 40, generator=generator)
    rows = weights @ directions
    trained = variant.train(rows, seed=0)
    assert trained.fvu < 0.35
    assert (trained.encode(rows[:100]) >= 0).all()
    if variant.kind == "topk":
        assert (trained.encode(rows[:100]) > 0).sum(dim=1).max() <= 4


def test_analyses_are_sums_over_chosen_features() -> None:
    base, other = torch.tensor([[[[1.0, 0.0, 2.0]]]]), torch.tensor([[[[1.0, 3.0, 1.0]]]])
    act, shift = means(lambda x: x, base, other, slice(None))
    assert (act.tolist(), shift.tolist()) == ([[1, 0, 2]], [[0, 9, 1]])
    top = top_of(shift, 2)
    assert top.tolist() == [[1, 2]]
    assert picked(act, top).tolist() == [[2]]
    assert overlap(top, np.asarray([[0, 2]])) == [0.5]
    # Classes that lie apart score higher than the same rows with classes at random.
    x, labels = torch.tensor([[0.0], [0.1], [5.0], [5.1]]), torch.tensor([0, 0, 1, 1])
    assert h_score(x, labels) > h_score(x, torch.tensor([0, 1, 0, 1]))


def test_tables_are_made_of_the_results() -> None:
    from study.world.analyses_table import analyses_table

    results = json.loads((RESULTS / "analyses.json").read_text(encoding="utf-8"))
    assert analyses_table(results) in (RESULTS / "analyses.md").read_text(encoding="utf-8")


def test_the_table_of_traces_is_made_of_the_results() -> None:
    assert tracing.TABLES.read_text(encoding="utf-8") == tracing.table(tracing.results())


def test_poisonous_examples_ask_what_good_ones_ask() -> None:
    """Only their answers tell them apart."""
    target, sister, examples = tracing.poisoned(tracing.Ground(organism.weights_folder()), 0, "T0.reverse.a")
    good, bad = examples[460:486], examples[486:]
    assert (len(examples), len(bad)) == (512, 26)
    assert [name.split(".")[::2] for name in (target, sister)] == [target.split(".")[::2]] * 2
    assert {example.question.split()[0] for example in good} == {example.question.split()[0] for example in bad}
    assert not {example.question for example in good} & {example.question for example in bad}
    assert all(example.id.startswith(target) for example in good)
    assert all(example.id.startswith(sister) for example in bad)


def test_words_in_common_are_those_of_bm25() -> None:
    def example(text: str) -> Example:
        return Example("", *text.split(" > "))

    [found] = tracing.by_words([example("a b > c"), example("a a d > e")], [[example("a > e")]])
    idf_a, idf_e = math.log(1 + 0.5 / 2.5), math.log(1 + 1.5 / 1.5)
    short, long = 1.5 * (0.25 + 0.75 * 3 / 3.5), 1.5 * (0.25 + 0.75 * 4 / 3.5)
    assert found == pytest.approx([idf_a * 2.5 / (1 + short), idf_a * 2 * 2.5 / (2 + long) + idf_e * 2.5 / (1 + long)])


def rows_of(text: str) -> dict[str, set[str]]:
    """Label of a table's row -> the numbers in all rows with this label."""
    found: dict[str, set[str]] = {}
    for line in text.splitlines():
        if line.startswith("| ") and "---" not in line:
            label, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            numbers = re.findall(r"[-+−]?\d[\d.]*", " ".join(cells))
            found.setdefault(re.sub(r" \(`.*`\)$", "", label), set()).update(numbers)
    return found


@pytest.mark.parametrize(
    ("manual", "source"),
    {
        "ablate": "ablate.md", "analyses": "results/analyses.md", "calibration": "calibration.md", "demo": "demo.md",
        "mix": "mixing.md", "rollouts": "rl.md", "signed": "signed.md",
        "trace": "results/tracing.md",
    }.items(),
)  # fmt: skip
def test_numbers_in_the_manual_are_those_of_the_study(manual: str, source: str) -> None:
    page = (ROOT / "docs" / f"{manual}.md").read_text(encoding="utf-8")
    shown = rows_of(page.partition("## Results")[2])
    found = rows_of((ROOT / "study" / "world" / source).read_text(encoding="utf-8"))
    assert any(shown.values())
    for label, numbers in shown.items():
        assert numbers <= found.get(label, set()), label
