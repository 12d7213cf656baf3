"""Trains and measures one architecture. A pure function of its Job: the same row on the same machine type gives the
same number, bit for bit (one thread, deterministic algorithms, data and noise drawn from (seed, step))."""

import math
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from nas.data import Corpus, load_corpus, training_batch, validation_windows
from nas.errors import DataError
from nas.records import Job, Progress, Recipe, Report, Result
from search_spaces import load_space
from search_spaces.connections import connection_parameters
from search_spaces.gates import execution_rates, gate_loss, gates_of, reset_rates, start_step

RUNGS = (1 / 8, 1 / 4, 1 / 2, 1.0)  # shares of the training at which a trial is evaluated
WARMUP = 1 / 20  # share of the steps over which the learning rate rises
FINAL_RATE = 0.1  # of the peak, at the end of a cosine or linear schedule
CLIP = 1.0  # gradient norm
EVALUATION_SHARE = 1 / 8  # validation tokens a training token ...
EVALUATION_TOKENS = (16_384, 1 << 20)  # ... within these bounds
PROGRESS_SECONDS = 0.5
BACKWARD = 2  # backward costs twice the forward


class DivergedError(RuntimeError):
    """The loss is not a finite number any more."""


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

    With Muon the matrices of attention and feed-forward nets are Muon's and everything else is AdamW's.
    """
    static = {id(parameter) for parameter in connection_parameters(model)[1]}
    decayed, plain, hidden = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or id(parameter) in static:
            plain.append(parameter)
        elif recipe.optimizer == "muon" and ".branch." in name:
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
class TextScore:
    bits_per_byte: float
    accuracy: float


@torch.no_grad()
def score_text(model: nn.Module, windows: np.ndarray, batch: int) -> TextScore:
    """Validation loss and next-token accuracy over windows (W, T + 1), `batch` windows at a time."""
    model.eval()
    nats, right = 0.0, 0
    for start in range(0, len(windows), batch):
        tokens = torch.from_numpy(windows[start : start + batch])
        logits = model(tokens[:, :-1]).float().flatten(0, 1)
        targets = tokens[:, 1:].flatten()
        nats += F.cross_entropy(logits, targets, reduction="sum").item()
        right += int((logits.argmax(-1) == targets).sum())
    count = windows[:, 1:].size
    return TextScore(nats / math.log(2) / count, right / count)


def seeded_build(space: Any, arch: Any, seed: int) -> nn.Module:
    """The module with the initial weights that `seed` draws; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = space.build(arch)
    return model


@lru_cache(maxsize=4)
def _corpus(path: str | None, hash: str) -> Corpus:
    corpus = load_corpus(path)
    if corpus.hash != hash:
        raise DataError(
            f"the text {corpus.name} on this worker has hash {corpus.hash[:12]}, the study's has {hash[:12]}: "
            "use the same files (and, for the default text, the same Python version) everywhere"
        )
    return corpus


@lru_cache(maxsize=8)
def _space(name: str, settings: tuple[tuple[str, str], ...]) -> Any:
    return load_space(name, dict(settings))


def deterministic() -> None:
    """One thread and deterministic algorithms, for this whole process."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # costs time, and nothing here reads unwritten memory


def provenance() -> dict[str, Any]:
    """What a trial's number depends on besides its row."""
    from nas import version

    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "hypernas": version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": "cpu",
        "cpu": f"{platform.machine()} {capability}",
        "threads": torch.get_num_threads(),
        "kernels": "reference",
        "worker": f"{platform.node()}:{os.getpid()}",
    }


def evaluation_tokens(recipe: Recipe) -> int:
    low, high = EVALUATION_TOKENS
    return int(min(max(EVALUATION_SHARE * recipe.tokens, low), high))


def evaluate(job: Job) -> Iterator[Progress | Report | Result]:
    """Trains the job's architecture: progress as it goes, a report at each rung, one result at the end.

    Raises SpaceError when the architecture cannot be built, DivergedError when the loss is not finite.
    """
    deterministic()
    recipe = job.recipe
    space = _space(job.space.name, tuple(sorted(job.space.settings.items())))
    corpus = _corpus(job.data_path, job.data_hash)
    arch = space.from_json(job.arch)
    cost = space.cost(arch)
    model = seeded_build(space, arch, recipe.seed)
    windows = max(1, recipe.batch_tokens // arch.context)
    validation = validation_windows(corpus, evaluation_tokens(recipe), arch.context)
    step_tokens = windows * arch.context
    steps = max(1, round(recipe.tokens / step_tokens))
    rungs = {max(1, round(share * steps)): rung for rung, share in enumerate(RUNGS)}
    optimizers = make_optimizers(model, recipe)

    train_seconds = evaluate_seconds = 0.0
    shown = clock = time.perf_counter()
    score = None
    model.train()
    for step in range(steps):
        loss = _train_step(model, optimizers, corpus, job, step, steps, windows, arch.context)
        now = time.perf_counter()
        if now - shown > PROGRESS_SECONDS:
            shown = now
            yield Progress(job.trial, (step + 1) / steps, loss / math.log(2))
        if step + 1 in rungs:
            train_seconds += time.perf_counter() - clock
            clock = time.perf_counter()
            reset_rates(model)
            score = score_text(model, validation, windows)
            model.train()
            evaluate_seconds += time.perf_counter() - clock
            tokens = (step + 1) * step_tokens
            yield Report(
                trial=job.trial,
                rung=rungs[step + 1],
                step=step + 1,
                tokens=tokens,
                training_flops=(1 + BACKWARD) * cost.flops_total * tokens,
                loss=score.bits_per_byte,
                seconds=train_seconds + evaluate_seconds,
            )
            clock = time.perf_counter()
    if score is None or not math.isfinite(score.bits_per_byte):
        raise DivergedError("the validation loss is not finite")
    rates = execution_rates(model)
    yield Result(
        trial=job.trial,
        token=job.token,
        values={
            "bits_per_byte": score.bits_per_byte,
            "accuracy": score.accuracy,
            "flops_per_token": float(cost.flops_executed(rates)),
            "parameters": float(cost.parameters_total),
            "training_flops": float((1 + BACKWARD) * cost.flops_total * steps * step_tokens),
        },
        parameters=cost.parameters_total,
        train_seconds=train_seconds,
        evaluate_seconds=evaluate_seconds,
        provenance=provenance(),
        diagnostics={"gate_rates": rates} if rates else {},
        weights=save(model.state_dict()),
    )


def _train_step(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    corpus: Corpus,
    job: Job,
    step: int,
    steps: int,
    windows: int,
    context: int,
) -> float:
    """One update; the batch's mean loss in nats a token. Raises DivergedError."""
    batch = torch.from_numpy(training_batch(corpus, job.data_seed, step, windows, context))
    progress = step / steps
    start_step(model, job.recipe.seed, step, progress)
    logits: Tensor = model(batch[:, :-1])
    loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
    total = loss + gate_loss(model, progress) if gates_of(model) else loss
    value = loss.item()
    if not math.isfinite(value):
        raise DivergedError(f"the training loss is {value} at step {step} of {steps}")
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    total.backward()
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    rate = learning_rate(job.recipe, step, steps)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    return value
