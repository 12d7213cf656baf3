"""What `nas decompose` is asked for, checked without torch: the export, the controls and the folder to write."""

from pathlib import Path

from hypernas.errors import UserError
from hypernas.export.card import read_card
from hypernas.export.request import check_parent

LEAST_CONTROLS = 3  # each is tested against two others, as the model is against all


def check_request(folder: str, out: str, controls: int) -> None:
    """Raises UserError for what no torch is needed to refuse; the folder's files are compared later."""
    check_controls(controls)
    read_card(folder)
    check_target(out)


def check_controls(controls: int) -> None:
    if controls < LEAST_CONTROLS:
        raise UserError(
            f"--controls {controls}: wanted at least {LEAST_CONTROLS}, since each is tested against two others"
        )


def check_target(out: str) -> Path:
    """The folder to write. Raises UserError where it exists, or the folder that it would lie in does not."""
    target = Path(out).resolve()
    if target.exists():
        raise UserError(f"--out {out}: exists; name another folder")
    check_parent(target, out)
    return target
