"""Rules about the source tree itself, enforced by reading it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python" / "sts_fast"

# A module imports only from modules before it. A new module gets its place here.
ORDER = [
    *("_version", "errors", "files", "places", "data", "sae", "ops", "model"),
    *("signed", "forecast"),
    *("ablate", "rollouts", "mix"),
    *("outcomes", "report", "demo", "trainer", "cli", "__main__"),
]
HEAVY = {"torch", "transformers", "sae_lens", "pandas", "pyarrow", "matplotlib", "datasets"}
SUBCLASSES_OF_HEAVY = {"trainer.py"}  # whoever imports it has imported transformers
UNPICKLERS = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
NAMES_THAT_SAY_NOTHING = re.compile(r"(^|_)(util|utils|helper|helpers|common|misc|base|manager)$")
MACHINE_PATH = re.compile("(?<![\\w.])/" + "(root|home/[a-z]|work|Users/[a-z])" + "(/|\\b)", re.IGNORECASE)

SOURCES = sorted(path for path in PACKAGE.rglob("*.py*") if path.suffix in (".py", ".pyi"))
MODULES = [path for path in SOURCES if path.suffix == ".py"]


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def unit_of(path: Path) -> str:
    """The module of ORDER that a file belongs to; a package is one unit."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(path.suffix)


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of everything imported anywhere; a name taken from the package itself is spelled in full."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            if module == "sts_fast":
                yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield module, node.lineno


def run_on_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that importing a module runs: not those of functions, nor under `if TYPE_CHECKING`."""
    for node in body:
        yield node
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from run_on_import(node.orelse)
            continue
        for field in ("body", "orelse", "finalbody"):
            yield from run_on_import(getattr(node, field, []))
        for handler in getattr(node, "handlers", []):
            yield from run_on_import(handler.body)


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def is_literal(call: ast.Call, keyword: str, value: object) -> bool:
    return any(k.arg == keyword and isinstance(k.value, ast.Constant) and k.value.value is value for k in call.keywords)


def tracked_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=False
    ).stdout
    if not listed:
        pytest.skip("not a git checkout")
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_module_imports_only_from_its_left(path: Path) -> None:
    unit = unit_of(path)
    if unit == "__init__":
        return
    assert unit in ORDER, f"{name_of(path)} has no place in ORDER: put it behind every module that it imports"
    for name, line in imported(tree_of(path)):
        assert not name.startswith("."), f"{name_of(path)}:{line} imports {name}: write it from sts_fast on"
        package, _, rest = name.partition(".")
        if package != "sts_fast":
            continue
        other = rest.partition(".")[0].replace("__version__", "_version")
        assert other in ORDER, f"{name_of(path)}:{line} imports {name}: import it from the module that defines it"
        assert other == unit or ORDER.index(other) < ORDER.index(unit), (
            f"{name_of(path)}:{line} imports {other}, which stands to the right of {unit}"
        )


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_heavy_packages_are_imported_where_used(path: Path) -> None:
    for node in run_on_import(tree_of(path).body):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        heavy = {name.partition(".")[0] for name in names if name_of(path) not in SUBCLASSES_OF_HEAVY} & HEAVY
        assert not heavy, f"{name_of(path)}:{node.lineno} imports {', '.join(heavy)}: do it inside the function"


def test_import_loads_nothing_heavy() -> None:
    program = (
        "import sys, sts_fast\n"
        "for name in sts_fast.__all__: getattr(sts_fast, name)\n"
        "print(*(name for name in sys.modules if '.' not in name))\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert not HEAVY & set(ran.stdout.split())


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_module_prints_nothing_and_trusts_nobody(path: Path) -> None:
    for name, line in imported(tree_of(path)):
        assert name.partition(".")[0] not in UNPICKLERS, f"{name_of(path)}:{line} imports {name}"
    for function, call in calls(path):
        where = f"{name_of(path)}:{call.lineno}"
        assert function != "print" or unit_of(path) == "cli", f"{where} prints; only the command line does"
        assert not is_literal(call, "trust_remote_code", True), f"{where} runs code that came with a model"
        assert not is_literal(call, "allow_pickle", True), f"{where} unpickles"
        assert function != "torch.load" or is_literal(call, "weights_only", True), f"{where} unpickles"


def test_every_test_file_has_its_module() -> None:
    tested = {name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", "_") for path in MODULES}
    tested |= {name for path in MODULES for name in (path.stem, path.parent.name)}
    tested |= {"_cpu", "_cuda"} | {path.stem.removeprefix("sae_") for path in (ROOT / "csrc").rglob("*.*")} | {"layout"}
    # The report in a browser, the core as machine code, benchmarks/ and benchmarks/study/, load_sae, examples/paper.md.
    tested |= {"report_browser", "core", "benchmarks", "study", "hostile_checkpoints", "paper"}
    tested = {name.removeprefix("_") for name in tested}
    files = {path.stem.removeprefix("test_") for path in (ROOT / "tests").rglob("test_*.py")}
    assert not files - tested, "tests are named after the module or the native source that they test"


def test_file_names_say_what_is_inside() -> None:
    for path in [*SOURCES, *tracked_files()]:
        assert not NAMES_THAT_SAY_NOTHING.search(path.stem.lower()), path


def test_no_file_names_a_path_of_one_machine() -> None:
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found = MACHINE_PATH.search(text)
        assert found is None, f"{path.relative_to(ROOT)} names {found[0] if found else ''}"
