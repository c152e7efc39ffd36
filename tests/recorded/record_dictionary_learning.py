"""Records SAEs of every class of dictionary_learning with what their own encode gives, for the tests of its reader.

The library asks for packages that do not go with the versions tested here, so it is not installed for the tests. Run
this where it is: `pip install dictionary-learning torch safetensors; python record_dictionary_learning.py FOLDER`.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from safetensors.torch import save_file

D_IN, D_SAE, K, N = 12, 40, 5, 60

SAES = {
    "AutoEncoder": lambda: AutoEncoder(D_IN, D_SAE),
    "AutoEncoderNew": lambda: AutoEncoderNew(D_IN, D_SAE),
    "GatedAutoEncoder": lambda: GatedAutoEncoder(D_IN, D_SAE),
    "JumpReluAutoEncoder": lambda: JumpReluAutoEncoder(D_IN, D_SAE),
    "AutoEncoderTopK": lambda: AutoEncoderTopK(D_IN, D_SAE, K),
    "BatchTopKSAE": lambda: BatchTopKSAE(D_IN, D_SAE, K),
    "MatryoshkaBatchTopKSAE": lambda: MatryoshkaBatchTopKSAE(D_IN, D_SAE, K, [8, 12, 20]),
}

folder = Path(sys.argv[1])
torch.manual_seed(0)
x = torch.randn(N, D_IN) + 0.3
recorded = {"x": x}
for name, make in SAES.items():
    sae = make()
    with torch.no_grad():
        for key, tensor in sae.state_dict().items():
            if tensor.dtype.is_floating_point:
                tensor.copy_(torch.randn(tensor.shape) * (0.4 if key in ("r_mag", "threshold") else 1))
            if key == "threshold":
                tensor.abs_()
        recorded[f"{name}.features"] = sae.encode(x)
        recorded[f"{name}.decoded"] = sae.decode(sae.encode(x)).contiguous()
    (folder / name).mkdir(parents=True, exist_ok=True)
    torch.save(sae.state_dict(), folder / name / "ae.pt")
    trainer = {"dict_class": name, "activation_dim": D_IN, "dict_size": D_SAE, "layer": 3, "lm_name": "tiny"}
    trainer |= {"submodule_name": "resid_post_layer_3", **({"k": K} if hasattr(sae, "k") else {})}
    (folder / name / "config.json").write_text(json.dumps({"trainer": trainer}, indent=1) + "\n")
said = {"library": "dictionary-learning", "version": version("dictionary-learning"), "torch": torch.__version__}
save_file(recorded, folder / "features.safetensors", metadata=said)
