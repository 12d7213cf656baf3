"""The floors of the house: a package imports lower floors alone, and each third-party library has its owners."""

import ast
import importlib
import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"nas": "hypernas", **{name: f"hypernas.{name}" for name in ("kernels", "search_spaces", "dashboards")}}
# From the ground up; what stands on one floor knows nothing of its neighbours there.
FLOORS = (
    ("errors", "files", "records", "pareto", "version", "yardstick"),
    ("kernels",),
    ("search_spaces",),
    ("data", "store"),
    ("config", "training"),
    ("strategy", "engines"),
    ("show",),
    ("study",),
    ("export", "scaling", "integrations"),
    ("dashboards", "decompose"),
    ("launch", "doctor"),
    ("bench",),
    ("cli", "api"),
    ("__init__", "__main__"),
)
OWNERS = {
    "triton": ("kernels/",),
    "sqlalchemy": ("nas/store/",),
    "alembic": ("nas/store/",),
    "psutil": ("nas/store/", "nas/engines/"),
    "optuna": ("nas/strategy/", "nas/integrations/"),
    "ray": ("nas/engines/", "nas/integrations/"),
    "pyarrow": ("nas/data/",),
    "moocore": ("nas/pareto.py",),
    "safetensors": ("nas/training/", "nas/export/", "nas/decompose/"),
    "scipy": ("nas/scaling/", "nas/decompose/"),
    "rich": ("nas/show/", "nas/export/"),
    "pandas": ("dashboards/", "nas/api.py"),  # the door names the types it returns
    "plotly": ("dashboards/", "nas/api.py"),
    "dash": ("dashboards/",),
    "click": ("nas/cli/", "nas/launch.py", "nas/scaling/launch.py"),
}
FILES = [path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
OTHERS = [path.relative_to(ROOT).as_posix() for top in ("tests", "docs") for path in sorted((ROOT / top).rglob("*.py"))]


@cache
def imports(file: str, *, at_import: bool = False) -> tuple[str, ...]:
    """Every module a file imports, inside functions too, unless only what is loaded with it is asked for."""
    return tuple(_imports(ast.parse((ROOT / file).read_text()), at_import))


def _imports(tree: ast.Module, at_import: bool) -> Iterator[str]:
    skipped: set[ast.AST] = set()
    if at_import:
        for node in ast.walk(tree):
            lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if lazy or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
                skipped.update(ast.walk(node))
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def package_of(module: str) -> str:
    """The package on a floor that a module of ours belongs to: `hypernas.store.rows` is of `store`."""
    return module.removeprefix("hypernas").lstrip(".").partition(".")[0] or "__init__"


def module_of(file: str) -> str:
    """The name that a file is imported by."""
    top, _, rest = file.removesuffix(".py").partition("/")
    return f"{FOLDERS[top]}.{rest.replace('/', '.')}".removesuffix(".__init__")


def inside(module: str, package: str) -> bool:
    """Whether importing the package is part of importing the module."""
    return module == package or module.startswith(f"{package}.")


def floor(package: str) -> int:
    return next(number for number, floor in enumerate(FLOORS) if package in floor)


@pytest.mark.parametrize("file", FILES)
def test_a_package_imports_lower_floors_alone(file: str) -> None:
    mine = package_of(module_of(file))
    for name in imports(file):
        if name.startswith("hypernas.") and package_of(name) != mine and package_of(name) != "__init__":
            assert floor(package_of(name)) < floor(mine), f"{file} imports {name}"


def test_no_import_goes_round_in_a_circle() -> None:
    modules = {module_of(file): file for file in FILES}
    arrows = {
        module: {name for name in imports(file, at_import=True) if name in modules and not inside(module, name)}
        for module, file in modules.items()
    }
    while True:
        leaves = {module for module, needs in arrows.items() if not needs}
        if not leaves:
            break
        arrows = {module: needs - leaves for module, needs in arrows.items() if module not in leaves}
    assert arrows == {}


@pytest.mark.parametrize("file", FILES)
def test_a_library_is_used_by_its_owners_alone(file: str) -> None:
    if file.startswith("nas/bench/"):  # benchmarks may import any peer
        return
    for name in imports(file):
        owners = OWNERS.get(name.partition(".")[0])
        assert owners is None or file.startswith(owners), f"{file} imports {name}; its owners are {owners}"


@pytest.mark.parametrize("file", [*FILES, *OTHERS])
def test_no_module_is_imported_under_a_second_name(file: str) -> None:
    """The folders at the top can be imported from the checkout, where what is imported so is loaded twice."""
    for name in imports(file):
        assert name.partition(".")[0] not in FOLDERS, f"{file} imports {name}: its name begins with hypernas"


@pytest.mark.parametrize("name", FOLDERS.values())
def test_the_import_packages_are_this_projects_own(name: str) -> None:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    assert Path(spec.origin).resolve().is_relative_to(ROOT)


# ---- size ----------------------------------------------------------------------------------------------------------

LONGEST_FUNCTION, LONGEST_FILE = 80, 500  # lines


@pytest.mark.parametrize("file", FILES)
def test_files_and_functions_stay_short(file: str) -> None:
    text = (ROOT / file).read_text()
    assert text.count("\n") <= LONGEST_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and not node.name.endswith("_kernel") and "/migrations/" not in file:
            assert (node.end_lineno or 0) - node.lineno < LONGEST_FUNCTION, f"{file}: {node.name}"


# ---- names in texts ------------------------------------------------------------------------------------------------


def leads_somewhere(dotted: str) -> bool:
    """Whether the longest part of a dotted name that is a module has the rest as attributes."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for name in parts[count:]:
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
        return True
    return False


DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
TEXTS = [*DOCUMENTS, *(ROOT / file for file in [*FILES, *OTHERS])]


def test_what_a_text_runs_with_python_m_is_of_the_package() -> None:
    """The folders' own names are no modules."""
    folders = "|".join(FOLDERS)
    run = {path.name: re.findall(rf"\s-m ({folders})\b", path.read_text()) for path in TEXTS}
    assert {name: found for name, found in run.items() if found} == {}


def test_dotted_names_of_ours_in_texts_and_in_code_that_is_text_are_there() -> None:
    """No linter reads a program in a string, nor a document."""
    named: dict[str, str] = {}
    for path in TEXTS:
        text = path.read_text()
        where = path.relative_to(ROOT).as_posix()
        for match in re.finditer(r"^\s*from (hypernas[\w.]*) import (\w+(?:, \w+)*)", text, re.MULTILINE):
            named |= {f"{match[1]}.{name}": where for name in match[2].split(", ")}
        if path.suffix == ".md":
            named |= {match[0]: where for match in re.finditer(r"(?<!ops\.)\bhypernas(?:\.\w+)+", text)}
    assert {name: where for name, where in named.items() if not leads_somewhere(name)} == {}
