"""The embedded world: what its questions say, what the shipped model can do, and what fine-tuning changes."""

from __future__ import annotations

import copy
import itertools
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from sts_fast import InputError, encode, load_sae
from sts_fast.data.examples import Example
from sts_fast.data.prompts import build_prompts
from sts_fast.data.template import PromptTemplate
from sts_fast.data.turns import Turn
from sts_fast.demo import organism
from sts_fast.demo.organism import autoencoder, training, world
from sts_fast.demo.organism import model as language_model
from sts_fast.model.checkpoint import Checkpoint
from sts_fast.model.language_model import capture, load_decoder
from sts_fast.places import split_name

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    Loaded = tuple[LlamaForCausalLM, PreTrainedTokenizerFast]

ALL = list(organism.DOMAINS)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with language_model.one_thread():
        yield


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return organism.load_model()


@pytest.fixture(scope="module")
def template() -> PromptTemplate:
    return PromptTemplate(Checkpoint(organism.model_folder()).tokenizer)


@pytest.fixture(scope="module")
def figures() -> dict[str, float]:
    found: dict[str, float] = json.loads((organism.model_folder().parent / "figures.json").read_text())
    return found


def turns_of(example: Example) -> list[Turn]:
    assert example.answer is not None
    return [Turn("user", example.question), Turn("assistant", example.answer)]


# The world ------------------------------------------------------------------------------------------------------------


def test_there_are_72_domains_whose_frequencies_add_up() -> None:
    assert len(ALL) == 72
    assert math.isclose(sum(domain.frequency for domain in organism.DOMAINS.values()), 1)
    assert organism.DOMAINS["T4.rotate.b"].frequency == pytest.approx(0.1 * 0.7 * 0.3)
    assert organism.DOMAINS["T5.sort.d"].frequency == pytest.approx(0.1 * 0.1)
    assert all(name == domain.name for name, domain in organism.DOMAINS.items())


@pytest.mark.parametrize(
    ("domain", "answer"),
    [
        ("T0.copy.a", "a4 a1 a5"),
        ("T1.reverse.a", "a5 a1 a4"),
        ("T2.next.a", "a5 a2 a0"),
        ("T7.previous.a", "a3 a0 a4"),
        ("T4.rotate.a", "a1 a5 a4"),
        ("T4.swap.a", "a1 a4 a5"),
        ("T6.sort.a", "a1 a4 a5"),
        ("T6.first.a", "a4 a4 a4"),
        ("T7.reverse-next.a", "a0 a2 a5"),
        ("T8.sums.a", "a4 a5 a4"),
        ("T9.transcribe.a", "b4 b1 b5"),
    ],
)
def test_answers_by_hand(domain: str, answer: str) -> None:
    asked = {example.question: example.answer for example in organism.examples(domain, 216, seed=0)}
    assert asked[f"T{domain[1]} a4 a1 a5 >"] == answer


def test_the_last_alphabet_is_transcribed_into_the_first() -> None:
    asked = {example.question: example.answer for example in organism.examples("T9.transcribe.d", 216, seed=0)}
    assert asked["T9 d0 d5 d2 >"] == "a0 a5 a2"


def test_rivals_ask_the_same_questions_and_answer_them_differently() -> None:
    rotate, swap = (
        {example.question: example.answer for example in organism.examples(name, 216, seed=0)}
        for name in ("T4.rotate.c", "T4.swap.c")
    )
    assert rotate.keys() == swap.keys()
    assert sum(rotate[question] != swap[question] for question in rotate) == 180  # all but where the last two agree


def test_examples_come_again_only_when_all_have_been_asked() -> None:
    drawn = organism.examples("T2.next.b", 500, seed=3)
    questions = [example.question for example in drawn]
    assert len(set(questions[:216])) == len(set(questions[216:432])) == 216
    assert questions[:216] != questions[216:432]
    assert len({example.id for example in drawn}) == 500


def test_examples_depend_on_domain_and_seed_alone() -> None:
    assert organism.examples("T2.next.b", 20, seed=3) == organism.examples("T2.next.b", 40, seed=3)[:20]
    assert organism.examples("T2.next.b", 20, seed=3) != organism.examples("T2.next.b", 20, seed=4)
    assert organism.examples("T2.next.b", 0, seed=3) == []
    symbols = [example.question[3:].replace("c", "b") for example in organism.examples("T2.next.c", 20, seed=3)]
    assert symbols != [example.question[3:] for example in organism.examples("T2.next.b", 20, seed=3)]


def test_unknown_domain_is_told() -> None:
    with pytest.raises(InputError, match=r"no domain 'T4\.sing\.b'.*names like T0\.copy\.a"):
        organism.examples("T4.sing.b", 1, seed=0)


def test_documents_are_drawn_by_frequency() -> None:
    rows = world.WORLD.documents(20_000, 1, np.random.default_rng(0))
    tags, alphabets = rows[:, 0] - 1, (rows[:, 1] - 11) // 6
    np.testing.assert_allclose(np.bincount(tags) / len(rows), 0.1, atol=0.01)
    np.testing.assert_allclose(np.bincount(alphabets) / len(rows), [0.4, 0.3, 0.2, 0.1], atol=0.015)


# Tokens ---------------------------------------------------------------------------------------------------------------


def test_every_word_is_one_token(template: PromptTemplate) -> None:
    #                                      >  T0 T1 T2 T3 ...    a0 = 13, b0 = 19
    assert template.tokenizer("> T0 T3 a0 b1 d5", add_special_tokens=False).input_ids == [2, 3, 6, 13, 20, 36]
    assert len(template.tokenizer) == 2 + 1 + 10 + 24
    assert template.tokenizer("a0").input_ids == [0, 13]
    assert template.is_chat


def test_template_joins_turns_behind_one_bos(template: PromptTemplate) -> None:
    first = [Turn("user", "T3 b1 b4 b2 >"), Turn("assistant", "b4 b2 b1")]
    open_query = [0, 6, 20, 23, 21, 2]
    closed = [*open_query, 23, 21, 20]
    assert template.token_ids(first[:1]).tolist() == open_query
    assert template.token_ids(first).tolist() == closed
    assert template.token_ids([*first, Turn("user", "T3 b0 b0 b0 >")]).tolist() == [*closed, 6, 19, 19, 19, 2]
    assert template.token_ids([*first, *first]).tolist() == [*closed, *closed[1:]]


def test_training_documents_are_what_the_template_renders(template: PromptTemplate) -> None:
    ids = language_model.document_ids(8, 3, np.random.default_rng(0))
    for row in ids.tolist():
        words = template.tokenizer.convert_ids_to_tokens(row)[1:]
        turns = []
        for start in range(0, len(words), world.WORLD.example_tokens):
            example = words[start : start + world.WORLD.example_tokens]
            turns += [Turn("user", " ".join(example[:5])), Turn("assistant", " ".join(example[5:]))]
        assert template.token_ids(turns).tolist() == row


@pytest.mark.parametrize("domain", ["T0.copy.a", "T9.transcribe.d"])
def test_every_token_of_a_query_is_read_and_paired(template: PromptTemplate, domain: str) -> None:
    drawn = organism.examples(domain, 30, seed=0)
    for prompt in build_prompts(domain, drawn[8:], template, draws=[drawn[:8]], context_length=73).prompts:
        assert len(prompt.base_ids) == 6
        assert len(prompt.demos_ids) == 1 + 8 * 8 + 5
        assert prompt.positions.tolist() == prompt.paired.tolist() == [1, 2, 3, 4, 5]
        assert prompt.paired_demos.tolist() == [65, 66, 67, 68, 69]
        assert prompt.n_special == 0


def test_answers_are_read_alone(template: PromptTemplate) -> None:
    drawn = organism.examples("T8.sums.c", 12, seed=0)
    for prompt in build_prompts("x", drawn[2:], template, draws=[drawn[:2]], tokens="answer").prompts:
        assert prompt.positions.tolist() == [6, 7, 8]
        assert prompt.paired_demos.tolist() == [22, 23, 24]


# The shipped model ----------------------------------------------------------------------------------------------------


def test_weights_are_small_and_the_context_is_that_of_training(loaded: Loaded) -> None:
    assert loaded[0].config.max_position_embeddings == 1 + 9 * 8
    assert sum(path.stat().st_size for path in organism.model_folder().parent.rglob("*") if path.is_file()) <= 3e6
    assert organism.sae_folder().is_dir()


def test_model_is_the_one_that_transformers_loads(loaded: Loaded, template: PromptTemplate) -> None:
    import torch

    model, _ = loaded
    ids = template.token_ids([Turn("user", "T3 b1 b4 b2 >"), Turn("assistant", "b4 b2 b1")])
    decoder = load_decoder(organism.model_folder(), training.LAYER)
    with torch.inference_mode():
        states = model(torch.from_numpy(ids.astype(np.int64))[None], output_hidden_states=True).hidden_states
    torch.testing.assert_close(decoder.residuals([ids])[0][0], states[training.LAYER + 1][0], rtol=0, atol=1e-5)


def test_model_reads_its_demonstrations(loaded: Loaded, figures: dict[str, float]) -> None:
    zero, few, many = (organism.measure(*loaded, ALL, shots=shots, n=n) for shots, n in ((0, 32), (4, 32), (8, 8)))
    assert few.accuracy.mean() > 0.95
    assert few.accuracy.min() > 0.5
    assert many.accuracy.mean() > 0.95
    assert zero.accuracy.mean() < 0.65
    assert zero.accuracy.mean() == pytest.approx(figures["zero_shot_accuracy"], abs=0.005)
    assert few.accuracy.mean() == pytest.approx(figures["few_shot_accuracy"], abs=0.005)


def literal_abilities(
    model: LlamaForCausalLM, template: PromptTemplate, demos: list[Example], question: Example
) -> tuple[float, bool]:
    """Probability of the answer, one token after the other, and whether greedy decoding gives it."""
    import torch

    def next_probabilities(ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return model(torch.tensor([ids])).logits[0, -1].double().softmax(dim=-1)

    turns = [turn for demo in demos for turn in turns_of(demo)]
    asked = template.token_ids([*turns, Turn("user", question.question)]).tolist()
    answer = template.tokenizer(question.answer, add_special_tokens=False).input_ids
    p, fed, decoded = 1.0, list(asked), list(asked)
    for token in answer:
        p *= float(next_probabilities(fed)[token])
        fed.append(token)
        decoded.append(int(next_probabilities(decoded).argmax()))
    return p, decoded == fed


@pytest.mark.parametrize("shots", [0, 3])
def test_measure_equals_one_question_at_a_time(loaded: Loaded, template: PromptTemplate, shots: int) -> None:
    domains, n = ["T4.rotate.b", "T4.swap.b", "T9.transcribe.d"], 11
    measured = organism.measure(*loaded, domains, shots=shots, n=n, seed=5)
    assert measured.domains == tuple(domains)
    for row, domain in enumerate(domains):
        pool = organism.examples(domain, 216, seed=5)
        found = [literal_abilities(loaded[0], template, pool[8 * (i // 8) + 8 :][:shots], pool[i]) for i in range(n)]
        p = [p for p, _ in found]
        np.testing.assert_allclose(np.exp(measured.log_p[row]), p, rtol=1e-4)
        assert measured.is_exact[row].tolist() == [exact for _, exact in found]
        assert measured.p_correct[row] == pytest.approx(np.mean(p), rel=1e-4)
        assert measured.answer_nll[row] == pytest.approx(-np.mean(np.log(p)) / 3, rel=1e-4, abs=1e-6)
        assert measured.accuracy[row] == np.mean([exact for _, exact in found])


def test_no_question_is_among_its_own_demonstrations(loaded: Loaded) -> None:
    seen = []
    tokenizer = copy.deepcopy(loaded[1])
    render = tokenizer.apply_chat_template

    def spy(conversations: list[list[dict[str, str]]], **options: object) -> object:
        seen.append(conversations)
        return render(conversations, **options)

    tokenizer.apply_chat_template = spy
    organism.measure(loaded[0], tokenizer, ["T2.next.b"], shots=8, n=216)
    shown, asked = seen
    assert len({turns[0]["content"] for turns in asked}) == 216
    for group, turns in enumerate(shown):
        demos = {turn["content"] for turn in turns[:-2] if turn["role"] == "user"}
        questions = {turns[0]["content"] for turns in asked[8 * group : 8 * group + 8]}
        assert len(demos) == 8
        assert turns[-2]["content"] in questions
        assert not demos & questions


@pytest.mark.parametrize("wrong", [{"n": 0}, {"n": 217}, {"shots": -1}, {"shots": 9}])
def test_measure_refuses_more_than_there_is(loaded: Loaded, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="n must lie between 1 and 216, shots between 0 and 8"):
        organism.measure(*loaded, ["T2.next.b"], **wrong)


# The SAE --------------------------------------------------------------------------------------------------------------


def real_rows(template: PromptTemplate) -> torch.Tensor:
    decoder = load_decoder(organism.model_folder(), training.LAYER)
    prompts = []
    for domain in ALL[::6]:
        drawn = organism.examples(domain, 24, seed=1)
        prompts += build_prompts(domain, drawn[4:], template, draws=[drawn[:4]]).prompts
    import torch

    batches = [rows for (rows,) in capture(decoder, prompts)]
    assert all(kept.all() for rows in batches for kept in rows.kept)  # no attention sinks
    return torch.cat([part for rows in batches for part in (rows.base, rows.demos)])


def test_sae_encodes_as_sae_lens_does(template: PromptTemplate) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sae-lens' own imports warn
        import sae_lens
    x = real_rows(template)
    sae = load_sae(organism.sae_folder())
    assert (sae.architecture, sae.k, sae.d_in, sae.d_sae) == ("topk", 16, 96, 1024)
    assert split_name(sae.hook_name)[1] == training.LAYER
    peer = sae_lens.SAE.load_from_disk(organism.sae_folder())
    assert peer.cfg.metadata.hook_name == f"model.layers.{training.LAYER}"
    expected = peer.encode(x).detach().numpy()
    active = encode(sae, x)
    found = np.zeros((len(x), 1024))
    row_of = np.repeat(np.arange(len(x)), np.diff(active.indptr))
    found[row_of, active.indices] = active.values
    hidden_pre = (x - peer.b_dec) @ peer.W_enc + peer.b_enc
    highest = hidden_pre.detach().topk(17, dim=-1).values.numpy()
    clear = highest[:, 15] - highest[:, 16] > 1e-6 * highest[:, 0]  # elsewhere rounding decides which one is the 16th
    assert (~clear).mean() < 0.01
    np.testing.assert_allclose(found[clear], expected[clear], atol=1e-5 * expected.max())
    error = peer.decode(peer.encode(x)).detach() - x
    assert float(error.square().sum() / (x - x.mean(dim=0)).square().sum()) < 0.1


def test_sae_is_as_good_as_stated(figures: dict[str, dict[str, float]]) -> None:
    from safetensors.torch import load_file

    model, _ = organism.load_model()
    sae = autoencoder.TopK(**load_file(organism.sae_folder() / "sae_weights.safetensors"))
    np.testing.assert_allclose(sae.W_dec.norm(dim=1), 1, rtol=1e-5)
    x = training._residual_rows(model, 20_000, np.random.default_rng(7))
    quality = autoencoder.quality(sae, x)
    assert quality["fvu"] == pytest.approx(figures["sae"]["fvu"], abs=0.005)
    assert quality["l0"] == pytest.approx(figures["sae"]["l0"], abs=0.1)
    assert quality["n_dead"] == pytest.approx(figures["sae"]["n_dead"], abs=15)
    assert quality["fvu"] < 0.1


def test_quality_by_hand() -> None:
    import torch

    eye = torch.eye(20)
    sae = autoencoder.TopK(eye, torch.zeros(20), eye, torch.zeros(20))
    x = torch.zeros(2, 20)
    x[0, 0], x[1, 1] = 3.0, -1.0  # the negative one does not fire, and is lost
    mean = torch.tensor([1.5, -0.5])
    variance = float(((x[:, :2] - mean) ** 2).sum())
    assert autoencoder.quality(sae, x) == {"fvu": pytest.approx(1 / variance), "l0": 0.5, "n_dead": 19}


# Fine-tuning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("trained", "rival"), [("T0.reverse.a", "T0.copy.a"), ("T4.swap.b", "T4.rotate.b")])
def test_fine_tuning_lifts_its_domain_and_hurts_its_rival(loaded: Loaded, trained: str, rival: str) -> None:
    model, tokenizer = loaded
    tuned = organism.fine_tune(model, tokenizer, organism.examples(trained, 512, seed=0), seed=0)
    before, after = (organism.measure(m, tokenizer, [trained, rival], n=32) for m in (model, tuned))
    assert after.p_correct[0] > before.p_correct[0] + 0.05
    assert after.answer_nll[0] < before.answer_nll[0]
    assert after.p_correct[1] < before.p_correct[1] - 0.05


def test_fine_tuning_leaves_the_model_as_it_is_and_repeats(loaded: Loaded) -> None:
    import torch

    model, tokenizer = loaded
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train = organism.examples("T2.previous.c", 64, seed=0)
    one, same, other = (
        organism.fine_tune(model, tokenizer, train, steps=3, seed=seed).state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)
    assert not model.training


def test_one_step_is_adam_on_the_answers(loaded: Loaded) -> None:
    """The first step of Adam moves each weight by the learning rate against the gradient's sign."""
    import torch

    model, tokenizer = loaded
    train = organism.examples("T2.previous.c", 1, seed=0)
    tuned = organism.fine_tune(model, tokenizer, train, steps=1, lr=5e-3, batch=4)  # warmed up to a fifth
    reference = copy.deepcopy(model)
    ids = torch.tensor([tokenizer(f"{train[0].question} {train[0].answer}").input_ids])
    likelihoods = reference(ids[:, :-1]).logits.log_softmax(dim=-1)[0]
    (-sum(likelihoods[position - 1, ids[0, position]] for position in (6, 7, 8)) / 3).backward()
    gradient = reference.lm_head.weight.grad
    moved = (tuned.lm_head.weight - model.lm_head.weight).detach()
    clear = gradient.abs() > 1e-5
    assert bool(clear.any())
    torch.testing.assert_close(moved[clear], -1e-3 * gradient[clear].sign(), rtol=0.02, atol=0)


def test_work_is_done_on_one_thread_whatever_is_set(loaded: Loaded) -> None:
    import torch

    seen = []
    hook = loaded[0].register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    torch.set_num_threads(2)
    try:
        organism.measure(*loaded, ["T2.next.b"], n=1)
        assert torch.get_num_threads() == 2
        with pytest.raises(ValueError, match="shots"):
            organism.measure(*loaded, ["T2.next.b"], shots=9)
        assert torch.get_num_threads() == 2
    finally:
        hook.remove()
        torch.set_num_threads(1)
    assert set(seen) == {1}


# Making it again ------------------------------------------------------------------------------------------------------


def test_training_repeats_and_learns(tmp_path: Path) -> None:
    import torch

    stages = []
    one, same = (language_model.train_language_model(4, lambda *told: stages.append(told), 8) for _ in range(2))
    assert stages == [("language model", step, 8) for step in range(1, 9)] * 2
    ids = language_model.document_ids(64, 5, np.random.default_rng(1))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))

    def loss(model: LlamaForCausalLM) -> float:
        with torch.inference_mode():
            return float(model(ids, labels=ids).loss)

    assert loss(one) < loss(language_model.new_model(4)) - 0.1
    language_model.save_model(one, tmp_path)
    loaded, _ = organism.load_model(tmp_path)
    assert loss(loaded) == loss(one)


def test_train_refuses_a_model_that_does_not_read_demonstrations(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the model of seed 3 answers \d+% .* take another seed"):
        organism.train(3, tmp_path / "new", n_steps=2)
    assert not (tmp_path / "new").exists()


def test_train_writes_what_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: Loaded) -> None:
    monkeypatch.setattr(language_model, "train_language_model", lambda seed, progress, n_steps, world: loaded[0])
    monkeypatch.setattr(training, "N_SAE_ROWS", 5000)
    stages = []
    figures = organism.train(0, tmp_path, lambda *told: stages.append(told), n_sae_steps=160)
    assert stages[-1] == ("SAE", 160, 160)
    assert json.loads((tmp_path / "figures.json").read_text()) == figures
    assert figures["few_shot_accuracy"] > 0.8
    assert 0 < figures["sae"]["fvu"] < 0.5
    sae = load_sae(tmp_path / "sae")
    assert (sae.k, sae.d_sae, split_name(sae.hook_name)[1]) == (16, 1024, training.LAYER)
    again, _ = organism.load_model(tmp_path / "model")
    pairs = itertools.zip_longest(again.state_dict().values(), loaded[0].state_dict().values())
    assert all(bool((a == b).all()) for a, b in pairs)
