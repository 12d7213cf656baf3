"""Names of other libraries that are not public, and that we use: one test a library says which are gone.

The upper bounds in pyproject.toml keep versions out in which nobody has run this.
"""

import inspect
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("nas", "kernels", "search_spaces", "dashboards")


def missing(names: Mapping[str, object]) -> list[str]:
    """Of `Owner.name`, each with the object that has it, those that are gone."""
    return [name for name, owner in names.items() if not hasattr(owner, name.rpartition(".")[2])]


def test_optunas_private_names_are_there() -> None:
    import optuna

    study = optuna.create_study()
    trial = study.ask()
    trials = study._get_trials(deepcopy=False, use_cache=True)
    assert [known.number for known in trials] == [0]
    names = {
        "Study._get_trials": study,
        "Study._storage": study,
        "Study._thread_local": study,
        "_thread_local.cached_all_trials": study._thread_local,
        "Trial._trial_id": trial,
        "InMemoryStorage._get_trial": optuna.storages.InMemoryStorage(),
        "InMemoryStorage.set_trial_system_attr": study._storage,
        "BaseDistribution._contains": optuna.distributions.FloatDistribution(0, 1),
    }
    assert missing(names) == []


def test_ray_tunes_private_names_are_there() -> None:
    from ray.tune.experiment import Trial

    trial = Trial("named", stub=True)
    names = {
        "Trial.get_json_state": trial,
        "Trial.temporary_state": trial,
        "temporary_state.ray_actor": trial.temporary_state,
    }
    assert missing(names) == []


def test_rays_private_names_are_there() -> None:
    from ray._private import services

    assert missing({"services.ConsolePopen": services}) == []
    assert "ConsolePopen(" in inspect.getsource(services.start_ray_process)


def test_torchs_private_names_are_there() -> None:
    import torch

    @torch._dynamo.assume_constant_result
    def constant() -> int:
        return 1

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.zeros(1)
    assert profile.profiler is not None
    names = {
        "assume_constant_result._dynamo_marked_constant": constant,
        "torch.cpu._init_amx": torch.cpu,
        "profile.profiler.kineto_results": profile.profiler,
    }
    assert missing(names) == []


@pytest.mark.parametrize(
    "pattern, files",
    [
        (
            r"\._(get_trials?|trial_id|thread_local|contains)\b",
            {"nas/strategy/optuna_study.py", "nas/strategy/samplers.py"},
        ),
        (r"\.(get_json_state|temporary_state)\b", {"nas/engines/tune_pool.py"}),
        (r"\bConsolePopen\b", {"nas/engines/cluster.py"}),
        (r"_dynamo_marked_constant", {"kernels/dispatch.py"}),
    ],
)
def test_a_private_name_is_used_behind_its_fence_alone(pattern: str, files: set[str]) -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if re.search(pattern, path.read_text())
    }
    assert found == files


@pytest.mark.parametrize("library", ["optuna", "ray", "torch"])
def test_a_library_whose_private_names_we_use_has_an_upper_bound(library: str) -> None:
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (line,) = [need for need in needs if re.match(rf"{library}\b(\[|>|=)", need)]
    assert "<" in line
