"""Who is alive: no clock that is set and no shared host name makes a live driver dead, or a dead one live."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import update

from hypernas.store import Store, liveness
from hypernas.store.models import DriverTable
from hypernas.store.statements import utcnow
from tests.nas.studies import new_study

DRIVER = """
import sys, time
from hypernas.store import Store
{before}
with Store(sys.argv[1]) as store:
    print(store.start_driver(store.study("s"), 1), flush=True)
    time.sleep(600)
"""


@contextmanager
def driver_process(store: Store, *prefix: str, before: str = "") -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """A process that drives the study and does nothing: its driver's id."""
    url = store.url.render_as_string(hide_password=False)
    command = [*prefix, sys.executable, "-c", DRIVER.format(before=before), url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline()), process
        finally:
            process.kill()


def change(store: Store, driver: int, **values: Any) -> None:
    with store._engine.begin() as connection:
        connection.execute(update(DriverTable).where(DriverTable.id == driver).values(values))


def age(store: Store, driver: int, seconds: float) -> None:
    """Makes the driver's last heartbeat so many seconds older than it is."""
    ticking = liveness.uptime()
    change(
        store,
        driver,
        heartbeat=utcnow() - timedelta(seconds=seconds),
        uptime=None if ticking is None else ticking - seconds,
    )


def test_a_clock_that_is_set_between_two_starts_leaves_a_driver_alive(store: Store) -> None:
    study = new_study(store)
    # What psutil adds to the ticks since boot moves with the machine's clock.
    stepped = "import psutil._pslinux as linux; boot = linux.boot_time(); linux.boot_time = lambda: boot + 5.0"
    with driver_process(store, before=stepped) as (driver, _):
        age(store, driver, 3600)  # it is stopped, or busy: its process is there
        assert store.live_drivers(study) == {driver: 1}


def test_a_killed_driver_of_this_machine_is_dead_at_once_whatever_its_heartbeat(store: Store) -> None:
    study = new_study(store)
    with driver_process(store) as (driver, process):
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # not yet reaped
        assert store.live_drivers(study) == {}
        process.wait()
        assert store.live_drivers(study) == {}
        change(store, driver, pid=os.getpid())  # the id is another process's by now
        assert store.live_drivers(study) == {}


@pytest.mark.parametrize("other", ["pid_namespace", "boot", "host"])
def test_a_process_that_cannot_be_seen_from_here_is_alive_until_its_heartbeats_end(store: Store, other: str) -> None:
    study = new_study(store)
    driver = store.start_driver(study, 1)
    change(store, driver, **{other: "another's"}, pid=2**22, process_started=1.0)  # no such process here
    assert store.live_drivers(study) == {driver: 1}
    age(store, driver, 55)
    assert store.live_drivers(study) == {driver: 1}
    age(store, driver, 65)
    assert store.live_drivers(study) == {}
    store.heartbeat(driver)
    assert store.live_drivers(study) == {driver: 1}


def test_two_containers_of_one_host_name_do_not_take_each_other_for_dead(store: Store, isolated: list[str]) -> None:
    study = new_study(store)
    mine = store.start_driver(study, 1)
    with driver_process(store, *isolated) as (theirs, _):
        assert store.live_drivers(study) == {mine: 1, theirs: 1}
        look = (
            "import sys; from hypernas.store import Reader; reader = Reader(sys.argv[1])\n"
            "print(*reader.live_drivers(reader.study('s')))"
        )
        url = store.url.render_as_string(hide_password=False)
        seen = subprocess.run([*isolated, sys.executable, "-c", look, url], check=True, capture_output=True, text=True)
        assert {int(number) for number in seen.stdout.split()} == {mine, theirs}
        age(store, theirs, 65)
        assert store.live_drivers(study) == {mine: 1}


@pytest.mark.skipif(not liveness.LINUX, reason="no clock here that processes share and nobody sets")
def test_a_clock_that_jumps_ahead_kills_nobody_on_the_same_machine(store: Store) -> None:
    study = new_study(store)
    driver = store.start_driver(study, 1)
    change(store, driver, pid_namespace="another's", heartbeat=utcnow() - timedelta(hours=1))
    assert store.live_drivers(study) == {driver: 1}


def test_heartbeats_are_stamped_and_compared_by_the_servers_clock(
    postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store(postgres, create=True) as store:
        study = new_study(store)
        try:

            class Late(liveness.datetime):
                @classmethod
                def now(cls, tz: Any = None) -> Any:
                    return super().now(tz) - timedelta(hours=1)

            with monkeypatch.context() as machine:
                for module in ("hypernas.store.connection", "hypernas.store.statements"):
                    machine.setattr(f"{module}.datetime", Late)
                driver = store.start_driver(study, 1)
                change(store, driver, boot="another's")
                store.heartbeat(driver)
                assert store.live_drivers(study) == {driver: 1}
            assert store.live_drivers(study) == {driver: 1}
            store.stop_driver(driver)
        finally:
            store.delete_study("s")
