"""Names of models that are of one model, and near collisions that are not."""

from __future__ import annotations

import pytest

from sts_fast.model.model_names import ModelName, model_type, same_model


@pytest.mark.parametrize(
    ("name", "family", "version", "size"),
    [
        ("google/gemma-2b", "gemma", "1", "2b"),
        ("gemma-2-2b-it", "gemma", "2", "2b"),
        ("gemma-v3-1b-it", "gemma", "3", "1b"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama", "3", "8b"),
        ("llama3.1-8b-it", "llama", "3.1", "8b"),
        ("meta-llama/Llama-3.2-1B", "llama", "3.2", "1b"),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen", "2.5", "7b"),
        ("Qwen/Qwen3-30B-A3B-Base", "qwen", "3", "30b"),
        ("mistralai/Mixtral-8x7B-v0.1", "mixtral", "1", "8x7b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral", "1", "7b"),
        ("openai-community/gpt2", "gpt", "2", "small"),
        ("gpt2-xl", "gpt", "2", "xl"),
        ("EleutherAI/gpt-neo-125m", "gptneo", "1", "125m"),
        ("mistral", "mistral", "", ""),
        ("openai/gpt-oss-20b", "gptoss", "1", "20b"),
        ("pythia-1.4b", "pythia", "1", "1.4b"),
        ("microsoft/Phi-3.5-mini-instruct", "phi", "3.5", "mini"),
        ("allenai/OLMo-2-1124-7B", "olmo", "2", "7b"),
    ],
)
def test_parts_of_a_name(name: str, family: str, version: str, size: str) -> None:
    parts = ModelName.parse(name)
    assert (parts.family, parts.version, parts.size) == (family, version, size)


@pytest.mark.parametrize(
    ("name", "other", "same"),
    [
        ("gemma-2b", "google/gemma-2b", True),
        ("gemma-2b", "google/gemma-2b-it", True),
        ("gemma-2b", "google/gemma-2-2b", False),
        ("google/gemma-2-2b", "google/gemma-2-9b", False),
        ("google/gemma-2-9b", "google/gemma-3-12b-pt", False),
        ("gemma-v3-1b-it", "google/gemma-3-1b-it", True),
        ("meta-llama/Meta-Llama-3-8B", "meta-llama/Llama-3.1-8B", False),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.2-3B", False),
        ("llama3.1-8b", "meta-llama/Llama-3.1-8B-Instruct", True),
        ("meta-llama/Llama-2-7b-chat-hf", "huggyllama/llama-7b", False),
        ("Qwen/Qwen2-7B", "Qwen/Qwen2.5-7B", False),
        ("Qwen/Qwen3-8B-Base", "Qwen/Qwen3.5-9B-Base", False),
        ("qwen3-8b", "Qwen/Qwen3-8B", True),
        ("Qwen/Qwen2.5-7B", "someone/my-qwen2.5-7b-math-rl", True),
        ("Qwen/Qwen2.5-7B", "someone/my-qwen2.5-1.5b-math-rl", False),
        ("pythia-70m", "EleutherAI/pythia-70m", True),
        ("pythia-70m", "EleutherAI/pythia-160m", False),
        ("pythia-70m", "EleutherAI/pythia-70m-deduped", False),
        ("pythia-70m-deduped", "EleutherAI/pythia-70m-deduped-v0", True),
        ("gpt2-small", "openai-community/gpt2", True),
        ("gpt2", "openai-community/gpt2-medium", False),
        ("gpt2-xl", "gpt2-large", False),
        ("gpt2-medium", "gpt2-355m", True),
        ("mistral-7b", "mistralai/Mistral-7B-v0.1", True),
        ("llama-7b", "openlm-research/open_llama_7b", None),
        ("google/gemma-2-9b", "./runs/checkpoint-400", None),
        ("stories260K", "gemma-2-2b", None),
        ("stories260K", "models/stories260K", True),
        ("tiny", "tiny", True),
        ("meta-llama/Llama-3.1-8B", "runs/llama-sft", True),
        ("meta-llama/Llama-3.1-8B", "runs/llama-7b-sft", False),
        ("mistral", "mistralai/Mistral-7B-v0.1", True),
    ],
)
def test_same_model(name: str, other: str, same: bool | None) -> None:
    assert same_model(name, other) is same_model(other, name)
    assert same_model(name, other) is same


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gemma-2b", "gemma"),
        ("gemma-2-2b", "gemma2"),
        ("google/gemma-3-1b-pt", "gemma3"),
        ("meta-llama/Llama-3.1-8B", "llama"),
        ("Qwen/Qwen2.5-7B", "qwen2"),
        ("gpt2-small", "gpt2"),
        ("microsoft/phi-2", "phi"),
        ("Phi-3.5-mini-instruct", "phi3"),
        ("openai/gpt-oss-20b", "gpt_oss"),
        ("pythia-70m", None),
        ("stories260K", None),
    ],
)
def test_architecture_of_a_name(name: str, expected: str | None) -> None:
    assert model_type(name) == expected
