"""A model and the SAEs that it is read with, opened together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny import LAYER, Tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from sts_fast import InputError, load_sae
from sts_fast.data.turns import Turn
from sts_fast.model.session import Purpose, Reading, Session, open_sae
from sts_fast.model.stored.index import INDEX_FILE


def test_the_whole_model_is_loaded_once_and_read_in(tiny: Tiny) -> None:
    session = Session.open(tiny.model, [tiny.saes["topk"]], purpose=Purpose(whole=True))
    assert session.whole is session.whole
    assert session.reader.model is session.whole
    assert session.reader.name == str(tiny.model)
    truncated = Session.open(tiny.model, [tiny.saes["topk"]])
    assert len(truncated.reader.model.layers) == LAYER + 1
    assert truncated.reader.weights_sha256() == session.reader.weights_sha256()


def test_a_model_in_memory_needs_its_tokenizer_only_for_texts(tiny: Tiny) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.model)
    with pytest.raises(ValueError, match="a model in memory needs its tokenizer"):
        Session.open(model, [tiny.saes["topk"]])
    session = Session.open(model, [tiny.saes["topk"]], purpose=Purpose(texts=False))
    assert (session.whole, session.name) == (model, "the model")


def test_activations_are_refused_where_more_is_needed(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / INDEX_FILE).write_text("{}")
    with pytest.raises(InputError, match=r"--this needs the whole model, but .* holds activations: give a folder"):
        Session.open(tmp_path, [tiny.saes["topk"]], purpose=Purpose(needs=[("--this", "the whole model")]))


def test_an_sae_is_read_where_and_as_asked(tiny: Tiny) -> None:
    path = tiny.saes["topk"]
    for source in (path, load_sae(path)):
        assert open_sae(source, Reading()).hook_name == load_sae(path).hook_name
        assert open_sae(source, Reading(layer=1)).hook_name == "blocks.1.hook_resid_post"
        assert open_sae(source, Reading(hook="blocks.0.hook_mlp_out")).hook_name == "blocks.0.hook_mlp_out"
        assert "bfloat16" in str(open_sae(source, Reading(sae_dtype="bfloat16")).W_enc.dtype)
        with pytest.raises(InputError, match="--layer and --hook say the same thing"):
            open_sae(source, Reading(layer=1, hook="blocks.0.hook_mlp_out"))
    with pytest.raises(InputError, match="--top-n is 100000, but the SAE"):
        open_sae(path, Reading(), 100_000)
    with pytest.raises(InputError, match="--batch-tokens must be at least 1, not 0"):
        Reading(batch_tokens=0)


@pytest.mark.parametrize("name", ["chat_template.json", "chat_template.jinja"])
def test_chat_template_beside_the_tokenizer_is_read(tiny: Tiny, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny.model, folder)
    assert not Session.open(folder, [], purpose=Purpose()).template.is_chat
    chat = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    (folder / name).write_text(json.dumps({"chat_template": chat}) if name.endswith("json") else chat)
    template = Session.open(folder, [], purpose=Purpose()).template
    assert template.text([Turn("user", "Why?")]) == "[user] Why? "


def test_several_chat_templates_of_a_processor_are_read_by_name(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny.model, folder)
    named = [{"name": name, "template": f"{{{{ messages[0].content }}}} {name}"} for name in ("default", "rag")]
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": named}))
    assert Session.open(folder, [], purpose=Purpose()).template.text([Turn("user", "Why?")]) == "Why? default"


def test_broken_chat_template_of_a_processor_is_told_in_one_line(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny.model, folder)
    (folder / "chat_template.json").write_text("{")
    with pytest.raises(InputError, match=r"cannot load the model .*model: Expecting property name"):
        Session.open(folder, [], purpose=Purpose()).template  # noqa: B018


def test_chat_template_of_the_tokenizer_comes_before_that_of_a_processor(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny.model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} own {% endfor %}"
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "other"}))
    assert Session.open(folder, [], purpose=Purpose()).template.text([Turn("user", "Why?")]) == "Why? own "
