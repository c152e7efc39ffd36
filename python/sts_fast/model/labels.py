"""Labels of an SAE's features, as Neuronpedia exports them."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sts_fast.errors import InputError
from sts_fast.model.model_names import is_chat, same_model
from sts_fast.places import PLACES, split_name
from sts_fast.sae import SAE

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
BATCHES = "explanations"  # folder of a bulk export, and key of an answer of the API
# Places of SAEs by the words that a source's name has for them.
SITES = {
    "res": ("resid_pre", "resid_mid", "resid_post"),
    "resid": ("resid_pre", "resid_mid", "resid_post"),
    "pre": ("resid_pre",),
    "mid": ("resid_mid",),
    "post": ("resid_post",),
    "mlp": ("mlp_out",),
    "att": ("attn_out", "hook_z"),
    "attn": ("attn_out", "hook_z"),
}
TRANSCODERS = {"transcoder", "clt"}


@dataclass(frozen=True)
class Source:
    """An SAE as Neuronpedia names it: model 'gemma-2-2b', name '20-gemmascope-res-16k'; '' where a row has none."""

    model: str
    name: str

    def __str__(self) -> str:
        return "/".join(filter(None, (self.model, self.name)))

    def mismatch(self, sae: SAE, model: str) -> str | None:
        """An SAE's first difference from it, such as "has 256 features"; None where they may be the same.

        model: name of the model that is read, for an SAE whose files do not name one
        """
        known = sae.metadata.get("neuronpedia_id")
        if isinstance(known, str) and "/" in known and self.model and self.name:
            return None if known.lower() == str(self).lower() else f"is {known}"
        same = same_model(self.model, sae.model_name or model) if self.model else True
        # A model in a folder may have any name, but an SAE names the model that it was trained on.
        if same is False or (same is None and sae.model_name):
            return f"is of {sae.model_name or model}"
        if self.model and sae.model_name and is_chat(self.model) != is_chat(sae.model_name):
            return f"is of {sae.model_name}"
        place, layer = split_name(sae.hook_name)
        number = re.match(r"\d+(?=-|$)", self.name)
        if number and layer is not None and int(number[0]) != layer:
            return f"reads at {sae.hook_name}"
        words = set(re.split(r"[-_]", self.name.lower()))
        is_elsewhere = place in PLACES and any(place not in SITES[word] for word in words & SITES.keys())
        if TRANSCODERS & words:
            is_elsewhere = not sae.target_hook_name
        if is_elsewhere:
            return f"reads at {sae.hook_name}"
        if (width := self.width) is not None and sae.d_sae not in width:
            return f"has {sae.d_sae} features"
        return None

    @property
    def width(self) -> range | None:
        """Numbers of features that its name may mean: 16k is 16,000 to 17,407; None where it says none."""
        match = re.search(r"[-_](\d+)(k|m)(?=[-_]|$)", self.name.lower())
        if match is None:
            return None
        n, (least, most) = int(match[1]), ((1000, 1024) if match[2] == "k" else (1000**2, 1024**2))
        return range(n * least, (n + 1) * most)


@dataclass(frozen=True)
class Labels:
    """Labels in a file or folder: by the SAE that they are of, label by feature."""

    path: Path
    by_source: Mapping[Source, Mapping[int, str]]

    @classmethod
    def read(cls, path: str | Path) -> Labels:
        """Labels of Neuronpedia's export: a JSON list, JSON lines (.gz too), an answer of its API, a folder of batches.

        The first label of a feature counts. Raises InputError where a file is unreadable or none contains a label.
        """
        path = Path(path)
        found: dict[Source, dict[int, str]] = {}
        for file in _files(path):
            for row in _rows(_read(file), {}):
                source = Source(str(row.get("modelId") or ""), str(row.get("layer") or ""))
                found.setdefault(source, {}).setdefault(int(row["index"]), row["description"].strip())
        if not found:
            raise InputError(
                f"{path} has no row with 'index' and 'description': give an export of Neuronpedia's explanations"
            )
        return cls(path, found)

    def of(self, sae: SAE, model: str) -> Mapping[int, str]:
        """Label by feature of an SAE. model: name of the model that is read.

        Raises InputError where all labels are of other SAEs, or those of several may be its own.
        """
        fitting, others = [], []
        for source, labels in self.by_source.items():
            reason = source.mismatch(sae, model)
            if reason is None and source.width is None and max(labels) >= sae.d_sae:
                reason = f"has {sae.d_sae} features, and feature {max(labels)} is labelled"
            if reason is None:
                fitting.append(source)
            else:
                others.append(f"{str(source) or 'an SAE without a name'}, but this SAE {reason}")
        if not fitting:
            some = "; ".join(others[:3]) + ("; …" if len(others) > 3 else "")
            raise InputError(
                f"{self.path} does not label the SAE {sae.source}: it labels {some}: give the labels of this SAE"
            )
        if len(fitting) > 1:
            raise InputError(
                f"{self.path} labels several SAEs that may be {sae.source} ({', '.join(map(str, fitting[:5]))}): keep "
                "the labels of one of them"
            )
        return {feature: label for feature, label in self.by_source[fitting[0]].items() if feature < sae.d_sae}


def _files(path: Path) -> list[Path]:
    """The file, or the batches in a folder or in its folders of explanations, in the order of their numbers."""
    if not path.is_dir():
        return [path]
    files = [file for file in path.iterdir() if file.name.endswith(SUFFIXES)]
    files = files or [file for file in path.glob(f"**/{BATCHES}/*") if file.name.endswith(SUFFIXES)]
    if not files:
        raise InputError(f"{path} contains no labels: give a file or folder of {', '.join(SUFFIXES)}")
    return sorted(
        files, key=lambda file: (str(file.parent), [int(n) for n in re.findall(r"\d+", file.name)], file.name)
    )


def _read(path: Path) -> Any:
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8")
        try:
            return json.loads(text)
        except ValueError:
            return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, EOFError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a readable export of feature labels: {error}") from error


def _rows(value: Any, above: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows with an index and a description; model, layer and index may be those of the object around a row."""
    if isinstance(value, list):
        for part in value:
            yield from _rows(part, above)
    elif isinstance(value, dict):
        own = {key: value[key] for key in ("modelId", "layer", "index") if value.get(key) is not None}
        row = {**above, **own, "description": value.get("description")}
        label = row["description"]
        if isinstance(value.get(BATCHES), list):
            yield from _rows(value[BATCHES], {**above, **own})
        elif str(row.get("index")).isdecimal() and isinstance(label, str) and label.strip():
            yield row
