"""What is built and installed: beside other distributions, in folders that hold names like ours, from an sdist."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = ("nas", "kernels", "search_spaces", "dashboards", "docs", "tests")
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "Makefile")
SEARCH = """
import hypernas as nas
settings = {"depth": 1, "d_model": 16, "head_dim": 8, "context": 32, "data.path": "text.txt"}
settings |= {"train.tokens": 512, "train.batch_tokens": 256}
study = nas.search("first", preset="quick", trials=3, engine="inline", halving=False, settings=settings)
assert study.outcome.finished == 3, study.outcome
model = study.best("knee").load()
print(type(model).__module__, nas.__file__)
"""


@pytest.fixture
def folder(tmp_path: Path, text: str) -> Path:
    """A user's folder, with a text and modules that have the names of our top folders."""
    folder = tmp_path / "mine"
    folder.mkdir()
    shutil.copy(text, folder / "text.txt")
    (folder / "nas.py").write_text("raise SystemExit('the file nas.py of the user was imported')")
    for name in ("kernels", "search_spaces", "dashboards"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(f"raise SystemExit('the folder {name} of the user was imported')")
    return folder


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_a_search_works_in_a_folder_that_holds_modules_of_the_same_names(folder: Path) -> None:
    (folder / "snippet.py").write_text(SEARCH)
    assert run(sys.executable, "snippet.py", cwd=folder).startswith("hypernas.search_spaces.")


def test_the_links_of_make_tree_are_the_package_without_an_installation(tmp_path: Path) -> None:
    links = tmp_path / "tree"
    run("make", "-s", "tree", f"TREE={links}", cwd=ROOT)
    code = "import hypernas, hypernas.kernels.swiglu as op; print(hypernas.__file__, op.__file__)"
    found = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(links)).split()
    assert all(path.startswith(str(links)) for path in found)


# ---- what is built -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel and the source distribution, built from a copy without what earlier builds left."""
    made = tmp_path_factory.mktemp("built")
    source = made / "source"
    left_out = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for part in PARTS:
        shutil.copytree(ROOT / part, source / part, ignore=left_out)
    for name in (*FILES, *(path.name for path in ROOT.glob("constraints-*.txt"))):
        shutil.copy(ROOT / name, source / name)
    tools = made / "tools"
    run(sys.executable, "-m", "pip", "install", "-q", "--target", str(tools), "setuptools>=77", cwd=made)
    code = "from setuptools.build_meta import build_sdist, build_wheel; build_sdist('..'); build_wheel('..')"
    run(sys.executable, "-c", code, cwd=source, PYTHONPATH=str(tools))
    return next(made.glob("*.whl")), next(made.glob("*.tar.gz"))


@pytest.mark.slow
def test_the_wheel_has_one_top_level_package_its_types_and_its_data(built: tuple[Path, Path]) -> None:
    names = zipfile.ZipFile(built[0]).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"hypernas"}
    for path in (
        "py.typed",
        "kernels/cpu/common.h",
        "kernels/cpu/swiglu.cpp",
        "search_spaces/lm.py",
        "dashboards/assets/style.css",
        "bench/tables/lm.json",
        "store/migrations/versions/0001_initial.py",
    ):
        assert f"hypernas/{path}" in names


@pytest.mark.slow
def test_the_sdist_holds_tests_and_documents(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"tests/test_packaging.py", "docs/space.md", "nas/api.py", "kernels/cpu/common.h", "Makefile"} <= names


@pytest.mark.slow
def test_the_wheel_works_beside_the_distribution_kernels(
    built: tuple[Path, Path], folder: Path, tmp_path: Path
) -> None:
    """Hugging Face's `kernels`, which transformers uses, has the import name that our folder has."""
    site = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "install", "-q", "--target", str(site))
    run(*pip, "--no-deps", str(built[0]), cwd=tmp_path)
    run(*pip, "kernels", cwd=tmp_path)
    shutil.rmtree(folder / "kernels")
    (folder / "snippet.py").write_text(SEARCH + "import kernels\nprint(kernels.__file__)\n")
    ours, theirs = run(sys.executable, "snippet.py", cwd=folder, PYTHONPATH=str(site)).splitlines()
    assert ours.endswith(str(site / "hypernas" / "__init__.py"))
    assert theirs.startswith(str(site / "kernels"))
