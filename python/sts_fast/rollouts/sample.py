"""Rollouts from the model itself: completions sampled for each question, and a checker that rewards them."""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Unpack, cast

from sts_fast.data.examples import Example, are_examples, load_examples
from sts_fast.data.options import Option, part, shows
from sts_fast.data.prompts import Tell
from sts_fast.data.sets import Drawing, DrawingOptions, Source
from sts_fast.data.sources import Places
from sts_fast.data.template import PromptTemplate
from sts_fast.errors import InputError
from sts_fast.files import NOTHING_KEPT, Kept
from sts_fast.model.lengths import forget_lengths
from sts_fast.model.memory import running
from sts_fast.model.packing import check_vocabulary
from sts_fast.model.session import Loading, LoadingOptions, Purpose, Reading, Session
from sts_fast.rollouts.read import Rollout, Rollouts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sts_fast.statistics import IntArray

Checker = Callable[[str, str, str | None], float]

# GSM8K writes its result after this mark.
RESULT_MARK = "####"
# Models without a chat template continue with a question of their own.
NEXT_QUESTION = "\nQuestion:"


@dataclass(frozen=True)
class Completing(Drawing, Loading):
    """Options of sampling completions; see Loading for how the model is loaded.

    n_samples: completions of each question, from the whole distribution at `temperature`, each of at most
               `max_new_tokens` tokens and no more than the context has room for; those without an end are truncated
    limit:     most questions, the first ones; None for all
    """

    n_samples: Annotated[int, Option("Completions of each question of --train.", "--sample", least=1)] = 8
    temperature: Annotated[float, Option("Temperature of sampling.")] = 1.0
    max_new_tokens: Annotated[int, Option("Longest completion sampled.", least=1)] = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0 or not math.isfinite(self.temperature):
            raise InputError(f"--temperature must be above 0, not {self.temperature:g}")


class CompletingOptions(DrawingOptions, LoadingOptions, total=False):
    """`Completing` as keywords."""

    n_samples: int
    temperature: float
    max_new_tokens: int


@shows(Completing, CompletingOptions)
def sample_rollouts(
    *,
    model: str | Path | PreTrainedModel,
    questions: Source,
    check: str | Checker,
    tokenizer: PreTrainedTokenizerBase | None = None,
    question_field: str | None = None,
    answer_field: str | None = None,
    progress: Tell | None = None,
    kept: Kept = NOTHING_KEPT,
    **options: Unpack[CompletingOptions],
) -> Rollouts:
    """Samples completions of questions and rewards them.

    questions: as the training set of `score`; check: see load_checker, or a function of (question, completion, answer)
    kept:      what has been computed, from which an interrupted run goes on; rewards are computed again
    options:   see Completing

    The completions of a question depend only on `seed` and the question, not on the other questions.

    Raises InputError for a checker that cannot be used, for questions that lack the answers it needs or are as long
    as the model's context, and for a tokenizer of another model.
    """
    completing = Completing(**options)
    checker = load_checker(check) if isinstance(check, str) else check
    if are_examples(questions):
        examples = list(questions)[: completing.limit]
    else:
        places = cast(Places, questions)
        examples = load_examples(places, question_field=question_field, answer_field=answer_field)[: completing.limit]
    if check in ("exact", "math") and (lacking := [example.id for example in examples if example.answer is None]):
        raise InputError(
            f"--check {check} compares with the answer, but question {lacking[0]} has none: fill it in, name its "
            "column with --answer-field, or give a checker of your own"
        )
    session = Session.open(
        model, [], replace(part(Reading, completing), kept=kept),
        tokenizer=tokenizer, purpose=Purpose(whole=True, needs=[("sampling", "a model")]),
    )  # fmt: skip
    template, whole = PromptTemplate(session.tokenizer), session.whole
    conversations = [example.turns for example in examples]
    ids = [template.token_ids(turns) for turns in conversations]
    check_vocabulary(whole, ids, name=session.name)
    room = _room(whole, examples, [len(prompt_ids) for prompt_ids in ids])
    rows: list[Rollout] = []
    for group, (example, turns) in enumerate(zip(examples, conversations, strict=True)):
        said = tuple((turn.role, turn.text) for turn in turns)
        seed = zlib.crc32(f"{completing.seed} {said}".encode())
        sampled = _sampled_ids(session, ids[group], completing, room[group], seed)
        for text, truncated in _completions(sampled, template, _end_ids(whole, template.tokenizer)):
            reward = _checked(checker, example, text)
            rows.append(Rollout(turns, text, reward, group, None, truncated))
        if progress is not None:
            progress(group + 1, len(examples))
    return Rollouts(
        rows, {"prompt": "questions", "completion": f"{completing.n_samples} samples", "reward": str(check)}
    )


def _room(model: Any, examples: Sequence[Example], lengths: Sequence[int]) -> list[int]:
    """Tokens that the context has left for a completion of each question, whose prompts have `lengths` tokens."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    for example, length in zip(examples, lengths, strict=True):
        if length >= context:
            raise InputError(
                f"question {example.id} has {length} tokens, and the model's context of {context} leaves no room for a "
                "completion: leave it out, or use a model with a longer context"
            )
    return [context - length for length in lengths]


def _sampled_ids(
    session: Session, prompt_ids: IntArray, completing: Completing, room: int, seed: int
) -> NDArray[np.int64]:
    """[n_samples, longest] token ids of the completions of a prompt [n_tokens]; room: tokens left in the context."""
    model, ends = session.whole, _end_ids(session.whole, session.tokenizer)
    options: dict[str, Any] = {
        "do_sample": True, "temperature": completing.temperature, "top_k": 0, "top_p": 1.0,
        "num_return_sequences": completing.n_samples, "max_new_tokens": min(completing.max_new_tokens, room),
        "eos_token_id": ends or None, "pad_token_id": ends[0] if ends else 0,
    }  # fmt: skip

    def sample() -> dict[str, NDArray[Any]]:
        import torch

        ids = torch.from_numpy(prompt_ids.astype("int64"))[None].to(next(model.parameters()).device)
        forget_lengths(model)
        with torch.random.fork_rng(), running("the model"), torch.inference_mode():
            torch.manual_seed(seed)
            out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return {"ids": out[:, ids.shape[1] :].cpu().numpy()}

    config = getattr(model, "generation_config", None)  # which may have further options, as a penalty for repetition
    defaults = None if config is None else json.dumps(config.to_dict(), sort_keys=True, default=str)
    return session.kept.arrays("completions", [prompt_ids, seed, options, defaults], sample)["ids"]


def _completions(sampled: NDArray[np.int64], template: PromptTemplate, ends: Sequence[int]) -> list[tuple[str, bool]]:
    """(text, whether it was cut off) of each completion of some token ids [n_samples, longest]."""
    tokenizer = template.tokenizer
    completions = []
    for row in sampled.tolist():
        at = next((i for i, token in enumerate(row) if token in ends), None)
        text = str(tokenizer.decode(row[:at], skip_special_tokens=True))
        text, _, more = text.partition(NEXT_QUESTION) if not template.is_chat else (text, "", "")
        completions.append((text, at is None and not more))
    return completions


def _end_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [ends]
    return list(dict.fromkeys(int(end) for end in (*ends, tokenizer.eos_token_id) if end is not None))


def load_checker(name: str) -> Checker:
    """A function (question, completion, answer) -> reward, by name.

    'exact': 1 where completion and answer are the same text, apart from surrounding space
    'math':  1 where math-verify finds them equivalent
    'package.module:function': any function of the user's, found as Python finds modules, or in the current folder

    Raises InputError where there is no such function, or math-verify is not installed.
    """
    if name == "exact":
        return lambda question, completion, answer: float(completion.strip() == (answer or "").strip())
    if name == "math":
        return _math_checker()
    module_name, colon, function_name = name.partition(":")
    if not colon or not module_name or not function_name:
        raise InputError(f"--check must be exact, math, or package.module:function, not '{name}'")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a module of the user's may raise anything
        raise InputError(f"--check {name}: {module_name} cannot be imported ({_first_line(error)})") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(f"--check {name}: {module_name} has no function {function_name}")
    checker: Checker = function
    return checker


def _math_checker() -> Checker:
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise InputError(
            "--check math needs math-verify, which is not installed: pip install 'sts-fast[math]', or use --check exact"
        ) from error

    def check(question: str, completion: str, answer: str | None) -> float:
        gold = (answer or "").rpartition(RESULT_MARK)[2].strip()
        # math-verify recognises a bare result such as \frac{1}{2} only between dollar signs.
        return float(any(verify(parse(form), parse(completion)) for form in (gold, f"${gold}$")))

    return check


def _checked(checker: Checker, example: Example, completion: str) -> float:
    try:
        reward = float(checker(example.question, completion, example.answer))
    except Exception as error:  # a function of the user's may raise anything
        raise InputError(f"the checker failed on question {example.id} ({_first_line(error)}): correct it") from error
    if not math.isfinite(reward):
        raise InputError(f"the checker returned {reward} for question {example.id}: rewards must be finite numbers")
    return reward


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().partition("\n")[0]
