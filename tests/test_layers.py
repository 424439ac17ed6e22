"""Who may import whom: no arrow back up, no circle. Read from the source, nothing is imported."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# torch_clip, from the ground up; a module imports only from lines above its own.
FLOORS = (
    {"scalars"},
    {"norms", "schedules", "shapes", "histories", "tails", "smoothness"},
    {"scopes", "thresholds", "gates"},
    {"clipping"},
    {"chain", "spike_guard", "attach"},
    {"transforms"},
    {"methods"},
    {"expect", "sstm"},
    {"alone", "attached", "processes"},
    {"testing"},
    {"optimizers"},
    {"restarter"},
    {"optimizers_collector"},
    {"torch_clip"},  # __init__
)
# What each part of clipbench may know of the repository, itself apart.
ALLOWED = {
    "torch_clip": set(),
    "experiments.errors": set(),
    "experiments.complaints": {"experiments.errors", "experiments.training.presets"},
    "experiments.locks": set(),
    "experiments.runs": {"experiments.errors", "experiments.locks"},
    "experiments.sweeps": {"experiments.locks", "experiments.runs"},
    "experiments.trials": {"experiments.errors", "experiments.runs", "experiments.sweeps"},
    "experiments.tasks": {"experiments.errors", "torch_clip"},
    "experiments.training": {
        *("experiments.errors", "experiments.runs", "experiments.sweeps", "experiments.trials"),
        *("experiments.tasks", "torch_clip"),
    },
    "experiments.analysis": {
        *("experiments.errors", "experiments.runs", "experiments.sweeps", "experiments.trials"),
        "torch_clip.tails",
    },
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PACKAGES = ("torch_clip", "experiments")
SOURCES = {module_name(path): path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
LIBRARY = [name for name in SOURCES if name.split(".")[0] == "torch_clip"]


def imports(source: str, module: str, is_package: bool = False, top_level: bool = False) -> set[str]:
    """Dotted names that ``source`` imports, relative ones resolved; a ``from`` import gives its parts too.

    Args:
        source: of a module.
        module: its dotted name.
        is_package: whether it is an ``__init__``.
        top_level: only what is imported when the module is, not inside functions; type checking apart.
    """

    def walk(node: ast.AST):
        for child in ast.iter_child_nodes(node):
            if top_level and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                yield from () if top_level else walk(child)
                continue
            yield child
            yield from walk(child)

    found = set()
    for node in walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join([*parents[: len(parents) - node.level + 1], *base.split(".")]).strip(".")
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
            found |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return found


def imports_of(module: str, top_level: bool = False) -> set[str]:
    path = SOURCES[module]
    return imports(path.read_text(encoding="utf8"), module, path.name == "__init__.py", top_level)


def modules_of(module: str) -> set[str]:
    """The repository's modules that ``module`` imports: the longest name of each import that is a file."""
    known = set()
    for name in imports_of(module):
        parts = name.split(".")
        prefixes = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
        known |= {next((prefix for prefix in prefixes if prefix in SOURCES), module)}
    return known - {module}


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def test_the_reader_of_imports_sees_all_kinds():
    source = (
        "import a.b, c\nfrom d import e\nfrom . import f\nfrom ..g import h\n"
        "if TYPE_CHECKING:\n    import i\n"
        "def function():\n    import j\n    importlib.import_module('k')\n"
        "try:\n    import l\nexcept E:\n    pass\n"
    )
    always = {"a.b", "c", "d", "d.e", "x.y", "x.y.f", "x.g", "x.g.h", "l"}
    assert imports(source, "x.y.z", top_level=True) == always
    assert imports(source, "x.y.z") == always | {"i", "j", "k"}
    assert imports("from .m import n", "x.y", is_package=True) == {"x.y.m", "x.y.m.n"}
    assert "torch_clip.attach" in SOURCES


@pytest.mark.parametrize("module", LIBRARY)
def test_the_library_imports_torch_and_the_standard_library(module):
    roots = {name.split(".")[0] for name in imports_of(module)}
    assert roots - set(sys.stdlib_module_names) <= {"torch", "torch_clip"}


@pytest.mark.parametrize("module", LIBRARY)
def test_the_library_builds_upwards(module):
    floor_of = {name: floor for floor, names in enumerate(FLOORS) for name in names}
    own = module.rpartition(".")[2]
    assert own in floor_of, f"give {own} a floor in FLOORS"
    for other in modules_of(module):
        assert floor_of[other.rpartition(".")[2]] < floor_of[own], f"{module} imports {other}"


@pytest.mark.parametrize("part", ALLOWED)
def test_arrows_between_the_parts(part):
    for module in SOURCES:
        if not within(module, part):
            continue
        for other in modules_of(module):
            allowed = any(within(other, package) for package in ALLOWED[part] | {part})
            # A package on the way to an allowed module is run when that is imported, and may be named.
            assert allowed or other in ("experiments", "torch_clip"), f"{module} imports {other}"


def test_the_package_of_experiments_is_empty_of_imports():
    # Or the rule above would let anything through it.
    assert not {name for name in imports_of("experiments") if within(name, "experiments")}


def test_nobody_imports_scripts_or_tests():
    for module in SOURCES:
        roots = {name.split(".")[0] for name in imports_of(module)}
        assert not roots & {"scripts", "tests", "conftest"}, module


def test_the_command_line_starts_light():
    """`clipbench list` and a misspelt option answer without waiting for torch or Hydra."""
    heavy = {"torch", "hydra", "omegaconf", "transformers", "pandas", "matplotlib", "numpy"}
    commands = {module for module in SOURCES if within(module, "experiments.commands")}
    reached, waiting = set(), {"experiments", "experiments.cli"} | commands
    while waiting:
        module = waiting.pop()
        reached.add(module)
        names = imports_of(module, top_level=True)
        assert not {name.split(".")[0] for name in names} & heavy, module
        waiting |= ({n for name in names for n in (name, name.rpartition(".")[0])} & set(SOURCES)) - reached


def test_there_are_no_circles():
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above[above.index(module) :], module])
        if module in done:
            return
        for other in modules_of(module):
            # A package's __init__ may gather its modules; they do not import it back.
            visit(other, (*above, module))
        done.add(module)

    for module in SOURCES:
        visit(module, ())
