"""The whole path on a tiny model made on the spot: shows what sts-fast does, and forecasts nothing.

Without --model it writes a random Llama and a random SAE, so the scores mean nothing: no network, no GPU, seconds.
With --model and --sae (and --train, --domains) it runs on real ones.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

LAYER = 2
D_IN, D_SAE = 64, 512


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id of a model; needs --sae too")
    parser.add_argument("--sae", help="its SAE: a SAELens folder, or release/id")
    parser.add_argument("--train", help="training set; default: questions made on the spot")
    parser.add_argument("--domains", nargs="+", help="domains; default: questions made on the spot")
    parser.add_argument("--output", default="demo-run", help="folder for the results")
    args = parser.parse_args()
    if (args.model is None) != (args.sae is None):
        parser.error("--model and --sae go together")

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_questions(folder / "questions")
        if args.model is None:
            print(
                "This demo makes a tiny RANDOM model and SAE: it shows the path, its scores mean nothing.\n", flush=True
            )
            write_model(folder / "random-llama", folder / "questions")
            write_sae(folder / "random-sae")
        command = [
            *(sys.executable, "-m", "sts_fast", "score"),
            *("--model", args.model or str(folder / "random-llama")),
            *("--sae", args.sae or str(folder / "random-sae")),
            *("--train", args.train or str(folder / "questions" / "addition.jsonl")),
            *(word for domain in args.domains or [str(folder / "questions")] for word in ("--domains", domain)),
            *("--shots", "1", "--domain-shots", "1", "--top-n", "50", "--output", args.output),
        ]
        return subprocess.run(command, check=False).returncode


def write_questions(folder: Path, n: int = 60) -> None:
    """Small sets of questions and answers, one JSONL file a domain."""
    rng = random.Random(0)
    words = ["apple", "river", "stone", "cloud", "table", "green", "window", "garden", "silver", "mountain"]
    days = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]

    def addition() -> tuple[str, str]:
        a, b = rng.randrange(100), rng.randrange(100)
        return f"What is {a} + {b}?", str(a + b)

    def multiplication() -> tuple[str, str]:
        a, b = rng.randrange(20), rng.randrange(20)
        return f"What is {a} times {b}?", str(a * b)

    def reversal() -> tuple[str, str]:
        word = rng.choice(words)
        return f"Spell '{word}' backwards.", word[::-1]

    def counting() -> tuple[str, str]:
        word, letter = rng.choice(words), rng.choice("aeinrt")
        return f"How many times does the letter {letter} occur in '{word}'?", str(word.count(letter))

    def calendar() -> tuple[str, str]:
        day, ahead = rng.randrange(7), rng.randrange(1, 10)
        return f"Today is {days[day]}. What day is it in {ahead} days?", days[(day + ahead) % 7]

    makers: list[Callable[[], tuple[str, str]]] = [addition, multiplication, reversal, counting, calendar]
    folder.mkdir(parents=True)
    for make in makers:
        rows = [dict(zip(("question", "answer"), make(), strict=True)) for _ in range(n)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{make.__name__}.jsonl").write_text(text, encoding="utf-8")


def write_model(folder: Path, questions: Path) -> None:
    """A random LlamaForCausalLM with a byte-level tokenizer learnt from the questions."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(path) for path in sorted(questions.glob("*.jsonl"))], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=D_IN,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def write_sae(folder: Path) -> None:
    """A random JumpReLU SAE in SAELens layout."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, D_IN, generator=generator), dim=1)
    tensors = {
        "W_enc": W_dec.T.contiguous(),
        "W_dec": W_dec,
        "b_enc": torch.zeros(D_SAE),
        "b_dec": torch.zeros(D_IN),
        "threshold": torch.full((D_SAE,), 0.02),
    }
    save_file(tensors, folder / "sae_weights.safetensors")
    config = {
        "architecture": "jumprelu",
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "float32",
        "normalize_activations": "none",
        "apply_b_dec_to_input": True,
        "metadata": {"model_name": "random-llama", "hook_name": f"model.layers.{LAYER}", "prepend_bos": True},
    }
    (folder / "cfg.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
