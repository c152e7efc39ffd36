"""Files that are either whole or not there."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from safetensors.numpy import save_file

from sts_fast import files
from sts_fast.errors import InputError


@dataclass(frozen=True)
class Design:
    n: int
    shares: tuple[float, ...]


KIND = {"kind": "Test", "note": "é"}
ARRAYS = {
    "doubles": np.linspace(0, 1, 7),
    "counts": np.array([1, 2**40], np.int64),
    "table": np.arange(6.0).reshape(2, 3),
    "column by column": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "every other": np.arange(10)[::2],
    "empty": np.zeros((3, 0)),
}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_written_whole_under_its_name(tmp_path: Path) -> None:
    path = tmp_path / "result.txt"
    path.write_text("old")
    with files.atomic_path(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent == path.parent
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["result.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
def test_a_fault_half_way_leaves_what_was_there(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "result.txt"
    path.write_text("old")

    def write_half() -> None:
        with files.atomic_path(path) as temporary:
            temporary.write_text("half of the n")
            raise error

    with pytest.raises(error):
        write_half()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["result.txt"]


def test_a_full_disk_is_told_in_one_sentence(tmp_path: Path) -> None:
    def write_half() -> None:
        with files.atomic_path(tmp_path / "result.txt") as temporary:
            temporary.write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(InputError, match=r"cannot write .*result\.txt: No space left on device$"):
        write_half()
    assert names(tmp_path) == []


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "missing" / "r.txt", tmp_path / "file" / "r.txt", tmp_path / "folder"):
        with pytest.raises(InputError, match="cannot write"), files.atomic_path(place) as temporary:
            temporary.write_text("x")
    assert names(tmp_path) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "x"


def killed_while(write: Callable[[], None]) -> None:
    """Runs it in a process of its own, which kills itself on the way."""
    child = os.fork()
    if child == 0:
        write()
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def kill_while_writing(path: Path) -> None:
    with files.atomic_path(path) as temporary:
        temporary.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def kill_while_writing_a_folder(path: Path) -> None:
    with files.results(path, overwrite=True) as results:
        (results.folder / "a").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    for _ in range(3):
        killed_while(lambda: kill_while_writing(tmp_path / "r.txt"))
        killed_while(lambda: kill_while_writing_a_folder(tmp_path / "run"))
        assert len(names(tmp_path)) == 2  # one of each: the one before is gone
    with files.atomic_path(tmp_path / "r.txt") as temporary:
        with files.atomic_path(tmp_path / "r.txt") as second:  # of a process that lives, though
            second.write_text("second")
        temporary.write_text("first")
    with files.atomic_folder(tmp_path / "run") as folder:
        (folder / "a").write_text("whole")
    assert names(tmp_path) == ["r.txt", "run"]
    assert (tmp_path / "r.txt").read_text() == "first"


def test_a_folder_that_another_process_takes_for_one_that_was_left_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, real = [], os.open

    def removed_before(path: Path, *options: int) -> int:
        opened.append(path)
        if len(opened) == 1:
            path.rmdir()
        return real(path, *options)

    monkeypatch.setattr(os, "open", removed_before)
    with files.atomic_folder(tmp_path / "run") as folder:
        monkeypatch.undo()
        (folder / "a").write_text("whole")
    assert len(opened) == 2
    assert names(tmp_path) == ["run"]


def test_links_that_others_planted_are_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "victim").write_text("mine")
    drawn = iter(["0" * 16, "1" * 16])
    monkeypatch.setattr(files.secrets, "token_hex", lambda n: next(drawn))
    (tmp_path / f".r.txt.{'0' * 16}.tmp").symlink_to(tmp_path / "victim")
    with pytest.raises(InputError, match="File exists"), files.atomic_path(tmp_path / "r.txt") as temporary:
        temporary.write_text("theirs")
    assert (tmp_path / "victim").read_text() == "mine"


def whole(results: files.Results, text: str) -> None:
    (results.folder / files.RESULTS_FILE).write_text("")
    (results.folder / "a").write_text(text)


def test_results_lie_under_the_next_free_name_or_replace_earlier_ones(tmp_path: Path) -> None:
    for name, text in (("run", "first"), ("run-2", "second"), ("run-3", "third")):
        with files.results(tmp_path / "run") as results:
            assert results.path == tmp_path / name
            assert not results.path.exists()
            whole(results, text)
        assert (results.path / "a").read_text() == text
    (tmp_path / "run" / "validation.json").write_text("of the first")
    with files.results(tmp_path / "run", overwrite=True) as results:
        whole(results, "fourth")
        assert (tmp_path / "run" / "a").read_text() == "first"
    assert names(tmp_path / "run") == ["a", files.RESULTS_FILE]
    assert (tmp_path / "run" / "a").read_text() == "fourth"
    assert names(tmp_path) == ["run", "run-2", "run-3"]


def test_two_at_once_do_not_mix(tmp_path: Path) -> None:
    with files.results(tmp_path / "run") as first, files.results(tmp_path / "run") as second:
        whole(first, "first")
        whole(second, "second")
        assert (first.path, second.path) == (tmp_path / "run", tmp_path / "run")
    assert (first.path, second.path) == (tmp_path / "run-2", tmp_path / "run")
    assert [(tmp_path / name / "a").read_text() for name in ("run", "run-2")] == ["second", "first"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_results_that_fail_leave_the_earlier_ones_whole(error: type[BaseException], tmp_path: Path) -> None:
    with files.results(tmp_path / "run") as results:
        whole(results, "first")

    def fail() -> None:
        with files.results(tmp_path / "run", overwrite=True) as results:
            whole(results, "half")
            raise error

    with pytest.raises(error):
        fail()
    assert names(tmp_path) == ["run"]
    assert (tmp_path / "run" / "a").read_text() == "first"


def test_a_killed_overwrite_leaves_the_earlier_results_whole(tmp_path: Path) -> None:
    with files.results(tmp_path / "run") as results:
        whole(results, "first")
    killed_while(lambda: kill_while_writing_a_folder(tmp_path / "run"))
    assert (tmp_path / "run" / "a").read_text() == "first"
    with files.results(tmp_path / "run", overwrite=True) as results:
        whole(results, "second")
    assert names(tmp_path) == ["run"]


def test_where_two_names_cannot_be_exchanged_they_are_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with files.results(tmp_path / "run") as results:
        whole(results, "first")
    monkeypatch.setattr(files, "_exchanged", lambda first, second: False)
    with files.results(tmp_path / "run", overwrite=True) as results:
        whole(results, "second")
    assert (tmp_path / "run" / "a").read_text() == "second"
    assert names(tmp_path) == ["run"]


def test_a_kill_between_two_renames_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_exchanged", lambda first, second: False)
    replace = os.replace
    for n_renames, left in ((1, "first"), (2, "second")):
        with files.results(tmp_path / "run", overwrite=True) as results:
            whole(results, "first")

        def kill_after(first: Path, second: Path, n: int = n_renames, done: list[int] = []) -> None:  # noqa: B006
            replace(first, second)
            done.append(1)
            if len(done) == n:
                os.kill(os.getpid(), signal.SIGKILL)

        def overwrite(kill: Callable[..., None] = kill_after) -> None:
            with files.results(tmp_path / "run", overwrite=True) as results:
                whole(results, "second")
                os.replace = kill

        killed_while(overwrite)
        with files.results(tmp_path / "run") as results:
            assert (tmp_path / "run" / "a").read_text() == left
            whole(results, "third")
        assert results.path == tmp_path / f"run-{n_renames + 1}"
    assert names(tmp_path) == ["run", "run-2", "run-3"]


def test_what_another_program_put_there_meanwhile_stays(tmp_path: Path) -> None:
    with files.results(tmp_path / "run", overwrite=True) as results:
        whole(results, "mine")
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "notes.txt").write_text("theirs")
    assert results.path == tmp_path / "run-2"
    assert (tmp_path / "run" / "notes.txt").read_text() == "theirs"


@pytest.mark.parametrize("reason", [errno.EBUSY, errno.EXDEV])
def test_a_folder_that_cannot_be_renamed_is_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: int
) -> None:
    """As a volume in a container."""
    mounted = tmp_path / "run"
    mounted.mkdir()

    def refuses(change: Callable[..., None]) -> Callable[..., None]:
        def changed(first: Path, second: Path) -> None:
            if mounted in (Path(first), Path(second)):
                raise OSError(reason, os.strerror(reason))
            change(first, second)

        return changed

    monkeypatch.setattr(files, "_exchanged", lambda first, second: False)
    monkeypatch.setattr(os, "rename", refuses(os.rename))
    monkeypatch.setattr(os, "replace", refuses(os.replace))
    for text, overwrite in (("first", False), ("second", True)):
        with files.results(mounted, overwrite=overwrite) as results:
            whole(results, text)
        assert (mounted / "a").read_text() == text
        assert names(mounted) == ["a", files.RESULTS_FILE]
        assert names(tmp_path) == ["run"]
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == mounted)
    with pytest.raises(InputError, match="a mounted folder that holds results"), files.results(mounted):
        pass


def test_a_link_to_a_folder_leads_there(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    for text in ("first", "second"):
        with files.results(tmp_path / "link", overwrite=True) as results:
            whole(results, text)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "disk" / "a").read_text() == text
    assert names(tmp_path) == ["disk", "link"]


def test_what_others_wrote_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for place in ("run", "file"):
        with (
            pytest.raises(InputError, match="holds something that sts-fast did not write"),
            files.results(tmp_path / place, overwrite=True),
        ):
            pass
    with pytest.raises(InputError, match="their own folder"), files.results(""):
        pass
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_what_is_kept_stays_after_an_error_and_goes_after_success(tmp_path: Path) -> None:
    def read(*, fails: bool, name: str) -> None:
        with files.kept(tmp_path / "kept") as folder:
            (folder / name).write_text("read")
            if fails:
                raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        read(fails=True, name="a")
    assert names(tmp_path / "kept") == ["a"]
    with files.kept(tmp_path / "kept"):
        read(fails=False, name="b")  # one of two that use it
        assert names(tmp_path / "kept") == ["a", "b"]
    assert names(tmp_path) == []


def test_what_was_computed_is_kept_by_all_that_it_was_computed_from(tmp_path: Path) -> None:
    made: list[str] = []

    def make() -> dict[str, Any]:
        made.append("made")
        return {**ARRAYS, "flags": np.array([True, False]), "number": np.asarray(1 / 3)}

    rows = np.arange(4.0)
    kept = files.Kept(tmp_path).of("model", 3)
    first = kept.arrays("answers", [rows, Design(2, (0.5,)), {"a": None}], make)
    again = files.Kept(tmp_path).of("model", 3).arrays("answers", [rows.copy(), Design(2, (0.5,)), {"a": None}], make)
    assert made == ["made"]
    assert first.keys() == again.keys()
    for name, array in first.items():
        assert (array.dtype, array.shape, array.tobytes()) == (
            again[name].dtype,
            again[name].shape,
            again[name].tobytes(),
        )
    for name, parts in (
        ("answers", [rows + 1e-16 * (rows == 1), Design(2, (0.5,)), {"a": None}]),
        ("answers", [rows.astype(np.float32), Design(2, (0.5,)), {"a": None}]),
        ("answers", [rows[:, None], Design(2, (0.5,)), {"a": None}]),
        ("answers", [rows, Design(2, (0.5000001,)), {"a": None}]),
        ("answers", [rows, Design(3, (0.5,)), {"a": None}]),
        ("answers", [rows, Design(2, (0.5,)), {"b": None}]),
        ("answers", [rows, Design(2, (0.5,)), {"a": "None"}]),
        ("answers", [rows, Design(2, (0.5,)), {"a": None}, None]),
        ("trials", [rows, Design(2, (0.5,)), {"a": None}]),
    ):
        kept.arrays(name, parts, make)
    for other in (kept.of(None), files.Kept(tmp_path).of("model", 4), files.Kept(tmp_path)):
        other.arrays("answers", [rows, Design(2, (0.5,)), {"a": None}], make)
    assert len(made) == 12  # rows + 1e-16 are the same rows
    assert kept.counts() == {"answers": 11, "trials": 1}
    assert files.Kept().arrays("answers", [], make)["number"] == 1 / 3
    assert files.Kept().counts() == {}
    with pytest.raises(TypeError, match="object has no digest"):
        files.digest(object())


def damaged(path: Path, change: str) -> None:
    content = path.read_bytes()
    match change:
        case "cut off":
            path.write_bytes(content[:-3])
        case "a bit":
            path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
        case "another's":
            files.save_arrays(path, {"x": np.ones(2)}, {"kind": files.KEPT, "key": "", "sha256": ""})
        case "nothing":
            path.write_bytes(b"")


@pytest.mark.parametrize("change", ["cut off", "a bit", "another's", "nothing"])
def test_what_was_kept_and_is_damaged_is_made_again(change: str, tmp_path: Path) -> None:
    said: list[str] = []
    kept = files.Kept(tmp_path, said.append)
    kept.arrays("answers", [1], lambda: {"x": np.zeros(2)})
    [path] = tmp_path.iterdir()
    damaged(path, change)
    assert kept.arrays("answers", [1], lambda: {"x": np.ones(2)})["x"].tolist() == [1, 1]
    assert said == [f"{path} is damaged: it is made again"]
    assert kept.arrays("answers", [1], lambda: {"x": np.zeros(2)})["x"].tolist() == [1, 1]
    assert len(said) == 1


def test_a_run_goes_on_where_nothing_can_be_kept(tmp_path: Path) -> None:
    said: list[str] = []
    kept = files.Kept(tmp_path / "none" / "such", said.append)
    assert kept.arrays("answers", [], lambda: {"x": np.ones(1)})["x"] == 1
    assert len(said) == 1
    assert "so that it is not kept" in said[0]


def test_where_nothing_may_lie_beside_a_folder_it_lies_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a container's volume is mounted at the root."""
    volume = tmp_path / "run"
    volume.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    for text, overwrite in (("first", False), ("second", True)):
        with files.kept(files.hidden(volume, "kept")) as folder, files.results(volume, overwrite=overwrite) as results:
            (folder / "read").write_text("read")
            whole(results, text)
            assert names(tmp_path) == ["run"]
        assert (volume / "a").read_text() == text
        assert names(volume) == ["a", files.RESULTS_FILE]


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to the superuser")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(InputError, match=r"cannot write .*: Permission denied"):
        files.save_arrays(tmp_path / "a.safetensors", ARRAYS, KIND)
    tmp_path.chmod(stat.S_IRWXU)


def test_arrays_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    files.save_arrays(path, ARRAYS, KIND)
    arrays, metadata = files.load_arrays(path, "Test")
    assert metadata == KIND
    assert set(arrays) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert np.array_equal(arrays[name], array)
        assert arrays[name].dtype == array.dtype
        assert arrays[name].shape == array.shape
        arrays[name][...] = 0  # they are the caller's, who goes on adding to them
    assert names(tmp_path) == ["a.safetensors"]


def test_files_that_are_not_what_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(InputError, match=r"there is no file .*a\.safetensors"):
        files.load_arrays(path, "Test")
    save_file({"doubles": np.zeros(1)}, path)
    with pytest.raises(InputError, match=r"a\.safetensors does not contain Test"):
        files.load_arrays(path, "Test")
    files.save_arrays(path, ARRAYS, {"kind": "Other"})
    with pytest.raises(InputError, match=r"a\.safetensors does not contain Test"):
        files.load_arrays(path, "Test")
    whole = path.read_bytes()
    for damaged in (b"", b"x", whole[:-1], whole[: len(whole) // 2], b"\0" * 500, whole[8:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"a\.safetensors is not a readable safetensors file") as e:
            files.load_arrays(path, "Other")
        assert "\n" not in str(e.value)
    with pytest.raises(InputError):
        files.load_arrays(tmp_path, "Test")


def test_sha256(tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(300_000)
    (tmp_path / "f").write_bytes(content)
    assert files.sha256(tmp_path / "f") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    "place",
    [
        "forecast/scores.schema.json",
        "forecast/trace.schema.json",
        "mix/mix.schema.json",
        "ablate/ablation.schema.json",
        "outcomes/calibration/calibration.schema.json",
    ],
)
def test_schemas_are_valid_and_refuse_an_empty_document(place: str) -> None:
    schema = files.load_schema(place)
    jsonschema.Draft202012Validator.check_schema(schema)
    with pytest.raises(jsonschema.ValidationError):
        files.check_document({}, schema)


def test_documents_are_checked_as_they_are_written() -> None:
    schema = {"properties": {"ci": {"type": "array"}}}
    files.check_document({"ci": (1.0, 2.0)}, schema)
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.check_document({"ci": [float("nan")]}, schema)
