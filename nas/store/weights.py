"""Trained weights on disk, written whole or not at all: the front's, or every trial's where children inherit."""

import re
from hashlib import sha256

from hypernas.files import remove_halves, write_whole
from hypernas.records import FINISHED, StudyRow
from hypernas.store import Reader, Store
from hypernas.store.folders import artifacts_folder, weights_file

WEIGHTS = "weights"
_NAME = re.compile(r"trial-(\d{1,9})\.safetensors")


def inherits(study: StudyRow) -> bool:
    """Whether children of the study start from their parents' weights."""
    return study.settings.inherit


def should_keep_weights(store: Reader, study: StudyRow, number: int) -> bool:
    """Whether the trial's weights are kept: on the front, or where children of any trial inherit them."""
    return inherits(study) or store.is_on_front(study, number)


def keep_weights(store: Store, study: StudyRow, number: int, weights: bytes) -> None:
    """Writes the trial's weights and their row in the store; deletes those of trials that have left the front."""
    path = weights_file(store, study, number)
    write_whole(path, weights)
    store.add_artifact(study, number, WEIGHTS, path.name, sha256(weights).hexdigest(), len(weights))
    if inherits(study):
        return
    for other in store.artifacts(study, WEIGHTS, off_front=True):
        store.drop_artifact(study, other, WEIGHTS)
        weights_file(store, study, other).unlink(missing_ok=True)


def drop_strays(store: Reader, study: StudyRow) -> None:
    """Deletes files of weights that no row names: of a search that was killed between the two.

    Not while a search is alive, which may be between the two; nor what is not the weights of an ended trial.
    """
    folder = artifacts_folder(store, study.name)
    found = {int(name[1]) for path in folder.glob("trial-*") if (name := _NAME.fullmatch(path.name))}
    if not folder.is_dir() or store.live_drivers(study):
        return
    remove_halves(folder)
    strays = found - store.artifacts(study, WEIGHTS).keys()
    for number in strays & store.numbers(study, FINISHED) if strays else ():
        weights_file(store, study, number).unlink(missing_ok=True)


def find_weights(store: Reader, study: StudyRow, number: int) -> bytes | None:
    """The trial's weights if they are kept, readable and unchanged, else None: the trial re-trains from its row."""
    _, digest = store.artifacts(study, WEIGHTS, number=number).get(number, ("", ""))
    path = weights_file(store, study, number)
    if not digest or not path.is_file():
        return None
    weights = path.read_bytes()
    return weights if sha256(weights).hexdigest() == digest else None
