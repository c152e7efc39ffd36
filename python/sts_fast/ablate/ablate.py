"""Zeroes features in the running model: does the trained ability disappear with them, and do the others stay?

At the SAE's hook, for a set D of features,

    x_t  ->  x_t - sum_{j in D} h_j(x_t) W_dec[j]

so that the SAE's reconstruction loses what these features write, and the part of x_t that it does not explain stays.
This happens on every token that leads to an answer, except BOS and attention sinks. (The masking of top dimensions of
the STS paper.) For comparison, other sets of as many features are zeroed, each drawn several times:

    random         any features outside D_N, most of which hardly ever fire
    like_activity  features outside D_N, each about as active on the training set as one of D_N
    low_shift      features among those that fire and shift least

Cost, for a hook at layer 25 of 32: one forward pass of each set, and a fifth of one for every set of features zeroed.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Unpack

import numpy as np

from sts_fast import files
from sts_fast._version import __version__
from sts_fast.ablate.measure import draw_features, measure
from sts_fast.ablate.record import SCHEMA_VERSION, Ablation, answers_table, outcome_of
from sts_fast.data.examples import Example
from sts_fast.data.options import Option, shows
from sts_fast.data.prompts import PromptSet
from sts_fast.data.sets import Fields, FieldsOptions, Kind, Sampling, Seed, Sets, Source, Sources, check_enough
from sts_fast.data.template import PromptTemplate
from sts_fast.errors import InputError
from sts_fast.forecast.blocks import Scores
from sts_fast.forecast.run import SCORES_FILE, Forecast, Run
from sts_fast.forecast.stored_prompts import answered_sets
from sts_fast.model.session import Purpose, Reading, ReadingOptions, SAESource, Session, open_sae
from sts_fast.profile.means import FeatureMeans
from sts_fast.sae import SAE
from sts_fast.signed.gradients import HookedModel
from sts_fast.signed.signed import hook_layer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Zeroing(Fields, Reading):
    """Options of the features that are zeroed and of the questions; see Fields and Reading for the rest.

    few_shot: ask after demonstrations (`demos`, as for `score`), as many as the run shows; needs train and domains
    top_n:    number of the most shifted features; by default all of D_N
    n_draws:  sets of features of each control
    seed:     seed of the draws and the intervals
    """

    TITLE = "Ablation"

    few_shot: Annotated[bool, Option("Ask after the run's number of demonstrations.")] = False
    top_n: Annotated[int | None, Option("Number of the most shifted features; default: all of D_N.", least=1)] = None
    n_draws: Annotated[int, Option("Sets of features of each control.", "--draws", least=1)] = 5
    seed: Seed = 0


class ZeroingOptions(FieldsOptions, ReadingOptions, total=False):
    """`Zeroing` as keywords."""

    few_shot: bool
    top_n: int | None
    n_draws: int
    seed: int


@shows(Zeroing, ZeroingOptions)
def ablate(
    run: Forecast | str | Path,
    *,
    model: str | Path | PreTrainedModel | None = None,
    sae: SAESource | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    train: Source | None = None,
    domains: Sources | None = None,
    demos: Sources | None = None,
    **options: Unpack[ZeroingOptions],
) -> Ablation:
    """Zeroes the shifted features of a run in the running model, and others for comparison; see the module's equation.

    run:     a forecast, or the folder that it was saved in
    model:   model to zero them in: by default the run's; the model after training may be given instead
    sae:     needed only where the run's SAE has moved
    train, domains: answered questions, as for `score`; by default those of the run, if it has signed forecasts
    options: see Zeroing; the SAE reads where the run's did

    Raises InputError where the run, the model or the SAE cannot be used together, answers are missing, or the SAE's
    files have no decoder.
    """
    forecast = run if isinstance(run, Forecast) else Forecast.load(run)
    scores, means = forecast.to_dict(), forecast.means
    zeroing = Zeroing(**options)
    few_shot, n_draws, seed = zeroing.few_shot, zeroing.n_draws, zeroing.seed
    if few_shot and train is None:
        raise InputError("--few-shot needs --train and --domains, from which demonstrations are taken: give both")
    if (train is None) != (domains is None):
        raise InputError("--train and --domains go together: give both or neither")
    if zeroing.layer is not None or zeroing.hook is not None:
        raise InputError("--layer and --hook are taken from the run: leave them out, or make the run again with them")
    zeroing = replace(zeroing, hook=scores["sae"]["hook_name"])
    loaded = open_sae(scores["sae"]["source"] if sae is None else sae, zeroing)
    _check_sae(loaded, means)
    session = Session.open(
        scores["model"]["name"] if model is None else model, [loaded], zeroing,
        tokenizer=tokenizer,
        purpose=Purpose(whole=True, texts=train is not None, needs=[("ablate", "the whole model")]),
    )  # fmt: skip
    reader = session.reader
    hooked = HookedModel(
        session.whole, hook_layer(loaded), name=reader.name, batch_tokens=zeroing.batch_tokens, kept=session.kept
    )

    if train is None or domains is None:
        of_train, of_domains = answered_sets(forecast.prompts)
        if not of_train:
            raise InputError("this run contains no answers (it has no signed forecast): give --train and --domains")
        sets = [*of_train, *of_domains]
    else:
        examples = Sets.read({scores["train"]["name"]: train}, domains, demos, zeroing)
        for line in examples.told():
            zeroing.tell_line(line)
        sets = _asked_sets(examples, scores, session.template, reader.context_length, few_shot=few_shot)
    session.check_fit(sets[0])

    top = np.asarray([feature["index"] for feature in scores["shifted_features"]][: zeroing.top_n], np.int64)
    drawn = draw_features(means, top, n_draws, seed, few_shot=few_shot)
    measured = []
    for n_done, prompt_set in enumerate(sets):
        measured.append(measure(hooked, loaded, prompt_set, drawn))
        zeroing.tell("answers with features zeroed", n_done + 1, len(sets))
    kinds = ["domain" if i else "train" for i in range(len(measured))]
    folder = None if isinstance(run, Forecast) else Run.load(run).folder
    document = {
        **({} if folder is None else {"run": files.sha256(folder / SCORES_FILE)}),
        "schema_version": SCHEMA_VERSION,
        "model": reader.name,
        "forecast_of": scores["model"]["name"],
        "sae": loaded.source,
        "hook_name": loaded.hook_name,
        "few_shot": few_shot,
        "top_n": len(top),
        "n_draws": n_draws,
        "features": {condition: [features.tolist() for features in draws] for condition, draws in drawn.items()},
        "sets": [outcome_of(answers, kind, seed) for answers, kind in zip(measured, kinds, strict=True)],
        "provenance": {
            "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": zeroing.command,
            "seed": seed,
            "version": __version__,
        },
    }
    return Ablation(document, answers_table(measured, kinds))


def _check_sae(sae: SAE, means: FeatureMeans) -> None:
    if sae.fingerprint != means.sae_fingerprint:
        raise InputError(f"{sae.source or 'the SAE'} is not the SAE of this run: give that one with --sae")
    if sae.decoder is None:
        raise InputError(f"the files of {sae.source} have no W_dec, which zeroing needs: give the complete files")
    if sae.target_hook_name:
        raise InputError(
            f"{sae.source} is a transcoder, whose features are not written where it reads: give an SAE of a resid_post "
            "hook"
        )


def _asked_sets(
    examples: Sets, scores: Scores, template: PromptTemplate, context_length: int | None, *, few_shot: bool
) -> list[PromptSet]:
    """Answered prompts of the training set and the domains; without demonstrations those of a signed forecast."""
    settings = scores["settings"]
    sampling = Sampling(
        shots=settings["shots"], domain_shots=settings["domain_shots"], demo_draws=settings["demo_draws"],
        tokens="answer", limit=settings["limit"],
        seed=scores["provenance"]["seed"],
    )  # fmt: skip
    given: list[tuple[Kind, str, list[Example]]] = [("train", name, rows) for name, rows in examples.trains.items()]
    given += [("domain", name, rows) for name, rows in examples.domains.items()]
    prompt_sets = []
    for kind, name, rows in given:
        demos = examples.demos.get(name)
        prompt_set = sampling.prompts(name, rows, demos, template, context_length, kind=kind, show=few_shot)
        check_enough(prompt_set, context_length, kind)
        if few_shot:
            after_demos = [replace(p, base_ids=p.demos_ids, positions=p.paired_demos) for p in prompt_set.prompts]
            prompt_set = replace(prompt_set, prompts=after_demos)
        prompt_sets.append(prompt_set)
    return prompt_sets
