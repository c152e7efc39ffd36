"""Everything that a forecast will read, made and checked before the first forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from sts_fast.data.contamination import SAME, NgramIndex
from sts_fast.data.prompts import PromptSet, show_prompt
from sts_fast.data.sets import MIN_PROMPTS, Kind, Sets, large_enough
from sts_fast.errors import InputError
from sts_fast.forecast.estimators import BY_NAME
from sts_fast.forecast.options import Settings
from sts_fast.model.labels import Labels
from sts_fast.model.session import Session
from sts_fast.profile.library import Library
from sts_fast.sae import SAE
from sts_fast.signed.signed import hook_layer
from sts_fast.signed.trial import BATCH_ROWS, TrialDesign


@dataclass(frozen=True)
class Plan:
    """The prompts of a forecast.

    trains:  those that D_N is taken from, by training set; domains: those that are scored
    train_answers, domain_answers: those that read their answers in the whole model: of training sets, for signed
        estimators at the hook; of domains that have enough answers, for signed estimators and for --controls all
    trial_rows: those that trials train on; trial_designs: by training set
    labels:  by SAE, the labels of its features by index; none of an SAE that the labels are not of
    sources: what else the forecast is made from, by role, for the provenance
    sets:    the examples that the prompts are made of
    library: profiles that are not made again, and that new ones are added to
    warnings: about domains that are left out
    shared:  by training set, warnings about its examples that ask what a domain asks
    """

    session: Session
    settings: Settings
    domains: list[PromptSet]
    domain_answers: list[PromptSet]
    labels: Mapping[SAE, Mapping[int, str]]
    sources: Mapping[str, object]
    sets: Sets
    library: Library | None
    trains: list[PromptSet] = field(default_factory=list)
    train_answers: list[PromptSet] = field(default_factory=list)
    trial_rows: list[PromptSet] = field(default_factory=list)
    trial_designs: Mapping[str, TrialDesign] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    shared: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @classmethod
    def make(
        cls, session: Session, settings: Settings, sets: Sets, sources: Mapping[str, object], library: Library | None
    ) -> Plan:
        """Makes the prompts of every set.

        A domain with too few prompts is left out with a warning.

        Raises InputError where the training set or every domain has too few, or where the model cannot give what the
        settings ask for.
        """
        signed, at_the_hook, sizes = settings.signed, settings.at_the_hook, settings.sizes
        if settings.controls == "all" and not session.has_head:
            raise InputError(
                "the base model's loss and accuracy need its head: give a model with one, or --controls features"
            )
        for sae in session.saes if at_the_hook else ():
            hook_layer(sae)

        def prompts(kind: Kind, name: str, *, show: bool, enough: bool = True, **sampling: Any) -> PromptSet:
            examples, demos = (sets.trains if kind == "train" else sets.domains)[name], sets.demos.get(name)
            return session.prompts(kind, name, examples, demos, replace(settings, **sampling), show=show, enough=enough)

        trains = [prompts("train", name, show=settings.dims == "icl") for name in sets.trains]
        pairs = any(BY_NAME[estimator].of == "pairs" for estimator in sizes)
        domains, warnings = large_enough(
            "domain", (partial(prompts, "domain", name, show=pairs) for name in sets.domains)
        )
        if warnings and settings.strict:
            raise InputError(f"{warnings[0]} (--strict)")
        # Without demonstrations, and of domains with answers enough.
        with_answers = domains if signed or settings.controls == "all" else ()
        domain_answers = [
            prompts("domain", domain.name, show=False, enough=False, tokens="answer") for domain in with_answers
        ]
        domain_answers = [answers for answers in domain_answers if len(answers.prompts) >= MIN_PROMPTS]
        if signed and not domain_answers:
            raise InputError(
                f"no domain has the {MIN_PROMPTS} answered questions that signed estimators need: add answers, or "
                f"leave out {', '.join(signed)}"
            )
        train_answers = [prompts("train", name, show=False, tokens="answer") for name in sets.trains if at_the_hook]
        trials = {
            name: settings.trial_design(len(examples)) for name, examples in sets.trains.items() if "trial" in signed
        }
        trial_rows = [
            prompts("train", name, show=False, tokens="answer", limit=design.n_steps * BATCH_ROWS)
            for name, design in trials.items()
        ]
        labels = {} if settings.labels is None else _labels(Labels.read(settings.labels), session)
        return cls(
            session, settings, domains, domain_answers, labels, sources, sets, library, trains, train_answers,
            trial_rows, trials, warnings, _contaminated(sets, [domain.name for domain in domains]),
        )  # fmt: skip

    def show(self) -> None:
        """Hands the first prompt of each set to `settings.show`."""
        if self.settings.show is not None:
            for prompt_set in (*self.trains, *self.domains):
                self.settings.show(show_prompt(prompt_set, self.session.tokenizer))


def _contaminated(sets: Sets, domains: Sequence[str]) -> dict[str, list[str]]:
    """By training set, a warning for each domain that it shares questions with, of all examples, read or not."""
    ngrams = NgramIndex.of({name: [example.question for example in sets.domains[name]] for name in domains})
    found: dict[str, list[str]] = {}
    for train, examples in sets.trains.items():
        same = ngrams.shared(example.question for example in examples)
        found[train] = [
            f"{len(places)} of the {len(examples)} examples of '{train}' ask the same as questions of '{name}' "
            f"({SAME}), such as {examples[places[0]].id}: an evaluation on them would measure what was learnt by heart"
            for name, places in same.items()
        ]
    return found


def _labels(labels: Labels, session: Session) -> dict[SAE, Mapping[int, str]]:
    """Labels by SAE; raises InputError where they are of none of the session's."""
    found, wrong = {}, []
    for sae in session.saes:
        try:
            found[sae] = labels.of(sae, session.name)
        except InputError as error:
            wrong.append(error)
    if wrong and not found:
        raise wrong[0]
    return found
