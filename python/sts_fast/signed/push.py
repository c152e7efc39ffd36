"""Direction in which a training set pushes each domain: signed forecasts, from gradients at the hook, without training.

A linear map W from features to the residual stream, added at the hook, stands for the training:

    x_t -> x_t + W^T h(x_t),    W [n_features, d_in], zero before training.

The gradient of a set's loss with respect to it is, with L the mean negative log-likelihood of an answer's tokens,

    M_S = dL_S/dW = E_prompts sum_t h(x_t) g_t^T,    g_t = dL/dx_t,

one forward pass and one backward pass that ends at the hook. A step -η M_S / ||M_S|| then moves a domain T by

    ntk_loss   <M_S, M_T> / ||M_S||                              fall of T's loss, per unit of η (first order)
    ntk        E_prompts n P <M_S, m_prompt> / ||M_S||           rise of P(answer), per unit of η (first order)
    step       rise of P(answer) when the step is really taken, and the layers above the hook run again
    step_loss  fall of the loss, likewise
    adapter, adapter_loss   the same with W trained on S in many small steps instead of one long one

with m_prompt one prompt's part of M_T, n the tokens of its answer and P the probability of all of them; η of `step` is
such that S's own loss falls to a quarter, and W of `adapter` is trained until it falls to a twentieth. `<M_S, M_T>` is
the neural tangent kernel of W, averaged over both sets. For RL, S's loss is that of its own completions,
`objectives.PolicyLoss`.

At 7B shape (d_in 3584, d_sae 131,072, hook at layer 25 of 32) M costs a set one forward pass and the upper fifth of a
backward pass, 1.4 forward passes in all, and 67 MB, since g is projected to 64 dimensions. `step` and `adapter` cost
another 0.2 forward passes for each pair of sets, and 10 to 30 times 0.6 for 64 prompts of a training set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sts_fast.data.prompts import Progress, Prompt, Tell
from sts_fast.errors import InputError
from sts_fast.files import Kept, digest
from sts_fast.ops import _cpu, backend
from sts_fast.ops.encode import encode
from sts_fast.sae import SAE
from sts_fast.signed.gradients import AnswerRows, HookedModel
from sts_fast.signed.objectives import AnswerLoss, PolicyLoss

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from sts_fast.statistics import Doubles

FeatureKind = Literal["sae", "fired", "raw"]
MapKind = Literal["step", "adapter"]
ShareLeft = Callable[..., float]  # of the loss, by W; adds the gradient to a second argument

# A training set whose loss is below this, in nats per token, has almost no gradient left.
SOLVED_LOSS = 0.01
# Where answers are less probable than this on average, a change of their probability says nothing.
SMALLEST_P = 1e-3
# Prompts of the training set on which a map is fitted, and the share of their loss that it should leave.
MAP_PROMPTS = 64
STEP_LOSS, ADAPTER_LOSS = 0.25, 0.05
STEP_GROWTH, MOST_STEPS, N_BISECTIONS = 1.4, 40, 7
# Number of an adapter's steps that would bring the loss to zero by the first gradient alone; it needs more.
ADAPTER_STEPS, MOST_ADAPTER_STEPS = 8, 64
# Evaluations of the layers above the hook that fitting a map usually takes, and at most.
MAP_EVALUATIONS: dict[MapKind, int] = {"step": 15, "adapter": 60}
MOST_EVALUATIONS: dict[MapKind, int] = {"step": MOST_STEPS + N_BISECTIONS + 1, "adapter": MOST_ADAPTER_STEPS + 1}
# Rows whose active features are listed at a time: 64 MB at 100 features a row.
SPARSE_ROWS = 1024


@dataclass(frozen=True)
class Features:
    """h(x): the coordinates of a training set's push.

    kind:   'sae' its activations, 'fired' 1 where a feature fires, or 'raw' the residual x itself, less `centre`
    centre: [d_in] float64, a mean residual; for 'raw' only

    The SAE explains a forecast and makes it sparse, but not better; see docs/signed.md.
    """

    sae: SAE
    kind: FeatureKind = "sae"
    centre: Doubles | None = None

    @property
    def n(self) -> int:
        return self.sae.d_in if self.kind == "raw" else self.sae.d_sae

    @cached_property
    def sha256(self) -> str:
        return digest(self.sae.fingerprint, self.kind, self.centre)

    def accumulate(self, M: Doubles, x: torch.Tensor, g: Doubles) -> None:
        """M += sum_t h(x_t) g_t^T, for M [n_features, r], x [n_tokens, d_in] float32 or bfloat16, g [n_tokens, r]."""
        import torch

        if self.kind == "sae":
            sums = np.zeros(self.n), np.zeros(self.n), np.zeros(self.n, np.int64)
            _cpu.accumulate_moments(
                backend.encoder(self.sae), x, g, sum_h=sums[0], sum_sq_h=sums[1], n_fired=sums[2], sum_hy=M
            )
        elif self.kind == "raw":
            M += np.einsum("ti,tr->ir", self._centred(x), g)
        else:
            for rows in _chunks(len(x)):
                active = encode(self.sae, x[rows])
                row_of = np.repeat(np.arange(len(active.indptr) - 1), np.diff(active.indptr))
                features = torch.from_numpy(active.indices.astype(np.int64))
                torch.from_numpy(M).index_add_(0, features, torch.from_numpy(g[rows][row_of]))

    def times(self, x: torch.Tensor, *Ms: Doubles) -> list[Doubles]:
        """[n_tokens, r] h(x) M for each M [n_features, r]; x is encoded once for all."""
        import torch

        if self.kind == "raw":
            centred = self._centred(x)
            return [np.einsum("ti,ir->tr", centred, M) for M in Ms]
        products: list[Doubles] = [np.empty((len(x), M.shape[1])) for M in Ms]
        for rows in _chunks(len(x)):
            active = encode(self.sae, x[rows])
            indices, starts = torch.from_numpy(active.indices.astype(np.int64)), torch.from_numpy(active.indptr[:-1])
            values = torch.from_numpy(active.values.astype(np.float64))
            if self.kind == "fired":
                values = torch.ones_like(values)
            for product, M in zip(products, Ms, strict=True):
                product[rows] = torch.nn.functional.embedding_bag(
                    indices, torch.from_numpy(M), starts, mode="sum", per_sample_weights=values
                ).numpy()
        return products

    def _centred(self, x: torch.Tensor) -> Doubles:
        residual: Doubles = x.double().numpy()
        return residual if self.centre is None else residual - self.centre


def _chunks(n: int) -> Iterator[slice]:
    return (slice(start, start + SPARSE_ROWS) for start in range(0, n, SPARSE_ROWS))


@dataclass(frozen=True)
class LinearMap:
    """A map that stands for the training: x_t -> x_t + W^T h(x_t) at the hook.

    W:         [n_features, r] float64, acting through Q
    loss_left: share of the training set's own loss that it leaves; aim: the share it was fitted for
    """

    W: Doubles
    loss_left: float
    aim: float


@dataclass(frozen=True)
class Push:
    """Gradient of a training set at the hook.

    direction: [n_features, r] float64 M_S / ||M_S||, gradients projected; training moves W against it
    norm:      ||M_S||, fall of the set's own loss per unit of η
    loss:      the set's loss before training: of answers, in nats per token; of a policy, in advantages
    nll:       [n_prompts] loss per token of each answer (or completion) before training, in nats
    folds:     [n_folds, n_features, r] parts of M_S that add up to it, from every n_folds-th prompt or group; or None
    maps:      W after a virtual training, by estimator ('step', 'adapter'); may be empty
    """

    name: str
    direction: Doubles
    norm: float
    loss: float
    nll: Doubles
    maps: dict[MapKind, LinearMap]
    folds: Doubles | None = None

    @cached_property
    def sha256(self) -> str:
        """Digest of its direction and its maps, which a domain answers to."""
        return digest(self.direction, self.maps)


@dataclass(frozen=True)
class Pull:
    """Response of a domain to each push.

    values: by estimator, such as 'ntk' and 'ntk_loss', [n_pushes, n_prompts] each prompt's part, as in the module's
        equations: a domain's forecast is the mean over its prompts
    contributions: [n_pushes, n_features] <direction[j], M_T[j]>: each feature's part of the domain's ntk_loss
    nll, n_answer: [n_prompts] loss per token of the answer, in nats, and its number of tokens
    exact:  [n_prompts] whether the whole answer is the model's first choice
    norm:   ||M_T||: <direction, M_T> / ||M_T|| is the cosine of both sets' gradients in features, from -1 to 1
    """

    name: str
    values: dict[str, Doubles]
    contributions: Doubles
    nll: Doubles
    n_answer: NDArray[np.int64]
    exact: NDArray[np.bool_]
    norm: float

    @property
    def p_answer(self) -> Doubles:
        """[n_prompts] probability of the whole answer."""
        return np.exp(-self.nll * self.n_answer)


def measure_push(
    model: HookedModel,
    features: Features,
    Q: Doubles,
    name: str,
    prompts: Sequence[Prompt],
    *,
    objective: AnswerLoss | PolicyLoss | None = None,
    maps: Sequence[MapKind] = (),
    n_folds: int = 0,
    tell: Progress | None = None,
) -> Push:
    """The push of a training set, from one forward and one backward pass down to the hook.

    Q:         [d_in, r] of `projection`
    objective: what training lowers, by default AnswerLoss; of a PolicyLoss, `prompts` are the completions
    maps:      also fit these, on at most 64 of the prompts (or groups of at most 64 completions in all)
    n_folds:   also keep M_S in this number of parts
    tell:      is told of the prompts of that pass, as stage 'gradients of NAME', and as 'step of NAME' of those that
        fitting a map has passed through the upper layers, each time anew, beside the most that it may take

    Raises InputError where the loss has no gradient at the hook.
    """

    def told(what: str) -> Tell | None:
        return None if tell is None else partial(tell, f"{what} of {name}")

    objective = objective or AnswerLoss()
    kept = model.kept.of(features.sha256, Q, [prompt.read_plain for prompt in prompts], objective)
    of = kept.arrays(
        "gradients",
        [n_folds],
        lambda: _gradients(model, features, Q, prompts, objective, n_folds=n_folds, tell=told("gradients")),
    )
    direction, nll, folds = of["direction"], of["nll"], of.get("folds")
    norm, loss = float(of["norm"]), objective.loss(nll, nll)
    if norm == 0:
        raise InputError(
            f"the answers of '{name}' have no gradient at the SAE's features: none of these fires, or the loss is "
            "exactly zero; leave the set out, or give the SAE of this model"
        )
    map_prompts = cache(lambda: _MapPrompts.of(model, features, Q, prompts, objective))
    fitted = {kind: _fitted(kind, kept, map_prompts, direction, loss / norm, told(kind)) for kind in maps}
    return Push(name, direction, norm, loss, nll, fitted, folds)


def _gradients(
    model: HookedModel,
    features: Features,
    Q: Doubles,
    prompts: Sequence[Prompt],
    objective: AnswerLoss | PolicyLoss,
    *,
    n_folds: int,
    tell: Tell | None,
) -> dict[str, NDArray[Any]]:
    """Parts of a Push, by name, that one pass over all prompts gives; `direction` is zero where M_S is."""
    n = len(prompts)
    slopes = objective.slopes(np.zeros(n), np.zeros(n))  # at the base model they do not depend on the likelihoods
    folds = np.zeros((max(n_folds, 1), features.n, Q.shape[1]))
    fold_of = np.zeros(n, np.int64)
    if n_folds:
        fold_of = (objective.group_of if isinstance(objective, PolicyLoss) else np.arange(n)) % n_folds
    nll = np.zeros(n)
    done = 0
    for rows in model.answer_rows(prompts, Q):
        prompt_of = np.asarray(rows.prompts)[rows.prompt_of]
        g = rows.g * slopes[prompt_of, None]
        for fold in np.unique(fold_of[rows.prompts]):
            of_fold = np.flatnonzero(fold_of[prompt_of] == fold)
            whole = len(of_fold) == len(g)
            features.accumulate(folds[fold], *((rows.x, g) if whole else (rows.x[of_fold], g[of_fold])))
        nll[rows.prompts] = rows.nll
        done += len(rows.prompts)
        if tell is not None:
            tell(done, n)
    M: Doubles = folds.sum(axis=0) if n_folds else folds[0]
    norm = _norm(M)
    of = {"direction": M / (norm or 1.0), "norm": np.asarray(norm), "nll": nll}
    return {**of, "folds": folds} if n_folds else of


def _fitted(
    kind: MapKind,
    kept: Kept,
    prompts: Callable[[], _MapPrompts],
    direction: Doubles,
    full_step: float,
    tell: Tell | None,
) -> LinearMap:
    """The map of a kind; see _seek_step and _train_adapter. kept: what has been computed of the same prompts."""

    def fit() -> dict[str, NDArray[Any]]:
        on = prompts()
        n, n_done = len(on.prompts), 0

        def evaluated(W: Doubles, M: Doubles | None = None) -> float:
            nonlocal n_done
            left = on.share_left(W, M)
            n_done += n
            if tell is not None:
                tell(n_done, n * MOST_EVALUATIONS[kind])
            return left

        linear_map = seek(evaluated, direction, full_step)
        if tell is not None:
            tell(n * MOST_EVALUATIONS[kind], n * MOST_EVALUATIONS[kind])
        return {"W": linear_map.W, "loss_left": np.asarray(linear_map.loss_left)}

    seek, aim = {"step": (_seek_step, STEP_LOSS), "adapter": (_train_adapter, ADAPTER_LOSS)}[kind]
    of = kept.arrays("maps", [kind], fit)
    return LinearMap(of["W"], float(of["loss_left"]), aim)


@dataclass(frozen=True)
class _MapPrompts:
    """Prompts on which a map is fitted; their residuals are kept, so that only the upper layers are run again."""

    model: HookedModel
    features: Features
    Q: Doubles
    prompts: Sequence[Prompt]
    objective: AnswerLoss | PolicyLoss
    rows: list[AnswerRows]
    nll: Doubles

    @classmethod
    def of(
        cls,
        model: HookedModel,
        features: Features,
        Q: Doubles,
        prompts: Sequence[Prompt],
        objective: AnswerLoss | PolicyLoss,
    ) -> _MapPrompts:
        n, objective = objective.first(MAP_PROMPTS)
        rows = list(model.answer_rows(prompts[:n]))
        nll = np.zeros(len(prompts[:n]))
        for batch in rows:
            nll[batch.prompts] = batch.nll
        return cls(model, features, Q, prompts[:n], objective, rows, nll)

    def share_left(self, W: Doubles, M: Doubles | None = None) -> float:
        """Share of the loss that W leaves; adds the gradient with respect to W to M."""
        nll, gradients = np.zeros_like(self.nll), []
        for rows in self.rows:
            moved = _project_back(self.features.times(rows.x, W)[0], self.Q)
            nll[rows.prompts], g = self.model.from_hook(rows, self.prompts, moved, None if M is None else self.Q)
            gradients.append(g)
        if M is not None:
            slopes = self.objective.slopes(nll, self.nll)  # of a policy, they depend on all completions of a prompt
            for rows, g in zip(self.rows, gradients, strict=True):
                self.features.accumulate(M, rows.x, g * slopes[np.asarray(rows.prompts)[rows.prompt_of], None])
        return self.objective.loss(nll, self.nll) / self.objective.loss(self.nll, self.nll)


def _seek_step(share_left_by: ShareLeft, direction: Doubles, full_step: float) -> LinearMap:
    """The map -η direction with the smallest η found that lowers the loss to STEP_LOSS of itself.

    Where the loss never falls so far, η is the one with the lowest loss. full_step: the η at which a straight line
    reaches zero
    """
    left: dict[float, float] = {}

    def share_left(eta: float) -> float:
        left[eta] = share_left_by(-eta * direction)
        return left[eta]

    too_short, eta = 0.0, full_step / 10  # starts well below
    while share_left(eta) > STEP_LOSS:
        if left[eta] > 3 or len(left) > MOST_STEPS:
            eta = min(left, key=lambda eta: left[eta])
            return LinearMap(-eta * direction, left[eta], STEP_LOSS)
        too_short, eta = eta, eta * STEP_GROWTH
    for _ in range(N_BISECTIONS):
        middle = (too_short + eta) / 2
        too_short, eta = (too_short, middle) if share_left(middle) <= STEP_LOSS else (middle, eta)
    return LinearMap(-eta * direction, left[eta], STEP_LOSS)


def _train_adapter(share_left_by: ShareLeft, direction: Doubles, full_step: float) -> LinearMap:
    """W after gradient descent in equal steps, once the loss is ADAPTER_LOSS of itself; else the best W on the way."""
    W = np.zeros_like(direction)
    best = LinearMap(W, 1.0, ADAPTER_LOSS)
    for _ in range(MOST_ADAPTER_STEPS + 1):
        M = np.zeros_like(W)
        left = share_left_by(W, M)
        if left <= best.loss_left:
            best = LinearMap(W, left, ADAPTER_LOSS)
        norm = _norm(M)
        if left <= ADAPTER_LOSS or norm == 0:
            break
        W = W - full_step / ADAPTER_STEPS * M / norm
    return best


def measure_pull(
    model: HookedModel,
    features: Features,
    Q: Doubles,
    name: str,
    prompts: Sequence[Prompt],
    pushes: Sequence[Push],
    *,
    tell: Tell | None = None,
) -> Pull:
    """Response of a domain to each push, from one pass over it, and one through the upper layers for each map.

    All pushes must have the same maps.
    """
    of = model.kept.arrays(
        "responses",
        [features.sha256, Q, [prompt.read_plain for prompt in prompts], [push.sha256 for push in pushes]],
        lambda: _responses(model, features, Q, prompts, pushes, tell=tell),
    )
    fields = [f"{estimator}{what}" for estimator in ("ntk", *pushes[0].maps) for what in ("", "_loss")]
    values = {field: of[field] for field in fields}
    return Pull(name, values, of["contributions"], of["nll"], of["n_answer"], of["exact"], float(of["norm"]))


def _responses(
    model: HookedModel,
    features: Features,
    Q: Doubles,
    prompts: Sequence[Prompt],
    pushes: Sequence[Push],
    *,
    tell: Tell | None,
) -> dict[str, NDArray[Any]]:
    """Parts of a Pull, by name."""
    n = len(prompts)
    M = np.zeros((features.n, Q.shape[1]))
    aligned = np.zeros((len(pushes), n))
    directions = [M for push in pushes for M in (push.direction, *(linear_map.W for linear_map in push.maps.values()))]
    moved_nll = {kind: np.zeros((len(pushes), n)) for push in pushes for kind in push.maps}
    nll, n_answer, exact = np.zeros(n), np.zeros(n, np.int64), np.zeros(n, bool)
    done = 0
    for rows in model.answer_rows(prompts, Q):
        features.accumulate(M, rows.x, rows.g / n)
        nll[rows.prompts], n_answer[rows.prompts], exact[rows.prompts] = rows.nll, rows.n_answer, rows.exact
        along = iter(features.times(rows.x, *directions))
        for i, push in enumerate(pushes):
            per_token = np.einsum("tr,tr->t", next(along), rows.g)
            aligned[i, rows.prompts] = np.bincount(rows.prompt_of, per_token, minlength=len(rows.prompts))
            for kind in push.maps:
                moved_nll[kind][i, rows.prompts] = model.from_hook(rows, prompts, _project_back(next(along), Q))[0]
        done += len(rows.prompts)
        if tell is not None:
            tell(done, n)
    p_answer = np.exp(-nll * n_answer)
    values = {"ntk": aligned * n_answer * p_answer, "ntk_loss": aligned}
    for kind, after in moved_nll.items():
        values |= {kind: np.exp(-after * n_answer) - p_answer, f"{kind}_loss": nll - after}
    return {
        "contributions": np.stack([np.einsum("jr,jr->j", push.direction, M) for push in pushes]),
        "nll": nll,
        "n_answer": n_answer,
        "exact": exact,
        "norm": np.asarray(_norm(M)),
        **values,
    }


def push_warnings(push: Push) -> list[str]:
    """Warnings about a training set's push, one sentence each."""
    warnings = []
    if push.loss < SOLVED_LOSS:
        warnings.append(
            f"the model already answers '{push.name}' (loss {push.loss:.4f} per token, below {SOLVED_LOSS}): little "
            "gradient is left, and signed forecasts are weak"
        )
    warnings += [
        f"no {kind} brings the loss of '{push.name}' down to {linear_map.aim:.0%} of itself; the best one leaves "
        f"{linear_map.loss_left:.0%}"
        for kind, linear_map in push.maps.items()
        if linear_map.loss_left > linear_map.aim * 1.05
    ]
    return warnings


def pull_warnings(pulls: Sequence[Pull]) -> list[str]:
    """Warnings about the domains' answers, one sentence each."""
    unlikely = {pull.name: p for pull in pulls if (p := float(pull.p_answer.mean())) < SMALLEST_P}
    if not unlikely:
        return []
    named = ", ".join(f"{name} ({p:.1g})" for name, p in unlikely.items())
    return [
        f"answers are too long or too unlikely for a change of their probability to say much in {named}: use the "
        "forecasts of the loss there"
    ]


def _norm(M: Doubles) -> float:
    return float(np.sqrt(np.einsum("jr,jr->", M, M)))


def _project_back(projected: Doubles, Q: Doubles) -> torch.Tensor:
    import torch

    return torch.from_numpy(projected) @ torch.from_numpy(Q).T
