"""Rows of files, against rows written by hand: compressed, separated by other signs, without a header, damaged."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from sts_fast.data.examples import Example, load_examples
from sts_fast.data.tables import Table, file_rows
from sts_fast.errors import InputError

CASES = Path(__file__).parents[3] / "shared" / "cases"
needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason="the cases are not beside the checkout")

ROW = {"question": "1+1?", "answer": "2"}


def zst(data: bytes) -> bytes:
    pa = pytest.importorskip("pyarrow")
    buffer = pa.BufferOutputStream()
    with pa.CompressedOutputStream(buffer, "zstd") as stream:
        stream.write(data)
    return bytes(buffer.getvalue().to_pybytes())


def rows_of(path: Path, text: str | bytes) -> list[object]:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return [row for _, _, row in file_rows(path)]


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": zst,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


@pytest.mark.parametrize("compression", COMPRESS)
def test_compressed_text(tmp_path: Path, compression: str) -> None:
    compress = COMPRESS[compression]
    lines = "".join(json.dumps({"question": f"{i}?"}) + "\n" for i in range(3000)).encode()
    for name, text, n in (
        ("a.jsonl", lines, 3000),
        ("b.json", json.dumps([ROW]).encode(), 1),
        ("c.csv", b"question,answer\n1+1?,2\n", 1),
        ("d.tsv", b"question\tanswer\n1+1?\t2\n", 1),
    ):
        rows = rows_of(tmp_path / (name + compression.upper()), compress(text))
        assert len(rows) == n
        assert rows[0] in (ROW, {"question": "0?"})
    # Parts that were compressed apart and put one behind the other are one file.
    assert len(rows_of(tmp_path / f"two.jsonl{compression}", compress(lines) + compress(lines))) == 6000


@pytest.mark.parametrize("compression", COMPRESS)
def test_damaged_compressed_text_is_one_sentence(tmp_path: Path, compression: str) -> None:
    whole = COMPRESS[compression](b"".join(b'{"question": "%d?"}\n' % i for i in range(3000)))
    for data in (whole[:-9], whole[: len(whole) // 2], b'{"question": "not compressed"}\n'):
        with pytest.raises(InputError, match=r"a\.jsonl\..* cannot be read \(.+\); is it complete") as caught:
            rows_of(tmp_path / f"a.jsonl{compression}", data)
        assert "\n" not in str(caught.value)


@needs_cases
@pytest.mark.parametrize("name", ["a.tsv", "b.csv"])
def test_files_separated_by_other_signs(name: str) -> None:
    assert load_examples(CASES / "62_tsv" / name) == [Example("1", "x", "y")]


@needs_cases
def test_a_spreadsheets_unicode_text() -> None:
    assert load_examples(CASES / "62_tsv" / "c.csv") == [Example("1", "x", "y")]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_utf_16_is_known_by_its_mark(tmp_path: Path, encoding: str) -> None:
    def encoded(text: str) -> bytes:
        return ("" if encoding == "utf-16" else "\ufeff").encode(encoding) + text.encode(encoding)

    row = {"question": "Wo, ä?", "answer": "日"}
    assert rows_of(tmp_path / "a.tsv", encoded("question\tanswer\r\nWo, ä?\t日\r\n")) == [row]
    assert rows_of(tmp_path / "a.json", encoded(json.dumps([row], ensure_ascii=False))) == [row]
    assert rows_of(tmp_path / "a.jsonl.gz", gzip.compress(encoded(json.dumps(row, ensure_ascii=False)))) == [row]
    with pytest.raises(InputError, match=r"b\.csv cannot be read \(.*truncated data\); is it complete"):
        rows_of(tmp_path / "b.csv", encoded("question\nx")[:-1])


def test_other_encodings_are_refused_by_the_line(tmp_path: Path) -> None:
    for text in ("question,answer\nWo?,Österreich\n", "question;answer\nÜber?;x\n"):
        with pytest.raises(InputError, match=r"c\.csv: line 2 is not UTF-8; convert the file to UTF-8"):
            rows_of(tmp_path / "c.csv", text.encode("cp1252"))


SEPARATED = {
    "tabs": ("a.tsv", 'question\tanswer\n1, 2; 3?\t"a ""b""\tc"\n', [("1, 2; 3?", 'a "b"\tc')]),
    "semicolons": ("a.csv", "question;answer\nfirst, then?;3,5\n", [("first, then?", "3,5")]),
    "tabs in a .csv": ("a.csv", "question\tanswer\r\na;b?\tc\r\n", [("a;b?", "c")]),
    "bars": ("a.csv", "question|answer\na, b?|c\n", [("a, b?", "c")]),
    "commas, other signs in the values": ("a.csv", "question,answer\na;b,c|d\ne;f,h\n", [("a;b", "c|d"), ("e;f", "h")]),
    "a sign in the header": ("a.csv", "question,answer,notes; other\na,b,c\nd,e,f; g; h\n", [("a", "b"), ("d", "e")]),
    "a spreadsheet's line above it": ("a.csv", "\ufeffsep=;\r\nquestion;answer\r\na;b\r\n", [("a", "b")]),
    "a quoted line end": ("a.csv", 'question;answer\n"a\nb;c";d\n', [("a\nb;c", "d")]),
    "one column": ("a.csv", "question\nwhat; or who?\n", [("what; or who?", None)]),
}  # fmt: skip


@pytest.mark.parametrize(("name", "text", "expected"), SEPARATED.values(), ids=SEPARATED.keys())
def test_separators(tmp_path: Path, name: str, text: str, expected: list[tuple[str, str | None]]) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert [(example.question, example.answer) for example in load_examples(tmp_path / name)] == expected


def test_the_separator_is_found_in_a_long_file(tmp_path: Path) -> None:
    body = "".join(f'"question {i}, or; {i}";"an\nanswer {i}"\n' for i in range(1000))
    rows = rows_of(tmp_path / "a.csv", f"question;answer\n{body}")
    assert rows == [{"question": f"question {i}, or; {i}", "answer": f"an\nanswer {i}"} for i in range(1000)]


UNCLEAR = {
    "a late answer that is no option": (
        "Q?,a,b,c,B\n" + 300 * "R?,a,b,c,A\n" + "S?,a,b,c,E\n",
        "row 302 has the answer 'E'",
    ),
    "two separators": ("question,answer;x\na,b;c\nd,e;f\n", "may be separated by commas or by semicolons; write it as"),
    "ragged": (
        "question;answer\na;b\na;b;c\n",
        "row 2 has 3 values for 2 columns; quote the values that .* semicolons",
    ),
    "ragged tabs": ("question\tanswer\na\tb\tc\n", "row 1 has 3 values for 2 columns; quote the values .* tabs"),
    "a name twice": ("question,answer,answer\na,b,c\n", "has two columns called 'answer'; rename one"),
    "no header": ("Where is Rome?,Italy\nWhere is Oslo?,Norway\n", "; where its first line is a row, add a header"),
    "no header, numbers": ("What is 1+1?;2\nWhat is 1+2?;3\n", "among What is 1.1., 2; .* add a header line above it"),
}


@pytest.mark.parametrize(("text", "message"), UNCLEAR.values(), ids=UNCLEAR.keys())
def test_what_is_unclear_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_examples(tmp_path / "a.csv", strict=True)
    assert str(caught.value).startswith(str(tmp_path / "a.csv"))
    assert "\n" not in str(caught.value)


CHOICES = {
    "as MMLU": (
        '"Find it, please.",0,4,"2, or 3",6,B\n"How many\nare ""there""?",1,2,3,4,D\n',
        [
            Example("1", "Find it, please.\nA. 0\nB. 4\nC. 2, or 3\nD. 6", "B"),
            Example("2", 'How many\nare "there"?\nA. 1\nB. 2\nC. 3\nD. 4', "D"),
        ],
    ),
    "three options": ("Which?,x,y,z,C\nWhy?,p,q,r,A\n", [
        Example("1", "Which?\nA. x\nB. y\nC. z", "C"), Example("2", "Why?\nA. p\nB. q\nC. r", "A"),
    ]),
    "tabs": ("Which, then?\tx\ty\t B\n", [Example("1", "Which, then?\nA. x\nB. y", "B")]),
}  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), CHOICES.values(), ids=CHOICES.keys())
def test_multiple_choice_without_a_header(tmp_path: Path, text: str, expected: list[Example]) -> None:
    path = tmp_path / ("a.tsv" if "\t" in text else "a.csv")
    path.write_text(text)
    assert load_examples(path) == expected


def test_a_header_of_letters_is_a_header(tmp_path: Path) -> None:
    text = "id,question,A,B,C,D\n7,Which?,w,x,y,z\n"
    assert rows_of(tmp_path / "a.csv", text) == [
        {"id": "7", "question": "Which?"} | dict(zip("ABCD", "wxyz", strict=True))
    ]
    assert rows_of(tmp_path / "b.csv", "question,A,B,answer\nWhich?,x,y,B\n") == [
        {"question": "Which?", "A": "x", "B": "y", "answer": "B"}
    ]


@pytest.mark.parametrize(
    "text", ['[{"question": "x"}, {"question": "y"}]', '\n[\n{"question": "x"},\n{"question": "y"}\n]']
)
def test_a_list_of_rows_that_is_called_jsonl(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    assert load_examples(tmp_path / "a.jsonl", strict=True) == [Example("1", "x", None), Example("2", "y", None)]


def test_truth_values_of_a_csv_are_yes_and_no(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question,answer\nIs it?,False\nWas it?,True\nWill it?,\n")
    assert [example.answer for example in load_examples(tmp_path / "a.csv")] == ["no", "yes", None]
    for text in ("question,answer\nIs it?,False\nWhat is it?,ice\n", "question,A,B,answer\nIs it?,True,False,False\n"):
        (tmp_path / "a.csv").write_text(text)
        assert load_examples(tmp_path / "a.csv")[0].answer == "False"
    (tmp_path / "a.jsonl").write_text('{"question": "True or false: it is.", "answer": "False"}')
    assert load_examples(tmp_path / "a.jsonl")[0].answer == "False"


def test_splits_in_one_document_are_refused(tmp_path: Path) -> None:
    for splits in (("train", "test"), ("Validation", "dev", "rows")):
        with pytest.raises(
            InputError, match=rf"a.json contains the splits {splits[0]}, .*; write the one to be read as"
        ):
            rows_of(tmp_path / "a.json", json.dumps({name: [ROW] for name in splits}))
    assert rows_of(tmp_path / "b.json", json.dumps({"version": 2, "test": [ROW]})) == [ROW]


def test_arrow_files_of_both_kinds(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    table = pa.Table.from_pylist([ROW, ROW | {"answer": None}])
    for name, writer in (("file", pa.ipc.new_file), ("stream", pa.ipc.new_stream)):
        with writer(str(tmp_path / f"{name}.arrow"), table.schema) as out:
            out.write_table(table, max_chunksize=1)
        rows = [row for _, _, row in file_rows(tmp_path / f"{name}.arrow")]
        assert rows == [ROW, {"question": "1+1?", "answer": None}]
    (tmp_path / "bad.arrow").write_bytes((tmp_path / "file.arrow").read_bytes()[:-40])
    with pytest.raises(InputError, match=r"bad\.arrow cannot be read"):
        list(file_rows(tmp_path / "bad.arrow"))


def test_the_digest_of_a_table_is_of_its_bytes_or_of_its_rows(tmp_path: Path) -> None:
    import hashlib

    (tmp_path / "a.csv").write_bytes(b"question\nx\n")
    assert Table.of_file(tmp_path / "a.csv").sha256 == hashlib.sha256(b"question\nx\n").hexdigest()
    in_memory = Table("'train' in memory", lambda: iter([(1, None, {"b": 1, "a": "x"}), (2, None, {"a": None})]))
    expected = hashlib.sha256(b'{"a": "x", "b": 1}\n{"a": null}\n').hexdigest()
    assert in_memory.sha256 == expected
