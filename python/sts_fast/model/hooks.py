"""Hooks of a model: the modules that compute the places that SAEs read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sts_fast.errors import InputError
from sts_fast.model.layer_trace import (
    N_TOKENS,
    LayerTrace,
    Norm,
    Tap,
    find_taps,
    first_tensor,
    run_few_tokens,
    trace_layer,
)
from sts_fast.model.memory import running
from sts_fast.places import OTHER_TOWERS, PLACES, layer_of, place_name, split_name

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Hook:
    """A place in a model: the input or output of one of its modules.

    name:  as requested
    path:  the module's path in the model
    side:  'input' or 'output'
    layer: index of the decoder layer that contains it; None outside the layers
    d_in:  numbers per token
    scale: factor of the value, by which the model multiplies it before adding it
    norm:  applied to the value; None for none
    """

    name: str
    path: str
    side: str
    layer: int | None
    d_in: int
    scale: float = 1.0
    norm: Norm | None = None

    @property
    def where(self) -> str:
        """The place in words: 'after layer 25', or 'at' its name."""
        return f"after layer {self.layer}" if split_name(self.name)[0] == "resid_post" else f"at {self.name}"

    def attach(self, model: torch.nn.Module, saw: Callable[[torch.Tensor], None]) -> Any:
        """Calls `saw` with [n_sequences, n_tokens, d_in] in every forward pass; returns a handle with `remove()`."""
        module = model.get_submodule(self.path)

        def scaled(value: torch.Tensor) -> None:
            value = value if self.scale == 1 else value * self.scale
            saw(value if self.norm is None else self.norm(value))

        if self.side == "input":
            return module.register_forward_pre_hook(
                lambda module, args, options: scaled(first_tensor(args, options)), with_kwargs=True
            )
        return module.register_forward_hook(lambda module, args, output: scaled(first_tensor(output, {})))


def find_hooks(model: torch.nn.Module, places: Sequence[str | int], *, name: str) -> list[Hook]:
    """Finds places in a model by name.

    A name is a place of a layer as SAEs spell it ('blocks.25.hook_resid_post', 'blocks.3.attn.hook_z'), or the path of
    a module, for its output ('model.layers.12.mlp') or its input ('model.layers.12.mlp.input'). An index means the
    output of that layer. A place inside a layer is found by tracing the layer's modules on a few tokens.

    Raises InputError, with the paths of existing modules, where the model has no such place.
    """
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    layers = decoder_layers(model, config.num_hidden_layers)
    seen: dict[int, tuple[LayerTrace | None, dict[str, Tap]]] = {}
    hooks = []
    for requested in places:
        layer = layer_of(requested, config.num_hidden_layers, name=name)
        full = place_name("resid_post", requested) if isinstance(requested, int) else requested
        place, _ = split_name(full)
        if layer is None or place not in PLACES:
            path, side = _find_module(model, full, f"{layers}.{layer or 0}", name=name)
            hooks.append(Hook(full, path, side, layer, _width(model, path, side, name=name)))
        elif place in ("resid_pre", "resid_post"):
            side = "input" if place == "resid_pre" else "output"
            hooks.append(Hook(full, f"{layers}.{layer}", side, layer, config.hidden_size))
        else:
            block = f"{layers}.{layer}"
            if layer not in seen:
                with running(name):
                    trace = trace_layer(model, block)
                seen[layer] = trace, {} if trace is None else find_taps(trace)
            trace, taps = seen[layer]
            if trace is None or place not in taps:
                raise InputError(
                    f"{name} has no {place} ({PLACES[place]}) in its layer {layer} that can be recognised from what "
                    f"{type(model.get_submodule(block)).__name__} computes{_listed('; it has ', taps)}: "
                    f"{_modules(model, block)}"
                )
            tap = taps[place]
            d_in = (trace.inputs if tap.side == "input" else trace.outputs)[tap.path].shape[-1]
            hooks.append(Hook(full, f"{block}.{tap.path}", tap.side, layer, d_in, tap.scale, tap.norm))
    return hooks


def decoder_layers(model: torch.nn.Module, n_layers: int) -> str:
    """Path of the decoder layers: the outermost ModuleList of n_layers outside vision, audio and experts.

    Raises InputError where there is none.
    """
    import torch

    lists = [
        (name.count("."), name)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList)
        and len(module) == n_layers
        and not any(tower in name for tower in OTHER_TOWERS)
    ]
    if not lists:
        raise InputError(f"no list of {n_layers} decoder layers was found in {type(model).__name__}")
    path: str = min(lists)[1]
    return path


def _find_module(model: torch.nn.Module, path: str, block: str, *, name: str) -> tuple[str, str]:
    """A module's path in this model, and the side ('input' or 'output') that the name means.

    Leading parts of the path are dropped as far as needed, but never the layer: a module's path changes where the
    model is wrapped, or loaded without its head.
    """
    names = {module for module, _ in model.named_modules() if module}
    side = "output"
    if path not in names and path.rpartition(".")[2] in ("input", "output"):
        path, _, side = path.rpartition(".")
    parts = path.split(".")
    last = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts)) - 1
    for start in range(max(last, 0) + 1):
        tail = ".".join(parts[start:])
        matches = [module for module in names if module == tail or module.endswith(f".{tail}")]
        if tail in matches:
            return tail, side
        if len(matches) == 1:
            return matches[0], side
    raise InputError(f"{name} has no module '{path}': {_modules(model, block)}")


def _modules(model: torch.nn.Module, block: str) -> str:
    listed = [f"{block}.{name}" for name, _ in model.get_submodule(block).named_children()]
    some = f"such as {', '.join(listed[:8])}, or its input, as in {listed[0]}.input"
    return f"give the path of a module with --hook, {some}; or --layer"


def _listed(words: str, names: dict[str, Tap]) -> str:
    return words + ", ".join(name for name in PLACES if name in names) if names else ""


def _width(model: torch.nn.Module, path: str, side: str, *, name: str) -> int:
    """Numbers per token at a module, measured in a forward pass of a few tokens."""
    import torch

    class Seen(Exception):
        pass

    values: list[Any] = []

    def saw(value: Any) -> None:
        values.append(value)
        raise Seen

    handle = Hook("", path, side, None, 0).attach(model, saw)
    try:
        with running(name), suppress(Seen):
            run_few_tokens(model)
    finally:
        handle.remove()
    if not values:
        raise InputError(f"{name} does not run {path} for plain text: read another module")
    if not (torch.is_tensor(values[0]) and values[0].ndim == 3 and values[0].shape[:2] == (2, N_TOKENS)):
        raise InputError(f"{path} of {name} does not have one vector per token as its {side}: read another module")
    return int(values[0].shape[-1])
