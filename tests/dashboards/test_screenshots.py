import subprocess
import sys

import pytest

from hypernas.dashboards.screenshots import main


@pytest.mark.slow
@pytest.mark.browser
def test_every_page_is_pictured(small, tmp_path, browser_path):
    # A process of its own: playwright runs once in a process, and the other tests' browser may be open in this one.
    out = tmp_path / "images"
    command = [sys.executable, "-m", "hypernas.dashboards.screenshots", "--study", "first", "--out", str(out)]
    command += ["--store", small.store.url.database]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in out.iterdir())
    assert names == ["cluster.png", "front-dark.png", "front-phone.png", "front.png", "space.png", "trial.png"]
    assert all((out / name).stat().st_size > 10_000 for name in names)


def test_an_unknown_study_is_named(small, tmp_path, capsys):
    assert main(["--store", small.store.url.database, "--study", "none", "--out", str(tmp_path / "images")]) == 2
    assert "no study 'none'" in capsys.readouterr().err
    assert not (tmp_path / "images").exists()
