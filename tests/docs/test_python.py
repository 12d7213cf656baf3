"""The Python of the README, of docs/python.md and of the notebook runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
SNIPPETS = [
    pytest.param(text, id=f"{document}-{number}")
    for document in ("README.md", "docs/python.md")
    for number, text in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.S))
]


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_a_snippet_runs_as_it_stands(snippet: str, tmp_path: Path) -> None:
    (tmp_path / "snippet.py").write_text(snippet)
    done = subprocess.run(
        [sys.executable, "snippet.py"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_notebook_runs_and_shows_its_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The kernel must be this interpreter, whatever kernels are installed for the user.
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "none"))
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    notebook = nbformat.read(ROOT / "docs" / "examples" / "search.ipynb", as_version=4)
    NotebookClient(notebook, timeout=250, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    texts = "".join(str(output.get("text", "")) + str(output.get("data", "")) for output in shown)
    assert "trial 0 starts" in texts  # progress
    assert "bits_per_byte" in texts and "application/vnd.plotly" in texts and "import " in texts
