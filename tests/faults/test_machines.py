"""Drivers that cannot see each other's processes, and clocks that are set under them."""

import os
import random
import shutil
import struct
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hypernas.store import Store
from tests.faults.searches import Values, Watch, command, measured, rounds

# Setting the machine's clock would disturb whatever else runs on it: processes that load this see it set. The seconds
# are read from a file at each call; clocks that nobody can set stay as they are.
STEPPED_CLOCK = r"""
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile double *seconds;
static double step(void) {
    if (!seconds) {
        static double none = 0.0;
        const char *path = getenv("STEPPED_CLOCK");
        int file = path ? open(path, O_RDONLY) : -1;
        void *found = file < 0 ? MAP_FAILED : mmap(0, sizeof(double), PROT_READ, MAP_SHARED, file, 0);
        seconds = found == MAP_FAILED ? &none : (double *)found;
    }
    return *seconds;
}
int clock_gettime(clockid_t clock, struct timespec *at) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(clock, at);
    if (!code && clock == CLOCK_REALTIME) at->tv_sec += (time_t)step();
    return code;
}
int gettimeofday(struct timeval *at, void *zone) {
    struct timespec now;
    int code = clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec, at->tv_usec = now.tv_nsec / 1000;
    return code;
}
time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
"""


class Clock:
    """A clock that processes with its environment see set."""

    def __init__(self, folder: Path) -> None:
        source, library, self._file = folder / "clock.c", folder / "clock.so", folder / "seconds"
        source.write_text(STEPPED_CLOCK)
        subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-o", library, source, "-ldl"], check=True)
        self.set(0.0)
        self.environment = {"LD_PRELOAD": str(library), "STEPPED_CLOCK": str(self._file)}

    def set(self, seconds: float) -> None:
        """Whole seconds from the machine's."""
        with self._file.open("r+b" if self._file.exists() else "wb") as file:
            file.write(struct.pack("d", seconds))


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    if shutil.which("gcc") is None:
        pytest.skip("no C compiler here: the stepped clock is a small library")
    return Clock(tmp_path)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "nas.db") if request.param == "sqlite" else request.getfixturevalue("served")


def two_drivers(
    search: Callable[[int], dict[str, Any]], url: str, meanwhile: Callable[[list[subprocess.Popen[str]], int], None]
) -> list[tuple[int, str]]:
    """Runs two searches of one study to their end, calling `meanwhile` at each rung: exit codes and what they said."""
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    drivers = [subprocess.Popen(**search(number), **pipes) for number in range(2)]
    seen, deadline = 0, time.monotonic() + 240
    try:
        with Watch(url) as watch:
            while any(driver.poll() is None for driver in drivers) and time.monotonic() < deadline:
                if (rungs := watch.rungs()) > seen:
                    seen = rungs
                    meanwhile(drivers, rungs)
                time.sleep(0.1)
        return [(driver.wait(5), driver.communicate()[1]) for driver in drivers]
    finally:
        for driver in drivers:
            driver.kill()


def started_twice(url: str) -> int:
    """Trials that somebody began again: taken over, or lost."""
    with Store(url) as store:
        return sum(trial.attempts > 1 for trial in store.trials(store.study("s")))


@pytest.mark.timeout(400)
@pytest.mark.parametrize("number", rounds(4))
def test_drivers_whose_clocks_are_set_go_on_beside_each_other(
    number: int, text: str, url: str, tmp_path: Path, clock: Clock, undisturbed: Values, faults: Counter[str]
) -> None:
    """One of the two lives by a clock that is set by seconds, minutes and hours, there and back."""
    rng = random.Random(number)

    def search(driver: int) -> dict[str, Any]:
        extra = clock.environment if driver else {}
        return {"args": command(url, text, "--engine", "inline"), "env": os.environ | extra}

    def step(_: Any, rungs: int) -> None:
        if rungs % 6 == 3:
            clock.set(float(rng.choice((-7200, -90, -5, 0, 5, 90, 7200))))
            faults["clock set"] += 1

    ended = two_drivers(search, url, step)
    assert [code for code, _ in ended] == [0, 0], ended
    assert measured(url) == undisturbed
    assert faults["clock set"]
    assert started_twice(url) == 0  # neither took the other for dead


@pytest.mark.timeout(400)
@pytest.mark.parametrize("number", rounds(3))
def test_drivers_in_containers_of_one_host_name_share_a_study_and_inherit_from_the_dead(
    number: int, text: str, url: str, isolated: list[str], undisturbed: Values, faults: Counter[str]
) -> None:
    def search(_: int) -> dict[str, Any]:
        return {"args": [*isolated, *command(url, text, "--engine", "inline")]}

    def kill_one(drivers: list[subprocess.Popen[str]], rungs: int) -> None:
        if rungs >= 4 + 8 * number and all(driver.poll() is None for driver in drivers):
            drivers[0].kill()
            faults["driver in a namespace killed"] += 1

    ended = two_drivers(search, url, kill_one)
    assert [code for code, _ in ended] == [-9, 0], ended
    assert measured(url) == undisturbed
    assert started_twice(url) <= 1  # what the dead one held, once its heartbeats had ended
