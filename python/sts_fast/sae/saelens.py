"""SAELens 3 to 6: a folder of cfg.json and sae_weights.safetensors."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sts_fast.errors import InputError
from sts_fast.files import Document
from sts_fast.sae.checkpoint import Checkpoint
from sts_fast.sae.config import Config
from sts_fast.sae.decoder import Decoder
from sts_fast.sae.sae import FORGOTTEN_FOLDING, SAE

if TYPE_CHECKING:
    from sts_fast.statistics import Floats

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
# Options with which TransformerLens changes a model's weights, and with them what an SAE reads.
PROCESSING = ("center_writing_weights", "fold_ln", "fold_value_biases", "refactor_factored_attn_matrices")


def read(folder: Path, *, dtype: str | None = None, overrides: Document | None = None) -> SAE:
    """An SAE saved by SAELens.

    dtype: of W_enc in memory, 'float32' or 'bfloat16'; None keeps the file's, memory-mapped
    overrides: keys of cfg.json with other values than the file's
    Raises InputError, naming file and key, for missing or damaged files and unsupported settings.
    """
    config = Config.read(folder / CONFIG_FILE)
    config = Config(config.where, {**config.values, **(overrides or {})})
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
    rescale = "topk" in architecture and config.flag("rescale_acts_by_decoder_norm")
    W_dec = file.matrix("W_dec", (d_sae, d_out)) if "W_dec" in file.shapes or rescale else None
    b_dec = file.vector("b_dec", d_out)
    own: dict[str, Any] = {}
    if activation == "gated":
        own = {name: file.vector(name, d_sae) for name in ("r_mag", "b_mag", "b_gate")}
    elif activation == "jumprelu":
        own["threshold"] = _threshold(file, d_sae)
    elif activation in ("topk", "abstopk"):
        own["k"] = k_from.k(d_sae)
    # Of the batch variants, k is the mean over a batch.
    l0 = metadata.number("l0") if metadata.has("l0") or "batchtopk" not in architecture else config.number("k")
    gain = _gain(file, config, d_sae)
    if rescale:
        assert W_dec is not None
        own["W_dec_norm"] = W_dec.row_norms()
    W_skip = file.matrix("W_skip", (d_in, d_out), transposed=True) if "skip" in architecture else None

    hook_name, hook_key = _first(metadata, config, "hook_name", "hook_point")
    _check_heads(config, metadata, hook_name)
    b_enc = np.zeros(d_sae, np.float32) if activation == "gated" else file.vector("b_enc", d_sae)
    target = (_first(metadata, config, "hook_name_out", "hook_point_out")[0] or "unknown") if is_transcoder else ""
    apply_b_dec = config.flag("apply_b_dec_to_input", True)
    prepend_bos = metadata.flag("prepend_bos", config.flag("prepend_bos", not metadata.values))
    model_name, version = _first(metadata, config, "model_name")[0], _version(config, metadata)
    notes = {"expected_average_only_in": FORGOTTEN_FOLDING, "covariance_whitening": FORGOTTEN_WHITENING}
    processed = _processed(metadata, config)
    neuronpedia = _first(metadata, config, "neuronpedia_id")[0]
    file.refuse_unread()
    config.refuse_unread()
    return SAE(
        architecture=activation,
        W_enc=W_enc.whole(dtype),
        b_enc=b_enc,
        b_dec=b_dec,
        **own,
        apply_b_dec_to_input=not is_transcoder and apply_b_dec,
        input_norm=NORMS.get(norm, "none"),
        hook_name=hook_name,
        target_hook_name=target,
        model_name=model_name,
        prepend_bos=prepend_bos,
        l0=l0,
        decoder=None if W_dec is None else Decoder(W_dec, b_dec, W_skip, gain=gain),
        needs_scaling=norm == "expected_average_only_in",
        source=source,
        layout=version,
        notes=(*((notes[norm],) if norm in notes else ()), *((processed,) if processed else ())),
        metadata={**metadata.values, **({"neuronpedia_id": neuronpedia} if neuronpedia else {})},
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
            **({"l0": CONFIG_FILE} if l0 is not None else {}),
            **({"W_dec_norm": "W_dec, since rescale_acts_by_decoder_norm"} if rescale else {}),
        },
    )


def _architecture(config: Config) -> tuple[str, Config]:
    """The architecture's name, and the part of the config with k. Before SAELens 6, TopK was an activation."""
    activation = config.text("activation_fn_str", config.text("activation_fn", "relu"))
    architecture = config.text("architecture", "standard")
    if activation == "topk":
        arguments = config.part("activation_fn_kwargs")
        has_k = arguments.has("k")
        arguments.refuse_unread()
        return "topk", arguments if has_k else config
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
    value = config.values["normalize_activations"] if config.has("normalize_activations") else None
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


def _gain(file: Checkpoint, config: Config, d_sae: int) -> Floats | None:
    """Factor of each feature in the decoder, of SAEs that were fine-tuned against shrinkage; None where all are 1."""
    name = next((name for name in ("finetuning_scaling_factor", "scaling_factor") if name in file.shapes), None)
    is_tuned = config.flag("finetuning_scaling_factor")
    gain = None if name is None else file.vector(name, d_sae)
    if gain is None or np.allclose(gain, 1):
        return None
    if not is_tuned:
        raise InputError(
            f"{file.path} has a {name} other than 1, but {config.where} says finetuning_scaling_factor false: remove "
            "the tensor, or correct the key"
        )
    return gain


def _processed(metadata: Config, config: Config) -> str | None:
    """A note where the SAE was trained on a model whose weights TransformerLens had changed."""
    given = [part.part("model_from_pretrained_kwargs").values for part in (config, metadata)]
    changes = {key: value for options in given for key, value in options.items() if key in PROCESSING and value}
    if not changes:
        return None
    text = ", ".join(f"{key}={value}" for key, value in changes.items())
    return f"it was trained on a model that TransformerLens had changed ({text}): its features differ on the original"


def _check_heads(config: Config, metadata: Config, hook_name: str) -> None:
    reshape = config.text("reshape_activations", "none")
    if reshape not in ("none", "hook_z"):
        raise InputError(f"{config.where}: reshape_activations '{reshape[:40]}' is not supported: use none or hook_z")
    keys = ("hook_head_index", "hook_point_head_index", "hook_head_index_out")
    for part, key in product((metadata, config), keys):
        if part.has(key):
            raise InputError(
                f"{part.where}: {key} {str(part.values[key])[:20]}: an SAE of a single head of "
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
