"""SAELens 3 to 6: a folder of cfg.json and sae_weights.safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sts_fast.errors import InputError
from sts_fast.sae.checkpoint import Checkpoint
from sts_fast.sae.config import Config
from sts_fast.sae.decoder import Decoder
from sts_fast.sae.sae import FORGOTTEN_FOLDING, SAE

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"

# The core's architecture for each of SAELens'; once trained, the batch variants are jumprelu with one threshold.
ACTIVATIONS = {
    "standard": "standard",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "topk": "topk",
    "abstopk": "abstopk",
    "batchtopk": "jumprelu",
    "matryoshka_batchtopk": "jumprelu",
    "transcoder": "standard",
    "skip_transcoder": "standard",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
REFUSED = {
    "matching_pursuit": "each of its features depends on what the earlier ones subtracted from the row",
    "temporal": "the features of a token depend on the tokens before it, through attention",
}
NORMS = {"none": "none", "layer_norm": "layer_norm", "constant_norm_rescale": "constant_norm_rescale"}
# Scalings that are folded into the weights when an SAE is saved; without that step they are lost.
FOLDED_NORMS = ("expected_average_only_in", "covariance_whitening")
FORGOTTEN_WHITENING = (
    "its config says 'covariance_whitening', which is not in its files: if it was not folded into the weights when the "
    "SAE was saved, the features are wrong"
)
SCALING_FACTOR = "its scaling_factor, which only its decoder would use, was ignored"


def read(folder: Path, *, dtype: str | None = None) -> SAE:
    """An SAE saved by SAELens.

    dtype: of W_enc in memory, 'float32' or 'bfloat16'; None keeps the file's, memory-mapped
    Raises InputError, naming file and key, for missing or damaged files and unsupported settings.
    """
    config = Config.read(folder / CONFIG_FILE)
    if not (folder / WEIGHTS_FILE).is_file():
        raise InputError(f"{folder} has a {CONFIG_FILE} but no {WEIGHTS_FILE}: copy the SAE's whole folder")
    return read_files(Checkpoint(folder / WEIGHTS_FILE), config, source=str(folder), dtype=dtype)


def read_files(file: Checkpoint, config: Config, *, source: str, dtype: str | None = None) -> SAE:
    """The same from an opened weights file and its config."""
    metadata = config.part("metadata")
    architecture, k_from = _architecture(config)
    activation = ACTIVATIONS[architecture]
    is_transcoder = "transcoder" in architecture
    norm = _normalisation(config)

    W_enc = file.matrix("W_enc", (None, None))
    d_in, d_sae = W_enc.shape
    config.check_widths(d_in=d_in, d_sae=d_sae)
    d_out = d_in
    if is_transcoder:
        d_out = file.shapes["b_dec"][0] if len(file.shapes.get("b_dec", ())) == 1 else d_in
        config.check_widths(d_out=d_out)
    rescale = config.flag("rescale_acts_by_decoder_norm") and activation != "gated"
    W_dec = file.matrix("W_dec", (d_sae, d_out)) if "W_dec" in file.shapes or rescale else None
    b_dec = file.vector("b_dec", d_out)
    own: dict[str, Any] = {}
    if activation == "gated":
        own = {name: file.vector(name, d_sae) for name in ("r_mag", "b_mag", "b_gate")}
    elif activation == "jumprelu":
        own["threshold"] = _threshold(file, d_sae)
    elif activation in ("topk", "abstopk"):
        own["k"] = k_from.k(d_sae)
    if rescale:
        assert W_dec is not None
        own["W_dec_norm"] = W_dec.row_norms()
    W_skip = file.matrix("W_skip", (d_in, d_out), transposed=True) if "skip" in architecture else None

    hook_name, hook_key = _first(metadata, config, "hook_name", "hook_point")
    _check_heads(config, metadata, hook_name)
    notes = {"expected_average_only_in": FORGOTTEN_FOLDING, "covariance_whitening": FORGOTTEN_WHITENING}
    ignored = "scaling_factor" in file.shapes and not np.allclose(file.vector("scaling_factor", d_sae), 1)
    return SAE(
        architecture=activation,
        W_enc=W_enc.whole(dtype),
        b_enc=np.zeros(d_sae, np.float32) if activation == "gated" else file.vector("b_enc", d_sae),
        b_dec=b_dec,
        **own,
        apply_b_dec_to_input=not is_transcoder and config.flag("apply_b_dec_to_input", True),
        input_norm=NORMS.get(norm, "none"),
        hook_name=hook_name,
        target_hook_name=(_first(metadata, config, "hook_name_out", "hook_point_out")[0] or "unknown")
        if is_transcoder
        else "",
        model_name=_first(metadata, config, "model_name")[0],
        prepend_bos=metadata.flag("prepend_bos", config.flag("prepend_bos", not metadata.values)),
        l0=metadata.number("l0"),
        decoder=None if W_dec is None else Decoder(W_dec, b_dec, W_skip),
        needs_scaling=norm == "expected_average_only_in",
        source=source,
        layout=_version(config, metadata),
        notes=(*((notes[norm],) if norm in notes else ()), *((SCALING_FACTOR,) if ignored else ())),
        metadata=metadata.values,
        origin={
            "architecture": f"{CONFIG_FILE}: {architecture}",
            "d_in": "W_enc",
            "d_sae": "W_enc",
            **({"k": CONFIG_FILE} if "k" in own else {}),
            **({"threshold": WEIGHTS_FILE} if "threshold" in own else {}),
            "hook_name": f"{CONFIG_FILE}: {hook_key}" if hook_name else "",
            "model_name": CONFIG_FILE,
            "input_norm": f"{CONFIG_FILE}: normalize_activations {norm}",
            "apply_b_dec_to_input": CONFIG_FILE if config.has("apply_b_dec_to_input") else "SAELens' default",
            **({"l0": CONFIG_FILE} if metadata.has("l0") else {}),
            **({"W_dec_norm": "W_dec, since rescale_acts_by_decoder_norm"} if rescale else {}),
        },
    )


def _architecture(config: Config) -> tuple[str, Config]:
    """The architecture's name, and the part of the config with k. Before SAELens 6, TopK was an activation."""
    activation = config.text("activation_fn_str", config.text("activation_fn", "relu"))
    architecture = config.text("architecture", "standard")
    if activation == "topk":
        arguments = config.part("activation_fn_kwargs")
        return "topk", arguments if arguments.has("k") else config
    if activation != "relu" and architecture not in ("topk", "abstopk"):
        raise InputError(
            f"{config.where}: activation_fn '{activation[:40]}' is not supported: use an SAE with relu or topk"
        )
    if architecture in REFUSED:
        raise InputError(
            f"{config.where}: architecture '{architecture}' is not supported, because {REFUSED[architecture]}: "
            "use an SAE whose encoder is one product and an activation"
        )
    if architecture not in ACTIVATIONS:
        raise InputError(
            f"{config.where}: architecture '{architecture[:40]}' is not supported: use one of {', '.join(ACTIVATIONS)}"
        )
    return architecture, config


def _normalisation(config: Config) -> str:
    value = config.values.get("normalize_activations")
    if value is None or isinstance(value, bool):  # before 4
        return "expected_average_only_in" if value else "none"
    norm = config.text("normalize_activations")
    if norm not in (*NORMS, *FOLDED_NORMS):
        raise InputError(
            f"{config.where}: normalize_activations '{norm[:40]}' is not supported: use one of "
            f"{', '.join((*NORMS, *FOLDED_NORMS))}"
        )
    return norm


def _threshold(file: Checkpoint, d_sae: int) -> Any:
    if "threshold" not in file.shapes and "log_threshold" in file.shapes:
        return file.exponential("log_threshold", d_sae)
    if "threshold" not in file.shapes and "topk_threshold" in file.shapes:  # as training saves it
        return file.vector("topk_threshold", d_sae, or_number=True)
    return file.vector("threshold", d_sae)


def _check_heads(config: Config, metadata: Config, hook_name: str) -> None:
    reshape = config.text("reshape_activations", "none")
    if reshape not in ("none", "hook_z"):
        raise InputError(f"{config.where}: reshape_activations '{reshape[:40]}' is not supported: use none or hook_z")
    for part in (metadata, config):
        if part.has("hook_head_index"):
            raise InputError(
                f"{part.where}: hook_head_index {str(part.values['hook_head_index'])[:20]}: an SAE of a single head of "
                f"{hook_name or 'attention'} is not supported, use one of all heads"
            )


def _first(metadata: Config, config: Config, *keys: str) -> tuple[str, str]:
    """(value, key) of the first key present, in the metadata of SAELens 6 or the flat config of earlier versions."""
    for part in (metadata, config):
        for key in keys:
            if part.text(key):
                return part.text(key), key
    return "", keys[0]


def _version(config: Config, metadata: Config) -> str:
    version, _ = _first(metadata, config, "sae_lens_version", "sae_lens_training_version")
    return f"SAELens {version[:20]}" if version else "SAELens"
