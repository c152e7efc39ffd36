"""SAEs by name: the releases that sae-lens knows."""

from __future__ import annotations

from sts_fast.errors import InputError
from sts_fast.sae import SAE, saelens
from sts_fast.sae.checkpoint import Checkpoint
from sts_fast.sae.config import Config


def read_release(name: str, *, dtype: str | None = None) -> SAE:
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
    config = Config(name, {**loaded.cfg.to_dict(), "architecture": loaded.cfg.architecture()})
    tensors = {key: value.detach() for key, value in loaded.state_dict().items()}
    return saelens.read_files(Checkpoint.of_memory(name, tensors), config, source=name, dtype=dtype)
