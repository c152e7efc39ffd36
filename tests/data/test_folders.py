"""Folders as people keep data sets: which files are one set, which split is read, and what is said about the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sts_fast.data.examples import load_domains, load_examples
from sts_fast.data.sets import Fields, Sets
from sts_fast.errors import InputError

CASES = Path(__file__).parents[3] / "shared" / "cases"
needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason="the cases are not beside the checkout")


def tree(folder: Path, *names: str, category: str | None = None) -> Path:
    """Files of one question each, which is the file's own path below the folder."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        row = {"question": name} | ({} if category is None else {"subject": category})
        if path.suffix == ".parquet":
            pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
            pq.write_table(pa.Table.from_pylist([row]), path)
        elif path.suffix == ".csv":
            path.write_text(f"{name},a,b,c,d,A\n")
        else:
            path.write_text(json.dumps(row) + "\n")
    return folder


def asked(source: Path | str) -> dict[str, list[str]]:
    """By domain the files that were read."""
    return {
        name: [example.question.partition("\n")[0] for example in examples]
        for name, examples in load_domains([str(source)]).items()
    }


def trained_on(source: Path | str) -> list[str]:
    return [example.question for example in load_examples(source)]


# Which split is read --------------------------------------------------------------------------------------------------


@needs_cases
def test_a_subject_of_a_hub_snapshot_is_one_domain() -> None:
    mmlu = CASES / "57_hub_mmlu"
    assert {name: len(rows) for name, rows in load_domains([str(mmlu / "geo")]).items()} == {"geo": 1}
    assert {name: len(rows) for name, rows in load_domains([str(mmlu)]).items()} == {"geo": 1, "law": 1}
    assert [*load_domains([f"maps={mmlu / 'geo'}"])] == ["maps"]


def test_splits_side_by_side_are_one_domain_by_its_category(tmp_path: Path) -> None:
    splits = ("dev-00000-of-00001.parquet", "test-00000-of-00001.parquet", "validation-00000-of-00001.parquet")
    snapshot = tree(tmp_path / "all", *splits, category="astronomy")
    assert asked(snapshot) == {"astronomy": ["test-00000-of-00001.parquet"]}
    uncategorised = tree(tmp_path / "sciq", "train.jsonl", "Valid.jsonl")
    assert asked(uncategorised) == {"sciq": ["Valid.jsonl"]}
    assert trained_on(uncategorised) == ["train.jsonl"]
    assert asked(f"science={uncategorised}") == {"science": ["Valid.jsonl"]}


def test_split_folders_with_a_file_for_each_subject(tmp_path: Path) -> None:
    subjects = ("law", "art")
    data = tree(
        tmp_path / "data", *(f"{split}/{name}_{split}.csv" for split in ("dev", "val", "test") for name in subjects)
    )
    tree(data, "auxiliary_train/arc_easy.csv", "auxiliary_train/race.csv")
    assert asked(data) == {"art": ["test/art_test.csv"], "law": ["test/law_test.csv"]}
    assert asked(data / "dev") == {"art": ["dev/art_dev.csv"], "law": ["dev/law_dev.csv"]}
    sets = Sets.read({"train": []}, [str(data / "test")], [str(data / "dev")], Fields())
    assert {name: [example.question.partition("\n")[0] for example in of] for name, of in sets.demos.items()} == {
        "art": ["dev/art_dev.csv"], "law": ["dev/law_dev.csv"],
    }  # fmt: skip


def test_split_folders_with_shards(tmp_path: Path) -> None:
    converted = tree(
        tmp_path / "copa", "default/train/0000.parquet", "default/train/0001.parquet", "default/test/0000.parquet"
    )
    assert asked(converted) == {"copa": ["default/test/0000.parquet"]}
    assert trained_on(converted) == ["default/train/0000.parquet", "default/train/0001.parquet"]


def test_splits_of_subjects_in_one_folder(tmp_path: Path) -> None:
    folder = tree(tmp_path / "evals", "law_test.jsonl", "law_dev.jsonl", "art-test.jsonl", "art-train.jsonl")
    assert asked(folder) == {"art": ["art-test.jsonl"], "law": ["law_test.jsonl"]}
    with pytest.raises(InputError, match=r"evals contains art-test, .* and none is called train; give one of them"):
        trained_on(folder)
    one = tree(tmp_path / "one", "gsm8k_test.jsonl", "gsm8k_train.jsonl")
    assert asked(one) == {"gsm8k": ["gsm8k_test.jsonl"]}
    assert trained_on(one) == ["gsm8k_train.jsonl"]


def test_domains_that_are_trained_on_are_not_the_evaluation(tmp_path: Path) -> None:
    gsm8k = tree(tmp_path / "gsm8k", "train.jsonl", "test.jsonl")
    tree(tmp_path / "evals", "law/test.jsonl", "law/train.jsonl", "art/test.jsonl", "art/train.jsonl")
    for domains, read in (
        ([str(gsm8k)], ["train.jsonl"]),
        ([str(tmp_path / "evals")], ["art/train.jsonl", "law/train.jsonl"]),
    ):
        sets = Sets.read({"train": []}, domains, None, Fields(), "train")
        assert [example.question for of in sets.domains.values() for example in of] == read


def test_demonstrations_come_from_the_split_that_is_for_them(tmp_path: Path) -> None:
    geo = tree(tmp_path / "geo", "dev.jsonl", "test.jsonl", "validation.jsonl")
    arc = tree(tmp_path / "arc", "train.jsonl", "test.jsonl", "validation.jsonl")
    sets = Sets.read({"train": []}, {"geo": geo, "arc": arc}, {"geo": geo, "arc": arc}, Fields())
    assert [example.question for example in sets.domains["geo"] + sets.domains["arc"]] == ["test.jsonl"] * 2
    assert [example.question for example in sets.demos["geo"] + sets.demos["arc"]] == ["dev.jsonl", "train.jsonl"]
    # Without being asked for, no demonstration comes from another split.
    assert Sets.read({"train": []}, {"geo": geo}, None, Fields()).demos == {}


# Subjects -------------------------------------------------------------------------------------------------------------


def test_a_folder_for_each_subject(tmp_path: Path) -> None:
    mmlu = tree(
        tmp_path / "mmlu",
        *(f"{name}/{split}-00000-of-00001.parquet" for name in ("all", "law", "art") for split in ("dev", "test")),
        *("auxiliary_train/train-00000-of-00001.parquet", "bio/validation.jsonl", "README.md", "dataset_infos.json"),
    )
    assert asked(mmlu) == {
        "art": ["art/test-00000-of-00001.parquet"],
        "bio": ["bio/validation.jsonl"],
        "law": ["law/test-00000-of-00001.parquet"],
    }
    assert Sets.read({"train": []}, [str(mmlu)], None, Fields()).left_out() == [
        "Not read beside the domains: all, auxiliary_train, dev"
    ]
    assert trained_on(mmlu) == ["auxiliary_train/train-00000-of-00001.parquet"]
    gsm8k = tree(tmp_path / "gsm8k", "main/train.jsonl", "socratic/train.jsonl")
    with pytest.raises(InputError, match="gsm8k contains main, socratic and none is called train; give one of them"):
        trained_on(gsm8k)


def test_the_folder_of_all_subjects_alone_is_split_by_category(tmp_path: Path) -> None:
    mmlu = tree(tmp_path / "mmlu", "all/test.jsonl", "all/dev.jsonl", category="law")
    assert asked(mmlu) == {"law": ["all/test.jsonl"]}
    tree(mmlu, "auxiliary_train/train.jsonl")
    assert asked(mmlu) == {"law": ["all/test.jsonl"]}
    assert asked(tree(tmp_path / "quiz", "all/test.jsonl")) == {"quiz": ["all/test.jsonl"]}


def test_names_that_end_like_evaluations_are_whole(tmp_path: Path) -> None:
    assert [*asked(tree(tmp_path / "evals", "human_eval.jsonl", "gpqa-eval.jsonl"))] == ["gpqa-eval", "human_eval"]


def test_files_with_only_training_splits_are_domains_too(tmp_path: Path) -> None:
    assert asked(tree(tmp_path / "evals", "law/train.jsonl", "art/train.jsonl")) == {
        "art": ["art/train.jsonl"],
        "law": ["law/train.jsonl"],
    }


def test_folders_beside_files_are_named(tmp_path: Path) -> None:
    evals = tree(tmp_path / "evals", "law.jsonl", "art.jsonl", "old/law.jsonl", "figures/notes.txt")
    assert asked(evals) == {"art": ["art.jsonl"], "law": ["law.jsonl"]}
    assert Sets.read({"train": []}, [str(evals)], None, Fields()).left_out() == ["Not read beside the domains: old"]


def test_a_domain_called_test_among_others_is_kept(tmp_path: Path) -> None:
    assert [*asked(tree(tmp_path / "evals", "law.jsonl", "test.jsonl"))] == ["law", "test"]


def test_a_category_column_with_splits_in_one_saved_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"question": "q", "subject": "law"}, {"question": "r", "subject": "art"}])
    datasets.DatasetDict({"dev": rows.select([0]), "test": rows}).save_to_disk(str(tmp_path / "mmlu"))
    assert asked(tmp_path / "mmlu") == {"law": ["q"], "art": ["r"]}
    datasets.DatasetDict({"law": rows.select([0]), "art": rows.select([1])}).save_to_disk(str(tmp_path / "subjects"))
    assert asked(tmp_path / "subjects") == {"art": ["r"], "law": ["q"]}


# Shards ---------------------------------------------------------------------------------------------------------------


def test_shards_under_the_names_of_their_writers(tmp_path: Path) -> None:
    for name, shards in {
        "hub": [f"train-0000{i}-of-00003.parquet" for i in range(3)],
        "numbers": [f"{i:04}.parquet" for i in range(3)],
        "tid": [f"part-0000{i}-tid-7023-1f6b-{i}-1-c000.snappy.parquet" for i in range(2)],
        "spark.parquet": [f"part-0000{i}-3f2a9c1d-77aa-4e0b-9b1c-0a1b2c3d4e5f-c000.snappy.parquet" for i in range(2)],
        "ranks": ["000_00000.jsonl", "000_00001.jsonl", "001_00000.jsonl"],
        "one": ["0000.parquet"],
    }.items():
        folder = tree(tmp_path / name, *shards)
        assert trained_on(folder) == shards
        assert asked(folder) == {name.removesuffix(".parquet"): shards}


def test_folders_that_spark_wrote_are_files(tmp_path: Path) -> None:
    files = [f"{name}.parquet/part-0000{i}-1a2b-c000.snappy.parquet" for name in ("test", "train") for i in range(2)]
    folder = tree(tmp_path / "quiz", *files)
    assert trained_on(folder) == files[2:]
    assert asked(folder) == {"quiz": files[:2]}
    subjects = tree(tmp_path / "evals", "law.csv/part-00000-1a2b-c000.csv", "art.csv/part-00000-1a2b-c000.csv")
    assert [*asked(subjects)] == ["art", "law"]


def test_one_name_in_two_formats_is_refused(tmp_path: Path) -> None:
    for name, files in {
        "formats": ("law.csv", "law.jsonl"),
        "shards": ("law-00000-of-00001.parquet", "law.jsonl"),
        "versions": ("law-00000-of-00001.jsonl", "law-00000-of-00002.jsonl", "law-00001-of-00002.jsonl"),
    }.items():
        folder = tree(tmp_path / name, *files)
        for read in (asked, trained_on):
            with pytest.raises(
                InputError, match=f"{name} contains {files[0]} and {files[-1]}, which may be the same rows"
            ):
                read(folder)


def test_numbers_that_are_names_stay_apart(tmp_path: Path) -> None:
    assert [*asked(tree(tmp_path / "aime", "2024.jsonl", "2025.jsonl"))] == ["2024", "2025"]
    assert [*asked(tree(tmp_path / "named", "aime_2024.jsonl", "aime_2025.jsonl"))] == ["aime_2024", "aime_2025"]
    assert [*asked(tree(tmp_path / "parts", "00_sums.jsonl", "01_law.jsonl", "part_0_art.jsonl"))] == [
        "00_sums", "01_law", "part_0_art",
    ]  # fmt: skip


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = tree(tmp_path / "set", "train-00000-of-00003.parquet", "train-00002-of-00003.parquet", "test.jsonl")
    with pytest.raises(
        InputError, match="set lacks shard 1 of train, counted from 0; complete it, or name the files to"
    ):
        trained_on(folder)
    assert asked(folder) == {"set": ["test.jsonl"]}
    shards = [folder / f"train-0000{i}-of-00003.parquet" for i in (0, 2)]
    assert [example.question for example in load_examples(shards)] == [shard.name for shard in shards]


def test_arrow_shards_without_their_state(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    saved = tmp_path / "set"
    datasets.Dataset.from_list([{"question": str(i)} for i in range(4)]).save_to_disk(str(saved), num_shards=2)
    (saved / "state.json").unlink()
    (saved / "cache-0123456789abcdef.arrow").write_bytes(b"left by a map()")
    assert trained_on(saved) == ["0", "1", "2", "3"]
    assert asked(saved) == {"set": ["0", "1", "2", "3"]}


def test_a_saved_selection_is_refused(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"question": "q"}]).save_to_disk(str(tmp_path / "set"))
    state = json.loads((tmp_path / "set" / "state.json").read_text())
    (tmp_path / "set" / "state.json").write_text(json.dumps(state | {"_indices_data_files": [{"filename": "i.arrow"}]}))
    with pytest.raises(
        InputError, match="set keeps a selection of its rows apart; write it again after flatten_indices"
    ):
        trained_on(tmp_path / "set")


# Several places of one set --------------------------------------------------------------------------------------------


def test_several_files_of_one_set(tmp_path: Path) -> None:
    folder = tree(tmp_path, "a.jsonl", "b.parquet", "set/train.jsonl", "set/test.jsonl")
    places = [folder / "a.jsonl", str(folder / "b.parquet"), folder / "set"]
    assert [(example.id, example.question) for example in load_examples(places)] == [
        ("1", "a.jsonl"), ("2", "b.parquet"), ("3", "set/train.jsonl"),
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"a\.jsonl is given twice for the set 'train'; give it once"):
        load_examples([folder / "a.jsonl", folder / "a.jsonl"])
    with pytest.raises(InputError, match=r"c\.jsonl does not exist; give a \.jsonl"):
        load_examples([folder / "a.jsonl", folder / "c.jsonl"])


def test_several_files_under_one_name(tmp_path: Path) -> None:
    folder = tree(tmp_path, "a.jsonl", "b.jsonl", "c.jsonl")
    a, b, c = (folder / f"{name}.jsonl" for name in "abc")
    domains = load_domains([f"law={a}", str(c), f"law={b}"])
    assert {name: [example.question for example in of] for name, of in domains.items()} == {
        "law": ["a.jsonl", "b.jsonl"],
        "c": ["c.jsonl"],
    }
    sets = Sets.read({"train": [a, b]}, {"law": [b, c]}, [f"law={a}", f"law={c}"], Fields())
    assert [example.question for example in sets.trains["train"]] == ["a.jsonl", "b.jsonl"]
    assert [example.question for example in sets.domains["law"]] == ["b.jsonl", "c.jsonl"]
    assert [example.question for example in sets.demos["law"]] == ["a.jsonl", "c.jsonl"]
    assert [table.path for table in sets.tables("demos")] == [a, c]
    with pytest.raises(InputError, match="demonstrations for 'law' are in two sources; give both as law=path"):
        Sets.read({"train": []}, {"law": b}, [f"law={a}", str(tree(tmp_path / "more", "law.jsonl"))], Fields())
