"""Deletes a study: its rows, and the files of its own trials in the folder that belongs to it in this store."""

from contextlib import suppress

from hypernas.store import Store
from hypernas.store.folders import checkpoints_folder, weights_file
from hypernas.store.weights import WEIGHTS, drop_strays
from hypernas.training.checkpoint_files import discard, list_checkpoints


def delete_study(store: Store, name: str) -> None:
    """Deletes the study with its trials, weights and checkpoints. A file that is not one of those stays.

    Raises StudyError for an unknown study, and while a search runs on it.
    """
    row = store.study(name)
    drop_strays(store, row)
    weights = [weights_file(store, row, number) for number in store.artifacts(row, WEIGHTS)]
    checkpoints = checkpoints_folder(store, row, None)
    half_trained = list_checkpoints(str(checkpoints)) & {trial.number for trial in store.trials(row)}
    store.delete_study(name)
    for path in weights:
        path.unlink(missing_ok=True)
    for number in half_trained:
        discard(str(checkpoints), number)
    for folder in (checkpoints, checkpoints.parent, checkpoints.parent.parent):
        with suppress(OSError):  # not there, or not empty: it holds what is not ours to delete
            folder.rmdir()
