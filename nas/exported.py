"""An exported folder on its way back in: checked against its model card, and loaded. It runs none of the folder's code.

The weights are a safetensors file, which holds tensors and no code; the network is built by the installed hypernas from
the architecture in config.json.
"""

import json
import re
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import nn

from nas.errors import UserError

CONFIG_VERSION = 1
CARD = "README.md"
_LISTED = re.compile(r"^- `([^`/]+)` sha256 `([0-9a-f]{64})`$", re.M)


def listed(folder: Path) -> str:
    """The card's lines for every other file of the folder, with their sha256."""
    paths = sorted(path for path in folder.iterdir() if path.is_file() and path.name != CARD)
    return "\n".join(f"- `{path.name}` sha256 `{digest(path)}`" for path in paths)


def digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json of an export whose files are all there and unchanged.

    Raises UserError for a folder that is no export, a newer version's, or one with a file that is missing or differs
    from what its card says.
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


def load(folder: str | Path) -> nn.Module:
    """The trained network of an export, in evaluation mode, built of the installed layers with their fast kernels.

    Raises UserError as `read_config`, and where the architecture is of a space that is not installed here.
    """
    from safetensors.torch import load_file

    from search_spaces import load_space
    from search_spaces.base import SpaceError

    config = read_config(folder)
    try:
        space = load_space(config["space"], {})
        model: nn.Module = space.build(space.from_json(config["arch"]))
    except SpaceError as error:
        raise UserError(f"{folder} cannot be built here: {error}; its model.py stands alone") from error
    model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    return model.eval()
