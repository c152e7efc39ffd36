"""Sets and costs of a forecast, known before the model is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from sts_fast.data.prompts import Prompt, PromptSet, set_warnings
from sts_fast.data.sets import Kind
from sts_fast.files import Document
from sts_fast.forecast.plan import Plan
from sts_fast.model.cost import ModelSize, count_passes, product_speed
from sts_fast.model.lengths import length_rule
from sts_fast.model.memory import TokenBudget
from sts_fast.model.packing import bytes_per_token
from sts_fast.ops.devices import device_named
from sts_fast.places import split_name
from sts_fast.sae import SAE
from sts_fast.signed.push import MAP_EVALUATIONS, MAP_PROMPTS
from sts_fast.signed.signed import hook_layer
from sts_fast.signed.trial import BATCH_ROWS, OWN_ROWS, asked_again

# Share of the speed of a bare product that a forecast reaches. With it, a forecast of SmolLM2-135M over four domains on
# two cores was put at 27 s and took 26 (35 with loading); with ntk, at 243 s, and took 350.
PRODUCT_SHARE = 0.5
# Bytes of float64 sums per feature: those of a training set, and those of one map of a signed estimator.
SUM_BYTES, MAP_BYTES = 8 * 40, 8 * 64
# Bytes of Python and its libraries.
LIBRARY_BYTES = 600e6


@dataclass(frozen=True)
class PlannedSet:
    """One set as it will be read.

    use:      'shift' (D_N is taken from it), 'score', 'answers' (read in the whole model), or 'trial' (trained on)
    n_prompts, n_too_long, n_unanswered: as in PromptSet
    n_passes, n_tokens: forward passes, and tokens in them; of answers, tokens only
    source:   the files, hub data sets or rows in memory that it is read from, and what beside them is not
    columns:  of these, by role; unread: others that hold text; None, as the source, where examples were given
    n_rows:   of its source; left_out: those without an example, by reason; None where examples were given
    first:    the question of the first prompt; first_lengths: its tokens without demonstrations, and with them where
        they are shown
    warnings: as in PromptSet
    """

    name: str
    use: str
    n_prompts: int
    n_too_long: int
    n_unanswered: int
    n_passes: int | None
    n_tokens: int
    source: str | None
    columns: dict[str, list[str]] | None
    unread: list[str] | None
    n_rows: int | None
    left_out: dict[str, int] | None
    first: str
    first_lengths: list[int]
    warnings: list[str]


@dataclass(frozen=True)
class Cost:
    """Passes, tokens, time and memory of a forecast.

    n_passes, n_tokens: forward passes up to the hooks, and the tokens in them, where prompts share what they begin with
    n_answer_tokens: tokens that pass the whole model, back to the hook too for signed estimators there; a trial's
        passes over them are more than one
    seconds, memory_bytes: estimates of the time, less that of loading the model, and of the peak memory
    """

    n_passes: int
    n_tokens: int
    n_answer_tokens: int
    seconds: float
    memory_bytes: float


@dataclass(frozen=True)
class Outlook:
    """Sets that a forecast reads, in their order, and its cost.

    warnings: those of the sets, each once
    """

    sets: list[PlannedSet]
    cost: Cost
    warnings: list[str]

    @classmethod
    def of(cls, plan: Plan) -> Outlook:
        planned = planned_sets(plan)
        prompt_sets = [*plan.trains, *plan.domains, *plan.train_answers, *plan.trial_rows, *plan.domain_answers]
        shared = [warning for of_train in plan.shared.values() for warning in of_train]
        return cls(planned, estimated_cost(plan, planned), [*set_warnings(prompt_sets), *shared])

    def to_dict(self) -> Document:
        return asdict(self)


def planned_sets(plan: Plan) -> list[PlannedSet]:
    """Every set, in the order in which they are read."""
    uses: tuple[tuple[str, Kind, list[PromptSet]], ...] = (
        ("shift", "train", plan.trains),
        ("score", "domain", plan.domains),
        ("answers", "train", plan.train_answers),
        ("answers", "domain", plan.domain_answers),
        ("trial", "train", plan.trial_rows),
    )
    budget = _budget(plan)
    return [_planned(plan, use, kind, prompt_set, budget) for use, kind, made in uses for prompt_set in made]


def estimated_cost(plan: Plan, planned: Sequence[PlannedSet]) -> Cost:
    """An estimate, from the sizes of everything and the speed of a bare product on this machine."""
    import torch

    settings, session, saes = plan.settings, plan.session, plan.session.saes
    size, budget = ModelSize(session.outline), _budget(plan)
    layers = [layer for sae in saes if (layer := split_name(sae.hook_name)[1]) is not None]
    last = max(layers) + 1 if len(layers) == len(saes) else size.n_layers
    whole = ("answers", "trial")
    n_answers = sum(of.n_tokens for of in planned if of.use in whole)
    n_tokens = sum(of.n_tokens for of in planned if of.use not in whole)
    n_encoded = sum(
        len(prompt.positions) * (2 if settings.dims == "tuned" and made in plan.trains else 1)
        + len(prompt.paired_demos)
        for made in (*plan.trains, *plan.domains)
        for prompt in made.prompts
    )
    answered = [*plan.train_answers, *plan.domain_answers]
    flops = n_tokens * size.flops(last) + sum(_answer_flops(made.prompts, size, size.n_layers) for made in answered)
    for sae in saes:
        encode = 2.0 * sae.d_in * sae.d_sae
        flops += n_encoded * encode
        if settings.at_the_hook:
            flops += n_answers * encode + _signed_flops(plan, size, hook_layer(sae) + 1)
    flops += sum(_trial_flops(plan, rows, size) for rows in plan.trial_rows)
    dtype: torch.dtype = getattr(torch, settings.dtype, None) or torch.float32
    if settings.dtype == "auto" and budget.device.type != "cpu":  # the checkpoint's own, as for load_decoder
        dtype = getattr(session.config, "dtype", None) or dtype
    runs_whole = bool(plan.domain_answers)
    n_weights = size.n_weights(last) + (size.n_weights(size.n_layers) if runs_whole else 0)
    n_maps = len(plan.trains) * SUM_BYTES + len(plan.train_answers) * (1 + len(settings.at_the_hook)) * MAP_BYTES
    of_token = bytes_per_token(session.config.get_text_config(), 0)
    return Cost(
        n_passes=sum(of.n_passes or 0 for of in planned),
        n_tokens=n_tokens,
        n_answer_tokens=n_answers,
        seconds=flops / (PRODUCT_SHARE * product_speed(budget.device, dtype)),
        memory_bytes=LIBRARY_BYTES
        + n_weights * dtype.itemsize * (session.activations is None)
        + sum(_matrix_bytes(sae) + sae.d_sae * n_maps for sae in saes)
        + budget.tokens(of_token) * of_token,
    )


def _budget(plan: Plan) -> TokenBudget:
    settings = plan.settings
    return TokenBudget(device_named(settings.device), plan.session.name, n_tokens=settings.batch_tokens)


def _planned(plan: Plan, use: str, kind: Kind, prompt_set: PromptSet, budget: TokenBudget) -> PlannedSet:
    rows = plan.sets.read_rows.get((kind, prompt_set.name))
    examples = (plan.sets.trains if kind == "train" else plan.sets.domains).get(prompt_set.name)
    first = prompt_set.prompts[0] if prompt_set.prompts else None
    n_passes = None
    if use in ("answers", "trial"):
        n_tokens = sum(_answer_lengths(prompt_set.prompts))
    elif plan.session.activations is not None:
        n_passes = n_tokens = 0
    else:
        config = plan.session.config.get_text_config()
        n_passes, n_tokens = count_passes(
            prompt_set,
            lambda n_shared: budget.tokens(bytes_per_token(config, n_shared)),
            n_models=2 if kind == "train" and plan.settings.dims == "tuned" else 1,
            rule=length_rule(config),
        )
    return PlannedSet(
        name=prompt_set.name,
        use=use,
        n_prompts=len(prompt_set.prompts),
        n_too_long=prompt_set.n_too_long,
        n_unanswered=prompt_set.n_unanswered,
        n_passes=n_passes,
        n_tokens=n_tokens,
        source=None if rows is None else str(rows.origin),
        columns=None if rows is None else rows.columns.by_role,
        unread=None if rows is None else rows.columns.unread,
        n_rows=None if rows is None else rows.n_rows,
        left_out=None if rows is None else dict(rows.left_out),
        first=first.question or (examples[0].question if examples else "") if first else "",
        first_lengths=[len(ids) for ids in (first.base_ids, first.demos_ids) if len(ids)] if first else [],
        warnings=[*map(str, prompt_set.warnings)],
    )


def _answer_lengths(prompts: Sequence[Prompt]) -> list[int]:
    """Tokens of each prompt up to the end of its answer."""
    return [int(prompt.positions[-1]) + 1 for prompt in prompts]


def _answer_flops(prompts: Sequence[Prompt], size: ModelSize, n_layers: int) -> float:
    """Of a pass through layers and the head, which is run on the answers' tokens alone."""
    n_answer = sum(len(prompt.positions) for prompt in prompts)
    return sum(_answer_lengths(prompts)) * size.flops(n_layers) + n_answer * size.head_flops


def _signed_flops(plan: Plan, size: ModelSize, hook: int) -> float:
    """Of going back from the answers to the hook, and of seeking and trying the maps above it."""
    n_above = size.n_layers - hook
    trains, domains = plan.train_answers, plan.domain_answers
    of_domains = sum(_answer_flops(made.prompts, size, n_above) for made in domains)
    flops = 2 * (sum(_answer_flops(made.prompts, size, n_above) for made in trains) + of_domains)
    for kind in MAP_EVALUATIONS.keys() & {*plan.settings.signed}:
        sought = sum(_answer_flops(made.prompts[:MAP_PROMPTS], size, n_above) for made in trains)
        flops += MAP_EVALUATIONS[kind] * sought + len(trains) * of_domains
    return flops


def _trial_flops(plan: Plan, rows: PromptSet, size: ModelSize) -> float:
    """Of a trial's training, forward and back, and of reading some of its own answers and of the domains' again."""
    design = plan.trial_designs[rows.name]

    def once(prompts: Sequence[Prompt]) -> float:
        return _answer_flops(prompts, size, size.n_layers)

    n_passes = design.n_steps * BATCH_ROWS / len(rows.prompts)
    asked = [made.prompts[i] for made in plan.domain_answers for i in asked_again(made, design)]
    return 3 * n_passes * once(rows.prompts) + 2 * once(rows.prompts[:OWN_ROWS]) + once(asked)


def _matrix_bytes(sae: SAE) -> float:
    """Of an SAE's two matrices."""
    return 2.0 * sae.d_in * sae.d_sae * float(sae.W_enc.dtype.itemsize)
