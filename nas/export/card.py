"""The model card and config.json of an exported folder, read without torch: whether it is an export, and unchanged."""

import json
import re
from hashlib import sha256
from pathlib import Path
from typing import Any

from hypernas.errors import UserError

CONFIG_VERSION = 1
CARD = "README.md"
_LISTED = re.compile(r"^- `([^`/]+)` sha256 `([0-9a-f]{64})`$", re.M)


def list_files(folder: Path) -> str:
    """The card's lines for every other file of the folder, with their sha256."""
    paths = sorted(path for path in folder.iterdir() if path.is_file() and path.name != CARD)
    return "\n".join(f"- `{path.name}` sha256 `{digest(path)}`" for path in paths)


def digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def read_card(folder: str | Path) -> tuple[str, dict[str, Any]]:
    """The model card and config.json of an export, whatever its other files are.

    Raises UserError for a folder that is no export, or a newer version's.
    """
    root = Path(folder)
    try:
        card = (root / CARD).read_text(encoding="utf-8")
        found: Any = json.loads((root / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{folder} is not an exported model: {error.strerror}: {error.filename}") from error
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
    return card, found


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
