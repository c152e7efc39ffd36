"""An HTML page as a tree."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "link", "br", "hr", "img", "input"}


@dataclass
class Node:
    tag: str
    attrs: dict[str, str]
    children: list[Node | str] = field(default_factory=list)

    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text() for child in self.children)

    def all(self, tag: str = "", **attrs: str) -> list[Node]:
        wanted = {key.rstrip("_"): value for key, value in attrs.items()}
        return [
            node
            for node in self.walk()
            if tag in ("", node.tag) and all(value in node.attrs.get(key, "").split() for key, value in wanted.items())
        ]

    def one(self, tag: str = "", **attrs: str) -> Node:
        [node] = self.all(tag, **attrs)
        return node

    def walk(self) -> Iterator[Node]:
        for child in self.children:
            if isinstance(child, Node):
                yield child
                yield from child.walk()


class TreeBuilder(HTMLParser):
    """Builds the tree, and fails where elements are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Node("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"<{tag}> repeats an attribute"
        node = Node(tag, {key: value or "" for key, value in attrs})
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag, f"</{tag}> does not close what is open"

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")


def read_page(path: Path) -> Node:
    builder = TreeBuilder()
    builder.feed(path.read_text(encoding="utf-8"))
    builder.close()
    assert builder.open == [builder.root]
    return builder.root


def rows_of(table: Node) -> list[list[Node]]:
    """The cells of a table's body, row by row."""
    return [[cell for cell in row.children if isinstance(cell, Node)] for row in table.one("tbody").all("tr")]


def values_of(cell: Node) -> list[float]:
    """The numbers of a cell, in full."""
    return [float(data.attrs["value"]) for data in cell.all("data")]


def plain(text: str) -> str:
    """Without the characters that keep a name's writing direction, and with single spaces."""
    return " ".join(re.sub("[\u2068\u2069]", "", text).split())
