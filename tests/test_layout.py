"""Rules about the source tree itself, enforced by reading it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python" / "sts_fast"

# The rooms of the package from left to right. A room imports from itself and from its left alone; rooms on one line do
# not import each other. The first line is the ground, on which all may stand.
ROOMS = [
    ("_version", "errors", "files", "places", "statistics"),
    ("data",),
    ("sae",),
    ("ops",),
    ("model",),
    ("profile",),
    ("signed",),
    ("forecast",),
    ("rollouts", "mix", "ablate", "outcomes"),
    ("report",),
    ("trainer", "demo"),
    ("cli",),
    ("__main__",),
]
COMPILED = {"sts_fast.ops._cpu", "sts_fast.ops._cuda"}
LINE_OF = {room: line for line, rooms in enumerate(ROOMS) for room in rooms}
MOST_ENTRIES = 22  # at the top of the package
MOST_PARAMETERS = 9  # of a function, but **options; what belongs together is a dataclass
# The CUDA encoder takes what its native sister takes.
OF_MORE_PARAMETERS = {"ops/device_encoder.py: Encoder.__init__"}
HEAVY = {"torch", "transformers", "sae_lens", "pandas", "pyarrow", "matplotlib", "datasets", "scipy"}
SUBCLASSES_OF_HEAVY = {"trainer.py"}  # whoever imports it has imported transformers
UNPICKLERS = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
NAMES_THAT_SAY_NOTHING = re.compile(r"(^|_)(util|utils|helper|helpers|common|misc|base|manager)$")
MACHINE_PATH = re.compile("(?<![\\w.])/" + "(root|home/[a-z]|work|Users/[a-z])" + "(/|\\b)", re.IGNORECASE)

# Tests of no module: of this tree, its recipes, benchmarks/, docs/, examples/ and tests/fuzz.py; and by folder, of
# killed commands, of the studies, of the core as machine code, of load_sae, and of the report in a browser.
OF_THE_REPOSITORY = {
    "layout", "benchmarks", "benchmarks_gpu", "distribution", "docs", "notebooks", "paper", "embed", "fuzz",
}  # fmt: skip
OF_NO_MODULE = {
    "faults": {"faults"},
    "study": {"real", "world", "agreement", "decisions"},
    "ops": {"core"},
    "sae": {"hostile_checkpoints"},
    "report": {"report_browser"},
}

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)

SOURCES = sorted(path for path in PACKAGE.rglob("*.py*") if path.suffix in (".py", ".pyi"))
MODULES = [path for path in SOURCES if path.suffix == ".py"]


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room_of(path: Path) -> str:
    """The folder at the top of the package that a file is in, or the file itself."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(path.suffix)


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def modules_of(folder: Path) -> dict[str, Path]:
    """Python files of a folder by dotted name; a package has the name of its folder."""
    dotted = {path: path.relative_to(folder.parent).with_suffix("").parts for path in folder.rglob("*.py")}
    return {".".join(parts).removesuffix(".__init__"): path for path, parts in dotted.items()}


def imported(tree: ast.Module, modules: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of everything imported anywhere; of a name that is no module, the module it is taken from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            for alias in node.names:
                full = f"{module}.{alias.name}"
                yield (full if full in modules or full in COMPILED else module), node.lineno


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


def report(offences: list[str]) -> None:
    assert not offences, "\n".join(offences)


def wrong_imports(path: Path, modules: dict[str, Path]) -> Iterator[str]:
    room = room_of(path)
    for name, line in imported(tree_of(path), modules):
        where = f"{name_of(path)}:{line} imports {name}"
        if name.startswith("."):
            yield f"{where}: write it from sts_fast on"
        package, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if package != "sts_fast" or other == room:
            continue
        if other not in LINE_OF:
            yield f"{where}: import it from the module that defines it"
        elif LINE_OF[other] > LINE_OF[room]:
            yield f"{where}, which is to the right of {room}"
        elif LINE_OF[other] == LINE_OF[room] > 0:
            yield f"{where}, which is beside {room}: what both need belongs to their left"


def test_room_imports_only_from_its_left() -> None:
    modules = modules_of(PACKAGE)
    inside = [path for path in SOURCES if path != PACKAGE / "__init__.py"]
    new = {room_of(path) for path in inside} - {*LINE_OF}
    assert not new, f"{', '.join(sorted(new))}: put it into a room, or give it a place in ROOMS"
    report([offence for path in inside for offence in wrong_imports(path, modules)])


def test_no_files_import_each_other_in_a_circle() -> None:
    offences = []
    for folder in (PACKAGE, ROOT / "benchmarks", ROOT / "study"):
        modules = modules_of(folder) if folder.is_dir() else {}
        taken = {name: {other for other, _ in imported(tree_of(path), modules)} for name, path in modules.items()}
        try:
            TopologicalSorter({name: others & {*modules} for name, others in taken.items()}).prepare()
        except CycleError as error:
            offences.append(" <- ".join(error.args[1]))
    report(offences)


def test_package_has_few_entries_at_its_top() -> None:
    entries = {room_of(path) for path in MODULES}
    assert len(entries) <= MOST_ENTRIES, f"{len(entries)} entries, and at most {MOST_ENTRIES} are easy to survey"


def test_init_holds_imports_and_their_names_alone() -> None:
    offences = []
    for path in MODULES:
        body = tree_of(path).body if path.name == "__init__.py" else []
        for node in body[1:]:  # behind the docstring
            is_list = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            is_list |= isinstance(node, ast.FunctionDef) and node.name == "__dir__"
            if not (is_list or isinstance(node, (ast.Import, ast.ImportFrom))):
                offences.append(f"{name_of(path)}:{node.lineno} holds more than imports: move it to a module")
    report(offences)


def functions_of(node: ast.AST, inside: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """(dotted name, definition) of all functions in a tree, those inside classes and other functions too."""
    for child in ast.iter_child_nodes(node):
        name = f"{inside}{child.name}" if isinstance(child, DEFINITIONS) else ""
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield name, child
        yield from functions_of(child, f"{name}." if name else inside)


def test_function_has_fewer_than_ten_parameters() -> None:
    large = {}
    for path in MODULES:
        for name, function in functions_of(tree_of(path)):
            given = function.args
            n = len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs)
            if n > MOST_PARAMETERS:
                large[f"{name_of(path)}: {name}"] = n
    offences = [
        f"{name} has {large[name]} parameters: make dataclasses of them"
        for name in sorted({*large} - OF_MORE_PARAMETERS)
    ]
    report(offences + [f"{name} is no such function any more" for name in sorted(OF_MORE_PARAMETERS - {*large})])


def test_heavy_packages_are_imported_where_used() -> None:
    offences = []
    for path in MODULES:
        if name_of(path) in SUBCLASSES_OF_HEAVY:
            continue
        for node in run_on_import(tree_of(path).body):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for heavy in {name.partition(".")[0] for name in names} & HEAVY:
                offences.append(f"{name_of(path)}:{node.lineno} imports {heavy}: do it inside the function")
    report(offences)


def test_import_loads_nothing_heavy() -> None:
    program = (
        "import sys, sts_fast\n"
        "for name in sts_fast.__all__: getattr(sts_fast, name)\n"
        "print(*(name for name in sys.modules if '.' not in name))\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert not HEAVY & set(ran.stdout.split())


def test_module_prints_nothing_and_trusts_nobody() -> None:
    offences = []
    for path in MODULES:
        for name, line in imported(tree_of(path), {}):
            if name.partition(".")[0] in UNPICKLERS:
                offences.append(f"{name_of(path)}:{line} imports {name}")
        for function, call in calls(path):
            where = f"{name_of(path)}:{call.lineno}"
            if function == "print" and room_of(path) != "cli":
                offences.append(f"{where} prints; only the command line does")
            if is_literal(call, "trust_remote_code", True):
                offences.append(f"{where} runs code that came with a model")
            if is_literal(call, "allow_pickle", True) or (
                function == "torch.load" and not is_literal(call, "weights_only", True)
            ):
                offences.append(f"{where} unpickles")
    report(offences)


def test_every_test_file_has_its_module() -> None:
    """tests/<room>/test_<module>.py, where the module may also be the room, or be named with its package."""
    tested: dict[str, set[str]] = {"": OF_THE_REPOSITORY}
    for path in MODULES:
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names = {"_".join(parts[i:]) for i in range(len(parts))} | {*parts}
        folder = parts[0] if len(parts) > 1 else ""
        tested[folder] = tested.get(folder, set()) | {name.removeprefix("_") for name in names}
    tested["ops"] |= {path.stem.removeprefix("sae_") for path in (ROOT / "csrc").rglob("*.*")}
    for room, names in OF_NO_MODULE.items():
        tested[room] = tested.get(room, set()) | names
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    offences = []
    for path in files:
        folder = path.parent.relative_to(ROOT / "tests").as_posix().removeprefix(".")
        if path.stem.removeprefix("test_") not in tested.get(folder, set()):
            offences.append(f"{path.relative_to(ROOT)} is not named after a module or native source of its room")
    report(offences)
    assert len({path.name for path in files}) == len(files), "two test files of one name cannot run together"


def test_file_names_say_what_is_inside() -> None:
    report([str(path) for path in [*SOURCES, *tracked_files()] if NAMES_THAT_SAY_NOTHING.search(path.stem.lower())])


def test_no_file_names_a_path_of_one_machine() -> None:
    offences = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if found := MACHINE_PATH.search(text):
            offences.append(f"{path.relative_to(ROOT)} names {found[0]}")
    report(offences)
