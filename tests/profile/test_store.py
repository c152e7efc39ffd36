"""Libraries in object stores: one in memory, and an S3 server on this machine."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from planned import digests
from tiny import Tiny

import sts_fast
from sts_fast.cli import main
from sts_fast.errors import InputError
from sts_fast.model.language_model import LanguageModel
from sts_fast.profile import store
from sts_fast.profile.profile import INDEX_FILE, RESIDUALS_FILE, ROWS_FILE
from sts_fast.report import build_library_report

OPTIONS: dict[str, Any] = {"shots": 1, "domain_shots": 2, "limit": 12, "demo_draws": 2}
ADDRESS = "memory://bucket/lib"


@pytest.fixture(scope="module")
def local(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library in a folder, of the same sets."""
    folder = tmp_path_factory.mktemp("local") / "lib"
    sts_fast.profile(**given(tiny), library=folder)
    return folder


@pytest.fixture(autouse=True)
def _caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))


@pytest.fixture
def memory() -> Iterator[Any]:
    """The file system of memory:// addresses, empty."""
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


@pytest.fixture
def filled(memory: Any, local: Path) -> Any:
    """The same with the profiles of the library at ADDRESS, as any tool copies them."""
    upload(memory, local, "/bucket/lib")
    return memory


def upload(system: Any, local: Path, root: str) -> None:
    for path in local.glob("*/*"):
        system.pipe_file(f"{root}/{path.relative_to(local).as_posix()}", path.read_bytes())


def given(tiny: Tiny) -> dict[str, Any]:
    return {
        "model": tiny.model, "sae": tiny.saes["topk"], "trains": {"sums": tiny.train}, "domains": tiny.domains,
        **OPTIONS,
    }  # fmt: skip


def other_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another cache, so that nothing is mirrored yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    return tmp_path / "other"


def stored(system: Any) -> dict[str, bytes]:
    return {path.removeprefix("/bucket/lib/"): system.cat_file(path) for path in system.find("/bucket")}


def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a set is read")

    monkeypatch.setattr(LanguageModel, "rows", rows)


def test_profiles_in_a_store_are_those_of_a_folder(
    tiny: Tiny, memory: Any, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sts_fast.profile(**given(tiny), library=ADDRESS)
    expected = {str(path.relative_to(local)): path.read_bytes() for path in local.glob("*/*")}
    assert stored(memory) == expected
    # Another machine reads nothing, and takes the files that it uses.
    other_machine(tmp_path, monkeypatch)
    unread(monkeypatch)
    scores = [
        sts_fast.compare(**given(tiny), top_n=8, library=library)["sums"].to_dict()["domains"]
        for library in (ADDRESS, Path(ADDRESS), local)
    ]
    assert scores[0] == scores[1] == scores[2]
    library = sts_fast.Library(ADDRESS)
    assert str(library) == ADDRESS
    assert len(library) == len(sts_fast.Library(local)) == 3
    assert [path.name for path in library] == [path.name for path in sts_fast.Library(local)]
    assert digests(library.folder) == digests(local)


def test_what_reads_a_library_reads_a_store(tiny: Tiny, filled: Any, local: Path) -> None:
    up, keep = tiny.domains
    for of in (
        lambda place: sts_fast.search(place, [up], [keep], top_n=8),
        lambda place: sts_fast.compare_stored(place, ["sums"], top_n=8)["sums"].to_dict()["domains"],
        lambda place: build_library_report(place, top_n=8).read_text(),
    ):
        assert of(ADDRESS) == of(local)


def test_commands(
    tiny: Tiny, filled: Any, local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    up, _ = tiny.domains

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["sts-fast", *words])
        main()
        return capsys.readouterr().out

    searched = [
        run("search", "--library", str(place), "--up", up, "--top-n", "8", "--json") for place in (ADDRESS, local)
    ]
    assert searched[0] == searched[1]
    for command in (["score"], ["compare"]):
        run(*command, "--library", ADDRESS, "--train", "sums", "--top-n", "8", "--output", str(tmp_path / command[0]))
    assert (tmp_path / "score" / "report.html").is_file()
    page = Path("".join(run("report", ADDRESS).split()))
    assert page.read_text() == build_library_report(local).read_text()
    unread(monkeypatch)
    said = run(
        "profile", "--library", ADDRESS, "--model", str(tiny.model), "--sae", str(tiny.saes["topk"]),
        "--train", f"sums={tiny.train}", "--shots", "1", "--domain-shots", "2", "--limit", "12", "--demo-draws", "2",
    )  # fmt: skip
    assert "sums (train): 12 prompts" in said
    with pytest.raises(SystemExit):
        run(
            "profile", "--library", ADDRESS, "--model", str(tiny.model), "--sae", str(tiny.saes["topk"]),
            "--train", f"sums={tiny.train}", "--plan-only",
        )  # fmt: skip
    assert f"and {ADDRESS} is an object store: give --library a folder" in "".join(
        capsys.readouterr().err.replace("\n", " ")
    )
    assert {path.name for path in tmp_path.iterdir()} == {"caches", "score", "compare"}


def test_a_killed_upload_leaves_no_profile_and_goes_on(
    tiny: Tiny, memory: Any, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = type(memory).put_file

    def killed(self: Any, lpath: str, rpath: str, **options: Any) -> None:
        if rpath.endswith(RESIDUALS_FILE):
            raise KeyboardInterrupt
        put(self, lpath, rpath, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "put_file", killed)
        with pytest.raises(KeyboardInterrupt):
            sts_fast.profile(**given(tiny), library=ADDRESS)
    assert [Path(name).name for name in stored(memory)] == [ROWS_FILE]
    assert len(sts_fast.Library(ADDRESS)) == 0
    with pytest.raises(InputError, match=f"{ADDRESS} has no profiles: make some with sts-fast profile"):
        sts_fast.search(ADDRESS, ["law"])
    # What was read is uploaded, and not read again.
    read: list[str] = []
    rows = LanguageModel.rows
    monkeypatch.setattr(
        LanguageModel, "rows", lambda self, kind, of, *rest: (read.append(of.name), rows(self, kind, of, *rest))[1]
    )
    sts_fast.profile(**given(tiny), library=ADDRESS)
    assert read == list(tiny.domains)
    assert stored(memory) == {str(path.relative_to(local)): path.read_bytes() for path in local.glob("*/*")}


def test_a_flipped_byte_and_a_missing_file_are_named(
    tiny: Tiny, filled: Any, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [folder] = local.glob("sums-*")
    place, rows = f"{ADDRESS}/{folder.name}", (folder / ROWS_FILE).read_bytes()
    up, _ = tiny.domains
    flipped = rows[:200] + bytes([rows[200] ^ 1]) + rows[201:]
    filled.pipe_file(f"/bucket/lib/{folder.name}/{ROWS_FILE}", flipped)
    named = (
        f"{place}/{ROWS_FILE} is not the file that its {INDEX_FILE} names: remove {place}, and make the profile again"
    )
    with pytest.raises(InputError, match=named):
        sts_fast.search(ADDRESS, [up], top_n=8)
    with pytest.raises(InputError, match=named):
        sts_fast.profile(**given(tiny), library=ADDRESS)
    filled.rm_file(f"/bucket/lib/{folder.name}/{ROWS_FILE}")
    with pytest.raises(InputError, match=f"{place}/{ROWS_FILE} is missing: remove {place}, and make the profile again"):
        sts_fast.search(ADDRESS, [up], top_n=8)
    # The remedy is one.
    filled.rm(f"/bucket/lib/{folder.name}", recursive=True)
    sts_fast.profile(**given(tiny), library=ADDRESS)
    assert stored(filled)[f"{folder.name}/{ROWS_FILE}"] == rows
    # What is damaged in the mirror is taken from the store again.
    mirror = sts_fast.Library(ADDRESS).folder / folder.name
    for name in (ROWS_FILE, INDEX_FILE):
        whole = (mirror / name).read_bytes()
        (mirror / name).write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    assert sts_fast.search(ADDRESS, [up], top_n=8) == sts_fast.search(local, [up], top_n=8)


def test_what_others_change_is_seen(tiny: Tiny, filled: Any, local: Path) -> None:
    up, keep = tiny.domains
    assert len(sts_fast.search(ADDRESS, [up], top_n=8)) == 1
    # Another machine made the profile again, and got other bytes; and one was removed.
    [folder], [kept] = local.glob("sums-*"), local.glob(f"{keep}-*")
    index = json.loads((folder / INDEX_FILE).read_text())
    index["files"][ROWS_FILE] = "0" * 64
    filled.pipe_file(f"/bucket/lib/{folder.name}/{INDEX_FILE}", json.dumps(index).encode())
    filled.rm(f"/bucket/lib/{kept.name}", recursive=True)
    with pytest.raises(InputError, match=f"{ROWS_FILE} is not the file that its {INDEX_FILE} names"):
        sts_fast.search(ADDRESS, [up], top_n=8)
    with pytest.raises(InputError, match=f"{ADDRESS} has no domain called {keep}"):
        sts_fast.search(ADDRESS, [keep], top_n=8)
    # Names that lead out of the mirror are no profiles.
    filled.pipe_file("/bucket/lib/x/../profile.json", b"{}")
    filled.store["/bucket/lib/../profile.json"] = filled.store[f"/bucket/lib/{folder.name}/{INDEX_FILE}"]
    assert len(sts_fast.Library(ADDRESS)) == 2


@pytest.mark.parametrize("call", ["cat_file", "get_file"])
def test_a_file_that_did_not_arrive_whole(
    tiny: Tiny, filled: Any, local: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    up, _ = tiny.domains
    whole = getattr(type(filled), call)

    def cut(self: Any, place: str, *path: str) -> Any:
        found = whole(self, place, *path)
        if path:
            Path(*path).write_bytes(Path(*path).read_bytes()[:200])
        return found and found[:200]

    with monkeypatch.context() as patch:
        patch.setattr(type(filled), call, cut)
        with pytest.raises(InputError, match=f"did not arrive whole from {ADDRESS}: give the same command again"):
            sts_fast.search(ADDRESS, [up], top_n=8)
    assert sts_fast.search(ADDRESS, [up], top_n=8) == sts_fast.search(local, [up], top_n=8)


def test_only_what_is_used_is_taken(tiny: Tiny, filled: Any) -> None:
    up, keep = tiny.domains
    sts_fast.search(ADDRESS, [up], top_n=8)
    mirror = sts_fast.Library(ADDRESS).folder
    assert {path.parent.name.split("-")[0] for path in mirror.glob(f"*/{INDEX_FILE}")} == {"sums", up, keep}
    assert {path.parent.name.split("-")[0] for path in mirror.glob(f"*/{ROWS_FILE}")} == {"sums", up}


def fails(error: Exception) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise error

    return call


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FileNotFoundError("no such bucket"), "there is no .*: correct the address, or make the bucket or the"),
        (PermissionError("Forbidden"), r"no permission to read .* \(Forbidden\): log in to the store, or ask its own"),
        (ConnectionError("no route"), r"cannot read .* \(no route\): check the address, the login and the network"),
    ],
)  # fmt: skip
def test_a_store_that_refuses(
    tiny: Tiny, error: Exception, said: str, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(memory), "find", fails(error))
    for command in (
        lambda: sts_fast.search(ADDRESS, ["law"]),
        # Before the model is opened.
        lambda: sts_fast.profile(model="none", sae="none", trains={"sums": "none"}, library=ADDRESS),
        lambda: sts_fast.score(model="none", sae="none", train=tiny.train, domains={}, library=ADDRESS),
    ):
        with pytest.raises(InputError, match=said.replace(".*", f"{ADDRESS}.*", 1)):
            command()


def test_a_store_that_does_not_answer(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PATIENCE", 0.1)
    monkeypatch.setattr(type(memory), "find", lambda *args, **kwargs: time.sleep(2))
    start = time.monotonic()
    with pytest.raises(InputError, match=r"did not answer within 0.1 seconds: check the network"):
        sts_fast.search(ADDRESS, ["law"])
    assert time.monotonic() - start < 1.5


def test_what_cannot_be_written_is_kept(tiny: Tiny, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "put_file", fails(PermissionError("Forbidden")))
        with pytest.raises(InputError, match=f"no permission to write {ADDRESS}.*and the same command uploads it"):
            sts_fast.profile(**given(tiny), library=ADDRESS)
    unread(monkeypatch)
    sts_fast.profile(**{**given(tiny), "domains": ()}, library=ADDRESS)
    assert len(sts_fast.Library(ADDRESS)) == 1


def test_what_is_no_store(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        InputError, match="nowhere://lib is in no store that fsspec knows: give a folder, or an address"
    ):
        sts_fast.search("nowhere://lib", ["law"])
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(InputError, match=r"to open s3://bucket/lib, a package is missing: pip install 's3fs'"):
        sts_fast.search("s3://bucket/lib", ["law"])
    with pytest.raises(InputError, match=r"cannot read hf://datasets/owner/name .*offline"):
        sts_fast.search("hf://datasets/owner/name", ["law"])
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"no mirror of .* name another folder for caches in XDG_CACHE_HOME"):
        sts_fast.search(ADDRESS, ["law"])


@pytest.mark.parametrize(
    ("place", "path"), [("lib", "lib"), (Path("a/lib"), "a/lib"), ("file:///a/lib", "/a/lib"), ("C:/lib", "C:/lib")]
)
def test_folders_are_no_stores(place: str | Path, path: str) -> None:
    assert store.folder_of(place) == store.Folder(Path(path))


def test_places_of_one_store_have_one_mirror() -> None:
    places = ["s3://bucket/lib", "s3://bucket/lib/", Path("s3://bucket/lib"), "s3://bucket/other", "gs://bucket/lib"]
    found = [store.folder_of(place) for place in places]
    assert found[0] == found[1] == found[2]
    assert str(found[2]) == "s3://bucket/lib"
    assert len({folder.path for folder in found}) == 3


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The file system of s3:// addresses: a server on this machine, with a bucket."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    system = fsspec.filesystem("s3", skip_instance_cache=True)
    system.mkdir("bucket")
    yield system
    server.stop()


def test_s3(tiny: Tiny, s3: Any, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sts_fast.profile(**given(tiny), library="s3://bucket/lib")
    expected = {path.relative_to(local).as_posix(): path.read_bytes() for path in local.glob("*/*")}
    s3.invalidate_cache()
    assert {path.removeprefix("bucket/lib/"): s3.cat_file(path) for path in s3.find("bucket/lib")} == expected
    shutil.rmtree(other_machine(tmp_path, monkeypatch), ignore_errors=True)
    up, keep = tiny.domains
    assert sts_fast.search("s3://bucket/lib", [up], [keep], top_n=8) == sts_fast.search(local, [up], [keep], top_n=8)
    unread(monkeypatch)
    sts_fast.profile(**given(tiny), library="s3://bucket/lib")
    with pytest.raises(InputError, match=r"there is no s3://nothing/lib .*make the bucket"):
        sts_fast.search("s3://nothing/lib", [up])
