"""Loads the weights of a checkpoint, and refuses those that were not understood."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import weakref
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sts_fast.errors import InputError, listed, one_line
from sts_fast.model import adapters, weights
from sts_fast.model.checkpoint import WEIGHT_FILES, Checkpoint
from sts_fast.model.hooks import decoder_layers
from sts_fast.model.weights import DeviceMap, Placement
from sts_fast.ops.devices import device_named
from sts_fast.places import OTHER_TOWERS

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

# Tensors that are not weights: masks and frequencies that older versions of transformers saved, and scales of quantised
# caches of keys and values.
NO_WEIGHTS = re.compile(
    r"(inv_freq|(cos|sin)_cached|(attn|attention)\.(masked_)?bias|causal_mask|position_ids|\.[kv]_scale)$"
)


@dataclass(frozen=True)
class Loaded:
    """A model, and what of it could not be loaded because its file is not there.

    absent: names of weights by the file that should have them; they must not be needed
    """

    model: torch.nn.Module
    absent: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """A model to be loaded: dtype, device and device_map as for `load_decoder`; n_layers: of the decoder's first."""

    n_layers: int
    dtype: str = "auto"
    device: str = "auto"
    device_map: DeviceMap | None = None


def load(checkpoint: Checkpoint, auto_class: Any, config: PretrainedConfig, request: Request) -> Loaded:
    """Loads the weights of a checkpoint.

    auto_class: AutoModel, or AutoModelForCausalLM with the head, which an adapter needs
    config:     of the checkpoint, with request.n_layers layers; the others are not read

    Raises InputError where the weights cannot be loaded, some are missing, or some have no place in the model.
    """
    import torch

    weights.check_placement(request.device, request.device_map)
    device, dtype = str(device_named(request.device)), request.dtype
    if dtype == "auto" and device == "cpu":
        dtype = "float32"
    placement = None if request.device_map is None else Placement(request.device_map, device)
    source = checkpoint if checkpoint.adapter is None else checkpoint.base
    files = Files(source, request.n_layers)
    with source.loading():
        model, info = auto_class.from_pretrained(
            files.folder,
            config=config,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **source.options,
            **(
                {}
                if placement is None
                else placement.options(auto_class, config, trust_remote_code=source.trust_remote_code)
            ),
        )
    files.keep_for(model)
    if placement is not None:
        placement.keep_for(model)
    _check_shapes(source, model, info["mismatched_keys"])
    absent = files.explain(info["missing_keys"])
    _check_unexpected(source, model, info["unexpected_keys"])
    _check_dtypes(source, model, files)
    if checkpoint.adapter is not None:
        model = adapters.merge(checkpoint, model, request.n_layers)
    try:
        model = model.to(device) if placement is None else model
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"{checkpoint} cannot be moved to the device '{device}': {one_line(error)}") from error
    return Loaded(model.eval(), absent)


def _check_shapes(checkpoint: Checkpoint, model: torch.nn.Module, mismatched: Collection[tuple[str, Any, Any]]) -> None:
    """Raises InputError for weights of another shape than the config describes: (name, stored shape, shape needed)."""
    for name, stored, needed in sorted(mismatched):
        raise InputError(
            f"cannot load the model {checkpoint}: {name} has shape {list(stored)}, but {type(model).__name__} of its "
            f"config.json needs {list(needed)}: give the config.json that belongs to these weights"
        )


def _check_dtypes(checkpoint: Checkpoint, model: torch.nn.Module, files: Files) -> None:
    """Raises InputError for weights that are stored as whole numbers, though the model computes with fractions."""
    if getattr(model, "is_quantized", False):  # transformers knows what they mean
        return
    fractional = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    for name, dtype in files.whole_numbers():
        parts = name.split(".")
        if any(".".join(parts[start:]) in fractional for start in range(len(parts))):
            raise InputError(
                f"{checkpoint} has whole numbers ({dtype}) as {name}, and its config.json has no quantization_config "
                "that says what they mean: give the config.json that belongs to these weights, or weights that are not "
                "quantised"
            )


def _check_unexpected(checkpoint: Checkpoint, model: torch.nn.Module, unexpected: set[str]) -> None:
    """Raises InputError for tensors that belong to a module of the model, and have no place in it."""
    layers = decoder_layers(model, model.config.get_text_config().num_hidden_layers)  # type: ignore[union-attr, operator]
    n_layers = len(list(model.get_submodule(layers).children()))
    modules = {name for name, _ in model.named_modules() if name}
    strange = []
    for name in sorted(unexpected):
        number = re.search(rf"(?:^|\.){re.escape(layers.rpartition('.')[2])}\.(\d+)\.", name)
        before = name[: number.start()] if number else name
        if NO_WEIGHTS.search(name) or any(tower in before for tower in OTHER_TOWERS):
            continue
        parts = name.split(".")[:-1]
        in_module = any(".".join(parts[start:]) in modules for start in range(len(parts)))
        if int(number[1]) < n_layers if number else in_module:
            strange.append(name)
    if strange:
        raise InputError(
            f"{checkpoint} has tensors for which {type(model).__name__} has no place, such as "
            f"{listed(strange, 3)}: its config.json describes another architecture, or lacks the quantization_config "
            "by which the weights were quantised; give the config.json that belongs to these weights"
        )


class Files:
    """The files of a checkpoint that are loaded, without those that have layers above the first n_layers only.

    folder: folder or hub id to load from; where files are left out, a folder of links to the others

    Raises InputError where a file that is needed is not there.
    """

    def __init__(self, checkpoint: Checkpoint, n_layers: int) -> None:
        self.checkpoint, self.folder = checkpoint, checkpoint.folder
        self._temporary: Path | None = None
        self._removal: weakref.finalize[..., Files] | None = None  # where loading fails, the links go with this object
        self._absent: dict[str, str] = {}  # file by weight
        first = None if checkpoint.gguf else self._first()
        index = checkpoint.find(first) if first is not None and first.endswith(".json") else None
        self._read = [] if first is None else [first]  # names of files with tensors
        if index is None:
            return
        try:
            content = json.loads(index.read_text(encoding="utf-8"))
            of_weight: dict[str, str] = content["weight_map"]
            needed = {weight for weight in of_weight if not above(weight, n_layers)}
            files = set(of_weight.values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{index} is not an index of weights by file ({one_line(error)}): copy it again"
            ) from error
        here = {name for name in files if _inside(name) and self._has(name, {of_weight[weight] for weight in needed})}
        self._read = sorted(here)
        self._absent = {weight: of_weight[weight] for weight in needed if of_weight[weight] not in here}
        if here == files and "metadata" in content:  # transformers needs that key
            return
        self._temporary = Path(tempfile.mkdtemp(prefix="sts-fast-checkpoint-"))
        self._removal = weakref.finalize(self, shutil.rmtree, self._temporary, ignore_errors=True)
        self.folder = str(self._temporary)
        for path in index.parent.iterdir():
            if path.name != index.name and path.name not in files - here:
                (self._temporary / path.name).symlink_to(path.absolute())
        kept = {weight: file for weight, file in of_weight.items() if file in here}
        (self._temporary / index.name).write_text(json.dumps({"metadata": {}, "weight_map": kept}), encoding="utf-8")

    def keep_for(self, model: torch.nn.Module) -> None:
        """Keeps the folder of links as long as the model, which may still read from it, and then deletes it."""
        if self._temporary is not None and self._removal is not None:
            self._removal.detach()
            weakref.finalize(model, shutil.rmtree, self._temporary, ignore_errors=True)

    def explain(self, missing: set[str]) -> dict[str, list[str]]:
        """The weights outside of the layers that are missing because their file is, by file.

        Raises InputError for other weights that are missing.
        """
        by_file: dict[str, list[str]] = {}
        for name in sorted(missing):
            of_name = (file for weight, file in self._absent.items() if f".{weight}".endswith(f".{name}"))
            file = next(of_name, next(iter(self._absent.values()), None))
            if file is None:
                raise InputError(
                    f"{self.checkpoint} lacks the weights {listed(sorted(missing)[:3])}: "
                    "it is incomplete, copy or download it again"
                )
            if re.search(r"\.\d+\.", name):
                raise InputError(absent_text(self.checkpoint, file, [name]))
            by_file.setdefault(file, []).append(name)
        return by_file

    def whole_numbers(self) -> Iterator[tuple[str, str]]:
        """Names and dtypes of the tensors that are stored as whole numbers, from the files' tables of contents."""
        import torch
        from safetensors import safe_open

        for path in filter(None, map(self.checkpoint.find, self._read)):
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    of_file = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
                yield from ((name, dtype) for name, dtype in of_file.items() if dtype[0] in "IU")
            else:
                tensors = torch.load(path, map_location="meta", weights_only=True)
                yield from ((name, str(tensor.dtype)) for name, tensor in tensors.items() if "int" in str(tensor.dtype))

    def _first(self) -> str | None:
        """The file of all weights, or the index of several; None where there is none."""
        from transformers.utils.hub import has_file

        return next((name for name in WEIGHT_FILES if has_file(self.folder, name)), None)

    def _has(self, name: str, needed: set[str]) -> bool:
        """True if the file is here, or is needed and can be downloaded."""
        if Path(self.folder).is_dir():
            return (Path(self.folder) / name).is_file()
        return name in needed and self.checkpoint.find(name) is not None


def absent_text(checkpoint: Checkpoint, file: str, names: list[str]) -> str:
    """A sentence on a file that is not there, though weights in it are needed."""
    weights_read = f"weights that are read ({listed(names, 3)})"
    return f"{checkpoint} lacks the file {file}, which has {weights_read}: copy or download that file too"


def above(weight: str, n_layers: int) -> bool:
    """True for a weight of a decoder layer that is not among the first n_layers."""
    number = re.search(r"(?:^|\.)(\d+)\.", weight)
    return (
        number is not None
        and int(number[1]) >= n_layers
        and not any(tower in weight[: number.start()] for tower in OTHER_TOWERS)
    )


def _inside(name: Any) -> bool:
    """True for the plain name of a file."""
    return isinstance(name, str) and Path(name).name == name
