"""SAELens: folders of cfg.json and sae_weights.safetensors (versions 5 and 6), and the hub through sae-lens itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sts_fast.errors import InputError
from sts_fast.sae import SAE

if TYPE_CHECKING:
    import torch

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"

# The tensors that an encoder needs; of W_dec at most the norms of its rows.
ENCODER_TENSORS = {
    "standard": ("W_enc", "b_enc", "b_dec"),
    "jumprelu": ("W_enc", "b_enc", "b_dec", "threshold"),
    "gated": ("W_enc", "b_dec", "r_mag", "b_mag", "b_gate"),
    "topk": ("W_enc", "b_enc", "b_dec"),
}
DTYPES = ("F32", "BF16", "F16")
FORGOTTEN_FOLDING = (
    "its config says 'expected_average_only_in', a scaling that a folder does not carry: if it was not folded into the "
    "weights when it was saved, the features are wrong"
)


def read_folder(folder: Path) -> SAE:
    """An SAE saved by SAELens 5 or 6; weights stay memory-mapped, W_dec is not loaded.

    Raises InputError, naming file and key, for missing or damaged files and unsupported configurations.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    config = _read_config(folder / CONFIG_FILE)
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise InputError(f"{folder} has a {CONFIG_FILE} but no {WEIGHTS_FILE}: copy the SAE's whole folder")
    architecture = config["architecture"]
    try:
        with safe_open(weights, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            _check_tensors(weights, config, shapes, {name: file.get_slice(name).get_dtype() for name in shapes})
            tensors = {name: file.get_tensor(name) for name in ENCODER_TENSORS[architecture] if name in shapes}
            if "log_threshold" in shapes and "threshold" not in shapes:
                tensors["threshold"] = torch.exp(file.get_tensor("log_threshold"))
            if config["rescale_acts_by_decoder_norm"]:
                tensors["W_dec_norm"] = _row_norms(file.get_slice("W_dec"), shapes["W_dec"][0])
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{weights} is not a readable safetensors file ({error}): copy or download it again"
        ) from error
    return _assemble(config, tensors, source=str(folder), where=str(weights))


def read_decoder_rows(folder: Path, features: Sequence[int]) -> torch.Tensor | None:
    """[n_features, d_in] rows of W_dec, gathered from the memory map; None where the folder does not hold W_dec."""
    import torch
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        if "W_dec" not in file.keys():  # noqa: SIM118
            return None
        W_dec = file.get_slice("W_dec")
        return torch.cat([W_dec[j : j + 1] for j in features])


def read_release(name: str) -> SAE:
    """An SAE by 'release/id', loaded by sae-lens, which knows every public release and caches what it downloads."""
    try:
        from sae_lens import SAE as SAELensSAE
    except ImportError as error:
        raise InputError(
            f"there is no folder {name}; to load it as a release from the hub, sae-lens is needed: "
            "pip install 'sts-fast[sae-lens]'"
        ) from error
    release, _, sae_id = name.partition("/")
    try:
        loaded = SAELensSAE.from_pretrained(release, sae_id)
    except Exception as error:  # whatever a download, a registry look-up or a conversion may raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"sae-lens cannot load release '{release}', id '{sae_id}': {reason}") from error
    config = {**loaded.cfg.to_dict(), "architecture": loaded.cfg.architecture()}
    state = {key: value.detach() for key, value in loaded.state_dict().items()}
    config = _understood(config, where=name)
    _check_tensors(name, config, {key: tuple(value.shape) for key, value in state.items()}, {})
    tensors = {key: state[key] for key in ENCODER_TENSORS[config["architecture"]]}
    if config["rescale_acts_by_decoder_norm"]:
        tensors["W_dec_norm"] = state["W_dec"].float().norm(dim=-1)
    return _assemble(config, tensors, source=name, where=name)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path.parent} has no {CONFIG_FILE}: give a folder saved by SAELens")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON ({error}): copy or download it again") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} does not hold a JSON object: copy or download it again")
    return _understood(config, where=str(path))


def _understood(config: dict[str, Any], *, where: str) -> dict[str, Any]:
    """The config in one form for all versions: before 6 it was flat, TopK was an activation, names differed."""
    for key in ("metadata", "activation_fn_kwargs"):
        if not isinstance(config.get(key) or {}, dict):
            raise InputError(f"{where}: {key} must be a JSON object, but is {config[key]!r}")
    metadata = config.get("metadata") or {}
    architecture = str(config.get("architecture", "standard"))
    activation = str(config.get("activation_fn_str", config.get("activation_fn", "relu")))
    k = config.get("k", 0)
    if activation == "topk":
        architecture = "topk"
        k = (config.get("activation_fn_kwargs") or {}).get("k", k)
    elif activation != "relu" and architecture != "topk":
        raise InputError(f"{where}: activation_fn '{activation}' is not supported: use an SAE with relu or topk")
    if architecture not in ENCODER_TENSORS:
        raise InputError(
            f"{where}: architecture '{architecture}' is not supported: use one of {', '.join(ENCODER_TENSORS)}"
        )
    normalize = config.get("normalize_activations")
    if normalize is None or isinstance(normalize, bool):
        normalize = "expected_average_only_in" if normalize else "none"
    if normalize not in ("none", "expected_average_only_in"):
        raise InputError(f"{where}: normalize_activations '{normalize}' is not supported: use an SAE without it")
    hook_name = str(metadata.get("hook_name") or config.get("hook_name") or config.get("hook_point") or "")
    if config.get("reshape_activations", "none") != "none" or "hook_z" in hook_name:
        raise InputError(f"{where}: hook_z SAEs are not supported: use one of the residual stream")
    return {
        "architecture": architecture,
        "k": k,
        "d_in": config.get("d_in"),
        "d_sae": config.get("d_sae"),
        "normalize_activations": normalize,
        "apply_b_dec_to_input": bool(config.get("apply_b_dec_to_input", True)),
        "rescale_acts_by_decoder_norm": architecture == "topk" and bool(config.get("rescale_acts_by_decoder_norm")),
        "hook_name": hook_name,
        "model_name": str(metadata.get("model_name") or config.get("model_name") or ""),
        "prepend_bos": bool(metadata.get("prepend_bos", config.get("prepend_bos", "metadata" not in config))),
        "metadata": metadata,
    }


def _check_tensors(
    where: str | Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]], dtypes: dict[str, str]
) -> None:
    architecture = config["architecture"]
    needed = [*ENCODER_TENSORS[architecture], *(["W_dec"] if config["rescale_acts_by_decoder_norm"] else [])]
    for name in needed:
        if name not in shapes and not (name == "threshold" and "log_threshold" in shapes):
            raise InputError(
                f"{where} has no tensor '{name}', which a {architecture} SAE needs (it has {', '.join(sorted(shapes))})"
            )
    if len(shapes["W_enc"]) != 2 or 0 in shapes["W_enc"]:
        raise InputError(f"{where}: W_enc has shape {list(shapes['W_enc'])}, but [d_in, d_sae] is needed")
    d_in, d_sae = shapes["W_enc"]
    for key, width in (("d_in", d_in), ("d_sae", d_sae)):
        if config[key] is not None and config[key] != width:
            raise InputError(f"{where}: W_enc has {key} = {width}, but {CONFIG_FILE} says {config[key]}")
    expected = {"W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    for name in [*needed, "log_threshold"]:
        shape = shapes.get(name)
        if shape is not None and name != "W_enc" and shape != expected.get(name, (d_sae,)):
            raise InputError(
                f"{where}: {name} has shape {list(shape)}, but {list(expected.get(name, (d_sae,)))} is needed"
            )
        if dtypes.get(name, "F32") not in DTYPES:
            raise InputError(f"{where}: {name} has dtype {dtypes[name]}, but one of {', '.join(DTYPES)} is needed")
    k = config["k"]
    if architecture == "topk" and not (isinstance(k, int) and not isinstance(k, bool) and 1 <= k <= d_sae):
        raise InputError(f"{where}: k must be a whole number between 1 and d_sae = {d_sae}, but {CONFIG_FILE} says {k}")


def _row_norms(W_dec: Any, d_sae: int, rows: int = 4096) -> torch.Tensor:
    """[d_sae] float32 norms of W_dec's rows, read a block at a time so that W_dec is never held."""
    import torch

    return torch.cat([W_dec[start : start + rows].float().norm(dim=-1) for start in range(0, d_sae, rows)])


def _assemble(config: dict[str, Any], tensors: dict[str, torch.Tensor], *, source: str, where: str) -> SAE:
    import torch

    vectors: dict[str, Any] = {name: tensor.float().numpy() for name, tensor in tensors.items() if name != "W_enc"}
    for name, vector in vectors.items():
        if not np.isfinite(vector).all():
            raise InputError(f"{where}: {name} contains NaN or infinity: copy or download it again")
    W_enc = tensors["W_enc"]
    if W_enc.dtype == torch.float16:
        W_enc = W_enc.float()
    if not all(bool(torch.isfinite(rows.sum(dtype=torch.float64))) for rows in torch.split(W_enc, 64)):
        raise InputError(f"{where}: W_enc contains NaN or infinity: copy or download it again")
    vectors.setdefault("b_enc", np.zeros(W_enc.shape[1], np.float32))
    return SAE(
        architecture=config["architecture"],
        W_enc=W_enc,
        **vectors,
        k=config["k"] if config["architecture"] == "topk" else 0,
        apply_b_dec_to_input=config["apply_b_dec_to_input"],
        hook_name=config["hook_name"],
        model_name=config["model_name"],
        prepend_bos=config["prepend_bos"],
        source=source,
        notes=(FORGOTTEN_FOLDING,) if config["normalize_activations"] == "expected_average_only_in" else (),
        metadata=config["metadata"],
    )
