"""What a model loses when only its strongest blocks run, by four methods."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hypernas.decompose.controls import load_or_train
from hypernas.decompose.evidence import Evidence
from hypernas.decompose.nets import (
    Masks,
    edges_of,
    equally_many,
    flops,
    masks_at,
    nets_of,
    parameter_masks,
    parameters,
    strongest,
)
from hypernas.search_spaces.base import arch_to_json
from hypernas.training.model import score
from hypernas.training.run import Setting, prepare
from hypernas.training.step import FINAL_RATE

KEPT = (1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125)  # shares of the confirmed edges along the curve
BLOCKS = "ffn.blocks"  # the key of a space that imposes blocks from the start


def anneal(setting: Setting, model: nn.Module, masks: Masks, steps: int, retrain: int) -> Iterator[float]:
    """Takes out the weights beyond `masks` in equal steps, in place; yields the share taken out after each.

    After every step the model trains on `retrain / steps` tokens (or images) that it has not seen, from a tenth of its
    learning rate, while what is taken out is held where it is.
    """
    held = [
        (parameter, mask, parameter.detach().clone())
        for name, net in nets_of(model).items()
        for parameter, mask in parameter_masks(net, masks[name])
    ]
    updates = round(retrain / (setting.steps.units * steps))
    recipe = replace(setting.recipe, learning_rate=FINAL_RATE * setting.recipe.learning_rate)
    run = prepare(replace(setting, recipe=recipe), model=model, steps=steps * updates)

    @torch.no_grad()
    def hold(left: float) -> None:
        for parameter, mask, start in held:
            parameter.copy_(torch.where(mask, parameter, left * start))

    for step in range(1, steps + 1):
        left = 1 - step / steps
        hold(left)
        model.train()
        for _ in range(updates):
            run.step(setting.batch(setting.steps.count + run.done))
            hold(left)
        run.losses.read()
        model.eval()
        yield step / steps


def compare(setting: Setting, original: nn.Module, model: nn.Module) -> dict[str, float]:
    """The model beside the original on validation: its loss and accuracy, KL(original || model) in nats, and how often
    their likeliest predictions agree."""
    scored = score(model, setting.validation(), setting.task.nats, original)
    return {
        setting.task.loss: scored.loss,
        "accuracy": scored.accuracy,
        "kl": scored.kl,
        "agreement": scored.agreement,
    }


METHODS = ("blocks", "magnitude", "units", "random")


def curve(
    setting: Setting,
    original: nn.Module,
    evidence: Mapping[str, Evidence],
    steps: int,
    retrain: int,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Loss against FLOPs: blocks of ever fewer edges, and each other method at the same FLOPs of products."""
    nets = nets_of(original)
    points = []
    for share in KEPT:
        masks = masks_at(nets, evidence, share)
        for method in METHODS:
            chosen = masks
            if method != "blocks":
                chosen = {
                    name: equally_many(method, edges_of(net), masks[name], setting.recipe.seed)
                    for name, net in nets.items()
                }
            model = copy.deepcopy(original)
            for _ in anneal(setting, model, chosen, steps, retrain):
                pass
            point = {
                "method": method,
                "kept": share,
                "blocks": [len(strongest(evidence[name], share).blocks) for name in nets],
                "flops": flops(setting, original, chosen),
                "parameters": parameters(setting, chosen),
                **compare(setting, original, model),
            }
            points.append(point)
            say(describe_point(setting, point))
    return points


def in_blocks_from_the_start(setting: Setting) -> dict[int, Setting]:
    """The setting with every feed-forward net in so many blocks of equal size, where its space has that choice."""
    if BLOCKS not in setting.space.keys:
        return {}
    flat = arch_to_json(setting.arch)
    counts = (count for count in setting.space.keys[BLOCKS].options if count > 1)
    return {count: replace(setting, arch=setting.space.from_json({**flat, BLOCKS: count})) for count in counts}


def train_in_blocks(
    setting: Setting, original: nn.Module, folder: Path, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Points of the curve for blocks that nobody had to find, trained as the model was."""
    for count, other in in_blocks_from_the_start(setting).items():
        model = load_or_train(other, f"in {count} blocks", folder, say)
        cost = setting.space.cost(other.arch)
        point = {
            "method": "imposed",
            "kept": 1 / count,
            "blocks": [count] * len(nets_of(original)),
            "flops": float(cost.flops_total),
            "parameters": cost.parameters_total,
            **compare(setting, original, model),
        }
        say(describe_point(setting, point))
        yield point


def describe_point(setting: Setting, point: Mapping[str, Any]) -> str:
    return (
        f"{point['method']:9} {point['kept']:8.5f} of the edges: {point['flops'] / 1e6:.4f} MFLOPs, "
        f"{setting.task.loss} {point[setting.task.loss]:.4f}, KL {point['kl']:.4f}, agreement {point['agreement']:.3f}"
    )
