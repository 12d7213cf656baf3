"""What a running search shows: a live view in a terminal, plain lines elsewhere. All of it goes to stderr."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hypernas.records import Progress, Report, Result, Trial
from hypernas.show.tables import front_table
from hypernas.show.terminal import make_console
from hypernas.show.words import describe_arch, describe_values

REFRESH = 4  # a second
MOST_SHOWN = 32  # running trials that a live view lists


@dataclass(slots=True)
class _Running:
    trial: Trial
    started: float
    share: float = 0.0
    loss: float | None = None


class Silent:
    """Nobody watches."""

    def on_start(self, trial: Trial) -> None: ...
    def on_progress(self, event: Progress) -> None: ...
    def on_report(self, event: Report) -> None: ...
    def on_stop(self, event: Report) -> None: ...
    def on_end(self, trial: int, result: Result | None) -> None: ...
    def message(self, text: str) -> None: ...
    def tick(self) -> None: ...


class Lines:
    """One line an event: for logs and pipes."""

    def __init__(self, asked: int, finished: int, unit: str, console: Console) -> None:
        self._asked, self._finished, self._unit, self._console = asked, finished, unit, console
        self._done_here, self._start = 0, time.monotonic()

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_: object) -> None: ...

    def _print(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)

    def on_start(self, trial: Trial) -> None:
        self._print(
            f"trial {trial.number} starts: {describe_arch(dict(trial.arch))}, lr {trial.recipe.learning_rate:.3g}"
        )

    def on_progress(self, event: Progress) -> None: ...

    def on_report(self, event: Report) -> None:
        self._print(
            f"trial {event.trial} rung {event.rung}: loss {event.loss:.4f} after {event.tokens:,} {self._unit}s"
        )

    def on_stop(self, event: Report) -> None:
        self._print(f"trial {event.trial} stopped at rung {event.rung} {self._one_more()}")

    def _one_more(self) -> str:
        self._finished += 1
        self._done_here += 1
        eta = (time.monotonic() - self._start) / self._done_here * (self._asked - self._finished)
        return f"[{self._finished}/{self._asked}, about {eta:.0f} s left]"

    def on_end(self, trial: int, result: Result | None) -> None:
        if result is None:
            return
        where = self._one_more()
        if result.failure:
            self._print(f"trial {trial} failed ({result.failure.kind}): {result.failure.message} {where}")
        else:
            self._print(f"trial {trial} done: {describe_values(result.values)} {where}")

    def message(self, text: str) -> None:
        self._print(text)

    def tick(self) -> None: ...


class Screen:
    """A live view: counts, running trials with their loss, the front so far, time left."""

    def __init__(self, asked: int, finished: int, front: Callable[[], Sequence[Trial]], console: Console) -> None:
        self._asked, self._finished, self._front = asked, finished, front
        self._failed = self._done_here = 0
        self._start = time.monotonic()
        self._running: dict[int, _Running] = {}
        self._shown, self._outdated = list(front()), False
        self._rendered = time.monotonic()
        self._live = Live(self._render(), console=console, refresh_per_second=REFRESH, transient=True)

    def __enter__(self) -> "Screen":
        self._live.__enter__()
        return self

    def __exit__(self, *details: object) -> None:
        self._live.__exit__(*details)  # type: ignore[arg-type]

    def on_start(self, trial: Trial) -> None:
        self._running[trial.number] = _Running(trial, time.monotonic())

    def on_progress(self, event: Progress) -> None:
        if event.trial in self._running:
            self._running[event.trial].share = event.share
            self._running[event.trial].loss = event.loss

    def on_report(self, event: Report) -> None:
        if event.trial in self._running:
            self._running[event.trial].loss = event.loss

    def on_stop(self, event: Report) -> None:
        self._running.pop(event.trial, None)
        self._finished += 1
        self._done_here += 1

    def on_end(self, trial: int, result: Result | None) -> None:
        self._running.pop(trial, None)
        if result is None:
            return
        self._finished += 1
        self._done_here += 1
        self._failed += result.failure is not None
        if result.failure:
            self._live.console.print(Text(f"trial {trial} failed ({result.failure.kind}): {result.failure.message}"))
        self._outdated = True

    def message(self, text: str) -> None:
        self._live.console.print(Text(text))

    def tick(self) -> None:
        """Draws anew as often as it is seen: with many workers, there are hundreds of ticks a second."""
        if time.monotonic() - self._rendered > 1 / REFRESH:
            if self._outdated:
                self._shown, self._outdated = list(self._front()), False
            self._live.update(self._render())
            self._rendered = time.monotonic()

    def _render(self) -> Group:
        spent = time.monotonic() - self._start
        left = spent / self._done_here * (self._asked - self._finished) if self._done_here else None
        head = Text(
            f"{self._finished} of {self._asked} trials"
            + (f", {self._failed} failed" if self._failed else "")
            + f"   {_clock(spent)} elapsed   "
            + (f"about {_clock(left)} left" if left is not None else "")
        )
        running = Table(box=None, padding=(0, 1))
        for title in ("trial", "", "loss", "architecture"):
            running.add_column(title, no_wrap=True)
        for entry in islice(self._running.values(), MOST_SHOWN):
            running.add_row(
                str(entry.trial.number),
                ProgressBar(total=1.0, completed=entry.share, width=24),
                "-" if entry.loss is None else f"{entry.loss:.3f}",
                Text(describe_arch(dict(entry.trial.arch))),
            )
        if len(self._running) > MOST_SHOWN:
            running.add_row("", Text(f"and {len(self._running) - MOST_SHOWN:,} more"))
        bar = ProgressBar(total=max(1, self._asked), completed=self._finished, width=60)
        return Group(head, bar, running, front_table(self._shown[:8], "front so far"))


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def make_view(asked: int, finished: int, unit: str, front: Callable[[], Sequence[Trial]]) -> Lines | Screen:
    """A live view where stderr is a terminal, lines otherwise. `unit` is what trials train on: token or image."""
    console = make_console(stderr=True)
    return Screen(asked, finished, front, console) if console.is_terminal else Lines(asked, finished, unit, console)
