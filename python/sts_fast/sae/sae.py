"""A sparse autoencoder: the encoder in memory, the decoder on disk."""

from __future__ import annotations

import hashlib
import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from sts_fast.data.options import dtype_name
from sts_fast.errors import InputError
from sts_fast.files import Document
from sts_fast.sae.decoder import MAX_ROWS, Decoder
from sts_fast.sae.features import SparseFeatures
from sts_fast.sae.rows import check_tensor, is_tensor, rows

if TYPE_CHECKING:
    import torch

    from sts_fast.statistics import Floats

# The note of an SAE that `needs_scaling`; scaling the SAE removes it.
FORGOTTEN_FOLDING = (
    "its config says 'expected_average_only_in', a scaling that is not in its files: if it was not folded into the "
    "weights when the SAE was saved, the features are wrong (give --norm-scaling-factor then)"
)


@dataclass(frozen=True, eq=False)
class SAE:
    """The encoder of a sparse autoencoder: everything that computes features from a residual stream.

    A row is first multiplied by input_scale and then normalised by input_norm:
      none                   x
      layer_norm             (x - mean) / (s + 1e-5), s its standard deviation over d_in - 1 degrees of freedom
      constant_norm_rescale  x sqrt(d_in) / ||x||, and 0 for a row of zeros
    With p = (x - b_dec if apply_b_dec_to_input else x) W_enc, a feature is
      standard  relu(p + b_enc)
      jumprelu  relu(p + b_enc) where p + b_enc > threshold, else 0
      gated     relu(exp(r_mag) p + b_mag) where p + b_gate > 0, else 0
      topk      relu of the k largest (p + b_enc) of the row (times W_dec_norm, if given), else 0
      abstopk   the k of largest absolute value, sign kept, of the same

    W_enc:       [d_in, d_sae] float32 or bfloat16, numpy or torch, in either memory order; never copied
    b_enc:       [d_sae] float32 (zeros for gated)
    b_dec:       [d_in] float32; [d_out], and never subtracted, for a transcoder
    threshold:   [d_sae] float32, jumprelu only
    r_mag, b_mag, b_gate: [d_sae] float32, gated only
    W_dec_norm:  [d_sae] float32, Euclidean norms of W_dec's rows, for (abs)topk trained with rescaled activations
    needs_scaling: true if its input may have been scaled in training by a factor that is not in the files
    hook_name:   place in the model that the SAE reads, as in its file: a name of TransformerLens such as
                 'blocks.25.hook_resid_post', or a module's path ('model.layers.25', its input 'model.layers.25.input')
    target_hook_name: place that a transcoder predicts, in the same spelling; '' for an SAE, which predicts its input
    l0:          mean number of active features in training, if its files contain it
    decoder:     W_dec in the checkpoint, not loaded; None where there is none
    source:      path or id that it was loaded from
    layout:      library that wrote the files, such as 'SAELens 6.54.12'
    notes:       warnings to the user of this SAE
    origin:      by field, the file or key that it was read from

    Raises ValueError, naming the field, where shapes do not match, and InputError for an unknown architecture, or for
    tensors that require grad or are not on the CPU.
    """

    architecture: str
    W_enc: Any
    b_enc: Floats
    b_dec: Floats
    threshold: Floats | None = None
    r_mag: Floats | None = None
    b_mag: Floats | None = None
    b_gate: Floats | None = None
    W_dec_norm: Floats | None = None
    k: int = 0
    apply_b_dec_to_input: bool = True
    input_norm: str = "none"
    input_scale: float = 1.0
    needs_scaling: bool = False
    hook_name: str = ""
    target_hook_name: str = ""
    model_name: str = ""
    prepend_bos: bool = False
    l0: float | None = None
    decoder: Decoder | None = None
    source: str = ""
    layout: str = ""
    notes: tuple[str, ...] = ()
    metadata: Document = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        place = f", read at {self.hook_name}" if self.hook_name else ""
        source = f", from {self.source}" if self.source else ""
        return f"SAE({self.architecture}, {self.d_in:,} -> {self.d_sae:,} features{place}{source})"

    def _repr_html_(self) -> str:
        return f"<code>{html.escape(repr(self))}</code>"

    def __post_init__(self) -> None:
        needed = {
            "standard": (),
            "jumprelu": ("threshold",),
            "gated": ("r_mag", "b_mag", "b_gate"),
            "topk": (),
            "abstopk": (),
        }
        if self.architecture not in needed:
            raise InputError(
                f"{self.source or 'the SAE'} has the architecture '{self.architecture}', which is not supported: "
                f"use one of {', '.join(needed)}"
            )
        if not is_tensor(self.W_enc) and not isinstance(self.W_enc, np.ndarray):
            raise InputError(f"W_enc must be a numpy array or a torch tensor, got {type(self.W_enc).__name__}")
        if is_tensor(self.W_enc):
            check_tensor(self.W_enc, "W_enc")
            if self.W_enc.device.type != "cpu":
                raise InputError(f"W_enc is on the device '{self.W_enc.device}': pass W_enc.cpu()")
        if len(self.W_enc.shape) != 2:
            raise ValueError(f"W_enc must have two dimensions, [d_in, d_sae], but has shape {tuple(self.W_enc.shape)}")
        d_out = self.d_in if self.decoder is None else self.decoder.W_dec.shape[1]
        widths = {"b_enc": self.d_sae, "b_dec": d_out, "W_dec_norm": self.d_sae}
        widths |= dict.fromkeys(("threshold", "r_mag", "b_mag", "b_gate"), self.d_sae)
        for name, width in widths.items():
            value = getattr(self, name)
            if value is None and name in needed[self.architecture]:
                raise ValueError(f"a {self.architecture} SAE needs {name}")
            if value is not None and not isinstance(value, np.ndarray):
                call = (
                    f"{name}.detach().float().cpu().numpy()"
                    if is_tensor(value)
                    else f"numpy.asarray({name}, 'float32')"
                )
                raise InputError(f"{name} must be a numpy array, got {type(value).__name__}: pass {call}")
            if value is not None and tuple(value.shape) != (width,):
                raise ValueError(f"{name} must have shape ({width},), but has {tuple(value.shape)}")
        if self.architecture in ("topk", "abstopk") and not 1 <= self.k <= self.d_sae:
            raise ValueError(f"k must lie between 1 and d_sae = {self.d_sae}, but is {self.k}")
        if self.input_norm not in ("none", "layer_norm", "constant_norm_rescale"):
            raise ValueError(f"input_norm '{self.input_norm}' is not one of none, layer_norm, constant_norm_rescale")
        if not 0 < self.input_scale < math.inf:
            raise ValueError(f"input_scale must be a positive number, but is {self.input_scale}")
        if self.input_norm != "none" and self.input_scale != 1:
            raise ValueError(f"input_scale must be 1 where input_norm is {self.input_norm}, but is {self.input_scale}")

    @property
    def d_in(self) -> int:
        return int(self.W_enc.shape[0])

    @property
    def d_sae(self) -> int:
        return int(self.W_enc.shape[1])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of the encoder's settings, all its vectors and three rows of W_enc."""
        settings = f"{self.architecture} {self.W_enc.dtype} {self.k} {self.apply_b_dec_to_input}"
        digest = hashlib.sha256(f"{settings} {self.input_norm} {self.input_scale}".encode())
        rows = (self.W_enc[i] for i in sorted({0, self.d_in // 2, self.d_in - 1}))
        vectors = (self.b_enc, self.b_dec, self.threshold, self.r_mag, self.b_mag, self.b_gate, self.W_dec_norm)
        for values in (*rows, *vectors):
            if values is not None:
                as_float = values.astype(np.float32) if isinstance(values, np.ndarray) else values.float().numpy()
                digest.update(np.ascontiguousarray(as_float).tobytes())
        return digest.hexdigest()

    def encode(self, acts: Any) -> SparseFeatures:
        """The active features of each row of acts; see sts_fast.encode for the forms of arrays and what is raised."""
        assert _encode is not None
        return _encode(self, acts)

    def decode(self, features: SparseFeatures) -> torch.Tensor:
        """[n, d_out] float32 features W_dec + b_dec in the units of the model, on the device of the features.

        features: some or all of those of `encode`; d_out is d_in but for a transcoder

        Only the rows of W_dec of active features are read, and no dense [n, d_sae] is made. Raises InputError without a
        decoder, for an SAE whose decoding needs its input too (see `reconstruct`), and as `decoder_rows`.
        """
        import torch

        if self.decoder is None:
            raise InputError(f"{self.source or 'the SAE'} has no decoder in its files: give one whose files have W_dec")
        if self.decoder.W_skip is not None or self.input_norm != "none":
            why = "normalises its input" if self.input_norm != "none" else "passes its input on to its output"
            raise InputError(
                f"{self.source or 'the SAE'} {why}: decode with that input, as sae.reconstruct(acts, features)"
            )
        on_cpu = features.on_cpu()
        decoded = torch.empty((len(on_cpu), len(self.decoder.b_dec)))
        for start in range(0, len(on_cpu), MAX_ROWS):
            part = on_cpu.rows(start, start + MAX_ROWS)
            decoded[start : start + MAX_ROWS] = self.decoder.decode(*part.parts, divisor=self.W_dec_norm)
        decoded /= self.decoder.scale if self.target_hook_name or self.decoder.scale != 1 else self.input_scale
        return decoded if isinstance(features.values, np.ndarray) else decoded.to(features.values.device)

    def decoder_rows(self, features: Sequence[int]) -> torch.Tensor | None:
        """[n_features, d_out] float32 rows of W_dec, gathered from the file; None without a decoder.

        Raises InputError where the file is missing or damaged.
        """
        return None if self.decoder is None else self.decoder.rows(features)

    def reconstruct(self, acts: Any, features: Any) -> torch.Tensor | None:
        """[n, d_out] float32: the features decoded, in the units of the model; None without a decoder.

        acts:     the encoded rows, in any form that `encode` takes; their norms undo the SAE's normalisation
        features: those of `encode(sae, acts)`, or their (indptr, indices, values); at most MAX_ROWS rows

        Only the rows of W_dec of active features are read. Raises InputError for too many rows, and as `decoder_rows`.
        """
        if self.decoder is None:
            return None
        x = self._tensor(acts)
        if len(x) > MAX_ROWS:
            raise InputError(f"at most {MAX_ROWS} rows can be reconstructed at a time, not {len(x)}: give a sample")
        decoded = self.decoder.decode(*_parts(features), divisor=self.W_dec_norm)
        if self.decoder.W_skip is not None:
            decoded += x @ self.decoder.W_skip.whole("float32")
        if self.target_hook_name or self.decoder.scale != 1:
            return decoded / self.decoder.scale
        decoded = decoded * self._size(x)
        return decoded + x.mean(dim=1, keepdim=True) if self.input_norm == "layer_norm" else decoded

    def written(self, acts: Any, features: Any) -> torch.Tensor:
        """[n, d_in] float32: the features' part of the reconstruction, sum_j h_j W_dec[j], in the model's units.

        acts, features: as for `reconstruct`, with some or all of the features and any number of rows

        Raises ValueError for a transcoder or without a decoder, and InputError as `decoder_rows`.
        """
        if self.decoder is None or self.target_hook_name:
            raise ValueError("only an SAE with a decoder writes into what it reads")
        x = self._tensor(acts)
        decoded = self.decoder.decode(*_parts(features), divisor=self.W_dec_norm, bias=False)
        return decoded / self.decoder.scale if self.decoder.scale != 1 else decoded * self._size(x)

    def _tensor(self, acts: Any) -> torch.Tensor:
        """[n, d_in] float32 rows."""
        import torch

        x = rows(acts, self.d_in)
        # torch takes no negative strides, and warns of memory that it must not write.
        return torch.from_numpy(np.array(x, np.float32)) if isinstance(x, np.ndarray) else torch.as_tensor(x).float()

    def _size(self, x: torch.Tensor) -> torch.Tensor:
        """Factor of decoded rows that undoes the normalisation of x [n, d_in]: [n, 1], or a scalar."""
        if self.input_norm == "layer_norm":
            return x.std(dim=1, keepdim=True)
        if self.input_norm == "constant_norm_rescale":
            return x.norm(dim=1, keepdim=True) / math.sqrt(self.d_in)  # type: ignore[no-any-return]
        return x.new_tensor(1 / self.input_scale)

    def scaled(self, factor: float, origin: str = "--norm-scaling-factor") -> SAE:
        """The SAE with the scaling of its input that its files require but do not contain.

        factor: factor of the input rows, applied before anything else
        origin: the option or file that gave the factor
        Raises InputError where it is not a positive number, or where the SAE needs none and it is not 1.
        """
        if not 0 < factor < math.inf:
            raise InputError(f"the factor of the SAE's input must be a positive number, but {origin} gives {factor}")
        if not self.needs_scaling:
            if factor == 1:  # beside other SAEs, to which the option gives a factor
                return self
            why = self.origin.get("input_norm", "no normalisation")
            raise InputError(f"{self.source} does not ask for --norm-scaling-factor ({why}): leave it out")
        is_transcoder = self.decoder is not None and bool(self.target_hook_name)
        return replace(
            self,
            input_scale=factor,
            needs_scaling=False,
            # Folding divides W_dec, and with it the norms by which activations are rescaled.
            W_dec_norm=None if self.W_dec_norm is None else (self.W_dec_norm / factor).astype(np.float32),
            decoder=replace(self.decoder, scale=factor) if self.decoder and is_transcoder else self.decoder,
            notes=tuple(note for note in self.notes if note != FORGOTTEN_FOLDING),
            origin={**self.origin, "input_scale": origin},
        )

    def with_dtype(self, dtype: str | torch.dtype) -> SAE:
        """The same SAE with W_enc as float32 or bfloat16 (rounded to nearest even); dtype: its name, or torch's own."""
        import torch

        name = dtype_name(dtype)
        if name not in ("float32", "bfloat16"):
            raise InputError(f"an SAE's dtype must be float32 or bfloat16, not {name}")
        return replace(self, W_enc=torch.as_tensor(self.W_enc).to(getattr(torch, name)))


# Of sts_fast.ops, which encodes natively and stands on this room.
_encode: Callable[[SAE, Any], SparseFeatures] | None = None


def provide_encode(encode: Callable[[SAE, Any], SparseFeatures]) -> None:
    """Makes `SAE.encode` call this function."""
    global _encode
    _encode = encode


def _parts(features: Any) -> tuple[Any, Any, Any]:
    indptr, indices, values = getattr(features, "parts", features)
    return indptr, indices, values
