"""The files of a model: a folder, a hub id, a GGUF file, or the adapter of another model."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sts_fast.errors import InputError, listed, one_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

ADAPTER_CONFIG = "adapter_config.json"
# Files with the weights of a whole model, or their index, in the order in which transformers takes them.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Where a processor's chat template is, beside a tokenizer that has none.
PROCESSOR_TEMPLATE_FILE = "chat_template.json"
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")


class Checkpoint:
    """A model's files, by which its config, tokenizer and weights are loaded.

    source: as it was given: a folder, a hub id, or a GGUF file; it names the model in errors
    trust_remote_code: runs Python code that comes with the files
    base:   where `source` is an adapter: folder or hub id of its base, if its own files name none that can be read

    folder: folder or hub id with the files; gguf: name of the GGUF file in it, if it is one
    adapter: config of an adapter, as PEFT writes it; None for a whole model

    Raises InputError for a folder that is not there, one of which the weights are ambiguous, and an adapter without
    PEFT.
    """

    def __init__(self, source: str | Path, *, trust_remote_code: bool = False, base: str | Path | None = None) -> None:
        self.source, self.trust_remote_code, self._given_base = source, trust_remote_code, base
        self.folder, self.gguf = _located(source)
        self.adapter: dict[str, Any] | None = None if self.gguf else self._adapter_config()

    def __str__(self) -> str:
        return str(self.source)

    @cached_property
    def base(self) -> Checkpoint:
        """The model that an adapter changes; its `folder` has the weights."""
        return self._base()[0]

    @cached_property
    def base_warning(self) -> str | None:
        """A warning where an adapter is applied to another model than the one that its files name."""
        return None if self.adapter is None else self._base()[1]

    @cached_property
    def config(self) -> PretrainedConfig:
        """Raises InputError where there is none."""
        from transformers import AutoConfig

        if self.adapter is not None:
            base = self.base
            try:
                return base.config
            except InputError as error:
                raise InputError(
                    f"{error} (this is the base that {ADAPTER_CONFIG} of the adapter {self} names as "
                    "base_model_name_or_path)"
                ) from error
        with self.loading():
            config: PretrainedConfig = AutoConfig.from_pretrained(self.folder, **self.options)
        return config

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """An adapter's own, or its base's; its chat template may be that of a processor beside it.

        Raises InputError where there is none.
        """
        from transformers import AutoTokenizer

        if self.adapter is not None and not self.has_tokenizer:
            return self.base.tokenizer
        with self.loading():
            tokenizer = AutoTokenizer.from_pretrained(self.folder, **self.options)
            beside = self.find(PROCESSOR_TEMPLATE_FILE) if tokenizer.chat_template is None else None
            if beside is not None:
                template = json.loads(beside.read_text(encoding="utf-8")).get("chat_template")
                is_several = isinstance(template, list)
                tokenizer.chat_template = {of["name"]: of["template"] for of in template} if is_several else template
            tokenizer.convert_ids_to_tokens(tokenizer.all_special_ids)  # damaged ones are told as damage of the model
            if not isinstance(tokenizer.model_max_length, (int, float)):
                raise ValueError("model_max_length of tokenizer_config.json is no number")
            return tokenizer

    @property
    def has_tokenizer(self) -> bool:
        """True if the files include a tokenizer."""
        return self.gguf is not None or any(self.find(name) is not None for name in TOKENIZER_FILES)

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of every `from_pretrained`."""
        gguf = {} if self.gguf is None else {"gguf_file": self.gguf}
        return {"trust_remote_code": self.trust_remote_code, **gguf}

    def find(self, name: str) -> Path | None:
        """Path of one of the files, downloaded from the hub if need be; None where there is no such file."""
        from transformers.utils.hub import cached_file

        if Path(self.folder).is_dir():
            path = Path(self.folder) / name
            return path if path.is_file() else None
        try:
            found = cached_file(
                self.folder,
                name,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
                _raise_exceptions_for_gated_repo=False,
            )
        except (OSError, ValueError):  # what is wrong with the id is told where the config is loaded
            return None
        return None if found is None else Path(found)

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Turns any error of transformers into an InputError of one sentence, and hides its reports."""
        from transformers.utils import logging as transformers_logging

        verbosity, accelerate = transformers_logging.get_verbosity(), logging.getLogger("accelerate")
        bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity(logging.CRITICAL)
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        saved_level = accelerate.level
        accelerate.setLevel(logging.ERROR)
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # OSError, ValueError, SafetensorError, RuntimeError, pickle errors, ...
            if "trust_remote_code" in str(error) and not self.trust_remote_code:
                raise InputError(
                    f"{self} comes with Python code of its own: read that code, and give --trust-remote-code to run it"
                ) from error
            remedy = ""
            if type(error).__name__ == "SafetensorError":
                remedy = ": its files are damaged, or pointers of Git LFS; copy or download them again"
            raise InputError(f"cannot load the model {self}: {one_line(error)}{remedy}") from error
        finally:
            accelerate.setLevel(saved_level)
            transformers_logging.set_verbosity(verbosity)
            if bars:
                transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]

    # Adapters ---------------------------------------------------------------------------------------------------------

    def _adapter_config(self) -> dict[str, Any] | None:
        from transformers.utils.hub import has_file

        path = self.find(ADAPTER_CONFIG)
        if path is None:
            return None
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path} is not readable JSON ({one_line(error)}): copy the adapter again") from error
        if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
            raise InputError(f"{path} names no peft_type: give the folder of an adapter that PEFT has written")
        whole = next((name for name in WEIGHT_FILES if has_file(self.folder, name)), None)
        if whole is not None:
            raise InputError(
                f"{self} has both a whole model ({whole}) and an adapter ({ADAPTER_CONFIG}), and nothing says whether "
                f"the adapter is merged into the model already: if it is, remove {ADAPTER_CONFIG}; if not, move the "
                "adapter's files to a folder of their own, write this folder there as base_model_name_or_path, and "
                "give that folder"
            )
        if importlib.util.find_spec("peft") is None:
            raise InputError(f"{self} is an adapter, which needs the package peft: pip install 'sts-fast[peft]'")
        return config

    def _base(self) -> tuple[Checkpoint, str | None]:
        named = (self.adapter or {}).get("base_model_name_or_path") or None
        given = self._given_base
        if named is None and given is None:
            raise InputError(
                f"{self} is an adapter that does not name its base: write the base's folder or hub id into "
                f"{ADAPTER_CONFIG} as base_model_name_or_path"
            )
        own = Path(self.folder) / str(named)
        # A relative path may be meant from the adapter's folder.
        source = own if named is not None and not Path(named).is_dir() and own.is_dir() else named
        warning = None
        if given is not None and (source is None or not Path(source).is_dir()):
            # The same model may have another path on this machine than where the adapter was trained.
            if named is not None and Path(named).name.lower() != Path(given).name.lower():
                warning = f"the adapter {self} names the base {named}, not found here: it is applied to {given}"
            source = given
        if not Path(str(source)).exists() and str(source).startswith(("/", ".", "~")):
            raise InputError(
                f"the base {named} of the adapter {self} is not here: write its folder or hub id into "
                f"{ADAPTER_CONFIG} as base_model_name_or_path"
            )
        base = Checkpoint(str(source), trust_remote_code=self.trust_remote_code)
        if base.adapter is not None:
            raise InputError(
                f"the base {base} of the adapter {self} is an adapter too: merge the two, and give the result"
            )
        return base, warning


def checkpoint_of(source: str | Path | Checkpoint) -> Checkpoint:
    return source if isinstance(source, Checkpoint) else Checkpoint(source)


def _located(source: str | Path) -> tuple[str, str | None]:
    """(folder or hub id, name of the GGUF file in it, if it is one)."""
    path = Path(source)
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(f"{source} is a file: give the folder of the model, with config.json, or a .gguf file")
        return str(path.parent), _readable_gguf(path)
    if not path.is_dir():
        if str(source).endswith(".gguf") or str(source).startswith(("/", ".", "~")):
            raise InputError(f"there is no model folder {source}: give a folder with config.json, or a hub id")
        return str(source), None
    files = sorted(file.name for file in path.glob("*.gguf"))
    if not files or any((path / name).is_file() for name in (*WEIGHT_FILES, ADAPTER_CONFIG)):
        return str(source), None
    if len(files) > 1:
        raise InputError(f"{source} has several GGUF files ({listed(files, 5)}): give one of them as the model")
    return str(source), _readable_gguf(path / files[0])


def _readable_gguf(path: Path) -> str:
    """The file's name. Raises InputError where it is a part of a model, or the package that reads it is missing."""
    if re.search(r"-\d+-of-\d+\.gguf$", path.name):
        raise InputError(f"{path} is one part of a split GGUF file: merge the parts first (llama-gguf-split --merge)")
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"{path} is a GGUF file, which needs the package {' and '.join(missing)}: pip install 'sts-fast[gguf]'"
        )
    return path.name
