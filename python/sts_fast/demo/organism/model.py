"""The organism's tokenizer and language model: real Hugging Face objects, small enough to train in minutes.

Six ways of training on this world were tried, all with seed 0, and judged by few-shot accuracy, time and size alone.
Discarded: 2,500 steps at 2.5e-3 on documents of five examples with rope_theta 10,000 (.83, but .09 behind more
demonstrations than in training); batches of nine-example documents only, with rope_theta 10,000 and 200 (learning
unsteadily, stopped early); the batches below with rope_theta 200 at 2.5e-3 for 2,500 steps (.82: skills that permute
were not told apart in context) and for 4,000 (slower than at 1.5e-3, stopped half-way). Kept: the one below (.98).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sts_fast.demo.organism.world import WORLD, World

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from sts_fast.data.prompts import Progress

BOS, UNKNOWN = "<s>", "<unk>"
SPECIAL = (BOS, UNKNOWN)
# Turns follow each other without separators, as in the training documents.
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %} {{ message.content }}{% endfor %}"

# The most demonstrations in a training document; with more, the model answers as without any.
MAX_SHOTS = 8

ARCHITECTURE: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rope_theta": 200.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": None,
}

N_STEPS = 4000
# (documents in a batch, examples in a document); every fourth batch has the longest documents, and as many tokens.
BATCHES = ((32, 5), (32, 5), (32, 5), (18, MAX_SHOTS + 1))
LEARNING_RATE = 1.5e-3
OTHER_TOKENS_WEIGHT = 0.05  # of the loss on unpredictable tokens; that of answers is 1


def weights_folder() -> Path:
    """Folder in the package with `model/`, `sae/` and figures.json, as `train` writes them."""
    return Path(str(files("sts_fast.demo.organism"))) / "weights"


def model_folder() -> Path:
    """Hugging Face folder of the embedded language model."""
    return weights_folder() / "model"


def sae_folder() -> Path:
    """SAELens folder of the embedded SAE."""
    return weights_folder() / "sae"


def load_model(folder: str | Path | None = None) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Loads the model and tokenizer of a folder, by default those in the package."""
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = Path(folder or model_folder())
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    model.train(mode=False)
    return model, PreTrainedTokenizerFast.from_pretrained(folder)


def save_model(model: LlamaForCausalLM, folder: Path, world: World = WORLD) -> None:
    """Writes a Hugging Face folder of model and tokenizer, for transformers 4 and 5."""
    from safetensors.torch import save_file

    make_tokenizer(world).save_pretrained(folder, save_jinja_files=False)
    _update_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    model.config.save_pretrained(folder)
    _update_json(folder / "config.json", architectures=["LlamaForCausalLM"], rope_theta=ARCHITECTURE["rope_theta"])
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})


def _update_json(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | values, indent=2) + "\n", encoding="utf-8")


def make_tokenizer(world: World = WORLD) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word; `apply_chat_template` puts <s> before the turns and nothing between them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = (*SPECIAL, *world.words)
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core, bos_token=BOS, unk_token=UNKNOWN, chat_template=CHAT_TEMPLATE
    )
    return tokenizer


def new_model(seed: int, world: World = WORLD) -> LlamaForCausalLM:
    """An untrained model with weights drawn from `seed`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **ARCHITECTURE,
        vocab_size=len(SPECIAL) + len(world.words),
        max_position_embeddings=1 + (MAX_SHOTS + 1) * world.example_tokens,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                in_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                at_ends = "embed_tokens" in name or "lm_head" in name
                std = 0.02 if at_ends else config.hidden_size**-0.5 * (0.35 if in_residual else 0.7)
                parameter.normal_(0, std, generator=generator)
    return model


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs torch on one thread; results then do not depend on the number of cores.

    Such small matrices gain little from more threads, and lose much where a core is busy.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_language_model(
    seed: int, progress: Progress, n_steps: int = N_STEPS, world: World = WORLD
) -> LlamaForCausalLM:
    """Trains a new model on documents of the world; the same seed gives the same model on the same machine."""
    import torch

    model = new_model(seed, world)
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05, fused=True
    )
    rng = np.random.default_rng(seed)
    for step in range(n_steps):
        decay = 1 - 0.95 * max(0.0, 2 * step / n_steps - 1)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 60) * decay
        ids = document_ids(*BATCHES[step % len(BATCHES)], rng, world)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        in_answer = torch.arange(len(losses)) % world.example_tokens >= world.question_tokens
        weights = torch.where(in_answer, 1.0, OTHER_TOKENS_WEIGHT)
        loss = (losses * weights).sum() / weights.sum()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress("language model", step + 1, n_steps)
    model.train(mode=False)
    return model


def document_ids(n: int, n_examples: int, rng: np.random.Generator, world: World = WORLD) -> torch.Tensor:
    """[n, 1 + n_examples * example_tokens] token ids of documents, each after <s>."""
    import torch

    rows = world.documents(n, n_examples, rng) + len(SPECIAL)
    return torch.from_numpy(np.concatenate([np.zeros((n, 1), np.int64), rows], axis=1))
