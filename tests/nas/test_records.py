"""Settings of a study: typed in code, and in the database as they were."""

import json
from dataclasses import replace

from hypernas.records import StudySettings

OLDER = {
    "study": "s",  # nothing reads it
    "trials": 20,
    "inherit": False,  # written out, though it is the default
    "data_path": None,
    "objectives": ["bits_per_byte"],
    "of_a_later_version": {"a": [1, 2]},
    "seed": 3,
}


def test_stored_settings_are_written_back_to_the_byte() -> None:
    assert json.dumps(StudySettings.of(OLDER).as_json()) == json.dumps(OLDER)
    assert StudySettings.of({}).as_json() == {}


def test_what_is_replaced_is_written_in_its_place_and_new_findings_at_the_end() -> None:
    found = replace(StudySettings.of(OLDER), trials=30, scale={"laws": []})
    assert json.dumps(found.as_json()) == json.dumps({**OLDER, "trials": 30, "scale": {"laws": []}})
    assert StudySettings.of(found.as_json()).scale == {"laws": []}


def test_a_value_put_back_to_its_default_replaces_the_stored_one() -> None:
    settings = replace(StudySettings.of(OLDER), seed=0, trials=0)
    assert settings.as_json() == {**OLDER, "seed": 0, "trials": 0}


def test_a_missing_key_means_what_its_absence_meant() -> None:
    settings = StudySettings.of({"trials": 4})
    assert (settings.repeats, settings.inherit, settings.evaluate, settings.yardstick) == (1, False, "training", None)
    assert (settings.engine, settings.workers, settings.gpus_per_trial) == (None, None, None)
    assert (settings.enqueued, settings.variants, settings.scale, settings.imported) == ((), {}, None, False)
