"""Loads an SAE of any layout from disk or the Hugging Face hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sts_fast.data.options import dtype_name
from sts_fast.errors import InputError
from sts_fast.sae import detect, hub
from sts_fast.sae.sae import SAE

if TYPE_CHECKING:
    import torch

NO_PLACE = "its files do not say where in the model it reads: give --layer or --hook"


def load_sae(
    source: str | Path,
    *,
    layer: int | None = None,
    hook: str | None = None,
    norm_scaling_factor: float | None = None,
    dtype: str | torch.dtype | None = None,
) -> SAE:
    """Loads an SAE from a folder or file, or from the Hugging Face hub.

    source: a folder or file of any layout in docs/saes.md, 'release/id' as sae-lens names it, or
            'owner/repository[:folder or file]' on the hub
    layer:  read the residual stream after this layer, regardless of the SAE's own files
    hook:   the same by name, such as 'blocks.25.hook_resid_post' or 'model.layers.25'
    norm_scaling_factor: factor of the input rows, for an SAE trained on inputs scaled to a mean norm of sqrt(d_in)
            ('expected_average_only_in') and saved without folding that factor into the weights
    dtype:  of W_enc in memory, float32 or bfloat16, by name or torch's own; None keeps the file's, memory-mapped

    Raises InputError, naming file and key, where the SAE cannot be read or is not supported.
    """
    dtype = None if dtype is None else dtype_name(dtype)
    if dtype not in (None, "float32", "bfloat16"):
        raise InputError(f"an SAE's dtype must be float32 or bfloat16, not {dtype}")
    path = Path(source)
    try:
        exists = path.exists() and bool(str(source))
    except OSError:  # a name that is too long
        exists = False
    if exists:
        sae = detect.read(path, dtype=dtype, below=True)
    elif "/" in str(source) and not path.is_absolute() and not str(source).startswith("."):
        sae = hub.read(str(source), dtype=dtype)
    else:
        raise InputError(
            f"there is no SAE at {str(source)[:200]}: give its folder or file, 'release/id' as sae-lens names it, or "
            "'owner/repository:folder' on the hub"
        )
    if layer is not None and hook is not None:
        raise InputError("--layer and --hook say the same thing: give one of them")
    if layer is not None:
        if layer < 0:
            raise InputError(f"--layer counts from 0, and is not {layer}")
        hook = f"blocks.{layer}.hook_resid_post"
    if hook is not None:
        sae = replace(sae, hook_name=hook, origin={**sae.origin, "hook_name": "--layer or --hook"})
    if not sae.hook_name:
        sae = replace(sae, notes=(NO_PLACE, *sae.notes))
    return sae if norm_scaling_factor is None else sae.scaled(norm_scaling_factor)
