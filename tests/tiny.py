"""Tiny random material made on the spot: a Llama, its tokenizer, SAEs written by sae-lens, questions and answers.

It is made to hold what a forecast must get right: attention sinks (words with SINK in them), special tokens inside
questions, rows without answers, and rows that overrun the model's context.
"""

from __future__ import annotations

import json
import random
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARCHITECTURES = ("standard", "jumprelu", "topk", "gated")
LAYER = 2
D_IN, D_SAE, CONTEXT = 64, 256, 512
K = 16
SINK = "~"
BOS, EOS = "<s>", "</s>"
N_QUESTIONS, N_TOO_LONG, N_UNANSWERED = 24, 2, 3


# Of the profiles in the library of tests/forecast.
LIBRARY_OPTIONS: dict[str, Any] = {"shots": 1, "domain_shots": 2, "limit": 12, "demo_draws": 2}


@dataclass(frozen=True)
class Tiny:
    """Where everything lies.

    model, tuned: folders of the model, and of the same with slightly other weights
    saes:    folder by architecture
    train:   file of questions and answers
    domains: file by name
    """

    model: Path
    tuned: Path
    saes: dict[str, Path]
    train: Path
    domains: dict[str, Path]


def at(folder: Path) -> Tiny:
    """What `make` has made there."""
    questions = {name: folder / "questions" / f"{name}.jsonl" for name in ("sums", "spelling", "days")}
    saes = {architecture: folder / "saes" / architecture for architecture in ARCHITECTURES}
    return Tiny(folder / "model", folder / "tuned", saes, questions.pop("sums"), questions)


def make(folder: Path) -> Tiny:
    tiny = at(folder)
    questions = [tiny.train, *tiny.domains.values()]
    for seed, path in enumerate(questions):
        write_questions(path, seed)
    write_model(tiny.model, tiny.tuned, questions)
    write_saes(tiny.saes, tiny.model, tiny.train)
    return tiny


def write_questions(path: Path, seed: int) -> None:
    """N_QUESTIONS answered rows, and rows without an answer, and rows that do not fit into the context."""
    rng = random.Random(seed)
    words = ["apple", "river", "stone", "cloud", "table", "green", "window", "garden", "silver", "mountain"]

    def question() -> str:
        listed = rng.sample(words, rng.randrange(2, 9))
        if rng.random() < 0.3:
            listed.insert(rng.randrange(len(listed)), SINK)
        if rng.random() < 0.2:
            listed.insert(rng.randrange(len(listed)), EOS)
        match path.stem:
            case "sums":
                return (
                    f"What is {rng.randrange(1000)} + {rng.randrange(1000)}, if {' and '.join(listed)} count nothing?"
                )
            case "spelling":
                return f"Spell these words backwards: {', '.join(listed)}."
        return f"In {rng.randrange(30)} days we visit the {' near the '.join(listed)}. Which day of the week is it?"

    rows = [{"question": question(), "answer": f"It is {rng.choice(words)}."} for _ in range(N_QUESTIONS)]
    rows += [{"question": question(), "answer": None} for _ in range(N_UNANSWERED)]
    rows += [{"question": " ".join(rng.choices(words, k=600)), "answer": "No."} for _ in range(N_TOO_LONG)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": f"{path.stem}-{i}", **row}) + "\n" for i, row in enumerate(rows)))


def write_model(folder: Path, tuned: Path, texts: list[Path]) -> None:
    """A random LlamaForCausalLM of 5 layers with a byte-level tokenizer learnt from the texts, and a tuned one."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train([str(path) for path in texts], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=D_IN,
        intermediate_size=128,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.15,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for token, index in tokenizer.get_vocab().items():
            if SINK in token:
                model.model.embed_tokens.weight[index] *= 200
        for path in (folder, tuned):
            model.save_pretrained(path)
            PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS).save_pretrained(path)
            for parameter in model.parameters():  # what is saved next is the tuned model
                parameter += 0.05 * parameter.std() * torch.randn_like(parameter)


def write_saes(folders: dict[str, Path], model: Path, texts: Path) -> None:
    """An SAE of each architecture with random weights, of which about one feature in ten fires."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sae-lens' own imports warn
        import sae_lens

    tokenizer = AutoTokenizer.from_pretrained(model)
    decoder = AutoModelForCausalLM.from_pretrained(model)
    rows = [json.loads(line)["question"].replace(SINK, "") for line in texts.read_text().splitlines()[:N_QUESTIONS]]
    with torch.no_grad():
        x = torch.cat(
            [
                decoder(torch.tensor([tokenizer(row).input_ids]), output_hidden_states=True).hidden_states[LAYER + 1][0]
                for row in rows
            ]
        )
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    classes = {
        "standard": (sae_lens.StandardSAE, sae_lens.StandardSAEConfig, {}),
        "jumprelu": (sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig, {}),
        "topk": (sae_lens.TopKSAE, sae_lens.TopKSAEConfig, {"k": K, "rescale_acts_by_decoder_norm": True}),
        "gated": (sae_lens.GatedSAE, sae_lens.GatedSAEConfig, {}),
    }
    for architecture, folder in folders.items():
        sae_class, config_class, options = classes[architecture]
        metadata = sae_lens.saes.sae.SAEMetadata(
            model_name="tiny", hook_name=f"blocks.{LAYER}.hook_resid_post", prepend_bos=True
        )
        config = config_class(d_in=D_IN, d_sae=D_SAE, apply_b_dec_to_input=True, metadata=metadata, **options)
        sae = sae_class(config)
        b_dec = x.mean(dim=0) + 0.1 * normal(D_IN)
        W_enc = normal(D_IN, D_SAE) / D_IN**0.5
        product = (x - b_dec) @ W_enc
        tensors = {"b_dec": b_dec, "W_enc": W_enc, "W_dec": normal(D_SAE, D_IN) / D_IN**0.5}
        match architecture:
            case "standard":
                tensors["b_enc"] = -product.quantile(0.9, dim=0)
            case "jumprelu":
                tensors["b_enc"] = 0.1 * normal(D_SAE)
                tensors["threshold"] = (product + tensors["b_enc"]).quantile(0.9, dim=0)
            case "topk":
                tensors["b_enc"] = 0.1 * normal(D_SAE)
            case "gated":
                tensors["b_gate"] = -product.quantile(0.9, dim=0)
                tensors["r_mag"], tensors["b_mag"] = 0.3 * normal(D_SAE), 0.1 * normal(D_SAE)
        with torch.no_grad():
            for name, tensor in tensors.items():
                getattr(sae, name).copy_(tensor)
        sae.save_model(folder)
