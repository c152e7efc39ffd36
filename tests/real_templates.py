"""Chat templates of real models, and a tokenizer to read them with."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast


def real_templates() -> list[str]:
    found = importlib.util.find_spec("trl")
    if found is None or found.origin is None:
        return []
    folder = Path(found.origin).parent / "chat_templates"
    return [str(path) for path in sorted(folder.glob("*.jinja")) if not path.stem.endswith("_training")]


def byte_tokenizer(chat: str, merges: Sequence[tuple[str, str]] = ()) -> PreTrainedTokenizerFast:
    """Every byte a token, but for the merges, so that ids can be turned back into the very text."""
    alphabet = [*sorted(ByteLevel.alphabet()), *(a + b for a, b in merges)]
    core = Tokenizer(BPE({letter: i for i, letter in enumerate(alphabet)}, [*merges]))
    core.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", chat_template=chat)
