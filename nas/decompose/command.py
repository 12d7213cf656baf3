"""A trained model taken apart into blocks that run independently, with the evidence for them: `nas decompose`.

From an export: its architecture and seed give back the initial weights, its recipe and data train the controls (the
same training on shuffled targets). evidence.py weighs each feed-forward net's change against theirs and finds the
blocks; here what is between blocks is taken out in steps, beside other ways of removing as many FLOPs, and what
that does to the model's output is measured every time. Attention, norms and the residual stream stay whole.

What is trained is kept in FOLDER.controls while the command runs, so that an interrupted one goes on where it was. The
variants along the curve join the front of the study that the model is of, as points of their own.
"""

import copy
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hypernas.decompose.controls import activities, controls_folder, load_or_train
from hypernas.decompose.curve import anneal, compare, curve, train_in_blocks
from hypernas.decompose.evidence import (
    DISCOVERY_LEVEL,
    FAMILY_LEVEL,
    Evidence,
    Structure,
    learned_change,
    shrinkage,
    weigh,
)
from hypernas.decompose.nets import Edges, Masks, edges_of, flops, in_blocks, masks_at, nets_of, strongest
from hypernas.decompose.report import describe_activity, describe_line, describe_net, write_result
from hypernas.decompose.request import check_controls, check_target
from hypernas.decompose.setting import read_setting
from hypernas.decompose.store import DEFAULT_STORE, join_front, joins_front
from hypernas.errors import UserError
from hypernas.export.card import read_config
from hypernas.export.read import load
from hypernas.store import Store
from hypernas.training.device import deterministic
from hypernas.training.inherit import INHERITED
from hypernas.training.model import score
from hypernas.training.run import Setting
from hypernas.version import version


@dataclass(frozen=True, slots=True)
class Models:
    """The model, its initial weights, and its controls, which were trained on shuffled targets."""

    original: nn.Module
    initial: nn.Module
    controls: Sequence[nn.Module]


@dataclass(frozen=True, slots=True)
class Weighed:
    """By the name of a feed-forward net: its evidence, the changes of its controls, and its chosen blocks."""

    evidence: Mapping[str, Evidence]
    changes: Mapping[str, Sequence[Edges]]
    structures: Mapping[str, Structure]


# ---- the command ---------------------------------------------------------------------------------------------------


def decompose(
    folder: str,
    out: str,
    *,
    data_path: str | None,
    controls: int,
    keep: float,
    steps: int,
    retrain: int,
    store: str | None,
    say: Callable[[str], None],
    device: torch.device | None = None,
    space: str | None = None,
) -> dict[str, Any]:
    """Takes the model of an export apart into `out`; returns the report, `nas decompose --json`.

    The model written runs the blocks of the strongest `keep` of the confirmed edges. The curve joins the front of the
    model's study in `store`; None: in DEFAULT_STORE, if it is there. All is trained on `device`; None is the GPU, where
    there is one. `space` is as in `hypernas.load`. Raises UserError before anything is trained, for a folder that is no
    whole and unchanged export too.
    """
    config = read_whole_model(folder, controls)
    target = check_target(out)
    joins = joins_front(store, folder, config, say)
    setting = read_setting(folder, config, data_path, device, space)
    say(setting.data.reading.describe(setting.data.name))
    deterministic(setting.space)
    original = load(folder, space=space).to(setting.device)
    if not nets_of(original):
        raise UserError(f"{folder} has no feed-forward net to take apart: wanted a Transformer")
    scratch = controls_folder(target, config)
    warn_of_another_torch(config, say)
    models = train_controls(setting, original, controls, scratch, say)
    weighed = weigh_nets(models, keep)
    described = describe_nets(setting, models, weighed, say)
    masks = masks_at(nets_of(original), weighed.evidence, keep)
    blocked, annealing = remove_rest(setting, original, masks, weighed.structures, steps, retrain)
    after = compare(setting, original, blocked)
    points = [original_point(setting, original)]
    if any(structure.blocks for structure in weighed.structures.values()):
        points += curve(setting, original, weighed.evidence, steps, retrain, say)
        points += train_in_blocks(setting, original, scratch, say)
    report = {
        "of": {"folder": str(folder), "sha256": config["sha256"]["model.safetensors"]},
        "hypernas": version(),
        "loss": setting.task.loss,
        "levels": {"family_wise": FAMILY_LEVEL, "false_discovery_rate": DISCOVERY_LEVEL},
        "losses": score_models(setting, models),
        "nets": described,
        "keep": keep,
        "retrain": retrain,
        "annealing": annealing,
        "result": {"flops": flops(setting, original, masks), **after},
        "curve": points,
        "verdict": [describe_line(net) for net in described],
    }
    write_result(target, config, setting, weighed.structures, blocked.cpu(), surprise(weighed.evidence), report)
    shutil.rmtree(scratch)
    if joins:
        with Store(store or DEFAULT_STORE) as opened:
            join_front(opened, config, points, setting.task)
    return report


# ---- its steps -----------------------------------------------------------------------------------------------------


def read_whole_model(folder: str, controls: int) -> dict[str, Any]:
    """The configuration of an export that can be taken apart beside so many controls. Raises UserError."""
    check_controls(controls)
    config = read_config(folder)
    if "blocks" in config:
        raise UserError(f"{folder} is taken apart already: give the export that it was made of")
    if INHERITED in config["provenance"]:
        raise UserError(
            f"{folder} started from another model's weights ({config['provenance'][INHERITED]}), and what learning "
            "changed is told from drawn ones: wanted a model of a search without --inherit"
        )
    return config


def warn_of_another_torch(config: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Says so where the model was trained with another torch than this one."""
    trained_with = config["provenance"].get("torch")
    if trained_with != torch.__version__:
        say(
            f"trained with torch {trained_with}, here is {torch.__version__}: the evidence holds only if both draw the "
            "same initial weights from a seed"
        )


def train_controls(
    setting: Setting, original: nn.Module, count: int, scratch: Path, say: Callable[[str], None]
) -> Models:
    """The model with `count` controls, each trained here or read from `scratch`."""
    initial = setting.build().eval()
    numbers = range(1, count + 1)
    return Models(
        original, initial, [load_or_train(setting, f"control {n}", scratch, say, shuffled_by=n) for n in numbers]
    )


def weigh_nets(models: Models, keep: float) -> Weighed:
    """The evidence of each net, and the blocks of the strongest `keep` of its confirmed edges.

    Raises UserError where a net has blocks, but none of so few edges.
    """
    changes: dict[str, list[Edges]] = {}
    evidence, structures = {}, {}
    for name, net in nets_of(models.original).items():
        before = edges_of(nets_of(models.initial)[name])
        final = [edges_of(nets_of(control)[name]) for control in models.controls]
        factor = shrinkage(final, before)
        changes[name] = [learned_change(weights, before, factor) for weights in final]
        evidence[name] = weigh(learned_change(edges_of(net), before, factor), changes[name])
        structures[name] = strongest(evidence[name], keep)
    for name, structure in structures.items():
        if strongest(evidence[name], 1.0).blocks and not structure.blocks:
            raise UserError(f"--keep {keep:g}: its edges form no block in {name}; keep more")
    return Weighed(evidence, changes, structures)


def describe_nets(
    setting: Setting, models: Models, weighed: Weighed, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The evidence of each net as JSON, with its graph of co-activation; says a line of each."""
    active = activities(models.original, setting)
    idle = [activities(control, setting) for control in (models.initial, *models.controls)]
    described = []
    for name, net in nets_of(models.original).items():
        evidence = weighed.evidence[name]
        own = [nets_of(control)[name] for control in models.controls]
        data = describe_net(net, nets_of(models.initial)[name], own, evidence, weighed.changes[name])
        others = [seen[name] for seen in idle]
        data["co_activation"] = describe_activity(active[name], others, strongest(evidence, 1.0))
        described.append({"name": name, **data})
        say(describe_line(described[-1]))
    return described


def remove_rest(
    setting: Setting,
    original: nn.Module,
    masks: Masks,
    structures: Mapping[str, Structure],
    steps: int,
    retrain: int,
) -> tuple[nn.Module, list[dict[str, float]]]:
    """The model in blocks, and how far from the original it was after each step of the removal."""
    model = copy.deepcopy(original)
    annealing = [{"removed": 0.0, **compare(setting, original, model)}]
    for removed in anneal(setting, model, masks, steps, retrain):
        annealing.append({"removed": removed, **compare(setting, original, model)})
    return in_blocks(model, structures), annealing


def original_point(setting: Setting, original: nn.Module) -> dict[str, Any]:
    """The first point of the curve: nothing is removed."""
    cost = setting.cost
    return {
        "method": "original",
        "kept": 1.0,
        "blocks": [1] * len(nets_of(original)),
        "flops": float(cost.flops_total),
        "parameters": cost.parameters_total,
        **compare(setting, original, original),
    }


def score_models(setting: Setting, models: Models) -> dict[str, Any]:
    """The loss of the model, of its initial weights and of each control."""

    def loss(model: nn.Module) -> float:
        return score(model, setting.validation(), setting.task.nats).loss

    return {
        "trained": loss(models.original),
        "untrained": loss(models.initial),
        "shuffled": [loss(control) for control in models.controls],
    }


def surprise(evidence: Mapping[str, Evidence]) -> dict[str, np.ndarray]:
    """-log10 p of each net's edges (C, H), in float16."""
    return {name: -np.log10(np.maximum(found.p, 1e-300)).astype(np.float16) for name, found in evidence.items()}
