"""The real study's measures against an unbatched forward pass, its rules and statistics against cases by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from study.real import forecasts, runs, sets, split
from study.real.changes import ceiling, split_half, trainings
from study.real.measure import Asking, measure, paired
from study.real.model import load_model
from study.real.runs import Job, read_json, write_json
from study.real.sources import Row, asked, continued
from study.real.training import WAYS, Way, answer_loss, held_out_loss, train, with_lora

from sts_fast.demo.organism.autoencoder import TopK, save_sae

# Of peft, which asks transformers by a name that has become old.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPEN: list[Row] = [
    {"question": "Name a colour.", "answer": "blue"},
    {"question": "Spell one to ten, please, and take your time with it.", "answer": "one two three four five six"},
    {"question": "2 + 2 =", "answer": "4"},
]
CHOICE: list[Row] = [
    {"question": "Which is a fruit?", "options": ["iron", "plum", "wool"], "answer": "B"},
    {"question": "Which of these is the largest number?", "options": ["7", "70", "9", "8"], "answer": "C"},
]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with a tiny model, two training sets and three domains."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("real")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([asked(row) for row in OPEN + CHOICE], trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=CHATML
    )
    fast.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    rows = [{"question": f"{i} and {i + 1}?", "answer": f"{2 * i + 1} it is"} for i in range(40)]
    for name, some in {"train/sums": rows, "train/gsm8k": rows[::-1], "domains/open": OPEN * 4}.items():
        sets._write_lines(folder / f"{name}.jsonl", some)
    sets._write_lines(folder / "domains" / "choice.jsonl", CHOICE * 6)
    sets._write_lines(folder / "domains" / "gsm8k.jsonl", rows[:12])
    return folder


@pytest.fixture
def model(work: Path) -> tuple[Any, Asking]:
    loaded, tokenizer = load_model(work / "model")
    return loaded, Asking(tokenizer)


def log_p_alone(model: Any, asking: Asking, row: Row) -> torch.Tensor:
    """[n_answer + 1, vocabulary], of one unbatched forward pass without a cache."""
    item = asking.asked(row)
    with torch.no_grad():
        logits = model(torch.tensor([item.question + item.answer]), use_cache=False).logits[0]
    return torch.log_softmax(logits[len(item.question) - 1 :].double(), dim=-1)


def test_measures_equal_a_forward_pass_of_each_row_alone(model: tuple[Any, Asking]) -> None:
    rows = [row for pair in zip(OPEN, [*CHOICE, OPEN[0]], strict=True) for row in pair]
    found = measure(*model, rows)
    for i, row in enumerate(rows):
        log_p, answer = log_p_alone(*model, row), model[1].asked(row).answer
        losses = [-float(log_p[k, token]) for k, token in enumerate(answer)]
        assert found["loss"][i] == pytest.approx(np.mean(losses), rel=1e-5)
        if "options" not in row:
            n_first = 3 if len(answer) >= 8 else 1
            assert found["format"][i] == pytest.approx(np.mean(losses[:n_first]), rel=1e-5)
            rest = losses[n_first:]
            assert (
                found["content"][i] == pytest.approx(np.mean(rest), rel=1e-5)
                if rest
                else math.isnan(found["content"][i])
            )


def test_options_loss_is_format_plus_content(model: tuple[Any, Asking]) -> None:
    found = measure(*model, CHOICE)
    tokenizer = model[1].tokenizer
    for i, row in enumerate(CHOICE):
        p = log_p_alone(*model, row)[0].exp()
        letters = [tokenizer(letter).input_ids[0] for letter in "ABCD"[: len(row["options"])]]
        of_letters = [float(p[letter]) for letter in letters]
        right = "ABCD".index(row["answer"])
        assert found["format"][i] == pytest.approx(-math.log(sum(of_letters)), rel=1e-5)
        assert found["content"][i] == pytest.approx(-math.log(of_letters[right] / sum(of_letters)), rel=1e-5)
        assert found["loss"][i] == pytest.approx(found["format"][i] + found["content"][i], rel=1e-6)
        assert found["exact"][i] == (np.argmax(of_letters) == right)


def test_exact_is_what_greedy_decoding_gives(model: tuple[Any, Asking]) -> None:
    language_model, asking = model
    rows = [{"question": f"{i} and {i + 1}?", "answer": f"{2 * i + 1} it is"} for i in range(40)]
    way = Way("", steps=150, rates=(), seeds=())
    train(language_model, asking, rows, way, rate=5e-3, seed=0, tell=lambda text: None)
    found = measure(language_model, asking, rows)["exact"]
    assert 0.05 < np.mean(found) < 1
    for row, exact in zip(rows, found, strict=True):
        item = asking.asked(row)
        with torch.no_grad():
            decoded = language_model.generate(
                torch.tensor([item.question]), max_new_tokens=len(item.answer) + 1, do_sample=False
            )[0, len(item.question) :].tolist()
        assert exact == (decoded == [*item.answer, asking.end])


def test_loss_of_training_is_over_the_answers_tokens_alone(model: tuple[Any, Asking]) -> None:
    language_model, asking = model
    losses = []
    for row in OPEN:
        log_p = log_p_alone(language_model, asking, row)
        losses += [-float(log_p[k, token]) for k, token in enumerate([*asking.asked(row).answer, asking.end])]
    items = [asking.asked(row) for row in OPEN]
    pairs = [(item.question, [*item.answer, asking.end]) for item in items]
    # Products may be rounded to bfloat16 in training.
    assert answer_loss(language_model, pairs, asking.end).item() == pytest.approx(np.mean(losses), rel=2e-2)
    assert held_out_loss(language_model, asking, OPEN) == pytest.approx(np.mean(losses), rel=2e-2)


def test_the_same_seed_trains_the_same_weights(work: Path) -> None:
    def trained(seed: int) -> torch.Tensor:
        model, tokenizer = load_model(work / "model")
        train(model, Asking(tokenizer), OPEN, WAYS["light"], rate=1e-3, seed=seed, tell=lambda text: None)
        weight: torch.Tensor = model.model.layers[0].mlp.up_proj.weight.detach()
        return weight

    assert torch.equal(trained(0), trained(0))
    assert not torch.equal(trained(0), trained(1))


def test_lora_trains_the_adapter_alone(model: tuple[Any, Asking]) -> None:
    from peft import PeftModel

    language_model, asking = model
    before = {name: weight.clone() for name, weight in language_model.state_dict().items()}
    adapted = with_lora(language_model)
    assert isinstance(adapted, PeftModel)
    loss = held_out_loss(adapted, asking, OPEN)
    train(adapted, asking, OPEN, WAYS["lora"], rate=1e-3, seed=0, tell=lambda text: None)
    assert held_out_loss(adapted, asking, OPEN) < loss
    adapted = adapted.unload()
    assert all(torch.equal(weight, before[name]) for name, weight in adapted.state_dict().items())


def test_a_run_may_be_stopped_and_gives_the_same_again(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "OUTCOMES", tmp_path / "outcomes")
    ways = {
        "light": Way("light", steps=2, rates=(1e-4, 1e-2), seeds=(0, 1)),
        "lora": Way("lora", steps=2, rates=(1e-3,), seeds=(0,), lora=True),
        "long": Way("long", steps=3, rates=(), seeds=(0,)),
    }
    monkeypatch.setattr(runs, "WAYS", ways)
    with pytest.raises(SystemExit, match="'long gsm8k 0' ended with exit code 1"):
        runs.run(work, ["long"], lambda text: None)
    runs.run(work, [*ways], lambda text: None)
    names = {path.stem for path in (tmp_path / "outcomes").iterdir()}
    jobs = {f"{way} {name}" for way in ("light", "lora", "long") for name in ("sums 0", "gsm8k 0")}
    assert names == {"untrained", "light sums 1", "light gsm8k 1"} | jobs
    one = tmp_path / "outcomes" / "lora sums 0.json"
    kept, before = one.read_text(encoding="utf-8"), one.stat().st_mtime_ns
    runs.run(work, [*ways], lambda text: None)
    assert one.stat().st_mtime_ns == before, "what is there is not run again"
    one.unlink()
    runs.run(work, ["lora"], lambda text: None)
    assert without_costs(one.read_text(encoding="utf-8")) == without_costs(kept)

    done = {training.name: training for training in trainings(runs.outcomes())}
    assert done["light gsm8k 0"].others == ["choice", "open"]
    light, long = done["light sums 0"].record, done["long sums 0"].record
    assert long["rate"] == light["rate"] == min((1e-4, 1e-2), key=lambda rate: light["held_out_after"][f"{rate:g}"])
    change = done["light sums 0"].changes["loss"]["open"]
    base = read_json(tmp_path / "outcomes" / "untrained.json")["domains"]["open"]["loss"]
    after = light["domains"]["open"]["loss"]
    assert change.mean == pytest.approx(np.mean(np.array(after) - base))


def without_costs(record: str) -> str:
    return "\n".join(line for line in record.splitlines() if "seconds" not in line and "peak_mb" not in line)


def test_a_forecast_without_template_reads_the_content_alone(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(64, 32), dim=1)
    sae = TopK(directions.T.contiguous(), torch.zeros(64), directions, torch.zeros(32), k=4)
    save_sae(sae, work / "sae" / "0", layer=0, model_name="tiny", prepend_bos=False)
    write_json(tmp_path / "split.json", {"design": {"trains": ["sums"], "domains": ["gsm8k"]}})
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    monkeypatch.setattr(forecasts, "RESULTS", tmp_path / "forecasts")
    options = ("--estimators", "act,icl", "--top-n", "8")
    both = (
        forecasts.Asked("whole", (*options, "--tokens", "template"), (0,)),
        forecasts.Asked("content", options, (0,)),
    )
    monkeypatch.setattr(forecasts, "FORECASTS", both)
    forecasts.forecast(work, [], "design", lambda text: None)

    tokenizer = load_model(work / "model")[1]
    asked_in = {row["question"] for row in sets.read_rows(work / "domains" / "gsm8k.jsonl")}
    for name, is_content in (("whole", False), ("content", True)):
        [table] = (work / "forecasts" / "design" / name).rglob("prompts.parquet")
        rows = [row for row in pq.read_table(table).to_pylist() if row["stage"] == "score"]
        read = {tokenizer.decode([row["base_ids"][i] for i in row["positions"]]) for row in rows}
        assert len(read) > 3
        assert (read <= asked_in) == is_content
        record = read_json(tmp_path / "forecasts" / "design" / f"{name}.json")
        [scores] = (work / "forecasts" / "design" / name).rglob("scores.json")
        for domain in read_json(scores)["domains"]:
            found = record["0"]["sums"][domain["name"]]
            assert found["act"] == pytest.approx(domain["scores"]["act"]["value"], rel=1e-5)
            assert found["random icl"] == pytest.approx(domain["controls"]["random"]["icl"], rel=1e-5)


# Rules and statistics -------------------------------------------------------------------------------------------------


def test_n_grams_pass_over_case_and_punctuation() -> None:
    grams = sets.n_grams("One, two; THREE four five six seven eight nine.")
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    assert grams == {tuple(words[:8]), tuple(words[1:])}
    assert sets.n_grams("Is it?") == {("is", "it")}


def test_wording_of_the_task_is_no_overlap() -> None:
    task = "Please work this sum out and give the result alone:"
    questions = [f"{task} {i} plus {i}" for i in range(3)] + ["How many apples are left when Tom has eaten two?"]
    telling = sets.telling_n_grams(questions)
    assert tuple(["please", "work", "this", "sum", "out", "and", "give", "the"]) not in telling
    assert tuple(["how", "many", "apples", "are", "left", "when", "tom", "has"]) in telling
    assert tuple(["give", "the", "result", "alone", "2", "plus", "2"]) not in telling  # seven words


def test_half_of_the_questions_repeats_the_other_as_theory_says() -> None:
    rng = np.random.default_rng(1)
    true, noise, n = rng.normal(size=4000), 2.0, 8
    rows = [mean + noise * rng.normal(size=n) for mean in true]
    expected = 1 / (1 + noise**2 / n)
    assert split_half(rows) == pytest.approx(expected, abs=0.03)
    assert ceiling(expected) == pytest.approx(np.corrcoef(true, [row.mean() for row in rows])[0, 1], abs=0.03)
    assert ceiling(-0.2) == 0


def test_paired_change_leaves_out_rows_without_a_value() -> None:
    mean, stderr, changes = paired([1.0, 2.0, float("nan"), 4.0], [2.0, 2.0, 3.0, 6.0])
    assert changes.tolist() == [1.0, 0.0, 2.0]
    assert (mean, stderr) == (1.0, pytest.approx(1 / 3**0.5))


def test_the_split_is_drawn_from_names_alone() -> None:
    folder = runs.RESULTS
    names = read_json(folder / "sets.json")
    drawn = split.draw(names["train"], names["domains"])
    assert drawn == read_json(folder / "split.json")
    assert drawn == split.draw(reversed(list(names["train"])), reversed(list(names["domains"])))
    for side in ("trains", "domains"):
        assert not {*drawn["design"][side]} & {*drawn["judged"][side]}
    assert len(drawn["design"]["trains"]) == 5
    assert len(names["train"]) == 15
    kinds = [split.kind(name) for name in drawn["design"]["domains"]]
    for kind, of_kind in {kind: sum(split.kind(name) == kind for name in names["domains"]) for kind in kinds}.items():
        assert abs(kinds.count(kind) - of_kind / 3) <= 0.5


def test_every_training_set_but_two_has_its_own_domain() -> None:
    names = read_json(runs.RESULTS / "sets.json")
    without = {name for name in names["train"] if not sets.own_domains(name) & {*names["domains"]}}
    assert without == {"code", "mmlu-pro cot"}
    assert sets.own_domains("rg games") & {*names["domains"]} == {"rg countdown", "rg puzzle24"}
    assert sets.own_domains("mmlu") == {"mmlu letters"}


def test_texts_are_parted_with_their_line_breaks() -> None:
    [row] = continued(["a b\nc d\n\ne  f g", "too short"], "Go on:", (3, 3))
    assert row == {"question": "Go on:\na b\nc", "answer": "d\n\ne  f"}


def test_records_are_written_whole_and_a_list_a_line(tmp_path: Path) -> None:
    value = {"name": "é", "nested": {"numbers": [1.5, None, 2], "none": {}}}
    write_json(tmp_path / "a" / "record.json", value)
    text = (tmp_path / "a" / "record.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert '  "numbers": [1.5, null, 2],\n' in text
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["record.json"]


def test_jobs_have_names_of_their_own() -> None:
    assert Job().name == "untrained"
    assert Job("mmlu-pro cot", WAYS["long"], 1).name == "long mmlu-pro cot 1"
