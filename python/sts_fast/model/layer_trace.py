"""Finds the parts of a decoder layer of any architecture from a trace of one tiny forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from sts_fast.ops.devices import doubled

if TYPE_CHECKING:
    import torch

N_TOKENS = 8
# Rounding allowed in sums of parts of the residual stream, in units of the dtype's epsilon.
MOST_ROUNDING = 4.0


class _Seen(Exception):
    """Raised by the last hook to leave the model's forward."""


@dataclass(frozen=True)
class Norm:
    """A norm without its gain and bias: x / sqrt(mean(x^2) + epsilon), of x - mean(x) where it is centred."""

    centred: bool
    epsilon: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., d], computed in float32 or better and returned in the dtype of x."""
        import torch

        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.centred:
            precise = precise - precise.mean(dim=-1, keepdim=True)
        return (precise * (precise.square().mean(dim=-1, keepdim=True) + self.epsilon).rsqrt()).to(x.dtype)


@dataclass(frozen=True)
class Tap:
    """The input or output of a module, times a factor or normed.

    path:  the module's path within the layer
    side:  'input' or 'output'
    scale: the factor
    norm:  the norm; None for none
    """

    path: str
    side: str
    scale: float = 1.0
    norm: Norm | None = None


@dataclass(frozen=True)
class LayerTrace:
    """Inputs and outputs of all of a layer's modules.

    The two sequences enter the layer with different first tokens and the same later ones. A difference in later tokens
    therefore comes from mixing tokens.

    before, after:   [2, N_TOKENS, d_model] the residual stream before and after the layer
    inputs, outputs: [2, N_TOKENS, d] by module's path in the layer, in the order in which the modules are run
    projecting:      paths of modules with a matrix
    nested:          paths of modules that contain other modules
    epsilons:        by module's path, its numbers that are called eps or epsilon
    """

    before: torch.Tensor
    after: torch.Tensor
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]
    projecting: set[str]
    nested: set[str]
    epsilons: dict[str, list[float]]


def first_tensor(values: Any, options: dict[str, Any]) -> Any:
    """The hidden states among a module's arguments or results: a tensor, or a tuple that starts with it."""
    if isinstance(values, (tuple, list)):
        return values[0] if values else options.get("hidden_states", next(iter(options.values()), None))
    return values


def trace_layer(model: torch.nn.Module, path: str) -> LayerTrace | None:
    """Runs a few tokens through the layer and records every module in it; None where no residual stream passes it."""
    import torch

    block = model.get_submodule(path)
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}

    def keep(seen: dict[str, torch.Tensor], name: str, value: Any) -> None:
        if torch.is_tensor(value) and value.ndim == 3 and value.shape[:2] == (2, N_TOKENS):
            seen.setdefault(name, value.detach().clone())  # later modules may write into it

    def change_first_token(module: Any, args: Any, options: Any) -> Any:
        value = first_tensor(args, options)
        if not torch.is_tensor(value) or value.ndim != 3:
            raise _Seen
        changed = value.clone()
        changed[1] = changed[0]
        changed[1, 0] = -changed[0, 0].roll(1)
        keep(inputs, "", changed)
        if args:
            return (changed, *args[1:]), options
        name = next(name for name, option in options.items() if option is value)
        return args, {**options, name: changed}

    def keep_input(name: str, module: Any, args: Any, options: Any) -> None:
        keep(inputs, name, first_tensor(args, options))

    def keep_output(name: str, module: Any, args: Any, output: Any) -> None:
        keep(outputs, name, first_tensor(output, {}))
        if not name:
            raise _Seen

    handles = [block.register_forward_pre_hook(change_first_token, with_kwargs=True)]
    for name, module in block.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(partial(keep_input, name), with_kwargs=True))
        handles.append(module.register_forward_hook(partial(keep_output, name)))
    try:
        run_few_tokens(model)
    except _Seen:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if "" not in inputs or "" not in outputs:
        return None
    modules = dict(block.named_modules())
    tensors = {name: [*module.parameters(), *module.buffers()] for name, module in modules.items()}
    return LayerTrace(
        before=inputs.pop(""),
        after=outputs.pop(""),
        inputs=inputs,
        outputs=outputs,
        projecting={name for name, some in tensors.items() if any(tensor.ndim >= 2 for tensor in some)},
        nested={name for name, module in modules.items() if any(True for _ in module.children())},
        epsilons={
            name: [value for key, value in vars(module).items() if "eps" in key and isinstance(value, float)]
            for name, module in modules.items()
        },
    )


def run_few_tokens(model: torch.nn.Module) -> None:
    """One forward pass of two sequences of N_TOKENS tokens."""
    import torch

    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    ids = torch.randint(0, config.vocab_size, (1, N_TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model(input_ids=ids.expand(2, -1).to(input_device(model)), use_cache=False)


def find_taps(trace: LayerTrace) -> dict[str, Tap]:
    """Tap of each place that the layer has.

    attn_out:  the part that mixes tokens, as added to the residual stream
    mlp_out:   the other part, as added to the residual stream
    resid_mid: the residual stream between them; a layer that adds both at once has none
    hook_z:    input of the mixing part's output projection
    mlp_in:    input of the other part
    mlp_normalized: the same before the gain and bias of the norm that computes it

    They are recognised by sums that hold up to rounding: before + attn_out = resid_mid, resid_mid + mlp_out = after.
    """
    taps: dict[str, Tap] = {}
    before, after = trace.before, trace.after
    adding = [name for name, value in trace.outputs.items() if value.shape == before.shape]
    adding.sort(key=lambda name: name.count("."))  # of modules with equal outputs, the outermost first
    mixing = [name for name in adding if _mixes(trace.outputs[name])]
    attention = mlp = None
    for name, middle in trace.inputs.items():
        if middle.shape != before.shape or _alike(middle, before) or _alike(middle, after) or not _mixes(middle):
            continue
        first = _addend(trace, before, middle, mixing)
        second = _addend(trace, middle, after, adding)
        if (first or second) and ("resid_mid" not in taps or (first and second)):
            taps["resid_mid"], attention, mlp = Tap(name, "input"), first, second
        if first and second:
            break
    if "resid_mid" not in taps:
        attention, mlp = _added_at_once(trace, mixing, [name for name in adding if name not in mixing])
    if attention is not None:
        taps["attn_out"] = attention
        projection = _projection(trace, attention.path)
        if projection is not None:
            taps["hook_z"] = Tap(projection, "input")
    if mlp is not None:
        taps["mlp_out"] = mlp
        entrance = _entrance(trace, mlp.path)
        if entrance is not None:
            taps["mlp_in"] = Tap(entrance, "input")
            normed = _normed(trace, trace.inputs[entrance])
            if normed is not None:
                taps["mlp_normalized"] = normed
    return taps


def _addend(trace: LayerTrace, start: torch.Tensor, end: torch.Tensor, names: list[str]) -> Tap | None:
    """The module whose output, times a factor, is end - start."""
    for name in names:
        part = trace.outputs[name]
        for scale in (1.0, _fitted(doubled(end) - doubled(start), doubled(part))):
            if scale and _adds_up(end, [(start, 1.0), (part, scale)]):
                return Tap(name, "output", scale)
    return None


def _added_at_once(trace: LayerTrace, mixing: list[str], others: list[str]) -> tuple[Tap | None, Tap | None]:
    """The two modules (or the one) whose outputs add up to the layer's output minus its input."""
    before, after = trace.before, trace.after
    for first in mixing:
        for second in others:
            if _adds_up(after, [(before, 1.0), (trace.outputs[first], 1.0), (trace.outputs[second], 1.0)]):
                return Tap(first, "output"), Tap(second, "output")
    return _addend(trace, before, after, mixing), _addend(trace, before, after, others)


def _projection(trace: LayerTrace, path: str) -> str | None:
    """The output projection of a module: its output is the module's, directly or through a norm."""
    for value in _behind(trace, path):
        for name in _giving(trace, value):
            entering = trace.inputs.get(name)
            if name in trace.projecting and entering is not None and _mixes(entering) and not _alike(entering, value):
                return name
    return None


def _entrance(trace: LayerTrace, path: str) -> str | None:
    """The outermost module that computes a module's output from the layer's normed residual stream."""
    for value in _behind(trace, path):
        for name in _giving(trace, value):
            if name not in trace.projecting:
                continue
            whole = name if name in trace.nested else name.rpartition(".")[0]
            entering = trace.inputs.get(whole)
            return whole if entering is not None and entering.shape == trace.before.shape else None
    return None


def _normed(trace: LayerTrace, value: torch.Tensor) -> Tap | None:
    """The input of the norm that computes a value, with the norm: the value is its result times a gain plus a bias."""
    for name in _giving(trace, value):
        entering = trace.inputs.get(name)
        if name in trace.projecting or entering is None or entering.shape != value.shape:
            continue
        for centred in (False, True):
            for epsilon in trace.epsilons[name]:
                norm = Norm(centred, epsilon)
                if _is_affine(norm(doubled(entering)).flatten(0, 1), doubled(value).flatten(0, 1), centred, value):
                    return Tap(name, "input", norm=norm)
    return None


def _is_affine(x: torch.Tensor, y: torch.Tensor, has_bias: bool, stored: torch.Tensor) -> bool:
    """True if each column of y [n, d] is a gain times that of x, plus a bias if any, to the rounding of `stored`."""
    shift = y.mean(dim=0) * has_bias
    centre = x.mean(dim=0) * has_bias
    gain = ((x - centre) * (y - shift)).sum(dim=0) / (x - centre).square().sum(dim=0).clamp(min=1e-30)
    fitted = shift + (x - centre) * gain
    size = y.abs() + shift.abs() + ((x - centre) * gain).abs()
    return bool(((fitted - y).abs() <= MOST_ROUNDING * _epsilon(stored) * size.amax(dim=0)).all())


def _behind(trace: LayerTrace, path: str) -> Iterator[torch.Tensor]:
    """A module's output; then, where a norm computes it, the norm's input; at most three in all."""
    value: torch.Tensor | None = trace.outputs[path]
    for _ in range(3):
        if value is None:
            return
        yield value
        value = next((trace.inputs.get(name) for name in _giving(trace, value) if name not in trace.projecting), None)


def _giving(trace: LayerTrace, value: torch.Tensor) -> list[str]:
    """Modules with this output, the outermost first."""
    names = [name for name, output in trace.outputs.items() if _alike(output, value)]
    return sorted(names, key=lambda name: name.count("."))


def _mixes(value: torch.Tensor) -> bool:
    """True if later tokens differ between two sequences that differ in their first token only."""
    first, second = doubled(value[0, 1:]), doubled(value[1, 1:])
    return float((first - second).abs().max()) > MOST_ROUNDING * _epsilon(value) * float(first.abs().max())


def _alike(value: torch.Tensor, other: torch.Tensor) -> bool:
    return value.shape == other.shape and bool((value == other).all())


def _fitted(total: torch.Tensor, part: torch.Tensor) -> float:
    squares = float((part * part).sum())
    return float((total * part).sum()) / squares if squares else 0.0


def _adds_up(total: torch.Tensor, parts: list[tuple[torch.Tensor, float]]) -> bool:
    terms = [doubled(part) * scale for part, scale in parts]
    size = doubled(total).abs()
    for term in terms:
        size = size + term.abs()
    rounding = MOST_ROUNDING * max(_epsilon(part) for part in (total, *(part for part, _ in parts)))
    added = float(terms[-1].abs().max()) > rounding * float(size.max())
    return added and bool(((sum(terms) - doubled(total)).abs() <= rounding * size).all())


def _epsilon(value: torch.Tensor) -> float:
    import torch

    return torch.finfo(value.dtype).eps


def input_device(model: torch.nn.Module) -> torch.device:
    """Device of the model's inputs; for a model spread over devices, the one that computes its embedding."""
    import torch

    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    placed = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    return next(model.parameters()).device if placed is None else torch.device(placed)
