"""An option is one field: its check, its keyword in Python and its place on the command line come from there."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_type_hints, is_typeddict

import numpy as np
import pytest
import torch

import sts_fast
from sts_fast.ablate.ablate import Zeroing, ZeroingOptions
from sts_fast.data.options import Checked, Option, annotations_of, element_choices_of, part, type_of
from sts_fast.errors import InputError
from sts_fast.forecast.estimators import ESTIMATOR_OPTIONS
from sts_fast.forecast.options import Options, Settings
from sts_fast.forecast.tracing import Tracing, TracingOptions
from sts_fast.mix.mix import Mixing, MixingOptions
from sts_fast.model.stored.writing import Capturing, CapturingOptions
from sts_fast.profile.make import Profiling, ProfilingOptions
from sts_fast.rollouts.rollouts import RolloutOptions, RolloutSettings
from sts_fast.rollouts.sample import Completing, CompletingOptions

KEYWORDS = {
    Options: Settings,
    MixingOptions: Mixing,
    ZeroingOptions: Zeroing,
    CapturingOptions: Capturing,
    CompletingOptions: Completing,
    RolloutOptions: RolloutSettings,
    ProfilingOptions: Profiling,
    TracingOptions: Tracing,
}


@dataclass(frozen=True)
class Cooking(Checked):
    heat: Annotated[Literal["low", "high"], Option("How hot.")] = "low"
    spices: Annotated[Sequence[Literal["salt", "pepper"]], Option("Which.")] = ("salt",)
    n_eggs: Annotated[int | None, Option("How many.", "--eggs", least=1)] = 2
    pan: Annotated[Literal["iron"] | None, Option("What in.")] = None
    watch: object = None


@dataclass(frozen=True)
class Baking(Cooking):
    minutes: Annotated[int, Option("How long.", least=5)] = 20


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"heat": "warm"}, "^--heat must be one of low, high, not 'warm'$"),
        ({"heat": None}, "^--heat must be one of low, high, not 'None'$"),
        ({"spices": ["salt", "sand"]}, "^--spices must be among salt, pepper, not 'sand'$"),
        ({"spices": ["salt", "salt"]}, "^--spices must name one or more, each once$"),
        ({"spices": []}, "^--spices must name one or more, each once$"),
        ({"n_eggs": 0}, "^--eggs must be at least 1, not 0$"),
        ({"pan": "steel"}, "^--pan must be one of iron, not 'steel'$"),
        ({"minutes": None}, "^--minutes must be at least 5, not None$"),
        ({"minutes": 4}, "^--minutes must be at least 5, not 4$"),
    ],
)
def test_what_an_annotation_rules_out_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Baking(**values)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_a_dtype_is_a_name_or_torchs_own(dtype: Any) -> None:
    assert Settings(dtype=dtype, sae_dtype=dtype) == Settings(dtype="bfloat16", sae_dtype="bfloat16")
    assert Settings(sae_dtype=np.float32).sae_dtype == "float32"
    with pytest.raises(InputError, match="--sae-dtype must be one of float32, bfloat16, not 'int8'"):
        Settings(sae_dtype=torch.int8)


def test_what_an_annotation_allows_is_taken() -> None:
    taken = Baking(heat="high", spices=["pepper", "salt"], n_eggs=None, pan="iron", minutes=5)
    assert (taken.heat, taken.n_eggs, taken.pan, taken.minutes) == ("high", None, "iron", 5)


def test_own_fields_come_before_those_of_the_bases() -> None:
    assert list(annotations_of(Baking)) == ["minutes", "heat", "spices", "n_eggs", "pan", "watch"]


def test_a_part_has_the_values_of_the_whole() -> None:
    assert part(Cooking, Baking(n_eggs=7, minutes=9)) == Cooking(n_eggs=7)


@pytest.mark.parametrize("keywords", KEYWORDS, ids=lambda keywords: keywords.__name__)
def test_keywords_are_the_fields(keywords: type) -> None:
    """Type checkers know the keywords of a function from a TypedDict alone, so that it repeats the fields."""
    fields = {name: type_of(annotation) for name, annotation in annotations_of(KEYWORDS[keywords]).items()}
    assert get_type_hints(keywords) == fields


def test_public_functions_take_these_keywords() -> None:
    taken = set()
    for function in (getattr(sts_fast, name) for name in sts_fast.__all__):
        if not inspect.isfunction(function):
            continue
        if annotation := function.__annotations__.get("options"):
            [keywords] = get_args(eval(str(annotation), inspect.getmodule(function).__dict__))
            assert is_typeddict(keywords)
            taken.add(keywords)
            parameters = inspect.signature(function).parameters
            assert all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values())
            of = KEYWORDS[keywords]()
            own = {name: parameters[name].default for name in get_type_hints(keywords) if name in vars(of)}
            given = {name for name, default in own.items() if default is inspect.Parameter.empty}
            assert {**own, **{name: vars(of)[name] for name in given}} == {name: vars(of)[name] for name in own}
    assert taken == {*KEYWORDS}


def test_every_estimator_can_be_chosen() -> None:
    assert element_choices_of(type_of(annotations_of(Settings)["estimators"])) == ESTIMATOR_OPTIONS
