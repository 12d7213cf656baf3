"""Trains and measures one architecture. A pure function of its Job: the same row on the same machine type gives the
same number, bit for bit (one thread, deterministic algorithms, data and noise drawn from (seed, step))."""

import math
import os
import platform
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from hypernas import cuda_graph
from hypernas.checkpoints import CheckpointError, Position, load_checkpoint, save_checkpoint
from hypernas.errors import DataError
from hypernas.inherit import described, inherit
from hypernas.kernels import _cpu, _dispatch
from hypernas.measure import latency_ms, peak_bytes, stream_diagnostics
from hypernas.records import RUNGS, Failure, FailureKind, Job, Notice, Progress, Recipe, Report, Result
from hypernas.search_spaces import is_built_in, load_space
from hypernas.search_spaces.connections import connection_parameters, recomputing_streams
from hypernas.search_spaces.gates import execution_rates, gate_loss, gates_of, reset_rates, start_step
from hypernas.tasks import TASKS, Batch, Steps, steps_of, to_device

WARMUP = 1 / 20  # share of the steps over which the learning rate rises
FINAL_RATE = 0.1  # of the peak, at the end of a cosine or linear schedule
CLIP = 1.0  # gradient norm
PROGRESS_SECONDS = 0.5
BACKWARD = 2  # backward costs twice the forward
READ_EVERY = 32  # steps whose losses are read from a GPU at once
SCORED_BYTES = 1 << 30  # of activations in a batch that a GPU scores, if all were kept


class DivergedError(RuntimeError):
    """The loss is not a finite number any more."""


@dataclass(slots=True)
class Losses:
    """The losses of a training of `steps` steps, in nats. What lies on a GPU is read seldom, as that waits for it."""

    steps: int
    last: float = math.nan
    unread: list[tuple[int, Tensor]] = field(default_factory=list)

    def add(self, step: int, loss: float | Tensor) -> None:
        """Notes what `train_step` returned for a step. Raises DivergedError, every READ_EVERY steps."""
        if isinstance(loss, float):
            self.last = loss
            return
        self.unread.append((step, loss))
        if len(self.unread) == READ_EVERY:
            self.read()

    def read(self) -> float:
        """The last step's loss. Raises DivergedError, which names the first step that had no finite one."""
        if self.unread:
            values = torch.stack([loss for _, loss in self.unread]).tolist()
            for (step, _), value in zip(self.unread, values, strict=True):
                require_finite(value, step, self.steps)
            self.unread.clear()
            self.last = values[-1]
        return self.last


def require_finite(loss: float, step: int, steps: int) -> None:
    """Raises DivergedError where the loss of a step is no finite number."""
    if not math.isfinite(loss):
        raise DivergedError(f"the training loss is {loss} at step {step} of {steps}")


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """The rate at a step of `steps`: linear warm-up, then cosine or linear decay to a tenth, or inverse square root."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    if recipe.schedule == "inverse_sqrt":
        return recipe.learning_rate * math.sqrt(warmup / (step + 1))
    left = 1 - (step - warmup) / max(1, steps - warmup)
    shape = 0.5 * (1 - math.cos(math.pi * left)) if recipe.schedule == "cosine" else left
    return recipe.learning_rate * (FINAL_RATE + (1 - FINAL_RATE) * shape)


def make_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Weight decay touches matrices only: not norms, biases, nor the static parts of connections and gates.

    With Muon the matrices of attention and feed-forward nets are Muon's and everything else is AdamW's (convolutions
    too: torch's Muon takes matrices alone).
    """
    static = {id(parameter) for parameter in connection_parameters(model)[1]}
    decayed, plain, hidden = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or id(parameter) in static:
            plain.append(parameter)
        elif recipe.optimizer == "muon" and ".branch." in name and parameter.ndim == 2:
            hidden.append(parameter)
        else:
            decayed.append(parameter)
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    if recipe.optimizer == "sgd":
        return [torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=0.9)]
    adamw = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)
    if not hidden:
        return [adamw]
    # Matched to AdamW's update size, so that one learning rate serves both.
    muon = torch.optim.Muon(
        hidden, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return [adamw, muon]


@dataclass(frozen=True, slots=True)
class Score:
    loss: float  # in the task's own unit
    accuracy: float


@torch.no_grad()
def score(model: nn.Module, batches: Iterable[Batch], nats: float) -> Score:
    """Mean cross-entropy, in units of `nats` nats, and accuracy over all predictions.

    In float32 on every device, whatever the precision of training: what is scored is what an export computes.
    """
    model.eval()
    count = 0
    device = next(model.parameters()).device
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # read once: it waits for a GPU
    for batch in batches:
        inputs, classes = to_device(batch, device)
        logits, targets = model(inputs).float().flatten(0, -2), classes.flatten()
        sums[0].add_(F.cross_entropy(logits, targets, reduction="sum"))
        sums[1].add_((logits.argmax(-1) == targets).sum())
        count += targets.numel()
    total, right = sums.tolist()
    return Score(total / nats / count, right / count)


def scored_at_once(spent: Steps, cost: Any, micro_batches: int, device: torch.device) -> int:
    """Samples in a batch of scoring: on a CPU as many as are trained on at once.

    On a GPU, which so few leave idle, as many as SCORED_BYTES would hold if their activations were kept, which scoring
    does not do. But where training ran out of memory as many as there.
    """
    trained = max(1, spent.samples // micro_batches)
    if device.type != "cuda" or micro_batches > 1:
        return trained
    kept = cost.activation_bytes * spent.units // spent.samples
    return max(trained, SCORED_BYTES // max(1, kept))


def seeded_build(space: Any, arch: Any, seed: int) -> nn.Module:
    """The module with the initial weights that `seed` draws; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = space.build(arch)
    return model


@lru_cache(maxsize=4)
def checked_data(task: str, path: str | None, hash: str) -> Any:
    """The task's data at `path`. Raises DataError when it is not what the study was trained on."""
    data = TASKS[task].load(path)
    if data.hash != hash:
        raise DataError(
            f"the data {data.name} on this worker has hash {data.hash[:12]}, the study's has {hash[:12]}: "
            "use the same files (and, for the default text, the same Python version) everywhere"
        )
    return data


@lru_cache(maxsize=8)
def _space(name: str, settings: tuple[tuple[str, str], ...]) -> Any:
    return load_space(name, dict(settings))


def deterministic(space: Any = None) -> None:
    """One thread and deterministic algorithms, for this whole process: an operator that has none is an error.

    On a GPU it is a warning in a `space` of a user's own, whose nets may need such an operator. Ours do not; and only
    where others are errors does attention choose a deterministic backward.
    """
    torch.set_num_threads(1)
    lenient = torch.cuda.is_available() and space is not None and not is_built_in(space)
    torch.use_deterministic_algorithms(True, warn_only=lenient)
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32: convolutions, and an LSTM's products, in a score
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # costs time, and nothing here reads unwritten memory


def worker_device(asked: str = "auto") -> torch.device:
    """Where this process trains, by what a job or a flag asks for: auto, a GPU if it has one; cpu, its CPU."""
    return torch.device("cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu")


def product_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU and on a CPU with matrix units, float32 on any other CPU.

    There bfloat16 gains a third at best and costs reproducibility between machine types.
    """
    return torch.bfloat16 if device.type == "cuda" or _cpu.has_amx() else torch.float32


def mixed_precision(device: torch.device, products: torch.dtype | None = None) -> torch.autocast:
    """Matrix products in `products`, by default the device's `product_dtype`; weights and streams in float32.

    A weight's copy is kept for no second product, as CUDA graphs want it; a weight takes part in one.
    """
    products = products or product_dtype(device)
    enabled = products is not torch.float32
    return torch.autocast(device.type, products if enabled else torch.bfloat16, enabled=enabled, cache_enabled=False)


def compile_parts(model: nn.Module) -> None:
    """torch.compile in place, branch by branch where there are branches: what lies between them differs at each step
    (gates) or is fused already. State and names stay."""
    branches = [module.branch for module in model.modules() if hasattr(module, "branch")]
    for part in branches or [model]:
        part.compile(dynamic=False)  # type: ignore[union-attr]


def precision(device: torch.device) -> str:
    """What a training on the device computes in, in words: rows of two precisions differ in their last digits."""
    if product_dtype(device) is torch.float32:
        return "float32"
    return f"bfloat16 products: {'cuda' if device.type == 'cuda' else 'amx'}"


def reading_waits(device: torch.device) -> bool:
    """Whether reading a number from the device stops the host until all that it launched there is done."""
    return device.type == "cuda"


def provenance(device: torch.device) -> dict[str, Any]:
    """What a trial's number depends on besides its row: where it ran, and which kernels computed it and why."""
    from hypernas import version

    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "hypernas": version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": f"{platform.machine()} {capability}",
        "precision": precision(device),
        "threads": torch.get_num_threads(),
        "kernels": {op: f"{choice.backend}: {choice.reason}" for op, choice in _dispatch.chosen().items()},
        "worker": f"{platform.node()}:{os.getpid()}",
    }


def evaluate(job: Job) -> Iterator[Progress | Notice | Report | Result]:
    """Trains the job's architecture: progress as it goes, a report at each rung, one result at the end.

    With a checkpoint, goes on from there; the numbers are those of training in one go. Raises SpaceError when the
    architecture cannot be built, DivergedError when the loss is not finite, BackendError when kernels were asked for
    that cannot run here.
    """
    space = _space(job.space.name, tuple(sorted(job.space.settings.items())))
    deterministic(space)
    device = worker_device(job.device)
    _dispatch.forget_chosen()
    with _dispatch.use_backend(job.kernels), torch.random.fork_rng([device] if device.type == "cuda" else []):
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
    from hypernas.scaling import Yardstick  # brings scipy

    return {"ceg": Yardstick.of(job.yardstick).gain(loss, flops)}


def measure(
    names: Collection[str],
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    batch: Batch,
    recipe: Recipe,
    steps: int,
    micro_batches: int = 1,
) -> tuple[dict[str, float], dict[str, Any]]:
    """The measured objectives among `names`, and what to know about them. Trains the model one step further.

    `latency_ms` is a forward pass of one sample; `peak_bytes` of a training step on `batch`: weights, gradients,
    optimiser and activations.
    """
    values: dict[str, float] = {}
    spread: dict[str, Any] = {}
    if "latency_ms" in names:
        values["latency_ms"], spread = latency_ms(model, batch[0][:1])
    if "peak_bytes" in names:
        model.train()
        states = [value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()]
        held = [*model.parameters(), *model.buffers(), *(value for value in states if isinstance(value, Tensor))]
        held += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        step = partial(train_step, model, optimizers, batch, recipe, steps - 1, steps, micro_batches)
        values["peak_bytes"] = float(peak_bytes(step, held, batch[0].device))
    return values, spread


def measured_worst(
    names: Collection[str],
    space: Any,
    arch: Any,
    recipe: Recipe,
    path: str | None,
    *,
    device: torch.device,
    kernels: str,
    compile: bool,
) -> dict[str, float]:
    """The measured objectives of an untrained architecture, measured as a worker on `device` would: what a study's
    others are held against. Raises BackendError for kernels that cannot run here."""
    if not names:
        return {}
    deterministic(space)
    task = TASKS[space.task]
    with _dispatch.use_backend(kernels):
        model = seeded_build(space, arch, recipe.seed).to(device)
        if compile:
            compile_parts(model)
        batch = to_device(task.batch(task.load(path), arch, 0, 0, steps_of(task, arch, recipe).samples), device)
        optimizers = make_optimizers(model, recipe)
        train_step(model, optimizers, batch, recipe, 0, 2)  # the optimiser's state is there from the first step on
        return measure(names, model, optimizers, batch, recipe, 2)[0]


def train_step(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    batch: Batch,
    recipe: Recipe,
    step: int,
    steps: int,
    micro_batches: int = 1,
    products: torch.dtype | None = None,
) -> float | Tensor:
    """One update, its gradients summed over the parts of the batch; its mean loss in nats, for `Losses`.

    Raises DivergedError; but on a GPU, where asking for the loss would stop the host in mid-step, the loss stays there.
    A batch goes in parts where memory ran out; then residual streams are not kept for backward where it is cheap to
    compute them again, which changes no number.
    `products` is the dtype of matrix products, by default the device's `product_dtype`.
    """
    progress = step / steps
    start_step(model, recipe.seed, step, progress)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    value: float | Tensor = 0.0
    for inputs, classes in zip(*(tensor.chunk(micro_batches) for tensor in batch), strict=True):
        share = len(inputs) / len(batch[0])
        recompute = recomputing_streams(model) if micro_batches > 1 else nullcontext()
        with mixed_precision(inputs.device, products), recompute:
            logits: Tensor = model(inputs)
        loss = F.cross_entropy(logits.float().flatten(0, -2), classes.flatten())
        total = loss + gate_loss(model, progress) if gates_of(model) else loss
        value = value + share * (loss.detach() if reading_waits(loss.device) else loss.item())
        if isinstance(value, float):
            require_finite(value, step, steps)
        (share * total).backward()
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    rate = learning_rate(recipe, step, steps)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    return value
