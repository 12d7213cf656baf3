"""What is asked for of an export, checked without torch: the trial or the rule, the formats and the folder to write."""

import os
import shutil
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from hypernas.errors import StudyError, UserError
from hypernas.export.card import CARD
from hypernas.files import read_json
from hypernas.records import State, StudyRow, Trial

if TYPE_CHECKING:
    from hypernas.store import Reader

PICKS = "knee, best, cheapest or max-flops=X"
FORMATS = ("py", "pt2", "onnx")
GRAPHS = {"pt2": "model.pt2", "onnx": "model.onnx"}  # the files of formats that are graphs
FILES = ("model.py", "model.safetensors", "config.json", CARD)


def check_request(trial: int | None, pick: str | None, formats: str, out: str) -> None:
    """Raises UserError for what neither the study nor torch is needed to refuse."""
    check_choice(trial, pick)
    wanted_formats(formats)
    free_folder(out)


def check_choice(trial: int | None, pick: str | None) -> None:
    """Raises UserError unless one of them is given, and the rule is one."""
    if (trial is None) == (pick is None):
        raise UserError(f"give either --trial N or --pick RULE ({PICKS})")
    if pick is not None:
        parse_pick(pick)


def parse_pick(pick: str) -> tuple[str, float]:
    """A rule, and the FLOPs that it allows. Raises UserError."""
    rule, _, limit = pick.partition("=")
    if rule not in ("knee", "best", "cheapest", "max-flops") or (rule == "max-flops") != bool(limit):
        raise UserError(f"--pick {pick!r}: wanted {PICKS}")
    try:
        return rule, float(limit) if limit else inf
    except ValueError as error:
        raise UserError(f"--pick {pick}: wanted a number of FLOPs") from error


def choose(store: "Reader", study: StudyRow, trial: int | None, pick: str | None) -> Trial:
    """The trial asked for, by number or by a rule over the front. Raises UserError and StudyError."""
    from hypernas import pareto  # brings numpy

    check_choice(trial, pick)
    if trial is not None:
        found = store.trial(study, trial)
        if found.state != State.COMPLETE:
            raise StudyError(f"trial {trial} is {found.state}: only COMPLETE trials have a model to take home")
        return found
    assert pick is not None
    rule, most = parse_pick(pick)
    front = store.front(study)
    if not front:
        raise StudyError(f"study {study.name!r} has no completed trial yet")
    flops = next((name for name in front[0].values if name.startswith("flops")), study.objectives[-1])
    if rule == "best":
        return front[0]
    if rule == "cheapest":
        return min(front, key=lambda t: t.values[flops])
    if rule == "knee":
        return front[knee([pareto.costs(study.objectives, t.values) for t in front])]
    within = [t for t in front if t.values[flops] <= most]
    if not within:
        least = min(t.values[flops] for t in front)
        raise UserError(f"--pick {pick}: the cheapest of the front takes {least:.0f}")
    return within[0]


def knee(points: list[tuple[float, ...]]) -> int:
    """The point nearest to the ideal one, each cost scaled to 0..1 over the front."""
    spans = [(min(axis), max(axis)) for axis in zip(*points, strict=True)]

    def distance(point: tuple[float, ...]) -> float:
        return sum(((x - low) / (high - low)) ** 2 for x, (low, high) in zip(point, spans, strict=True) if high > low)

    return min(range(len(points)), key=lambda i: distance(points[i]))


def wanted_formats(asked: str) -> tuple[str, ...]:
    """The formats of a list like py,pt2,onnx; the source is always among them. Raises UserError."""
    names = [name.strip() for name in asked.split(",")]
    for name in names:
        if name not in FORMATS:
            raise UserError(f"--formats {name!r}: wanted some of {', '.join(FORMATS)}")
    return tuple(name for name in FORMATS if name == "py" or name in names)


def free_folder(out: str) -> Path:
    """Where an export may be written. Raises UserError where it would replace anything but an export."""
    folder = Path(out).resolve()
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or _is_export(folder))):
        raise UserError(f"--out {out}: exists and is not an earlier export; name another folder")
    check_parent(folder, out)
    return folder


def check_parent(folder: Path, out: str) -> None:
    """Raises UserError unless an export can be put together beside where it will lie."""
    if not folder.parent.is_dir():
        raise UserError(f"--out {out}: the folder {folder.parent} does not exist")
    if not os.access(folder.parent, os.W_OK | os.X_OK):
        raise UserError(
            f"--out {out}: {folder.parent} cannot be written to, where an export is put together before it takes its "
            "name: name a folder in one that can be"
        )


def check_room(folder: Path, parameters: int | None) -> None:
    """Raises UserError where not even the weights fit beside `folder`: before anything is trained for it."""
    free, wanted = shutil.disk_usage(folder.parent).free, 4 * (parameters or 0)
    if free < wanted:
        raise UserError(
            f"--out {folder}: the weights alone take {wanted:,} bytes, and {free:,} are free there: make room, or name "
            "a folder on another disk"
        )


def _is_export(folder: Path) -> bool:
    """Whether the folder holds an export of ours and nothing else: only then may it be replaced."""
    if {path.name for path in folder.iterdir()} - {*FILES, *GRAPHS.values(), "__pycache__"}:
        return False
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and {"hypernas", "trial"} <= config.keys()
