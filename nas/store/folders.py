"""Where a study's files lie, by the store that is open: what a row says of folders is never asked.

So a study that was copied, moved or imported has files of its own, beside the store it is in now, and no row can name
the folder of anybody else. The files' names follow from the numbers of trials.
"""

from pathlib import Path

from hypernas.errors import StoreError
from hypernas.records import StudyRow
from hypernas.search_spaces.base import digest
from hypernas.store.reader import Reader


def _file_of(store: Reader) -> Path | None:
    """The file of a SQLite store, links followed; None for a server's."""
    return Path(store.url.database or "").resolve() if store.url.get_backend_name() == "sqlite" else None


def artifacts_folder(store: Reader, study: str) -> Path:
    """Where a study's weights are kept: beside a SQLite file, in the working directory otherwise.

    A store that moves takes them along: of its file the name counts, not the folder, unless all of them are on another
    disk, behind a link. Raises StoreError where the folder itself is a link.
    """
    path = _file_of(store)
    base, name = (Path("nas").resolve(), store.shown) if path is None else (path, f"sqlite:///{path.name}")
    root = base.parent / f"{base.stem}-artifacts"
    if path is not None and root.is_symlink():  # that of a copied folder leads to the original's
        name = str(path)
    return _no_link(root / digest({"store": name, "study": study}))


def _no_link(folder: Path) -> Path:
    if folder.is_symlink():
        raise StoreError(f"{folder} is a link, and would lead to the files of another study: delete the link")
    return folder


def weights_file(store: Reader, study: StudyRow, number: int) -> Path:
    """The file of a trial's weights, whether it is there or not."""
    return artifacts_folder(store, study.name) / f"trial-{int(number)}.safetensors"


def checkpoints_folder(store: Reader, study: StudyRow, shared: str | None) -> Path:
    """Where half-trained trials are kept: beside the weights, or in a folder that the studies of many stores share."""
    if shared is None:
        return _no_link(artifacts_folder(store, study.name) / "checkpoints")
    owner = {"store": str(_file_of(store) or store.shown), "study": study.name, "created": study.created.isoformat()}
    return Path(shared).resolve() / digest(owner) / "checkpoints"
