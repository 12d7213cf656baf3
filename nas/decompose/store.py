"""The block variants of a model, as points of its study's front."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hypernas.data.tasks import Task
from hypernas.errors import UserError
from hypernas.show.json_shapes import training_json
from hypernas.store import Reader, Store
from hypernas.training.model import Score, name_values

DEFAULT_STORE = "nas.db"


def joins_front(store: str | None, folder: str, config: Mapping[str, Any], say: Callable[[str], None]) -> bool:
    """Whether the store holds the trial that the model is of. Raises UserError where a store is given and does not."""
    try:
        with Reader(store or DEFAULT_STORE) as opened:
            row = opened.study(config["study"])
            trial = opened.trial(row, config["trial"])
            if (dict(trial.arch), training_json(row, trial)) != (config["arch"], config["training"]):
                raise UserError(
                    f"trial {trial.number} of study {row.name!r} in {opened.shown} is not the model of {folder}: it "
                    "has another architecture, or was trained otherwise"
                )
    except UserError as error:
        if store is not None:
            raise
        say(f"the curve joins no front, as its study is not here; --store URL says where it is ({error})")
        return False
    return True


def join_front(store: Store, config: Mapping[str, Any], points: Sequence[Mapping[str, Any]], task: Task) -> None:
    """Puts the variants of a trial that run as blocks beside the front of its study, by the names of objectives."""
    row = store.study(config["study"])
    variants = [
        {
            "kept": point["kept"],
            **name_values(task, Score(point[task.loss], point["accuracy"]), point["flops"], point["parameters"]),
        }
        for point in points
        if point["method"] == "blocks"
    ]
    joined = {**row.settings.variants, str(config["trial"]): variants}
    store.update_settings(row, replace(row.settings, variants=joined))
