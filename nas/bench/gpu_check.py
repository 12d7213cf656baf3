"""`make gpu-check`: the first nine minutes on a GPU. What runs there, whether it is right, and how fast it is beside
the figures to compare with.

Each step is a process of its own with a limit of its own: one that hangs or dies costs the others nothing, and what it
printed before its end is kept in its file. What a machine lacks is skipped and named. Without a CUDA device each step
takes its dry form, at tiny sizes, so that the script itself is tested; its figures then mean nothing. The pieces that
measure are in `nas/bench/gpu_pieces.py`; docs/gpu.md holds the results.
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 540.0  # for all steps together
ROOT = Path(__file__).resolve().parents[2]
# Verbose: what passed and failed is known also where the step is ended at its limit.
PYTEST = ("-m", "pytest", "-v", "-ra", "-o", "addopts=", "--import-mode=importlib", "-p", "no:cacheprovider")
ON_GPU = (*PYTEST, "-p", "no:benchmark", "--tb=short", "-m", "gpu")
GPU_TESTS = sorted(
    path.relative_to(ROOT).as_posix() for path in (ROOT / "tests/nas").rglob("*.py") if "mark.gpu" in path.read_text()
)
PIECE = ("-m", "hypernas.bench.gpu_pieces")
SEARCH = ("click", "sqlalchemy", "alembic", "optuna", "moocore", "rich")  # what a search imports beside torch
TESTS = ("pytest", "xdist", "hypothesis")
SANITIZER = ("--error-exitcode", "9", sys.executable, *PIECE, "boundary")


@dataclass(frozen=True, slots=True)
class Step:
    """Runs this Python, or `program`, with `arguments`. Without a CUDA device takes `dry` where that is given, and does
    not run where it is `real`."""

    name: str
    file: str
    limit: float  # seconds
    proves: str
    arguments: tuple[str, ...]
    dry: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()  # modules
    program: str | None = None
    real: bool = False


STEPS = (
    Step("versions", "env.txt", 50, "what ran", (*PIECE, "versions")),
    Step("ceilings", "env.txt", 20, "the device's floors", (*PIECE, "ceilings")),
    Step(
        "kernels", "kernels.txt", 90, "outputs and gradients against float64, equal bits twice",
        (*ON_GPU, "-n", "14", "tests/kernels"), dry=(*ON_GPU, "--collect-only", "tests/kernels"), needs=TESTS,
    ),
    Step(
        "graphs", "graphs.txt", 90, "capture, freeing; a job twice and through a checkpoint: equal bits",
        (*ON_GPU, "-n", "13", *GPU_TESTS), dry=(*ON_GPU, "--collect-only", *GPU_TESTS), needs=TESTS,
    ),
    Step(
        "memcheck", "kernels.txt", 30, "no stray access",
        ("--tool", "memcheck", *SANITIZER), dry=(*PIECE, "boundary"), program="compute-sanitizer",
    ),
    Step(
        "racecheck", "kernels.txt", 30, "no race in shared memory",
        ("--tool", "racecheck", *SANITIZER), program="compute-sanitizer", real=True,
    ),
    Step("steps", "steps.txt", 110, "training steps", (*PIECE, "steps")),
    Step("profile", "steps.txt", 30, "where a step's time goes", (*PIECE, "profile")),
    Step("ops", "ops.txt", 75, "kernels by graph replay", (*PIECE, "ops")),
    Step("search", "search.txt", 90, "the product, its time by phase", (*PIECE, "search"), needs=SEARCH),
    Step("one worker", "ray.txt", 75, "one trial on the GPU", (*PIECE, "workers", "1"), needs=(*SEARCH, "ray")),
    Step(
        "four workers", "ray.txt", 75, "four trials on it",
        (*PIECE, "workers", "4"), needs=(*SEARCH, "ray"), real=True,
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Done:
    """How a step ended: `ok`, `exit N`, `over its limit` or `skipped: ...`; and the figures it printed."""

    step: Step
    ended: str
    seconds: float
    rows: tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A figure by its name, and what it should be on an H100."""

    name: str
    bound: float
    at_most: bool
    source: str

    def holds(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound


def at_least(name: str, bound: float, source: str) -> Comparison:
    return Comparison(name, bound, False, source)


def at_most(name: str, bound: float, source: str) -> Comparison:
    return Comparison(name, bound, True, source)


# What a good figure is on an H100. Two bytes an element (bfloat16) take half of what four take.
COMPARISONS = (
    at_least("copy of 4 GB, read and written", 2.8, "3.0 TB/s seen on an H100 80GB HBM3"),
    at_least("product 8192 x 8192 x 8192, bfloat16", 700, "798 TFLOP/s seen there"),
    at_most("smallest kernel, graph of 1000", 3, "about 2 us a node"),
    at_most("kernels: failed", 0, "every test"),
    at_most("graphs: failed", 0, "every test"),
    at_most("stream_boundary/forward float32 T=65536, triton", 224, "10 C elements at 3.0 TB/s"),
    at_most("stream_boundary/forward+backward float32 T=65536, triton", 672, "30 C elements at 3.0 TB/s"),
    at_most("stream_boundary/forward bfloat16 T=65536, triton", 112, "10 C elements at 3.0 TB/s"),
    at_most("stream_boundary/forward+backward bfloat16 T=65536, triton", 336, "30 C elements at 3.0 TB/s"),
    at_least("mfu/plain, 12x768, graphs", 40, "llm.c and modded-nanogpt at 124M, nanochat d12: 40 to 41 %"),
    at_least("against plain/mhc n=4, 12x768, graphs", 0.87, "four streams cost at most 15 % at C = 768"),
    at_least("against plain/kromhc n=4, 12x768, graphs", 0.87, "four streams cost at most 15 % at C = 768"),
    at_most("launches/plain, 4x128, eager", 500, "387 forward, loss and backward, counted on a CPU"),
    at_most("launches/kromhc n=4, 4x128, eager", 900, "785 forward, loss and backward, counted on a CPU"),
    at_least("search: complete", 12, "every trial"),
    at_least("one worker: complete", 12, "every trial"),
    at_least("four workers: complete", 12, "every trial"),
    at_most("memcheck: errors", 0, "compute-sanitizer"),
    at_most("racecheck: errors", 0, "compute-sanitizer"),
)


def check(out: Path, steps: Sequence[Step] = STEPS, seconds: float = SECONDS) -> list[Done]:
    """Runs the steps one after the other, each into its file in `out`; says how each ended and writes summary.md.

    No step starts once `seconds` have gone; the last takes what is left of them. In the dry form, which times nothing,
    two files are written at a time.
    """
    out.mkdir(parents=True, exist_ok=True)
    dry = not _has_gpu()
    print("no CUDA device: the dry form, whose figures mean nothing" if dry else "on the device", flush=True)
    done: list[Done] = []
    end = time.monotonic() + seconds

    def run(several: Sequence[Step]) -> None:
        for step in several:
            ended = _run(step, out / step.file, end - time.monotonic(), dry=dry)
            done.append(ended)
            print(f"{step.name}: {ended.ended}, {ended.seconds:.1f} s", flush=True)
            (out / "summary.md").write_text(summary(sorted(done, key=lambda each: steps.index(each.step)), dry=dry))

    by_file = [[step for step in steps if step.file == name] for name in dict.fromkeys(step.file for step in steps)]
    for name in {step.file for step in steps}:
        (out / name).unlink(missing_ok=True)
    if dry:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(run, sorted(by_file, key=lambda several: -len(several[0].needs))))  # the longest first
    else:
        run(steps)
    done.sort(key=lambda each: steps.index(each.step))
    (out / "summary.md").write_text(summary(done, dry=dry))  # of two files at a time, either may have written last
    return done


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _run(step: Step, path: Path, left: float, *, dry: bool) -> Done:
    lacking = [name for name in step.needs if importlib.util.find_spec(name) is None]
    if dry and step.real:
        return Done(step, "skipped: no CUDA device", 0.0, ())
    program = sys.executable if dry or step.program is None else shutil.which(step.program)
    if lacking or program is None:
        return Done(step, f"skipped: no {', '.join(lacking) or step.program}", 0.0, ())
    if left <= 0:
        return Done(step, "skipped: the time for all steps is over", 0.0, ())
    arguments = step.dry if dry and step.dry else step.arguments
    clock = time.monotonic()
    with path.open("ab") as file:
        file.write(f"== {step.name}: {step.proves}\n".encode())
        file.flush()
        start = file.tell()
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        # In a session of its own: what it started ends with it.
        process = subprocess.Popen(
            [program, *arguments], cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
        )
        try:
            code = process.wait(min(step.limit, left))
            ended = "ok" if code == 0 else f"exit {code}"
        except subprocess.TimeoutExpired:
            ended = f"over its limit of {min(step.limit, left):.0f} s"
        finally:
            _end(process)
    text = path.read_bytes()[start:].decode(errors="replace")
    return Done(step, ended, time.monotonic() - clock, tuple(_rows(step, text)))


def _end(process: "subprocess.Popen[bytes]") -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def _rows(step: Step, text: str) -> list[dict[str, Any]]:
    """The figures a step printed: lines of JSON, pytest's last line, compute-sanitizer's."""
    rows = []
    for line in text.splitlines():
        if line.startswith('{"name": '):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:  # cut off by the step's end
                continue
        elif complete := re.search(r"^trial \d+ done: .* \[(\d+)/\d+", line):  # also where the search was ended
            rows.append({"name": f"{step.name}: complete", "value": int(complete[1]), "unit": "trials"})
        elif errors := re.search(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (\d+)", line):
            rows.append({"name": f"{step.name}: errors", "value": int(errors[1]), "unit": ""})
        elif re.search(r"\d (passed|failed|errors?)\b.* in [\d.]+s", line):
            counts = {word.rstrip("s"): int(count) for count, word in re.findall(r"(\d+) ([a-z]+)", line)}
            failed = counts.get("failed", 0) + counts.get("error", 0)
            found = {"passed": counts.get("passed", 0), "failed": failed, "skipped": counts.get("skipped", 0)}
            for word, count in found.items():
                rows.append({"name": f"{step.name}: {word}", "value": count, "unit": ""})
    return rows


def summary(done: Sequence[Done], *, dry: bool) -> str:
    """Markdown: how each step ended, and each figure that there is something to compare with."""
    values = {row["name"]: row for entry in done for row in entry.rows}
    lines = ["| step | proves | ended | s |", "|---|---|---|---|"]
    lines += [f"| {entry.step.name} | {entry.step.proves} | {entry.ended} | {entry.seconds:.0f} |" for entry in done]
    lines += ["", "| figure | measured | wanted | |", "|---|---|---|---|"]
    for wanted in COMPARISONS:
        row = values.get(wanted.name)
        measured = "unmeasured" if row is None or dry else f"{row['value']:,} {row['unit']}".strip()
        verdict = "" if row is None or dry else ("holds" if wanted.holds(row["value"]) else "MISSED")
        bound = f"{'at most' if wanted.at_most else 'at least'} {wanted.bound:,}: {wanted.source}"
        lines.append(f"| {wanted.name} | {measured} | {bound} | {verdict} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/gpu-check")
    done = check(out)
    print((out / "summary.md").read_text(), end="")
    return 0 if all(entry.ended == "ok" or entry.ended.startswith("skipped") for entry in done) else 1


if __name__ == "__main__":
    sys.exit(main())
