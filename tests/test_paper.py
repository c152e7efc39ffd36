"""The commands of examples/paper.md, word for word, on made-up models, SAEs and questions that carry the real names."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

PAGE = Path(__file__).parents[1] / "examples" / "paper.md"
D_IN, D_SAE, N_LAYERS, N_QUESTIONS = 16, 128, 32, 9
DOMAINS = ("law", "physics")
REVISION = "0" * 40

PROGRAM = """
import json, sys, warnings
warnings.simplefilter("ignore")
from sts_fast.cli import main
for words in json.load(sys.stdin):
    sys.argv = words
    main()
"""


def commands() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [shlex.split(block.replace("\\\n", " ")) for block in blocks]


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_enc": (D_SAE,), "b_dec": (D_IN,)}
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


def gated(folder: Path) -> None:
    w = weights()
    b_enc = w.pop("b_enc")
    save_file({**w, "b_gate": b_enc, "b_mag": b_enc.clone(), "r_mag": 0.1 * b_enc}, folder / "sae_weights.safetensors")
    config = {"architecture": "gated", "d_in": D_IN, "d_sae": D_SAE, "hook_name": folder.name}
    settings = {"apply_b_dec_to_input": True, "normalize_activations": "none", "prepend_bos": True}
    (folder / "cfg.json").write_text(json.dumps({**config, **settings, "dtype": "float32"}))


def dictionary_learning(folder: Path) -> None:
    w = weights()
    torch.save(
        {
            "encoder.weight": w["W_enc"].T.contiguous(),
            "encoder.bias": w["b_enc"],
            "decoder.weight": w["W_dec"].T.contiguous(),
            "b_dec": w["b_dec"],
            "threshold": torch.tensor(0.5),
            "k": torch.tensor(8),
        },
        folder / "ae.pt",
    )
    trainer = {"dict_class": "BatchTopKSAE", "activation_dim": D_IN, "dict_size": D_SAE, "k": 8}
    layer = int(re.findall(r"layer_(\d+)", str(folder))[-1])
    (folder / "config.json").write_text(json.dumps({"trainer": {**trainer, "layer": layer, "lm_name": "made up"}}))


def gemma_scope(folder: Path) -> None:
    tensors = {name: tensor.numpy() for name, tensor in weights().items()}
    np.savez(folder / "params.npz", **tensors, threshold=np.full(D_SAE, 0.5, np.float32))


def gemma_scope_2(folder: Path) -> None:
    tensors = {name.lower(): tensor for name, tensor in weights().items()}
    save_file({**tensors, "threshold": torch.full((D_SAE,), 0.5)}, folder / "params.safetensors")


def qwen_scope(file: Path) -> None:
    w = weights()
    torch.save({**w, "W_enc": w["W_enc"].T.contiguous(), "W_dec": w["W_dec"].T.contiguous()}, file)


# By the release that sae-lens lists: where its files lie on the hub, and how they are written.
LAYOUTS: dict[str, tuple[str, str, Callable[[Path], None]]] = {
    "llama-3-8b-it-res-jh": ("Juliushanhanhan/llama-3-8b-it-res", "{}", gated),
    "qwen2.5-7b-instruct-andyrdt": ("andyrdt/saes-qwen2.5-7b-instruct", "resid_post_layer_23/trainer_1", None),
    "llama-3.1-8b-instruct-andyrdt": ("andyrdt/saes-llama-3.1-8b-instruct", "resid_post_layer_23/trainer_1", None),
    "gemma-scope-9b-it-res-canonical": (
        *("google/gemma-scope-9b-it-res", "layer_20/width_131k/average_l0_81"),
        gemma_scope,
    ),
    "gemma-scope-2-12b-it-res": ("google/gemma-scope-2-12b-it", "resid_post/{}", gemma_scope_2),
    "qwen-scope-3-8b-base-w64k-l50": ("Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50", "{}.sae.pt", qwen_scope),
}


def snapshot(cache: Path, repository: str) -> Path:
    root = cache / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(REVISION)
    (root / "snapshots" / REVISION).mkdir(parents=True)
    return root / "snapshots" / REVISION


def put_model(folder: Path) -> None:
    torch.manual_seed(0)
    words = ["?", "<bos>", *(f"w{i}" for i in range(40))]
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=D_IN,
        intermediate_size=16,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?", bos_token="<bos>").save_pretrained(
        folder
    )


def put_data(folder: Path) -> None:
    rng = np.random.default_rng(0)

    def text(n: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(0, 40, n))

    def mmlu_pro(n: int) -> list[dict[str, object]]:
        return [
            {
                **{"question_id": i, "question": text(6), "options": [text(2), text(2)], "answer": "B"},
                **{"answer_index": 1, "cot_content": text(5), "category": category},
            }
            for category in DOMAINS
            for i in range(n)
        ]

    files = {
        "limo.jsonl": [{"question": text(6), "solution": text(20), "answer": "7"} for _ in range(N_QUESTIONS + 2)],
        "mmlu_pro.jsonl": mmlu_pro(N_QUESTIONS),
        "mmlu_pro_cot.jsonl": mmlu_pro(5),
    }
    for name, rows in files.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sae_lens", reason="its list says where the SAEs lie")
    folder = tmp_path_factory.mktemp("paper")
    put_data(folder)
    for words in commands():
        put_model(snapshot(folder / "hub", option(words, "--model")))
        release, _, sae_id = option(words, "--sae").partition("/")
        repository, path, write = LAYOUTS[release]
        place = snapshot(folder / "hub", repository) / path.format(sae_id)
        (place.parent if place.suffix == ".pt" else place).mkdir(parents=True, exist_ok=True)
        (write or dictionary_learning)(place)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        input=json.dumps(commands()),
        env={**os.environ, "HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("words", commands(), ids=lambda words: Path(words[-1]).name)
def test_the_command_runs_and_reads_what_it_names(ran: Path, words: list[str]) -> None:
    scores = json.loads((ran / option(words, "--output") / "scores.json").read_text())
    assert scores["model"]["name"] == option(words, "--model")
    assert scores["sae"]["source"] == option(words, "--sae")
    layer = int(re.search(r"(?:blocks\.|layer_?)(\d+)", option(words, "--sae"))[1])  # type: ignore[index]
    assert scores["model"]["layer"] == layer
    assert [domain["name"] for domain in scores["domains"]] == list(DOMAINS)
    assert all(domain["n_prompts"] == N_QUESTIONS for domain in scores["domains"])
    assert scores["settings"]["shots"] == 2
    assert scores["settings"]["domain_shots"] == 5
    assert {"act", "icl"} <= set(scores["settings"]["estimators"])


def test_the_page_says_that_nothing_of_it_was_run() -> None:
    assert "**Not run here.**" in PAGE.read_text(encoding="utf-8")
    assert len(commands()) == 6
