"""Studies for the dashboards' tests, written through the store's own API."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hypernas.dashboards.screenshots import launch_browser
from hypernas.records import Failure, FailureKind, Proposal, Recipe, Report, Result, SpaceSpec, StudyRow, StudySettings
from hypernas.store import Store

OBJECTIVES = ("bits_per_byte", "flops_per_token")
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp; \u202egnp.exe"
ARCH = {
    "family": "transformer",
    "depth": 4,
    "d_model": 128,
    "ffn.shape": "conventional",
    "ffn.ratio": 4.0,
    "attention.ratio": 1.0,
    "streams.n": 1,
    "gates.placement": "none",
}


def make_study(store: Store, name: str = "first") -> StudyRow:
    return store.create_study(
        name,
        space=SpaceSpec("lm"),
        objectives=OBJECTIVES,
        settings=StudySettings(trials=10, seed=0),
        reference={"bits_per_byte": 8.0, "flops_per_token": 9.0},
        data_name="docs",
        data_hash="0" * 64,
    )


class Writer:
    """Adds trials to one study, as a driver does."""

    def __init__(self, store: Store, study: StudyRow) -> None:
        self.store, self.study = store, study
        self.driver = store.start_driver(study, workers=2)

    def lease(
        self,
        arch: dict | None = None,
        origin: str = "sampler",
        params: dict | None = None,
        attrs: dict | None = None,
        arch_hash: str | None = None,
        seed: int = 0,
    ) -> tuple[int, int]:
        """A RUNNING trial: its number and token."""
        key = f"{random.random()}"
        recipe = Recipe(3e-3, seed=seed)
        proposal = Proposal(params or {}, arch or ARCH, arch_hash or key[:16], key, recipe, origin, attrs or {})
        trial = self.store.lease_new(self.study, self.driver, proposal, limit=10**6)
        assert trial is not None
        return trial.number, trial.token

    def report(self, trial: int, token: int, rung: int, loss: float, flops: float = 1e6) -> None:
        tokens = 1000 * 2**rung
        report = Report(trial, rung, tokens // 100, tokens, 3 * flops * tokens, loss, float(rung + 1))
        assert self.store.report(self.study, report, token)

    def complete(
        self, loss: float, flops: float, *, rungs: int = 0, diagnostics: dict | None = None, **more: object
    ) -> int:
        number, token = self.lease(**more)  # type: ignore[arg-type]
        for rung in range(rungs):
            self.report(number, token, rung, loss + rungs - 1 - rung, flops)
        values = {"bits_per_byte": loss, "flops_per_token": flops, "accuracy": 0.5, "training_flops": flops * 3e4}
        result = Result(
            number, token, values, parameters=1000, train_seconds=2.0, evaluate_seconds=0.5,
            diagnostics=diagnostics or {}, provenance={"torch": "2.13", "kernels": {"swiglu": "cpu: it is there"}},
        )  # fmt: skip
        assert self.store.finish(self.study, result)
        return number

    def fail(self, message: str = "no memory", kind: FailureKind = FailureKind.OUT_OF_MEMORY, **more: object) -> int:
        number, token = self.lease(**more)  # type: ignore[arg-type]
        failure = Failure(kind, message, f"Traceback\n{message}")
        assert self.store.finish(self.study, Result(number, token, failure=failure))
        return number


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(str(tmp_path / "nas.db"), create=True) as opened:
        yield opened


@pytest.fixture
def writer(store: Store) -> Writer:
    return Writer(store, make_study(store))


@pytest.fixture
def small(writer: Writer) -> Writer:
    """Baseline 0, dominated 1, front 2 and 0, failed 3, running 4 (with one report)."""
    writer.complete(3.0, 1e6, rungs=2, origin="baseline")
    writer.complete(3.5, 2e6, rungs=1)
    writer.complete(2.5, 4e6, rungs=3)
    writer.fail()
    number, token = writer.lease()
    writer.report(number, token, 0, 1.0, flops=1e5)
    return writer


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Writer]:
    """2,000 trials, every tenth failed."""
    drawn = random.Random(0)
    with Store(str(tmp_path_factory.mktemp("large") / "nas.db"), create=True) as opened:
        writer = Writer(opened, make_study(opened, "large"))
        for index in range(2000):
            if index % 10 == 9:
                writer.fail()
            else:
                flops = 10 ** drawn.uniform(5, 8)
                writer.complete(12 - flops**0.1 + drawn.random(), flops, rungs=index % 3 == 0)
        yield writer


@pytest.fixture
def hostile() -> str:
    return HOSTILE


@pytest.fixture
def write_in() -> Callable[[Store, str], Writer]:
    """Makes another study and its writer."""
    return lambda store, name: Writer(store, make_study(store, name))


@pytest.fixture(scope="session")
def browser(browser_path: str) -> Iterator[Any]:
    """Headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = launch_browser(playwright)
        yield launched
        launched.close()
