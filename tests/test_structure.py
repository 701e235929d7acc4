"""Reads every module and fails where the house is out of shape: sizes, floors, cycles, owners of a library.

The floors are those the README's tree states: an import points down or stays on its floor.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("profiles", "tuner", "store")
MOST_MODULE_LINES, MOST_FUNCTION_LINES, MOST_PARAMETERS = 400, 50, 5
# a name stands for itself and what is under it; the longest that fits counts
FLOORS = {
    "profiles.errors": 0,
    "profiles.terms": 0,
    "profiles.files": 1,
    "profiles.formulas": 1,
    "profiles.keys": 1,
    "profiles.packages": 1,
    "profiles.pairs": 1,
    "profiles.properties": 0,
    "profiles.protocol": 0,
    "profiles.replay": 1,
    "profiles.serving.gguf_place": 1,
    "profiles.serving.llama_flags": 1,
    "profiles.shipped": 1,
    "profiles.sizes": 1,
    "profiles.spelling": 1,
    "profiles.steering": 0,
    "profiles.traits": 1,
    "profiles": 2,
    "tuner": 3,
    "store": 4,
    "tune": 5,
}
# library -> the only places that may import it
OWNERS = {
    "optuna": ("tuner.search",),
    "sklearn": ("tuner.router",),
    "sqlalchemy": ("store",),
    "alembic": ("store",),
    "torch": ("profiles",),
    "transformers": ("profiles",),
}
TOOLS = ("profiles.family",)  # make what ships; not part of a run
UNSAFE = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve")
SQL = re.compile(r"^\s*(SELECT|INSERT|UPDATE|DELETE|CREATE|DROP|ALTER|REPLACE|WITH)\s")

MODULES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py")) + sorted(ROOT.glob("tune.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def name_of(path: Path) -> str:
    """`tuner/export/__init__.py` is `tuner.export`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def by_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


NAMES = frozenset(name_of(path) for path in MODULES)
every_module = pytest.mark.parametrize("path", MODULES, ids=by_name)
every_file = pytest.mark.parametrize("path", MODULES + TESTS, ids=by_name)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def within(module: str, places: tuple[str, ...]) -> bool:
    return any(module == place or module.startswith(place + ".") for place in places)


def imports_of(path: Path) -> Iterator[str]:
    """Dotted names a module imports anywhere in it, functions included; our own as modules, not as names in them."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{by_name(path)}:{node.lineno} imports relatively"
            assert node.level == 0, f"{by_name(path)}:{node.lineno} imports relatively"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (full if full in NAMES else node.module for full in inner)


def functions_of(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def floor_of(module: str) -> int:
    return FLOORS[max((name for name in FLOORS if within(module, (name,))), key=len)]


def calls_of(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call with the last part of what is called: `torch.cuda.synchronize()` gives `synchronize`."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            called = node.func
            yield called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", ""), node


def is_command(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """A typer command: its parameters are the flags."""
    return any(".command(" in ast.unparse(decorator) for decorator in function.decorator_list)


def test_the_rooms_are_found() -> None:
    """The checks below read real modules (an empty list would pass them all)."""
    assert {"profiles.terms", "tuner.policy", "tuner.export", "store"} <= NAMES


@every_file
def test_module_size(path: Path) -> None:
    """A module has at most 400 lines."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_MODULE_LINES


@every_module
def test_function_size(path: Path) -> None:
    """A function has at most 50 lines and 5 parameters beside self; a command's parameters are its flags."""
    for function in functions_of(path):
        where = f"{by_name(path)}:{function.lineno} {function.name}"
        size = (function.end_lineno or function.lineno) - function.lineno + 1
        taken = function.args
        names = [one.arg for one in taken.posonlyargs + taken.args + taken.kwonlyargs if one.arg not in ("self", "cls")]
        if not is_command(function):
            assert size <= MOST_FUNCTION_LINES, f"{where} has {size} lines"
            assert len(names) <= MOST_PARAMETERS, f"{where} has {len(names)} parameters"


@every_module
def test_module_opens_with_its_purpose(path: Path) -> None:
    """A module with code in it says what it is for."""
    tree = tree_of(path)
    assert not tree.body or ast.get_docstring(tree), f"{by_name(path)} has no docstring"


@every_module
def test_imports_point_down(path: Path) -> None:
    """An import points down the floors; tuner and floor 2 do not know each other."""
    module = name_of(path)
    for imported in imports_of(path):
        if not within(imported, (*ROOMS, "tune", "tests")):
            continue
        assert not within(imported, ("tests",)), f"{module} imports {imported}"
        assert floor_of(imported) <= floor_of(module), f"{module} imports {imported}, which is above it"
        if within(module, ("tuner",)):
            assert floor_of(imported) != 2, f"{module} imports {imported}, which measures"
        if not within(module, TOOLS):
            assert not within(imported, TOOLS), f"{module} imports the tool {imported}"


def test_no_import_cycle() -> None:
    """No module reaches itself through imports, those inside functions included."""
    graph = {name_of(path): sorted({one for one in imports_of(path) if one in NAMES}) for path in MODULES}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"import cycle: {' -> '.join((*way, module))}"
        if module not in done:
            for imported in graph[module]:
                visit(imported, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@every_module
def test_libraries_stay_with_their_owner(path: Path) -> None:
    """Optuna, scikit-learn, SQLAlchemy, Alembic, torch and transformers are imported in their room only."""
    for imported in imports_of(path):
        owners = OWNERS.get(imported.split(".")[0])
        assert owners is None or within(name_of(path), owners), f"{name_of(path)} imports {imported}"


@every_module
def test_one_clock(path: Path) -> None:
    """Only `profiles.clock` synchronises the device or reads the clock; `store.remember` times what it saves."""
    module = name_of(path)
    if module == "profiles.clock" or within(module, TOOLS):
        return
    allowed = {"perf_counter"} if module == "store.remember" else set()
    for node in ast.walk(tree_of(path)):
        names = {getattr(node, "attr", None), getattr(node, "id", None)}
        names |= {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else set()
        used = (names & {"perf_counter", "perf_counter_ns", "synchronize"}) - allowed
        assert not used, f"{by_name(path)}:{getattr(node, 'lineno', 0)} {module} uses {used}"


@every_file
def test_nothing_unsafe_is_loaded(path: Path) -> None:
    """No pickle, nor `torch.load`, which reads one: a file must not be able to run code."""
    for imported in imports_of(path):
        assert imported.split(".")[0] not in UNSAFE, f"{by_name(path)} imports {imported}"
    for _, call in calls_of(path):
        assert ast.unparse(call.func) != "torch.load", f"{by_name(path)}:{call.lineno} loads a pickle"


@pytest.mark.parametrize("path", [path for path in MODULES if within(name_of(path), ("store",))], ids=by_name)
def test_no_raw_sql(path: Path) -> None:
    """The store speaks SQLAlchemy: no statement is spelled as a string, and `text` is for PRAGMA only."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not SQL.match(node.value), f"{by_name(path)}:{node.lineno} {node.value[:40]!r}"
    for name, call in calls_of(path):
        if name == "text" and call.args:
            said = ast.unparse(call.args[0]).lstrip("f'\"").upper()
            assert said.startswith("PRAGMA"), f"{by_name(path)}:{call.lineno} text({said[:40]})"


@pytest.mark.parametrize("path", [path for path in TESTS if path.name.startswith("test_")], ids=by_name)
def test_tests_say_what_they_check(path: Path) -> None:
    """Every test function has a docstring."""
    for function in functions_of(path):
        if function.name.startswith("test_"):
            assert ast.get_docstring(function), f"{by_name(path)}:{function.lineno} {function.name} has no docstring"
