"""Values of rows: what kind they are, and their text."""

from __future__ import annotations

from typing import Any

from sts_fast.errors import InputError


def encodable(value: object, where: str, name: str) -> str:
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where} has half a character (a lone surrogate) in {name!r}; remove it") from error
    return text


def kind_of(value: Any) -> str:
    if value is None:
        return "empty"
    return {dict: "an object", list: "a list", str: "a text", bool: "a truth value"}.get(type(value), "a number")
