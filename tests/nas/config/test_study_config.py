"""A field of StudyConfig is written once: its option, its types and its scope follow from there."""

from typing import Any

import pytest

from hypernas.cli.search import search
from hypernas.config.study_config import FLAGS, Scope, StudyConfig, names_of, resume_settings, to_json, wrong_type
from hypernas.errors import UserError


def test_every_field_is_an_option_of_search_under_its_own_name() -> None:
    options = {param.name: param for param in search.params}
    assert options.keys() - {"config"} == FLAGS.keys()
    for name, flag in FLAGS.items():
        shown = getattr(options[name], "help", "")
        assert shown.startswith(flag.help) and flag.help.endswith(".")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("trials", 3, ""),
        ("trials", "3", "is str; wanted int"),
        ("trials", True, "is bool; wanted int"),
        ("time", 3, ""),
        ("time", "x", "is str; wanted int or float"),
        ("halving", False, ""),
        ("halving", 1, "is int; wanted bool"),
        ("objectives", "loss,flops", ""),
        ("objectives", ("loss", "flops"), ""),
        ("objectives", 3, "is int; wanted list or str"),
        ("sampler", "tpe", ""),
        ("settings", {"depth": "2"}, ""),
    ],
)
def test_a_value_of_another_type_than_its_fields_is_told_apart(name: str, value: Any, said: str) -> None:
    assert wrong_type(name, value) == said


def test_what_belongs_to_one_run_is_not_stored_and_all_else_is() -> None:
    assert to_json(StudyConfig()).keys() == FLAGS.keys() - set(names_of(Scope.RUN))


def test_a_resumed_study_changes_all_but_what_it_is() -> None:
    stored = to_json(StudyConfig(study="s", seed=3))
    assert resume_settings(stored, {"study": "s", "trials": 9, "workers": 2, "time": 1.0}).workers == 2
    for name, value in {"seed": 4, "preset": "quick", "objectives": ("loss",), "settings": {"depth": "2"}}.items():
        with pytest.raises(UserError, match=f"was created with {name}"):
            resume_settings(stored, {"study": "s", name: value})


def test_a_bad_value_is_refused_by_the_name_of_its_option() -> None:
    bad: dict[str, Any] = {"trial_timeout": 0.0, "device_hours": -1.0, "seed": -1, "repeats": 101, "study": " "}
    for name, value in bad.items():
        with pytest.raises(UserError, match="^--" + name.replace("_", "-")):
            StudyConfig(**{name: value})
