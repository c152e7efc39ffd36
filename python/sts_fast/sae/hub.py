"""SAEs from the Hugging Face hub: releases in sae-lens' list, and files of any repository."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from sts_fast.errors import InputError
from sts_fast.sae import circuit_tracer, detect, saelens
from sts_fast.sae.checkpoint import Checkpoint
from sts_fast.sae.config import Config
from sts_fast.sae.sae import SAE

# sae-lens' names of the layouts that this package reads from the files; sae-lens loads the others.
READ_HERE = {"gemma_2", "gemma_2_transcoder", "gemma_3", "goodfire", "deepseek_r1", "qwen_scope", "sparsify"}
READ_HERE |= {"llama_scope", "llama_scope_r1_distill", "dictionary_learning_1"}


def read(name: str, *, dtype: str | None = None) -> SAE:
    """An SAE by 'release/id' as sae-lens names it, or by 'owner/repository[:folder or file]'.

    Files in the cache of huggingface_hub are not downloaded again, and with HF_HUB_OFFLINE=1 nothing is.
    Raises InputError where it is not available, and as the reader of its layout.
    """
    repository, colon, path = name.partition(":")
    if colon:
        return _read_repository(repository, path, dtype=dtype, source=name)
    release, _, sae_id = name.partition("/")
    releases = _releases()
    if release in releases:
        return _read_release(releases[release], sae_id, name, dtype)
    if "/" not in sae_id and _is_repository(name):
        return _read_repository(name, "", dtype=dtype, source=name)
    if not releases:
        raise InputError(
            f"there is no folder {name}; to load it as a release from the hub, sae-lens is needed: "
            "pip install 'sts-fast[sae-lens]'"
        )
    raise InputError(
        f"there is no folder {name}, sae-lens knows no release '{release}', and no repository of that name is "
        "available: give a folder, 'release/id' as sae-lens names it, or 'owner/repository:folder'"
    )


def _releases() -> dict[str, Any]:
    """sae-lens' list of releases, empty where it is not installed."""
    try:
        from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
    except ImportError:
        return {}
    return dict(get_pretrained_saes_directory())


def _read_release(release: Any, sae_id: str, name: str, dtype: str | None) -> SAE:
    if sae_id not in release.saes_map:
        some = ", ".join(list(release.saes_map)[:4])
        raise InputError(f"release '{release.release}' has no SAE '{sae_id}': its ids are {some}, …")
    path, overrides = release.saes_map[sae_id], dict(release.config_overrides or {})
    if release.conversion_func is None:
        folder = _place(release.repo_id, path)
        sae = replace(saelens.read(folder, dtype=dtype, overrides=overrides), source=name)
    elif release.conversion_func in READ_HERE and not overrides:
        sae = _read_repository(release.repo_id, path, dtype=dtype, source=name)
    else:
        sae = _read_by_sae_lens(release.release, sae_id, name, dtype)
    origin = f"sae-lens' list: {release.release}"
    factor = release.norm_scaling_factor.get(sae_id)
    if factor and sae.needs_scaling:
        sae = sae.scaled(float(factor), origin)
    l0 = float(release.expected_l0.get(sae_id) or 0)
    neuronpedia = release.neuronpedia_id.get(sae_id)
    return replace(
        sae,
        model_name=sae.model_name or release.model,
        l0=sae.l0 if sae.l0 is not None else l0 or None,
        metadata={**sae.metadata, **({"neuronpedia_id": neuronpedia} if neuronpedia else {})},
        origin={
            **sae.origin,
            **({} if sae.model_name else {"model_name": origin}),
            **({"l0": origin} if sae.l0 is None and l0 else {}),
        },
    )


def _read_by_sae_lens(release: str, sae_id: str, name: str, dtype: str | None) -> SAE:
    """An SAE of a rare layout, converted by sae-lens, which keeps all its tensors in memory."""
    from sae_lens import SAE as SAELensSAE

    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # sae-lens calls torch.load, which unpickles by default before 2.6
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        loaded = SAELensSAE.from_pretrained(release, sae_id)
    except Exception as error:  # a download, a registry look-up or a conversion can raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"sae-lens cannot load release '{release}', id '{sae_id}': {reason}") from error
    finally:
        os.environ.pop(variable)
        if before is not None:
            os.environ[variable] = before
    config = Config(name, {**loaded.cfg.to_dict(), "architecture": loaded.cfg.architecture()})
    tensors = {key: value.detach() for key, value in loaded.state_dict().items()}
    return saelens.read_files(Checkpoint.of_memory(name, tensors), config, source=name, dtype=dtype)


def _is_repository(name: str) -> bool:
    """True if the hub has a repository of this name, or cannot say so; offline, if the cache has."""
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    try:
        _files(name)
    except InputError as error:
        reason = error.__cause__
        return isinstance(reason, HfHubHTTPError) and not isinstance(reason, RepositoryNotFoundError)
    return True


def _read_repository(repository: str, path: str, *, dtype: str | None, source: str) -> SAE:
    """The SAE in a folder or file of a repository, or in its root."""
    return replace(detect.read(_place(repository, path), dtype=dtype), source=source)


def _place(repository: str, path: str) -> Path:
    """The folder or file of a repository, downloaded where the cache lacks it; '' is its root."""
    if ".." in Path(path).parts or Path(path).is_absolute():
        raise InputError(f"'{path}' is not a folder or file of the repository {repository}")
    if path:
        # In some layouts, a config in the root, or beside the file, names the model that the SAEs were trained on.
        beside = (Path(path).parent / circuit_tracer.CONFIG_FILE).as_posix()
        patterns = [path, f"{path}/*", "config.json", beside]
    else:
        files = _files(repository)
        patterns = [file for file in files if "/" not in file]
        if not _has_weights(patterns):
            folders = sorted({str(Path(file).parent) for file in files if file.endswith(detect.WEIGHTS)})
            some = ", ".join(folders[:5]) + (", …" if len(folders) > 5 else "")
            raise InputError(
                f"{repository} contains no SAE in its root, but its folders may ({some or 'none'}): give one as "
                f"{repository}:folder"
            )
    place = _snapshot(repository, patterns) / path
    if not place.exists():
        raise InputError(
            f"the repository {repository} has no '{path}', or this machine is offline and its cache lacks it: correct "
            "the folder, or go online"
        )
    return place


def _snapshot(repository: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except Exception as error:  # the network, the hub or the cache can raise anything
        raise InputError(f"cannot get {repository} from the hub: {_reason(error)}") from error


def _files(repository: str) -> list[str]:
    """Names of a repository's files; offline, of those in the cache.

    Where the hub does not list them, those in the cache, if an SAE is in its root. Raises InputError with the hub's
    reason if not.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return _cached_files(repository)
    try:
        return sorted(file.rfilename for file in HfApi().model_info(repository).siblings or [])
    except Exception as error:  # the network or the hub can raise anything
        with suppress(InputError):
            files = _cached_files(repository)
            if _has_weights(file for file in files if "/" not in file):
                return files
        raise InputError(
            f"cannot list the files of {repository} on the hub ({_reason(error)}): try again, or give the SAE's folder "
            f"as {repository}:folder"
        ) from error


def _cached_files(repository: str) -> list[str]:
    root = _snapshot(repository, [])
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def _has_weights(files: Iterable[str]) -> bool:
    return any(file.endswith(detect.WEIGHTS) for file in files)


def _reason(error: Exception) -> str:
    from huggingface_hub.errors import LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError):
        why = str(error.__cause__).partition("\n")[0][:100]
        return f"it is not in the cache, and the hub could not be reached ({why})"
    return " ".join(str(error).split())[:200] or type(error).__name__
