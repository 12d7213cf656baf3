"""Who climbs the ladder: the winners of a study, the plain net, and ablations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hypernas.errors import UserError
from hypernas.records import Recipe, StudyRow
from hypernas.search_spaces import stored_space
from hypernas.search_spaces.base import Space, SpaceError, arch_to_json
from hypernas.search_spaces.gallery import named_settings
from hypernas.store import Reader

SIZE = ("depth", "d_model")  # what an ablation leaves to the ladder


@dataclass(frozen=True, slots=True)
class Contender:
    """A shape and how it is trained; `trial` its number in the searched study, if it comes from there."""

    name: str
    arch: Mapping[str, Any]
    training: Mapping[str, Any] = field(default_factory=dict)  # optim.name, optim.weight_decay, optim.schedule
    trial: int | None = None


def contenders(store: Reader, study: StudyRow, trials: str, baseline: str) -> list[Contender]:
    """The baseline, then the trials named (`front`, or numbers like 3,14). Raises UserError and SpaceError."""
    if study.settings.imported:
        raise UserError(f"study {study.name!r} was imported from Optuna: its space is not known here")
    task = study.settings.task
    if task != "text":
        raise UserError(f"study {study.name!r} trains on {task}: nas scale compares language models, space lm")
    if trials == "front":
        chosen = [trial for trial in store.front(study) if trial.origin != "baseline"]
    else:
        chosen = [store.trial(study, _number(part)) for part in trials.split(",")]
    if not chosen:
        raise UserError(f"the front of {study.name!r} holds baselines alone: name others with --trials N,M")
    usual = next(iter(store.trials(study, origin="baseline")), chosen[0])
    if baseline == "baseline":
        arch: Mapping[str, Any] = usual.arch
    else:
        # Of a named architecture the shape counts, not how long its windows are.
        settings = {**named_settings(study.space.name, baseline), "context": str(usual.arch["context"])}
        arch = arch_to_json(stored_space(replace(study.space, settings={})).from_json(settings))
    found = [Contender(baseline, arch, _training(usual.recipe))]
    return found + [Contender(f"trial {t.number}", t.arch, _training(t.recipe), t.number) for t in chosen]


def _number(text: str) -> int:
    if not text.strip().isdigit():
        raise UserError(f"--trials {text.strip()!r}: wanted front, or numbers of trials like 3,14")
    return int(text)


def _training(recipe: Recipe) -> dict[str, Any]:
    return {
        "optim.name": recipe.optimizer,
        "optim.weight_decay": recipe.weight_decay,
        "optim.schedule": recipe.schedule,
        "train.batch_tokens": recipe.batch_tokens,
    }


def ablation(space: Space, baseline: Contender, candidate: Contender) -> list[Contender]:
    """The baseline, the baseline with each of the candidate's components by itself, and with all of them.

    A component is what keys before a dot have in common (ffn, streams), or a key without one. Raises UserError where
    the two are one shape, SpaceError where a component cannot be had by itself.
    """
    own, other = dict(candidate.arch), dict(baseline.arch)
    if own.get("family") != other.get("family"):
        raise UserError(f"{candidate.name} and {baseline.name} are of different families: nothing to take apart")
    changed = [name for name in {**other, **own} if own.get(name) != other.get(name) and name not in SIZE]
    components = list(dict.fromkeys(name.partition(".")[0] for name in changed))
    if len(components) < 2:
        raise UserError(f"{candidate.name} and {baseline.name} differ in {', '.join(components) or 'size alone'}: "
                        "an ablation wants two components or more")  # fmt: skip

    def having(parts: Sequence[str]) -> Mapping[str, Any]:
        kept = {name: value for name, value in other.items() if name.partition(".")[0] not in parts}
        return kept | {name: value for name, value in own.items() if name.partition(".")[0] in parts}

    def contender(name: str, parts: Sequence[str]) -> Contender:
        try:
            arch = arch_to_json(space.from_json(having(parts)))
        except SpaceError as error:
            raise SpaceError(f"{', '.join(parts)} of {candidate.name} in {baseline.name}: {error}") from error
        return Contender(name, arch, baseline.training)

    together = replace(contender(TOGETHER, components), trial=candidate.trial)
    return [baseline, *(contender(f"+ {part}", [part]) for part in components), together]


TOGETHER = "all together"
