"""A sparse autoencoder: the encoder in memory, the decoder on disk."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from sts_fast.errors import InputError
from sts_fast.sae.decoder import MAX_ROWS, Decoder

if TYPE_CHECKING:
    import torch

    from sts_fast.statistics import Floats

# The note of readers where `needs_scaling`; a scaled SAE is without it.
FORGOTTEN_FOLDING = (
    "its config says 'expected_average_only_in', a scaling that a folder does not carry: if it was not folded into the "
    "weights when it was saved, the features are wrong (give --norm-scaling-factor then)"
)


@dataclass(frozen=True, eq=False)
class SAE:
    """The encoder of a sparse autoencoder: everything that turns a residual stream into features.

    A row is first multiplied by input_scale and then normalised as input_norm says:
      none                   x
      layer_norm             (x - mean) / (s + 1e-5), s its standard deviation over d_in - 1 degrees of freedom
      constant_norm_rescale  x sqrt(d_in) / ||x||
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
    needs_scaling: whether its input may have been scaled in training by a factor that the files do not give
    hook_name:   where in the model the SAE reads, as its file says: a name of TransformerLens such as
                 'blocks.25.hook_resid_post', or a module's path ('model.layers.25', its input 'model.layers.25.input')
    target_hook_name: what a transcoder predicts, in the same spelling; '' for an SAE, which predicts what it reads
    l0:          mean number of active features in training, where its files say so
    decoder:     W_dec in the checkpoint, of which nothing is loaded; None where there is none
    source:      path or id that it was loaded from
    layout:      whose files they are, such as 'SAELens 6.54.12'
    notes:       what a user of this SAE must know
    origin:      by field, which file or key it was read from

    Raises ValueError, naming the field, where shapes do not fit together, and InputError for an unknown architecture.
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
    metadata: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)

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
        if len(self.W_enc.shape) != 2:
            raise ValueError(f"W_enc must have two dimensions, [d_in, d_sae], but has shape {tuple(self.W_enc.shape)}")
        d_out = self.d_in if self.decoder is None else self.decoder.W_dec.shape[1]
        widths = {"b_enc": self.d_sae, "b_dec": d_out, "W_dec_norm": self.d_sae}
        widths |= dict.fromkeys(("threshold", "r_mag", "b_mag", "b_gate"), self.d_sae)
        for name, width in widths.items():
            value = getattr(self, name)
            if value is None and name in needed[self.architecture]:
                raise ValueError(f"a {self.architecture} SAE needs {name}")
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
        """SHA-256, in hexadecimal, of what the encoder computes with: all vectors and three rows of W_enc."""
        settings = f"{self.architecture} {self.W_enc.dtype} {self.k} {self.apply_b_dec_to_input}"
        digest = hashlib.sha256(f"{settings} {self.input_norm} {self.input_scale}".encode())
        rows = (self.W_enc[i] for i in sorted({0, self.d_in // 2, self.d_in - 1}))
        vectors = (self.b_enc, self.b_dec, self.threshold, self.r_mag, self.b_mag, self.b_gate, self.W_dec_norm)
        for values in (*rows, *vectors):
            if values is not None:
                as_float = values.astype(np.float32) if isinstance(values, np.ndarray) else values.float().numpy()
                digest.update(np.ascontiguousarray(as_float).tobytes())
        return digest.hexdigest()

    def decoder_rows(self, features: Sequence[int]) -> torch.Tensor | None:
        """[n_features, d_out] float32 rows of W_dec, gathered from the file; None where the checkpoint has none.

        Raises InputError where the file is no longer there, or is damaged.
        """
        return None if self.decoder is None else self.decoder.rows(features)

    def reconstruct(self, acts: Any, features: tuple[Any, Any, Any]) -> torch.Tensor | None:
        """[n, d_out] float32: what the decoder makes of the features, in the units of the model.

        acts:     [n, d_in] what was encoded, or [n, n_heads, d_head]: its norms undo the SAE's normalisation
        features: (indptr, indices, values) of `encode(sae, acts)`, at most MAX_ROWS rows

        Only the rows of W_dec of active features are read. None where the checkpoint has no decoder. Raises InputError
        for too many rows, and as `decoder_rows`.
        """
        import torch

        if self.decoder is None:
            return None
        x = torch.as_tensor(acts).float()
        x = x.reshape(len(x), -1)
        if len(x) > MAX_ROWS:
            raise InputError(f"at most {MAX_ROWS} rows can be reconstructed at a time, not {len(x)}: give a sample")
        decoded = self.decoder.decode(*features, divisor=self.W_dec_norm)
        if self.decoder.W_skip is not None:
            decoded += x @ self.decoder.W_skip.whole("float32")
        if self.target_hook_name or self.decoder.scale != 1:
            return decoded / self.decoder.scale
        decoded = decoded * self._size(x)
        return decoded + x.mean(dim=1, keepdim=True) if self.input_norm == "layer_norm" else decoded

    def written(self, acts: Any, features: tuple[Any, Any, Any]) -> torch.Tensor:
        """[n, d_in] float32: what features write into the reconstruction, sum_j h_j W_dec[j], in the model's units.

        acts, features: as for `reconstruct`, some of the features or all, of any number of rows

        For an SAE with a decoder, that predicts what it reads. Raises InputError as `decoder_rows`.
        """
        import torch

        if self.decoder is None or self.target_hook_name:
            raise ValueError("only an SAE with a decoder writes into what it reads")
        x = torch.as_tensor(acts).float().reshape(len(acts), -1)
        decoded = self.decoder.decode(*features, divisor=self.W_dec_norm, bias=False)
        return decoded / self.decoder.scale if self.decoder.scale != 1 else decoded * self._size(x)

    def _size(self, x: torch.Tensor) -> torch.Tensor:
        """What decoded rows are multiplied by to have the size that x [n, d_in] had before it was normalised."""
        if self.input_norm == "layer_norm":
            return x.std(dim=1, keepdim=True)
        if self.input_norm == "constant_norm_rescale":
            return x.norm(dim=1, keepdim=True) / math.sqrt(self.d_in)  # type: ignore[no-any-return]
        return x.new_tensor(1 / self.input_scale)

    def scaled(self, factor: float, said: str = "--norm-scaling-factor") -> SAE:
        """The SAE with the scaling of its input that its files ask for but do not carry.

        factor: what rows are multiplied by before anything else
        said:   where it comes from
        Raises InputError where it is not a positive number, or the files ask for none and it is not 1.
        """
        if not 0 < factor < math.inf:
            raise InputError(f"--norm-scaling-factor must be a positive number, not {factor}")
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
            # Folding divides W_dec, and so the norms that activations are rescaled by.
            W_dec_norm=None if self.W_dec_norm is None else (self.W_dec_norm / factor).astype(np.float32),
            decoder=replace(self.decoder, scale=factor) if self.decoder and is_transcoder else self.decoder,
            notes=tuple(note for note in self.notes if note != FORGOTTEN_FOLDING),
            origin={**self.origin, "input_scale": said},
        )

    def with_dtype(self, dtype: str) -> SAE:
        """The same SAE with W_enc as 'float32' or 'bfloat16' (rounded to nearest even)."""
        import torch

        if dtype not in ("float32", "bfloat16"):
            raise InputError(f"an SAE can be held as float32 or bfloat16, not {dtype}")
        return replace(self, W_enc=torch.as_tensor(self.W_enc).to(getattr(torch, dtype)))
