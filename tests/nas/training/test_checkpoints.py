"""Half-trained trials on disk."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hypernas import files
from hypernas.data.text import load_corpus
from hypernas.records import Job, Notice, Recipe, Report, Result, SpaceSpec
from hypernas.search_spaces.lm import LanguageModels
from hypernas.training.checkpoint_files import checkpoint_path, discard, list_checkpoints
from hypernas.training.checkpoints import CheckpointError, load_checkpoint
from hypernas.training.model import seeded_build
from hypernas.training.step import make_optimizers
from hypernas.training.worker import run

SPACE = LanguageModels()
ARCH = {"depth": 2, "d_model": 32, "head_dim": 8, "context": 32, "streams.n": 2, "gates.placement": "both"}


def job(text: str, folder: Path, optimizer: str = "adamw", **changed: object) -> Job:
    recipe = Recipe(3e-3, optimizer=optimizer, tokens=4096, batch_tokens=256)
    made = Job("s", 7, 1, SpaceSpec("lm"), ARCH, recipe, text, load_corpus(text).hash, 0)
    return replace(made, checkpoint=checkpoint_path(str(folder), 7), **changed)  # type: ignore[arg-type]


def until_rung(made: Job, rung: int) -> list[Report]:
    """Trains up to a rung, then lets go as a lost worker would."""
    reports = []
    events = run(made)
    for event in events:
        if isinstance(event, Report):
            reports.append(event)
            if event.rung == rung:
                break
    events.close()
    return reports


def finish(made: Job) -> tuple[list[Report], Result, list[Notice]]:
    *events, result = run(made)
    assert isinstance(result, Result) and result.failure is None, result
    reports = [event for event in events if isinstance(event, Report)]
    return reports, result, [event for event in events if isinstance(event, Notice)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_training_resumed_at_any_rung_gives_the_bits_of_training_undisturbed(
    optimizer: str, text: str, tmp_path: Path
) -> None:
    reports, whole, _ = finish(replace(job(text, tmp_path, optimizer), checkpoint=None))
    for rung in range(3):
        until_rung(job(text, tmp_path, optimizer), rung)
        rest, resumed, notices = finish(job(text, tmp_path, optimizer, token=2))
        assert notices == []
        assert [report.rung for report in rest] == list(range(rung, 4))  # the rung's own, in case it was lost
        assert [report.loss for report in rest] == [report.loss for report in reports[rung:]]
        assert resumed.values == whole.values
        assert resumed.weights == whole.weights
        discard(str(tmp_path), 7)


def test_a_damaged_checkpoint_is_named_and_the_trial_starts_again(text: str, tmp_path: Path) -> None:
    _, whole, _ = finish(replace(job(text, tmp_path), checkpoint=None))
    until_rung(job(text, tmp_path), 1)
    path = Path(checkpoint_path(str(tmp_path), 7))
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    for broken in (bytes(flipped), content[: len(content) // 2], b""):
        path.write_bytes(broken)
        reports, again, (notice,) = finish(job(text, tmp_path))
        assert "beginning" in notice.message and str(path) in notice.message
        assert [report.rung for report in reports] == [0, 1, 2, 3]
        assert again.values == whole.values


def test_a_checkpoint_of_other_training_is_refused(text: str, tmp_path: Path) -> None:
    until_rung(job(text, tmp_path), 1)
    other = job(text, tmp_path, data_seed=1)
    model = seeded_build(SPACE, SPACE.from_json(ARCH), 0)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(CheckpointError, match="other training"):
        load_checkpoint(other, model, make_optimizers(model, other.recipe))
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_a_disk_that_is_full_costs_the_checkpoint_and_not_the_trial(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    _, whole, _ = finish(replace(job(text, tmp_path), checkpoint=None))
    with monkeypatch.context() as patched:
        patched.setattr(files.os, "fsync", full)
        _, result, notices = finish(job(text, tmp_path))
    assert result.values == whole.values
    assert [notice.message.partition(":")[0] for notice in notices] == [
        f"has no checkpoint of rung {r}" for r in range(3)
    ]
    assert list(tmp_path.iterdir()) == []  # nothing half-written is left


def test_only_the_newest_rung_is_kept_and_nothing_once_it_is_discarded(text: str, tmp_path: Path) -> None:
    until_rung(job(text, tmp_path), 2)
    assert [path.name for path in tmp_path.iterdir()] == ["trial-7.checkpoint"]
    assert list_checkpoints(str(tmp_path)) == {7}
    (tmp_path / "trial-7.checkpoint.123.partial").write_bytes(b"half")
    discard(str(tmp_path), 7)
    assert list(tmp_path.iterdir()) == []
