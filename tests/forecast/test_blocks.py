from __future__ import annotations

import typing
from typing import Any

from sts_fast.files import Document
from sts_fast.forecast.blocks import Scores
from sts_fast.forecast.run import scores_schema

# Blocks whose keys only the schema names.
UNTYPED = {"sae.fit", "rollouts"}


def blocks_in(kind: Any) -> list[Any]:
    """The TypedDicts that a type is made of."""
    if typing.is_typeddict(kind):
        return [kind]
    return [block for inner in typing.get_args(kind) for block in blocks_in(inner)]


def object_in(schema: Document, definitions: Document) -> Document | None:
    """The schema of an object with named keys, also of those in a list or under any name."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    inner = schema.get("items") or schema.get("additionalProperties")
    if "properties" in schema:
        return schema
    return object_in(inner, definitions) if isinstance(inner, dict) else None


def differences(block: Any, schema: Document, definitions: Document, place: str = "") -> list[str]:
    hints, properties = typing.get_type_hints(block), schema["properties"]
    different = [f"{place}{key}" for key in sorted(hints.keys() ^ properties.keys())]
    for key in hints.keys() & properties.keys():
        inner, where = object_in(properties[key], definitions), f"{place}{key}"
        if inner is not None and where not in UNTYPED:
            assert blocks_in(hints[key]), f"{where} has no type"
            for inner_block in blocks_in(hints[key]):
                different += differences(inner_block, inner, definitions, f"{where}.")
    return different


def test_types_have_the_keys_of_the_schema() -> None:
    schema = scores_schema()
    assert differences(Scores, schema, schema["$defs"]) == []


def test_a_key_of_one_of_them_alone_is_noticed() -> None:
    schema = scores_schema()
    score = schema["$defs"]["score"]["properties"]
    score["stderr"] = score.pop("ci")
    assert differences(Scores, schema, schema["$defs"]) == ["domains.scores.ci", "domains.scores.stderr"]
