"""Where in a model an SAE reads: names of places, and the modules that compute them in a given model."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sts_fast.errors import InputError

if TYPE_CHECKING:
    import torch

OTHER_TOWERS = ("vision", "visual", "audio", "expert", "encoder")


@dataclass(frozen=True)
class Hook:
    """A place in a model.

    name:  as it was asked for
    path:  the module that is read, as the model names it
    side:  'input' or 'output' of it
    layer: index of the decoder layer it belongs to; None outside of the layers
    d_in:  numbers per token
    """

    name: str
    path: str
    side: str
    layer: int | None
    d_in: int

    @property
    def where(self) -> str:
        """The place in words: 'after layer 25', or 'at' its name."""
        return f"after layer {self.layer}" if self.name.endswith(".hook_resid_post") else f"at {self.name}"

    def attach(self, model: torch.nn.Module, saw: Callable[[torch.Tensor], None]) -> Any:
        """Calls `saw` with [n_sequences, n_tokens, d_in] in every forward pass; returns a handle with `remove()`."""
        module = model.get_submodule(self.path)
        if self.side == "input":
            return module.register_forward_pre_hook(
                lambda module, args, options: saw(first_tensor(args, options)), with_kwargs=True
            )
        return module.register_forward_hook(lambda module, args, output: saw(first_tensor(output, {})))


def first_tensor(values: Any, options: dict[str, Any]) -> Any:
    """The hidden states among a module's arguments or results, which may be a tensor or a tuple that starts with it."""
    if isinstance(values, (tuple, list)):
        return values[0] if values else options.get("hidden_states", next(iter(options.values()), None))
    return values


def layer_of(place: str | int, n_layers: int, *, name: str) -> int | None:
    """Index of the decoder layer that a place belongs to; None outside of the layers.

    Raises InputError where the model, called `name`, has no such layer.
    """
    layer = place
    if isinstance(place, str):
        match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", place)
        if match is None:
            return None
        layer = int(match[1])
    if not 0 <= int(layer) < n_layers:
        raise InputError(f"{name} has layers 0 to {n_layers - 1}, but layer {layer} is to be read")
    return int(layer)


def find_hooks(model: torch.nn.Module, places: Sequence[str | int], *, name: str) -> list[Hook]:
    """The places in a model, by name: 'blocks.25.hook_resid_post', a resid_pre, or the module path of a layer.

    An index stands for the output of that layer. Raises InputError where the model has no such place.
    """
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    layers = decoder_layers(model, config.num_hidden_layers)
    found = []
    for place in places:
        layer = layer_of(place, config.num_hidden_layers, name=name)
        full = f"blocks.{place}.hook_resid_post" if isinstance(place, int) else place
        side = "input" if full.endswith(".hook_resid_pre") else "output"
        found.append(Hook(full, f"{layers}.{layer}", side, layer, config.hidden_size))
    return found


def decoder_layers(model: torch.nn.Module, n_layers: int) -> str:
    """Path of the list of decoder layers: the outermost ModuleList of that length outside vision, audio and experts."""
    import torch

    found = [
        (name.count("."), name)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList)
        and len(module) == n_layers
        and not any(tower in name for tower in OTHER_TOWERS)
    ]
    if not found:
        raise InputError(f"no list of {n_layers} decoder layers was found in {type(model).__name__}")
    path: str = min(found)[1]
    return path
