"""Models spread over memory and disk, against the same in one piece; and the digest that tells weights apart."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import LAYER, Tiny
from transformers import AutoModelForCausalLM

import sts_fast
from sts_fast.errors import InputError
from sts_fast.model.language_model import LanguageModel, load_decoder
from sts_fast.model.weights import model_sha256, weights_sha256

TOP_N = 24


@pytest.mark.parametrize("device_map", ["auto", "cpu", "disk"])
def test_a_spread_model_gives_the_same_forecast(tiny: Tiny, device_map: str) -> None:
    """Every number, those that need the head and gradients too; what lies on disk only cannot be told from others."""
    pytest.importorskip("accelerate")
    options: dict[str, Any] = {
        **{"model": tiny.model, "sae": tiny.saes["standard"], "train": tiny.train, "domains": tiny.domains},
        **{"estimators": ("act", "icl", "step"), "controls": "all", "shots": 1, "domain_shots": 1, "top_n": TOP_N},
    }
    expected = sts_fast.score(**options).to_dict()
    found = sts_fast.score(**options, device_map=device_map).to_dict()
    for key in ("domains", "shifted_features", "signed", "shift"):
        assert found[key] == expected[key], key
    assert (found["model"] == expected["model"]) == (device_map != "disk")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"device_map": "everywhere"}, "--device-map is one of auto, balanced, .*, cpu, disk, not 'everywhere'"),
        ({"device_map": "auto", "device": "cpu"}, "--device and --device-map both say where the model goes"),
    ],
)
def test_device_maps_that_cannot_be(tiny: Tiny, options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        sts_fast.score(
            model=tiny.model, sae=tiny.saes["standard"], train=tiny.train, domains={}, top_n=TOP_N, **options
        )


def test_a_device_map_needs_accelerate(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="--device-map needs the package accelerate: pip install accelerate"):
        load_decoder(tiny.model, LAYER, device_map="auto")


def test_the_digest_tells_weights_apart(tiny: Tiny) -> None:
    """The same whether loaded up to the layer or whole; another for any layer that is run, none for those above."""
    whole = AutoModelForCausalLM.from_pretrained(tiny.model)
    expected = load_decoder(tiny.model, LAYER, device="cpu").weights_sha256()
    assert LanguageModel(whole, LAYER).weights_sha256() == expected
    assert load_decoder(tiny.tuned, LAYER, device="cpu").weights_sha256() != expected
    assert weights_sha256(whole.to(torch.bfloat16), LAYER) != expected
    for layer, same in ((0, False), (LAYER, False), (LAYER + 1, True)):
        changed = copy.deepcopy(AutoModelForCausalLM.from_pretrained(tiny.model))
        with torch.no_grad():
            changed.model.layers[layer].mlp.down_proj.weight.mul_(1.01)
        assert (weights_sha256(changed, LAYER) == expected) == same


def test_the_digest_of_a_whole_model_tells_apart_what_computes_otherwise(tiny: Tiny) -> None:
    def digest(dtype: torch.dtype = torch.float32) -> tuple[Any, str | None]:
        model = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=dtype)
        return model, model_sha256(model)

    model, first = digest()
    assert first == digest()[1]
    found = {first, digest(torch.bfloat16)[1]}
    with torch.no_grad():
        for weight in (model.lm_head.weight, model.model.norm.weight, model.model.layers[-1].mlp.up_proj.weight):
            weight.flatten()[0] += 1
            found.add(model_sha256(model))
    for name, value in (("rms_norm_eps", 1e-3), ("_attn_implementation", "eager")):
        setattr(model.config, name, value)
        found.add(model_sha256(model))
    assert len(found) == 7
    assert model_sha256(model.to("meta")) is None
