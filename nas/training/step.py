"""One optimiser step, and what it needs: learning rates, optimisers, and the check that a loss is finite."""

import math
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypernas.data.tasks import Batch
from hypernas.records import Recipe
from hypernas.search_spaces.connections import connection_parameters, recomputing_streams
from hypernas.search_spaces.gates import gate_loss, gates_of, start_step
from hypernas.training.device import mixed_precision, reading_waits

WARMUP = 1 / 20  # share of the steps over which the learning rate rises
FINAL_RATE = 0.1  # of the peak, at the end of a cosine or linear schedule
CLIP = 1.0  # gradient norm
BACKWARD = 2  # a backward pass computes two products for each of the forward pass: 2001.08361, section 2.1
READ_EVERY = 32  # steps whose losses are read from a GPU at once


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


def training_flops(forward: float, count: float) -> float:
    """FLOPs of training on `count` tokens (or images) whose forward pass takes `forward` each."""
    return (1 + BACKWARD) * forward * count


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
