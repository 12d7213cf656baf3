"""The name of the code that computes changes with every file that does."""

import pkgutil
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hypernas.training
from hypernas.engines.cluster import COMPUTES

ROOT = Path(__file__).parents[3]
# A file of each kind: where it lies, and where an import finds it.
EDITED = (
    "kernels/swiglu.py",
    "kernels/cpu/swiglu.cpp",
    "kernels/cpu/common.h",
    "search_spaces/layers.py",
    "training/step.py",
    "data/text.py",
    "records.py",
    "yardstick.py",
    "errors.py",
)
HASHES = """
import sys
from pathlib import Path
from hypernas.engines.cluster import code_hash
print(code_hash())
for name in sys.argv[2:]:
    path = Path(sys.argv[1]) / name
    before = path.read_bytes()
    path.write_bytes(before + b"\\n")
    print(code_hash())
    path.write_bytes(before)
print(code_hash())
"""


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The package as a wheel lays it out, to be edited."""
    package = tmp_path / "site" / "hypernas"
    left_out = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "nas", package, ignore=left_out)
    for name in ("kernels", "search_spaces", "dashboards"):
        shutil.copytree(ROOT / name, package / name, ignore=left_out)
    return package


def test_an_edit_of_whatever_computes_gives_the_code_another_name(copied: Path) -> None:
    command = [sys.executable, "-c", HASHES, str(copied), *EDITED, "study/driver.py"]
    environment = {"PYTHONPATH": str(copied.parent), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=copied.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, *edited, driver, last = done.stdout.split()
    assert first == last == driver  # the loop that hands out jobs computes nothing
    assert len({first, *edited}) == 1 + len(EDITED)


def modules() -> Iterator[str]:
    for found in pkgutil.iter_modules(hypernas.training.__path__, "hypernas.training."):
        yield found.name


def test_everything_that_training_imports_is_in_the_hash() -> None:
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\nprint(*sys.modules)"
    command = [sys.executable, "-c", code, *modules()]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    packages = {name.split(".")[1] for name in loaded if name.startswith("hypernas.")}
    assert packages <= set(COMPUTES)
