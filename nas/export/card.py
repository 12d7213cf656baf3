"""The model card and config.json of an exported folder, read without torch: whether it is an export, and unchanged."""

import re
from collections.abc import Mapping, Sequence
from hashlib import file_digest
from pathlib import Path
from typing import Any

from hypernas.errors import UserError
from hypernas.files import read_json, read_text
from hypernas.records import check_type

CONFIG_VERSION = 1
CARD = "README.md"
# What readers take from a configuration.
PARTS: Mapping[str, Any] = {
    "study": str,
    "trial": int,
    "space": str,
    "arch": Mapping[str, str | int | float | bool],
    "blocks": Mapping[str, Sequence[Sequence[int]]] | None,
    "training": Mapping[str, str | int | float],
    "data": Mapping[str, Any],
    "sha256": Mapping[str, str],
}
_LISTED = re.compile(r"^- `([^`/]+)` sha256 `([0-9a-f]{64})`$", re.M)


def list_files(folder: Path) -> str:
    """The card's lines for every other file of the folder, with their sha256."""
    paths = sorted(path for path in folder.iterdir() if path.is_file() and path.name != CARD)
    return "\n".join(f"- `{path.name}` sha256 `{digest(path)}`" for path in paths)


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def read_card(folder: str | Path) -> tuple[str, dict[str, Any]]:
    """The model card and config.json of an export, whatever its other files are.

    Raises UserError for a folder that is no export, or a newer version's.
    """
    root = Path(folder)
    try:
        card, found = read_text(root / CARD), read_json(root / "config.json")
    except OSError as error:
        raise UserError(f"{folder} is not an exported model: {error.filename}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{folder} is damaged: its config.json or {CARD} is not text as written") from error
    version = found.get("version") if isinstance(found, dict) else None
    if not isinstance(version, int):
        raise UserError(f"{folder} is not an exported model: its config.json has no version")
    if version > CONFIG_VERSION:
        raise UserError(
            f"{folder} has version {version}, newer than this hypernas knows ({CONFIG_VERSION}): upgrade, or use its "
            "model.py, which stands alone"
        )
    require(folder, {"config.json": found}, "config.json", PARTS)
    return card, found


def require(folder: str | Path, config: Mapping[str, Any], part: str, kinds: Mapping[str, Any]) -> None:
    """Raises UserError unless the values of a part of config.json are of these types; None stands for a missing one."""
    for name, kind in kinds.items():
        try:
            check_type(name, config[part].get(name), kind)
        except ValueError as error:
            raise UserError(f"{folder} is damaged: its {part} has no {name} as written: {error}") from error


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json of an export whose files are all there and unchanged.

    Raises UserError as `read_card`, and for a file that is missing or differs from what the card says.
    """
    root, (card, found) = Path(folder), read_card(folder)
    hashes = dict(_LISTED.findall(card))
    missing = {"config.json", "model.py", "model.safetensors"} - hashes.keys()
    if missing:
        raise UserError(f"{folder} is damaged: its {CARD} says nothing of {', '.join(sorted(missing))}")
    for name, wanted in hashes.items():
        path = root / name
        if not path.is_file():
            raise UserError(f"{folder} is incomplete: {name} is missing; copy it again or export anew")
        if digest(path) != wanted:
            raise UserError(
                f"{folder} is damaged: {name} has sha256 {digest(path)[:12]}..., its {CARD} says {wanted[:12]}...; "
                "copy it again or export anew"
            )
    return found
