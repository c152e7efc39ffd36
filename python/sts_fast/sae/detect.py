"""Detects from a checkpoint's files alone which library wrote it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

from sts_fast.errors import InputError
from sts_fast.sae import (
    circuit_tracer,
    dictionary_learning,
    gemma_scope,
    goodfire,
    llama_scope,
    named_tensors,
    openai,
    qwen_scope,
    saelens,
    sparsify,
)
from sts_fast.sae.checkpoint import Checkpoint
from sts_fast.sae.sae import SAE

WEIGHTS = (".safetensors", ".pt", ".pth", ".npz")
CONFIGS = (saelens.CONFIG_FILE, llama_scope.CONFIG_FILE, dictionary_learning.CONFIG_FILE)  # each means its folder
NO_WEIGHTS = ("sparsity.safetensors",)  # how often features fired, beside SAEs of SAELens
MOST_LISTED = 5000  # files and folders examined below a folder without an SAE
LOOKED_FOR = (
    f"{saelens.CONFIG_FILE} with {saelens.WEIGHTS_FILE} or {sparsify.WEIGHTS_FILE}, "
    f"{', '.join(gemma_scope.WEIGHTS_FILES)}, {llama_scope.CONFIG_FILE}, {dictionary_learning.WEIGHTS_FILE}, "
    f"or one file of {', '.join(WEIGHTS)}"
)


def read(path: Path, *, dtype: str | None = None, below: bool = False) -> SAE:
    """The SAE in a folder or file of any layout.

    below: if a folder contains no SAE itself, read the only one in its subfolders

    Raises InputError, with the files looked for, where no layout fits; where several do; and as the layout's reader.
    """
    try:
        return _read_folder(path, dtype, below) if path.is_dir() else _read_file(path, dtype)
    except PermissionError as error:
        raise InputError(f"{error.filename or path} may not be read: change its permissions") from error


def _read_folder(folder: Path, dtype: str | None, below: bool = False) -> SAE:
    names = {path.name for path in folder.iterdir() if path.is_file()}
    readers: dict[str, Callable[..., SAE]] = {}
    if saelens.WEIGHTS_FILE in names:
        is_later_llama_scope = saelens.CONFIG_FILE not in names and llama_scope.LATER_CONFIG_FILE in names
        readers[saelens.WEIGHTS_FILE] = llama_scope.read if is_later_llama_scope else saelens.read
    if sparsify.WEIGHTS_FILE in names:
        readers[sparsify.WEIGHTS_FILE] = sparsify.read
    for name in names & set(gemma_scope.WEIGHTS_FILES):
        readers[name] = gemma_scope.read
    if llama_scope.CONFIG_FILE in names:
        readers[llama_scope.CONFIG_FILE] = llama_scope.read
    if dictionary_learning.WEIGHTS_FILE in names:
        readers[dictionary_learning.WEIGHTS_FILE] = dictionary_learning.read
    if len(readers) > 1:
        raise InputError(f"{folder} contains SAEs of several layouts ({', '.join(sorted(readers))}): keep one of them")
    if readers:
        return next(iter(readers.values()))(folder, dtype=dtype)
    weights = sorted(name for name in names if name.endswith(WEIGHTS) and name not in NO_WEIGHTS)
    if len(weights) == 1:
        return _read_file(folder / weights[0], dtype)
    if len(weights) > 1:
        raise InputError(f"{folder} contains several files of weights ({_some(weights)}): give one of them")
    if saelens.CONFIG_FILE in names:
        raise InputError(
            f"{folder} has a {saelens.CONFIG_FILE} but no {saelens.WEIGHTS_FILE} nor {sparsify.WEIGHTS_FILE}: "
            "copy the SAE's whole folder"
        )
    below_folder = islice(folder.glob("**/*"), MOST_LISTED)
    deeper = sorted({path.parent.relative_to(folder).as_posix() for path in below_folder if _is_weights(path)})
    if below and len(deeper) == 1:
        return _read_folder(folder / deeper[0], dtype)
    if deeper:
        raise InputError(f"{folder} contains no SAE, but its subfolders may ({_some(deeper)}): give one of them")
    raise InputError(f"{folder} contains no SAE: looked for {LOOKED_FOR}")


def _read_file(path: Path, dtype: str | None) -> SAE:
    folder = path.parent
    if path.name in (saelens.WEIGHTS_FILE, sparsify.WEIGHTS_FILE, *CONFIGS):
        return _read_folder(folder, dtype)
    if path.name in gemma_scope.WEIGHTS_FILES:
        return gemma_scope.read(folder, dtype=dtype)
    if folder.name == llama_scope.WEIGHTS_FOLDER and (folder.parent / llama_scope.CONFIG_FILE).is_file():
        return llama_scope.read(folder.parent, dtype=dtype)
    if path.name == dictionary_learning.WEIGHTS_FILE:
        return dictionary_learning.read(path, dtype=dtype)
    if qwen_scope.FILE.fullmatch(path.name):
        return qwen_scope.read(path, dtype=dtype)
    if path.suffix not in WEIGHTS:
        raise InputError(f"{path} is not a checkpoint of an SAE: give its folder, or one file of {', '.join(WEIGHTS)}")
    shapes = Checkpoint(path).shapes
    names = set(shapes)
    if circuit_tracer.recognises(path, shapes):
        return circuit_tracer.read(path, dtype=dtype)
    if openai.MARK in names:
        return openai.read(path, dtype=dtype)
    if goodfire.FILE.fullmatch(path.name) or "encoder_linear.weight" in names:
        return goodfire.read(path, dtype=dtype)
    if path.suffix in (".pt", ".pth") and names & {"encoder.weight", "group_sizes"}:
        return dictionary_learning.read(path, dtype=dtype)
    return named_tensors.read(path, dtype=dtype)


def _is_weights(path: Path) -> bool:
    return path.suffix in WEIGHTS and path.name not in NO_WEIGHTS and path.is_file()


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
