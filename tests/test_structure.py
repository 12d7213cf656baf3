"""The one structural rule: imports run one way, and each third-party library has its owners."""

import ast
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("kernels", "search_spaces", "nas", "dashboards")  # each imports only those before it
OWNERS = {
    "triton": ("kernels/",),
    "sqlalchemy": ("nas/store/",),
    "alembic": ("nas/store/",),
    "optuna": ("nas/strategy/samplers.py", "nas/strategy/optuna_study.py", "nas/integrations/optuna_db.py"),
    "ray": ("nas/engines/ray_pool.py", "nas/engines/tune_pool.py", "nas/integrations/ray_tune.py"),
    "pyarrow": ("nas/data/text.py",),
    "moocore": ("nas/pareto.py",),
    "safetensors": (
        *("nas/export/write.py", "nas/export/read.py", "nas/export/formats.py", "nas/decompose/command.py"),
        *("nas/training/checkpoints.py", "nas/training/evaluate.py", "nas/training/inherit.py"),
    ),
    "scipy": ("nas/scaling/fit.py", "nas/decompose/evidence.py"),
    "rich": ("nas/show/views.py", "nas/show/json_shapes.py", "nas/export/write.py", "nas/export/retrain.py"),
    "pandas": ("dashboards/",),
    "plotly": ("dashboards/",),
    "dash": ("dashboards/",),
    "click": ("nas/cli/main.py", "nas/launch.py"),
    "psutil": ("nas/store/",),
}
REMOTE = (
    "nas/training/worker.py",
    "nas/training/evaluate.py",
    "nas/data/text.py",
    "nas/data/images.py",
    "nas/data/tasks.py",
    "nas/records.py",
    "nas/training/measure.py",
    "nas/training/checkpoints.py",
    "nas/training/repeats.py",
    "nas/training/inherit.py",
)
DRIVER_ONLY = tuple(f"hypernas.{name}" for name in ("store", "study", "samplers", "optuna_io", "driver", "executors"))
FILES = [path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]

TRACKED = [
    *FILES,
    *(path.relative_to(ROOT).as_posix() for top in ("tests", "docs") for path in (ROOT / top).rglob("*.py")),
]


def imports(file: str) -> list[str]:
    """Every module a file imports, inside functions too."""
    names = []
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names += [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


@pytest.mark.parametrize("file", FILES)
def test_imports_run_from_right_to_left(file: str) -> None:
    if file == "nas/cli/main.py":  # it alone may import any folder, inside its commands
        return
    place = FOLDERS.index(file.partition("/")[0])
    for name in imports(file):
        top = name.removeprefix("hypernas.").partition(".")[0] if name.startswith("hypernas.") else ""
        assert top not in FOLDERS or FOLDERS.index(top) <= place, f"{file} imports {name}"


@pytest.mark.parametrize("file", TRACKED)
def test_no_module_is_imported_under_a_second_name(file: str) -> None:
    """The folders at the top can be imported from the checkout, where what is imported so is loaded twice."""
    for name in imports(file):
        assert name.partition(".")[0] not in FOLDERS, f"{file} imports {name}: its name is hypernas.{name}"


@pytest.mark.parametrize("file", FILES)
def test_a_library_is_used_by_its_owners_alone(file: str) -> None:
    if file.startswith("nas/bench_"):  # benchmarks may import any peer
        return
    for name in imports(file):
        owners = OWNERS.get(name.partition(".")[0])
        assert owners is None or file.startswith(owners), f"{file} imports {name}; its owners are {owners}"


@pytest.mark.parametrize("file", [file for file in FILES if file in REMOTE])
def test_what_runs_remotely_knows_nothing_of_the_study(file: str) -> None:
    for name in imports(file):
        assert not name.startswith(DRIVER_ONLY), f"{file} imports {name}"


@pytest.mark.parametrize("name", ["hypernas", *(f"hypernas.{name}" for name in FOLDERS if name != "nas")])
def test_the_import_packages_are_this_projects_own(name: str) -> None:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    assert Path(spec.origin).resolve().is_relative_to(ROOT)
