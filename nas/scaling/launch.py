"""Runs a ladder from the flags of `nas scale`."""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from typing import Any

import click

from hypernas.config.study_config import StudyConfig
from hypernas.engines.devices import on_what
from hypernas.errors import UserError
from hypernas.scaling.analysis import analyse, keep
from hypernas.scaling.contenders import ablation, contenders
from hypernas.scaling.ladder import climb
from hypernas.scaling.shape import Ladder
from hypernas.search_spaces import name_space, stored_space
from hypernas.store import Store
from hypernas.study.search import check_resumed, executor_of, ran_on


def launch_scale(
    given: Mapping[str, Any], trials: str, baseline: str, ladder: Ladder, ablate: bool = False
) -> dict[str, Any]:
    """Trains a ladder for trials of the study `given` names, as the study NAME-scale of the same store, and keeps and
    returns what it came to. Raises UserError and SpaceError for bad input, before Ray starts."""
    config = StudyConfig(**given)
    with Store(config.store) as store:
        searched = name_space(store.study(config.study), given.get("space"))
        space = stored_space(searched.space)
        climbers = contenders(store, searched, trials, baseline)
        if ablate:
            if len(climbers) != 2:
                raise UserError(f"--ablate takes one trial apart, and there are {len(climbers) - 1}: give --trials N")
            climbers = ablation(space, *climbers)
        path = searched.settings.data_path
        ladder_study = f"{config.study}-scale"
        config = replace(
            StudyConfig(**ran_on(store, ladder_study) | dict(given)),
            study=ladder_study,
            space=searched.space.name,
            settings={"data.path": path} if path else {},
            kernels=searched.settings.kernels,
            seed=searched.settings.seed,
            halving=False,
        )
        with closing(executor_of(config)) as executor:
            check_resumed(store, config, executor)
            click.echo(on_what(executor), err=True)
            climbed = climb(store, executor, config, climbers, ladder, lambda text: click.echo(text, err=True))
        data = analyse(climbed, climbers, seed=config.seed)
        keep(store, searched, config.study, data)
    return data
