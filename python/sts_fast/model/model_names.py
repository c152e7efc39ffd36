"""Names of language models, taken apart: 'google/gemma-2-9b-it' is of the family gemma, version 2, size 9b."""

from __future__ import annotations

import re
from dataclasses import dataclass

# Words at the end of a model's name that describe its tuning, not what it was tuned from.
TUNED = {"instruct", "chat", "it", "pt", "base", "hf", "sft", "dpo", "rl", "bf16", "fp16", "fp8", "awq", "gptq", "int8"}
SIZE = re.compile(r"\d+(\.\d+)?[mbt]|\d+x\d+(\.\d+)?b|mini|small|medium|large|xl|nano|tiny")
VERSION = re.compile(r"\d+(\.\d+)?")
# Words for models that were trained from the start on other data.
OWN_TRAINING = {"deduped"}
# Words before a family's name that make it another family.
OTHER_FAMILY = {"open", "tiny", "code", "recurrent", "pali", "embedding"}
# Sizes of GPT-2 by its parameters, and by its names.
SIZES_OF_GPT2 = {"117m": "small", "124m": "small", "345m": "medium", "355m": "medium", "774m": "large", "1.5b": "xl"}


@dataclass(frozen=True)
class ModelName:
    """What a model's name says; '' for a size that it leaves out.

    family:  words before the first number, joined: 'gemma', 'gptneo'
    version: '1' where there is a size but no version, as for the first models of a family; '' where there is neither
    size:    '9b', '8x7b', 'mini'
    trained: the words of OWN_TRAINING in the name
    """

    family: str
    version: str
    size: str
    trained: frozenset[str]

    @classmethod
    def parse(cls, name: str) -> ModelName:
        """The parts of a name or hub id, or of a folder's last part."""
        words = _words(name)
        n_family = next((i for i, word in enumerate(words) if not word.isalpha() or word in TUNED), len(words))
        return cls._of("".join(words[:n_family]), words[n_family:])

    @classmethod
    def _of(cls, family: str, rest: list[str]) -> ModelName:
        has_version = bool(rest) and VERSION.fullmatch(rest[0]) is not None
        size = next((word for word in rest[has_version:] if SIZE.fullmatch(word)), "")
        version = rest[0].removesuffix(".0") if has_version else "1" if size else ""
        if (family, version) == ("gpt", "2"):
            size = SIZES_OF_GPT2.get(size, size or "small")
        return cls(family, version, size, frozenset(OWN_TRAINING.intersection(rest)))

    def named_in(self, name: str) -> ModelName | None:
        """What another name says of this family; None where it does not contain it: 'my-qwen2.5-7b' is a Qwen 2.5."""
        words = _words(name)
        for start in range(len(words)):
            for end in range(start + 1, len(words) + 1):
                is_other = start > 0 and words[start - 1] in OTHER_FAMILY
                if "".join(words[start:end]) == self.family and not is_other:
                    return ModelName._of(self.family, words[end:])
        return None


def model_type(name: str) -> str | None:
    """The architecture that transformers has for a model's name: 'gemma2' for 'gemma-2-9b', 'gemma' for 'gemma-2b'."""
    from transformers import CONFIG_MAPPING

    known = {str(known).replace("_", ""): str(known) for known in CONFIG_MAPPING}
    parts = ModelName.parse(name)
    versions = (parts.version.replace(".", ""), parts.version.partition(".")[0], "")
    names = [f"{parts.family}{version}" for version in versions if version != "1"]
    return next((known[name] for name in names if name in known), None)


def same_model(name: str, other: str) -> bool | None:
    """True where one of two names may be a tuned version of the other's model, False where they contradict each other.

    None where they have nothing in common, as a model and the folder of a training may have.
    """
    if _words(name) == _words(other) != []:
        return True
    for first, second in ((name, other), (other, name)):
        wanted = ModelName.parse(first)
        named = wanted.named_in(second) if wanted.family else None
        if named is not None:
            stated = [{wanted.version, named.version} - {""}, {wanted.size, named.size} - {""}]
            return all(len(values) <= 1 for values in stated) and wanted.trained == named.trained
    return None


def is_chat(name: str) -> bool:
    """True for the name of a model that was tuned to answer, such as 'gemma-2-9b-it'."""
    return not {"it", "instruct", "chat"}.isdisjoint(_words(name))


def _words(name: str) -> list[str]:
    """Words and numbers of a name without its owner: 'Qwen/Qwen2.5-7B' is qwen, 2.5, 7b."""
    last = name.rstrip("/").rpartition("/")[2].lower().removeprefix("meta-")
    words = re.findall(r"\d+x\d+(?:\.\d+)?b(?![a-z])|\d+(?:\.\d+)*[mbt](?![a-z])|\d+(?:\.\d+)*|[a-z]+", last)
    # The v of 'gemma-v3' and 'v0.1' says nothing more.
    return [word for i, word in enumerate(words) if word != "v" or i + 1 == len(words) or not words[i + 1][0].isdigit()]
