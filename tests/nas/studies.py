"""An empty study, for tests of what a store holds."""

from hypernas.records import SpaceSpec, StudyRow, StudySettings
from hypernas.store import Store


def new_study(store: Store, name: str = "s", **changed: object) -> StudyRow:
    described = {
        "space": SpaceSpec("lm"),
        "objectives": ("bits_per_byte", "flops_per_token"),
        "settings": StudySettings(trials=10),
        "reference": {"bits_per_byte": 8.0, "flops_per_token": 9.0},
        "data_name": "words",
        "data_hash": "0" * 64,
    }
    return store.create_study(name, **described | changed)  # type: ignore[arg-type]
