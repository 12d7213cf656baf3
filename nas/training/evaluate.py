"""Trains and measures one architecture. A pure function of its Job: the same row on the same machine type gives the
same number, bit for bit (one thread, deterministic algorithms, data and noise drawn from (seed, step))."""

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from hypernas.data.tasks import TASKS, steps_of, to_device
from hypernas.kernels import dispatch
from hypernas.records import RUNGS, Failure, FailureKind, Job, Notice, Progress, Report, Result
from hypernas.search_spaces.gates import execution_rates, gates_of, reset_rates
from hypernas.training import cuda_graph
from hypernas.training.checkpoints import CheckpointError, Position, load_checkpoint, save_checkpoint
from hypernas.training.device import compile_parts, deterministic, mixed_precision, provenance, worker_device
from hypernas.training.inherit import described, inherit
from hypernas.training.measure import latency_ms, measure, stream_diagnostics
from hypernas.training.model import cached_space, checked_data, score, scored_at_once, seeded_build
from hypernas.training.step import BACKWARD, DivergedError, Losses, make_optimizers, train_step

PROGRESS_SECONDS = 0.5


def evaluate(job: Job) -> Iterator[Progress | Notice | Report | Result]:
    """Trains the job's architecture: progress as it goes, a report at each rung, one result at the end.

    With a checkpoint, goes on from there; the numbers are those of training in one go. Raises SpaceError when the
    architecture cannot be built, DivergedError when the loss is not finite, BackendError when kernels were asked for
    that cannot run here.
    """
    space = cached_space(job.space.name, tuple(sorted(job.space.settings.items())))
    deterministic(space)
    device = worker_device(job.device)
    dispatch.forget_chosen()
    with dispatch.use_backend(job.kernels), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(job.recipe.seed)  # dropout in a user's space draws from the seed too
        yield from _evaluate(job, space, device)


def _evaluate(job: Job, space: Any, device: torch.device) -> Iterator[Progress | Notice | Report | Result]:
    recipe = job.recipe
    task, data = TASKS[space.task], checked_data(space.task, job.data_path, job.data_hash)
    arch = space.from_json(job.arch)
    cost = space.cost(arch)
    model = seeded_build(space, arch, recipe.seed).to(device)
    if job.compile:
        compile_parts(model)
    spent = steps_of(task, arch, recipe)
    steps = spent.count
    at_once = scored_at_once(spent, cost, job.micro_batches, device)
    rungs = {max(1, round(share * steps)): rung for rung, share in enumerate(RUNGS)}
    optimizers = make_optimizers(model, recipe)

    train_seconds = evaluate_seconds = 0.0
    measured: dict[str, float] = {}
    spread: dict[str, Any] = {}
    limit = job.max_latency_ms
    if limit is not None and not gates_of(model):
        # Training changes nothing of the time that a net without gates takes: one over the limit costs none.
        clock = time.perf_counter()
        inputs, _ = task.batch(data, arch, job.data_seed, 0, 1)
        measured["latency_ms"], spread = latency_ms(model, inputs.to(device))
        evaluate_seconds = time.perf_counter() - clock
        if measured["latency_ms"] > limit:
            yield over_limit(job, measured | spread, device, train_seconds, evaluate_seconds)
            return
    first = 0
    try:
        before = load_checkpoint(job, model, optimizers)
    except CheckpointError as error:
        yield Notice(job.trial, f"starts from its beginning: {error}")
        before = None
    if before is not None:
        first, train_seconds, evaluate_seconds = before.step, before.train_seconds, before.evaluate_seconds
        yield replace(before.report, trial=job.trial)
    elif job.inherits is not None:
        yield from start_from_parent(model, space, arch, job)
    shown = clock = time.perf_counter()
    scored = None
    losses = Losses(steps)
    model.train()
    trained, graph = model, {}
    if device.type == "cuda":
        sample, _ = task.batch(data, arch, job.data_seed, first, spent.samples)
        trained, graph["cuda_graph"] = on_graphs(space, model, sample.to(device), job)
    for step in range(first, steps):
        # Of a GPU nothing is waited for here: the next batch is made while it works.
        batch = to_device(task.batch(data, arch, job.data_seed, step, spent.samples), device)
        losses.add(step, train_step(trained, optimizers, batch, recipe, step, steps, job.micro_batches))
        now = time.perf_counter()
        if now - shown > PROGRESS_SECONDS:
            shown = now
            yield Progress(job.trial, (step + 1) / steps, losses.read() / task.nats)
        if step + 1 in rungs:
            losses.read()
            train_seconds += time.perf_counter() - clock
            clock = time.perf_counter()
            reset_rates(model)
            scored = score(model, task.validation(data, arch, recipe, at_once), task.nats)
            model.train()
            evaluate_seconds += time.perf_counter() - clock
            seen = (step + 1) * spent.units
            report = Report(
                trial=job.trial,
                rung=rungs[step + 1],
                step=step + 1,
                tokens=seen,
                training_flops=(1 + BACKWARD) * cost.flops_total * seen,
                loss=scored.loss,
                seconds=train_seconds + evaluate_seconds,
            )
            if job.checkpoint is not None and step + 1 < steps:
                try:
                    save_checkpoint(job, model, optimizers, Position(step + 1, train_seconds, evaluate_seconds, report))
                except OSError as error:
                    yield Notice(job.trial, f"has no checkpoint of rung {report.rung}: {error}")
            yield report
            clock = time.perf_counter()
    if scored is None or not math.isfinite(scored.loss):
        raise DivergedError("the validation loss is not finite")
    trained = model  # what follows is measured without the memory of graphs
    rates = execution_rates(model)
    validation_inputs, _ = next(iter(task.validation(data, arch, recipe, at_once)))
    weights = save({name: tensor.cpu() for name, tensor in model.state_dict().items()})
    diagnostics = ({"gate_rates": rates} if rates else {}) | stream_diagnostics(model, validation_inputs.to(device))
    names = set(job.measured) if limit is None else {*job.measured, "latency_ms"}
    values, quartiles = measure(names - measured.keys(), model, optimizers, batch, recipe, steps, job.micro_batches)
    measured |= values
    diagnostics |= spread | quartiles
    if limit is not None and measured["latency_ms"] > limit:
        found = {"latency_ms": measured["latency_ms"], **diagnostics}
        yield over_limit(job, found, device, train_seconds, evaluate_seconds)
        return
    training_flops = float((1 + BACKWARD) * cost.flops_total * steps * spent.units)
    yield Result(
        trial=job.trial,
        token=job.token,
        values={
            task.loss: scored.loss,
            "accuracy": scored.accuracy,
            f"flops_per_{task.unit}": float(cost.flops_executed(rates)),
            "parameters": float(cost.parameters_total),
            "training_flops": training_flops,
            **measured,
            **gain_over_baseline(job, scored.loss, training_flops),
        },
        parameters=cost.parameters_total,
        train_seconds=train_seconds,
        evaluate_seconds=evaluate_seconds,
        provenance=provenance(device)
        | graph
        | ({"micro_batches": job.micro_batches} if job.micro_batches > 1 else {})
        | (described(job.inherits) if job.inherits else {}),
        diagnostics=diagnostics,
        weights=weights,
    )


def on_graphs(space: Any, model: nn.Module, inputs: Tensor, job: Job) -> tuple[nn.Module, str]:
    """What to train on a GPU, the model on CUDA graphs where that can be, and what the trial's row says of it."""
    reason = cuda_graph.obstacle(space, model, compiled=job.compile, micro_batches=job.micro_batches)
    if reason is None:
        try:
            return cuda_graph.capture(model, inputs, mixed_precision), "yes"
        except RuntimeError as error:
            reason = cuda_graph.cause(error)
    return model, f"no: {reason}"


def over_limit(
    job: Job, found: dict[str, Any], device: torch.device, train_seconds: float, evaluate_seconds: float
) -> Result:
    """The end of a trial that is slower than its search allows; what was `found` stands in its diagnostics."""
    message = f"latency {found['latency_ms']:.4g} ms, over max.latency_ms={job.max_latency_ms:g}"
    return Result(
        job.trial,
        job.token,
        train_seconds=train_seconds,
        evaluate_seconds=evaluate_seconds,
        provenance=provenance(device),
        diagnostics=found,
        failure=Failure(FailureKind.OVER_LIMIT, message),
    )


def start_from_parent(model: nn.Module, space: Any, arch: Any, job: Job) -> Iterator[Progress | Notice]:
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
    inherit(model, space, arch, job.inherits, weights)


def gain_over_baseline(job: Job, loss: float, flops: float) -> dict[str, float]:
    """`ceg` of a training that ended at `loss` after `flops`, where the study asks for it."""
    if job.yardstick is None:
        return {}
    from hypernas.yardstick import Yardstick  # brings scipy

    return {"ceg": Yardstick.of(job.yardstick).gain(loss, flops)}
