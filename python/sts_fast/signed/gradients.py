"""Gradients of a model's answers with respect to its residual stream, and runs of the layers above it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sts_fast.data.prompts import Prompt
from sts_fast.errors import InputError
from sts_fast.files import NOTHING_KEPT, Kept
from sts_fast.model.answers import in_batches, read_answers
from sts_fast.model.hooks import decoder_layers
from sts_fast.model.language_model import attention_sinks
from sts_fast.model.layer_trace import input_device
from sts_fast.model.memory import TokenBudget, most_tokens
from sts_fast.model.packing import row_norms
from sts_fast.places import layer_of

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from sts_fast.statistics import Doubles


@dataclass(frozen=True)
class HookRows:
    """One batch of prompts at the hook: every token that leads to an answer, except BOS and attention sinks.

    prompts:  index of each prompt in the given list; padded: [n_prompts, longest, d_in] its residuals
    ids:      [n_prompts, longest] token ids
    at:       [n_tokens] row of each kept token in the flattened `padded`; prompt_of: [n_tokens] its place in `prompts`
    x:        [n_tokens, d_in] residuals of kept tokens, on the CPU, for the core
    """

    prompts: list[int]
    padded: torch.Tensor
    ids: torch.Tensor
    at: torch.Tensor
    prompt_of: NDArray[np.int64]
    x: torch.Tensor


@dataclass(frozen=True)
class AnswerRows(HookRows):
    """One batch of prompts at the hook, with their answers.

    g:        [n_tokens, r] float64 dL/dx_t Q, for L of the token's own prompt; no rows where no Q was given
    nll:      [n_prompts] L, mean negative log-likelihood of the answer's tokens, in nats; n_answer: their number
    exact:    [n_prompts] whether each of them is the model's first choice
    """

    g: Doubles
    nll: Doubles
    n_answer: NDArray[np.int64]
    exact: NDArray[np.bool_]


class _Reached(BaseException):  # no error of the model, which would be told as one
    """Raised at the hook to leave the forward pass there."""


class HookedModel:
    """A whole causal language model that can be differentiated at, and run on from, the output of one of its layers.

    model: a Hugging Face decoder in memory; layer: the layer whose output is the hook, the residual stream
    name:  its name in errors; say: called where a batch did not fit into memory and smaller ones follow
    batch_tokens: most tokens of one pass, if fewer than `most_tokens` of the device
    kept:  what has been computed with this model

    Raises InputError where the model has no such layer or no head.
    """

    def __init__(
        self,
        model: Any,
        layer: int,
        *,
        name: str = "the model",
        batch_tokens: int | None = None,
        say: Callable[[str], None] | None = None,
        kept: Kept = NOTHING_KEPT,
    ) -> None:
        config = model.config.get_text_config()
        layers = model.get_submodule(decoder_layers(model, config.num_hidden_layers))
        layer_of(layer, len(layers), name=name)
        if model.get_output_embeddings() is None:
            raise InputError("signed estimators need the model's head: give a causal language model with one")
        self.model, self.layer, self.name = model.eval(), layer, name
        self.device = input_device(model)
        self._batch_tokens = batch_tokens
        self.memory = TokenBudget(self.device, name, say=say)
        self.kept = kept.of("at the hook", layer, batch_tokens)
        self.d_in: int = config.hidden_size
        self._below, self._block = list(layers)[: layer + 1], layers[layer]
        self._bos = config.bos_token_id
        self._gives_tuple = False  # whether layers return (hidden states, ...); known once they have run

    def batch_tokens(self, *, gradient: bool) -> int:
        """Most tokens of one pass."""
        most = most_tokens(self.device, gradient=gradient)
        return min(self._batch_tokens or most, most)

    def answer_rows(self, prompts: Sequence[Prompt], Q: Doubles | None = None) -> Iterator[AnswerRows]:
        """Runs prompts that read their answers (tokens='answer'), shortest first, a batch at a time.

        Q: [d_in, r] of `projection`, where gradients are wanted. The backward pass ends at the hook: no weight gets a
            gradient.

        Raises InputError where the model returns NaN, or a single prompt does not fit into memory.
        """

        def read(batch: list[int], ids: torch.Tensor) -> AnswerRows:
            return self._rows(batch, ids, [prompts[i] for i in batch], Q)

        most = self.batch_tokens(gradient=Q is not None)
        for _, rows in in_batches(self.model, prompts, read, batch_tokens=most, memory=self.memory):
            yield rows

    def hook_rows(self, prompts: Sequence[Prompt]) -> Iterator[HookRows]:
        """The same rows, without answers: the passes end at the hook."""
        import torch

        def read(batch: list[int], ids: torch.Tensor) -> HookRows:
            leaf: list[torch.Tensor] = []

            def at_hook(hidden: torch.Tensor) -> torch.Tensor:
                leaf.append(hidden)
                raise _Reached

            chosen = [prompts[i] for i in batch]
            with torch.inference_mode(), self._changing(at_hook), suppress(_Reached):
                self._read(ids, chosen)
            return self._at_hook(batch, ids, chosen, leaf[0])

        most = self.batch_tokens(gradient=False)
        for _, rows in in_batches(self.model, prompts, read, batch_tokens=most, memory=self.memory):
            yield rows

    def _at_hook(self, batch: list[int], ids: torch.Tensor, chosen: Sequence[Prompt], x: torch.Tensor) -> HookRows:
        import torch

        kept = [self._kept(prompt, x[row, : prompt.positions[-1] + 1]) for row, prompt in enumerate(chosen)]
        at = torch.from_numpy(np.concatenate([row * ids.shape[1] + where for row, where in enumerate(kept)]))
        at = at.to(x.device)
        prompt_of = np.repeat(np.arange(len(batch)), [len(where) for where in kept])
        return HookRows(batch, x, ids, at, prompt_of, _for_core(x.flatten(0, 1)[at]))

    def _rows(self, batch: list[int], ids: torch.Tensor, chosen: Sequence[Prompt], Q: Doubles | None) -> AnswerRows:
        import torch

        leaf: list[torch.Tensor] = []

        def at_hook(hidden: torch.Tensor) -> torch.Tensor:
            leaf.append(hidden.detach().requires_grad_(Q is not None))
            return leaf[0]

        with frozen(self.model), self._changing(at_hook), torch.set_grad_enabled(Q is not None):
            nll, exact = self._read(ids, chosen)
            # Each prompt's loss depends on its own row of the batch alone.
            gradient = torch.zeros_like(leaf[0]) if Q is None else torch.autograd.grad(nll.sum(), leaf[0])[0]
        at_the_hook = self._at_hook(batch, ids, chosen, leaf[0].detach())
        return AnswerRows(
            **vars(at_the_hook),
            g=np.zeros((0, 0)) if Q is None else self._projected(gradient, at_the_hook.at, Q),
            nll=_finite(nll.detach(), self.name),
            n_answer=np.asarray([len(p.positions) for p in chosen]),
            exact=exact.cpu().numpy(),
        )

    def from_hook(
        self, rows: AnswerRows, prompts: Sequence[Prompt], moved: torch.Tensor, Q: Doubles | None = None
    ) -> tuple[Doubles, Doubles]:
        """The loss of a batch with `moved` [n_tokens, d_in] float64 added to its kept tokens at the hook.

        Only the layers above the hook are run. Returns [n_prompts] the loss and, where Q is given, its gradient there,
        as in AnswerRows.
        """
        import torch

        x = rows.padded.clone()
        x.flatten(0, 1)[rows.at] += moved.to(x.dtype).to(x.device)
        x.requires_grad_(Q is not None)
        chosen = [prompts[i] for i in rows.prompts]
        with (
            frozen(self.model),
            self._skipping_below(),
            self._changing(lambda hidden: x),
            torch.set_grad_enabled(Q is not None),
        ):
            nll, _ = self._read(rows.ids, chosen)
            g = np.zeros((0, 0)) if Q is None else self._projected(torch.autograd.grad(nll.sum(), x)[0], rows.at, Q)
        return _finite(nll.detach(), self.name), g

    def answers_from_hook(
        self, rows: AnswerRows, prompts: Sequence[Prompt], moved: torch.Tensor
    ) -> tuple[Doubles, NDArray[np.bool_]]:
        """As `from_hook`, without gradients: [n_prompts] the loss, and whether the whole answer is the first choice."""
        import torch

        x = rows.padded.clone()
        x.flatten(0, 1)[rows.at] += moved.to(x.dtype).to(x.device)
        chosen = [prompts[i] for i in rows.prompts]
        with torch.inference_mode(), self._skipping_below(), self._changing(lambda hidden: x):
            nll, exact = self._read(rows.ids, chosen)
        return _finite(nll, self.name), exact.cpu().numpy()

    def _projected(self, gradient: torch.Tensor, at: torch.Tensor, Q: Doubles) -> Doubles:
        import torch

        return _finite(gradient.flatten(0, 1)[at].double() @ torch.from_numpy(Q).to(gradient.device), self.name)

    def _read(self, ids: torch.Tensor, prompts: Sequence[Prompt]) -> tuple[torch.Tensor, torch.Tensor]:
        return read_answers(self.model, ids, prompts, name=self.name)

    def _kept(self, prompt: Prompt, residual: torch.Tensor) -> NDArray[np.int64]:
        """Positions that lead to the answer: all before its last token, except BOS and attention sinks."""
        kept = ~attention_sinks(row_norms(residual.detach()).cpu().numpy())
        kept[-1] = False
        kept[0] &= prompt.base_ids[0] != self._bos
        return np.flatnonzero(kept)

    @contextmanager
    def _changing(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
        def hook(module: Any, args: Any, output: Any) -> Any:
            self._gives_tuple = isinstance(output, tuple)
            return (change(output[0]), *output[1:]) if self._gives_tuple else change(output)

        handle = self._block.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _skipping_below(self) -> Iterator[None]:
        def hand_on(hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            return (hidden_states,) if self._gives_tuple else hidden_states

        # In a model spread over devices each module has its own `forward` attribute.
        saved = [vars(block).get("forward") for block in self._below]
        for block in self._below:
            block.forward = hand_on
        try:
            yield
        finally:
            for block, forward in zip(self._below, saved, strict=True):
                if forward is None:
                    del block.forward
                else:
                    block.forward = forward


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Gives no weight of the model a gradient; nothing below the first one wanted is then recorded for it."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            if not parameter.is_inference():  # a weight left on disk may be the trace of a pass in inference mode
                parameter.requires_grad_(True)


def _for_core(rows: torch.Tensor) -> torch.Tensor:
    import torch

    rows = rows.detach().cpu()
    return rows if rows.dtype in (torch.float32, torch.bfloat16) else rows.float()


def _finite(values: torch.Tensor, name: str) -> Doubles:
    doubles: Doubles = values.double().cpu().numpy()
    if not np.isfinite(doubles).all():
        raise InputError(f"{name} gives NaN or infinity for an answer's loss or its gradient: try --dtype float32")
    return doubles
