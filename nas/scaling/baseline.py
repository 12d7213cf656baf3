"""The law of the plain net, which `ceg` is measured against during a search."""

from collections.abc import Callable
from dataclasses import replace

from hypernas.config.keys import COUNTED, recipe_keys
from hypernas.config.plan import Plan
from hypernas.config.study_config import StudyConfig
from hypernas.data.tasks import TASKS
from hypernas.engines.protocol import Executor
from hypernas.errors import UserError
from hypernas.records import State, name_trials
from hypernas.scaling.analysis import BEYOND
from hypernas.scaling.fit import fit_laws
from hypernas.scaling.ladder import measurement_of
from hypernas.search_spaces import load_space
from hypernas.search_spaces.base import arch_to_json
from hypernas.search_spaces.grid import GridSpace
from hypernas.store import Store
from hypernas.study.sweep import sweep
from hypernas.yardstick import Yardstick

BASELINE_SIZES = (1 / 4, 8**-0.5, 1 / 2, 2**-0.5, 1.0, 2**0.5)  # 1.5 decades of compute for 4 of its trainings


def measure_baseline(
    store: Store, executor: Executor, config: StudyConfig, plan: Plan, say: Callable[[str], None]
) -> Yardstick:
    """The law of a study's baseline, by which its trials' gains are estimated: what `ceg` is as an objective.

    The baseline's shape is trained at some sizes around its own, with the study's tokens in proportion to size, as the
    study NAME-baseline; so the baseline's own gain is about 1. All with one learning rate: `nas scale` takes more care.
    Raises UserError where losses allow no law, KeyboardInterrupt when interrupted: the same call then goes on.
    """
    space = load_space(config.space)
    if not isinstance(space, GridSpace):
        raise UserError(f"space {config.space} cannot scale its baseline, which ceg is measured against; "
                        "wanted one made of a GridSpace, or other objectives")  # fmt: skip
    arch, recipe = plan.baselines()[0]
    total, batch = COUNTED[space.task]
    own = space.cost(arch).parameters_total
    ladder = [
        {
            **arch_to_json(space.scaled(arch, round(share * own))),
            **recipe_keys(recipe),
            total: round(share * recipe.tokens),
            batch: recipe.batch_tokens,
            "train.seed": recipe.seed,
        }
        for share in BASELINE_SIZES
    ]
    name = f"{config.study}-baseline"
    path = {"data.path": plan.data_path} if plan.data_path else {}
    say(f"ceg: first the baseline at {len(ladder)} sizes, as study {name!r}")
    trials = sweep(store, executor, replace(config, study=name, settings=path, objectives=(), halving=False), ladder)
    loss = TASKS[space.task].loss
    runs = [measurement_of("baseline", trial, loss) for trial in trials if trial.state == State.COMPLETE]
    if failed := [trial.number for trial in trials if trial.state != State.COMPLETE]:
        say(f"ceg: {name_trials(failed)} of study {name!r} failed, and the law is that of the others")
    law = fit_laws(runs, seed=config.seed).laws["baseline"]
    largest = max(run.flops for run in runs)
    say(
        f"ceg: the baseline's loss(C) = {law.irreducible:.4g} + {law.scale:.4g} C^-{law.exponent:.3f}, measured from "
        f"{min(run.flops for run in runs):.2e} to {largest:.2e} FLOPs"
    )
    return Yardstick(law, BEYOND[-1] * largest)
