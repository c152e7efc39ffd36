"""The weights of a model: their placement on devices, their digest, and the unembedding."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sts_fast._version import __version__
from sts_fast.errors import InputError
from sts_fast.model.hooks import decoder_layers
from sts_fast.ops.devices import device_named, name_of

if TYPE_CHECKING:
    import torch

DeviceMap = str | Mapping[str, Any]
# Device maps that transformers makes from the free memory of all devices; maps to one kind of memory.
SPREADING, SINGLE = ("auto", "balanced", "balanced_low_0", "sequential"), ("cpu", "disk")
# Numbers of each tensor in the digest, evenly spread: enough to distinguish two trainings.
N_SAMPLED = 1024


def check_placement(device: str, device_map: DeviceMap | None) -> None:
    """Raises InputError for an unknown device or map, for both together, and where accelerate is missing."""
    device_named(device)
    if device_map is None:
        return
    if device != "auto" and device_map != "disk":
        raise InputError("--device and --device-map both say where the model goes: give one of them")
    if isinstance(device_map, str) and device_map not in (*SPREADING, *SINGLE):
        raise InputError(f"--device-map is one of {', '.join((*SPREADING, *SINGLE))}, not '{device_map}'")
    if importlib.util.find_spec("accelerate") is None:
        raise InputError("--device-map needs the package accelerate: pip install accelerate")


class Placement:
    """Placement of a model's weights, as options of `from_pretrained`.

    device_map: 'auto', 'balanced', 'balanced_low_0' or 'sequential' (all devices, then memory, then disk), 'cpu',
        'disk' (the decoder layers stay there, and each is loaded when it is run), or a dict of a device by module, as
        for transformers
    device: device that runs a model whose layers stay on disk
    """

    def __init__(self, device_map: DeviceMap, device: str) -> None:
        self.device_map, self.device = device_map, device
        self.folder = tempfile.mkdtemp(prefix="sts-fast-offloaded-")

    def options(self, auto_class: Any, config: Any, trust_remote_code: bool) -> dict[str, Any]:
        device_map = self.device_map
        if device_map == "disk":
            import torch

            with torch.device("meta"):
                empty = auto_class.from_config(config, trust_remote_code=trust_remote_code)
            layers = decoder_layers(empty, config.get_text_config().num_hidden_layers)
            device_map = _all_but(empty, layers, self.device)
        return {"device_map": device_map, "offload_folder": self.folder}

    def keep_for(self, model: torch.nn.Module) -> None:
        """Keeps the folder of offloaded weights as long as the model, and then deletes it."""
        weakref.finalize(model, shutil.rmtree, self.folder, ignore_errors=True)


def _all_but(model: torch.nn.Module, layers: str, device: str) -> dict[str, str]:
    """A device map with the decoder layers on disk and everything else on a device."""
    places: dict[str, str] = {}

    def place(module: torch.nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            path = prefix + name
            if path == layers:
                places.update({f"{path}.{i}": "disk" for i, _ in child.named_children()})
            elif layers.startswith(f"{path}."):
                place(child, f"{path}.")
            else:
                places[path] = device

    place(model, "")
    return places


def weights_sha256(model: torch.nn.Module, last_layer: int | None) -> str:
    """SHA-256 over the embedding and the decoder layers up to `last_layer` (None: all of them).

    Each tensor counts with its name within the layer, its dtype and shape, and 1,024 numbers spread evenly over it (all
    of a smaller one). Models that were trained differently differ, regardless of their names; a few single numbers
    changed by hand may go unnoticed. A tensor that is left on disk counts by name, dtype and shape alone.
    """
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    layers = model.get_submodule(decoder_layers(model, config.num_hidden_layers))
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    parts = [] if embedding is None else [("embedding", embedding)]
    count = config.num_hidden_layers if last_layer is None else last_layer + 1
    parts += [(f"layers.{i}", layer) for i, layer in enumerate(layers.children()) if i < count]
    digest = hashlib.sha256()
    for part, module in parts:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{part}.{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(_sampled(tensor))
    return digest.hexdigest()


def model_sha256(model: Any) -> str | None:
    """SHA-256 of what decides a whole model's numbers: weights, config, device, and the versions of what runs it.

    The weights count as for `weights_sha256`. None where some are left on disk, and so are not told apart.
    """
    import torch
    import transformers

    if any(parameter.is_meta for parameter in model.parameters()):
        return None
    config, device = model.config, next(model.parameters()).device
    settings = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
    described = (
        f"{type(model).__module__}.{type(model).__qualname__}",
        json.dumps(settings, sort_keys=True, default=str),
        str(getattr(config, "_attn_implementation", None)),
        name_of(device),
        __version__, torch.__version__, transformers.__version__,
    )  # fmt: skip
    digest = hashlib.sha256("\n".join(described).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(_sampled(tensor))
    return digest.hexdigest()


def _sampled(tensor: torch.Tensor) -> bytes:
    import torch

    if tensor.is_meta:
        return b""
    flat, n = tensor.detach().reshape(-1), tensor.numel()
    if n > N_SAMPLED:
        flat = flat[torch.arange(N_SAMPLED, device=flat.device) * (n - 1) // (N_SAMPLED - 1)]
    return flat.cpu().contiguous().view(torch.uint8).numpy().tobytes() if n else b""


def unembedding(model: torch.nn.Module, source: str | Path | None) -> torch.Tensor | None:
    """[vocabulary, d_in] matrix from residuals to logits; None where it is not found.

    model:  a model in memory, whole or truncated
    source: folder or hub id that a truncated one was loaded from
    """
    from safetensors import safe_open
    from transformers.utils.hub import cached_file

    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None and model.config.get_text_config().tie_word_embeddings:  # type: ignore[union-attr, operator]
        head = model.get_input_embeddings()  # type: ignore[operator]
    if head is not None:
        return head.weight.detach().cpu()  # type: ignore[no-any-return]
    if source is None:
        return None

    def find(name: str) -> str | None:
        path: str | None = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        return path

    index = find("model.safetensors.index.json")
    shards = json.loads(Path(index).read_text())["weight_map"] if index else {}
    for name in ("lm_head.weight", "embed_out.weight"):
        file = find(shards.get(name, "model.safetensors")) if not shards or name in shards else None
        if file is not None:
            with safe_open(file, framework="pt") as weights:
                if name in weights.keys():  # noqa: SIM118
                    return weights.get_tensor(name)  # type: ignore[no-any-return]
    return None
