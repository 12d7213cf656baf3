"""Trains and measures one architecture. A pure function of its Job: the same row on the same machine type gives the
same number, bit for bit (one thread, deterministic algorithms, data and noise drawn from (seed, step)).

`evaluate` prepares a run, starts it (from a checkpoint, from a parent's weights or from its initial ones), trains it
from rung to rung, and concludes with the measurements of the trained model.
"""

import math
import time
from collections.abc import Generator, Iterator
from dataclasses import replace

import torch
from safetensors.torch import save

from hypernas.kernels import dispatch
from hypernas.records import RUNGS, Failure, FailureKind, Job, Notice, Progress, Report, Result
from hypernas.search_spaces.gates import execution_rates, gates_of
from hypernas.training.checkpoints import CheckpointError, Position, load_checkpoint, save_checkpoint
from hypernas.training.device import deterministic, provenance, worker_device
from hypernas.training.inherit import describe_change, inherit
from hypernas.training.measure import Measured, latency_ms, measure, stream_diagnostics
from hypernas.training.model import Score, cached_space
from hypernas.training.run import Run, Setting, job_setting, prepare, rung_step
from hypernas.training.step import DivergedError
from hypernas.yardstick import Yardstick

PROGRESS_SECONDS = 0.5


def evaluate(job: Job) -> Iterator[Progress | Notice | Report | Result]:
    """Trains the job's architecture: progress as it goes, a report at each rung, one result at the end.

    With a checkpoint, goes on from there; the numbers are those of training in one go. Raises SpaceError when the
    architecture cannot be built, DivergedError when the loss is not finite, BackendError when kernels were asked for
    that cannot run here.
    """
    space = cached_space(job.space.name, tuple(sorted(job.space.settings.items())), job.space.own)
    deterministic(space)
    device = worker_device(job.device)
    dispatch.forget_choices()
    with dispatch.use_backend(job.kernels), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(job.recipe.seed)  # dropout in a user's space draws from the seed too
        yield from _evaluate(job, job_setting(job, space, device))


def _evaluate(job: Job, setting: Setting) -> Iterator[Progress | Notice | Report | Result]:
    run = prepare(setting, micro_batches=job.micro_batches, compile=job.compile)
    measured = measure_untrained(run, job)
    if is_over_limit(job, measured):
        yield over_limit(run, job, measured)
        return
    yield from start(run, job)
    scored = yield from run_rungs(run, job)
    yield conclude(run, job, scored, measured)


def measure_untrained(run: Run, job: Job) -> Measured:
    """The latency that the search limits, of a net without gates: training changes nothing of its time."""
    if job.max_latency_ms is None or gates_of(run.model):
        return Measured()
    clock = time.perf_counter()
    inputs, _ = run.setting.batch(0, samples=1)
    latency, spread = latency_ms(run.model, inputs)
    run.evaluate_seconds = time.perf_counter() - clock
    return Measured({"latency_ms": latency}, spread)


def start(run: Run, job: Job) -> Iterator[Progress | Notice | Report]:
    """Puts the run where the job's checkpoint left it, or else its parent's weights into the model of a child."""
    try:
        before = load_checkpoint(job, run.model, run.optimizers)
    except CheckpointError as error:
        yield Notice(job.trial, f"starts from its beginning: {error}")
        before = None
    if before is not None:
        run.done, run.train_seconds, run.evaluate_seconds = before.step, before.train_seconds, before.evaluate_seconds
        yield replace(before.report, trial=job.trial)
    elif job.inherits is not None:
        yield from start_from_parent(run, job)


def run_rungs(run: Run, job: Job) -> Generator[Progress | Notice | Report, None, Score]:
    """Trains to the end, with a report at each rung; returns the score at the last."""
    rungs = {rung_step(rung, run.steps): rung for rung in range(len(RUNGS))}
    scored = Score(math.nan, math.nan)
    shown = clock = time.perf_counter()
    run.model.train()
    run.capture(compiled=job.compile)
    while run.done < run.steps:
        # Of a GPU nothing is waited for here: the next batch is made while it works.
        run.step(run.setting.batch(run.done))
        now = time.perf_counter()
        if now - shown > PROGRESS_SECONDS:
            shown = now
            yield Progress(job.trial, run.done / run.steps, run.loss())
        if run.done in rungs:
            run.losses.read()
            run.train_seconds += time.perf_counter() - clock
            clock = time.perf_counter()
            scored = run.score()
            run.evaluate_seconds += time.perf_counter() - clock
            report = run.report(job.trial, rungs[run.done], scored.loss)
            if job.checkpoint is not None and run.done < run.steps:
                try:
                    at = Position(run.done, run.train_seconds, run.evaluate_seconds, report)
                    save_checkpoint(job, run.model, run.optimizers, at)
                except OSError as error:
                    yield Notice(job.trial, f"has no checkpoint of rung {report.rung}: {error}")
            yield report
            clock = time.perf_counter()
    run.stepped = run.model  # what follows is measured without the memory of graphs
    if not math.isfinite(scored.loss):
        raise DivergedError("the validation loss is not finite")
    return scored


def conclude(run: Run, job: Job, scored: Score, measured: Measured) -> Result:
    """The result of a run that ended with this score; `measured` before it was trained."""
    values, rates = run.values(scored), execution_rates(run.model)
    inputs, _ = next(iter(run.setting.validation(run.scoring_samples)))
    weights = save({name: tensor.cpu() for name, tensor in run.model.state_dict().items()})
    diagnostics = ({"gate_rates": rates} if rates else {}) | stream_diagnostics(
        run.model, inputs.to(run.setting.device)
    )
    names = set(job.measured) if job.max_latency_ms is None else {*job.measured, "latency_ms"}
    late = measure(names - measured.values.keys(), run)
    measured = Measured({**measured.values, **late.values}, {**diagnostics, **measured.diagnostics, **late.diagnostics})
    if is_over_limit(job, measured):
        return over_limit(run, job, measured)
    return Result(
        trial=job.trial,
        token=job.token,
        values={
            **values,
            **measured.values,
            **gain_over_baseline(job, scored.loss, values["training_flops"]),
        },
        parameters=run.setting.cost.parameters_total,
        train_seconds=run.train_seconds,
        evaluate_seconds=run.evaluate_seconds,
        provenance=provenance(run.setting.device)
        | ({"cuda_graph": run.cuda_graph} if run.cuda_graph else {})
        | ({"micro_batches": job.micro_batches} if job.micro_batches > 1 else {})
        | (describe_change(job.inherits) if job.inherits else {}),
        diagnostics=measured.diagnostics,
        weights=weights,
    )


def is_over_limit(job: Job, measured: Measured) -> bool:
    """Whether a latency was measured, and is above what the search allows."""
    return job.max_latency_ms is not None and measured.values.get("latency_ms", 0.0) > job.max_latency_ms


def over_limit(run: Run, job: Job, measured: Measured) -> Result:
    """The end of a trial that is slower than its search allows; its latency stands in its diagnostics."""
    latency = measured.values["latency_ms"]
    message = f"latency {latency:.4g} ms, over max.latency_ms={job.max_latency_ms:g}"
    return Result(
        job.trial,
        job.token,
        train_seconds=run.train_seconds,
        evaluate_seconds=run.evaluate_seconds,
        provenance=provenance(run.setting.device),
        diagnostics={"latency_ms": latency, **measured.diagnostics},
        failure=Failure(FailureKind.OVER_LIMIT, message),
    )


def start_from_parent(run: Run, job: Job) -> Iterator[Progress | Notice]:
    """Puts the parent's weights into the model of a child; where they are not kept, the parent is trained again first.

    Raises whatever its training raises.
    """
    assert job.inherits is not None
    weights = job.inherits.weights
    if weights is None:
        assert job.inherits.job is not None
        yield Notice(job.trial, f"trains its parent, trial {job.inherits.trial}, first: its weights are not kept")
        for event in evaluate(job.inherits.job):
            if isinstance(event, Progress):
                yield Progress(job.trial, 0.0, event.loss)
            elif isinstance(event, Notice):
                yield replace(event, trial=job.trial)
            elif isinstance(event, Result):
                weights = event.weights
    assert weights is not None
    inherit(run.model, run.setting.space, run.setting.arch, job.inherits, weights)


def gain_over_baseline(job: Job, loss: float, flops: float) -> dict[str, float]:
    """`ceg` of a training that ended at `loss` after `flops`, where the study asks for it."""
    if job.yardstick is None:
        return {}
    return {"ceg": Yardstick.of(job.yardstick).gain(loss, flops)}
