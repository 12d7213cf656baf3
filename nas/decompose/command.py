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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hypernas.decompose.controls import LEAST_CONTROLS, activities, controls_folder, load_or_train
from hypernas.decompose.curve import anneal, compare, curve, train_in_blocks
from hypernas.decompose.evidence import DISCOVERY_LEVEL, FAMILY_LEVEL, learned_change, shrinkage, weigh
from hypernas.decompose.nets import Edges, edges_of, flops, in_blocks, masks_at, nets_of, strongest
from hypernas.decompose.report import describe_activity, describe_line, describe_net, write_result
from hypernas.decompose.setting import read_setting
from hypernas.decompose.store import DEFAULT_STORE, join_front, joins_front
from hypernas.errors import UserError
from hypernas.export.read import load, read_config
from hypernas.store import Store
from hypernas.training.device import deterministic
from hypernas.training.inherit import INHERITED
from hypernas.version import version

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
) -> dict[str, Any]:
    """Takes the model of an export apart into `out`; returns the report, `nas decompose --json`.

    The model written runs the blocks of the strongest `keep` of the confirmed edges. The curve joins the front of the
    model's study in `store`; None: in DEFAULT_STORE, if it is there. All is trained on `device`; None is the GPU, where
    there is one. Raises UserError before anything is trained, for a
    folder that is no whole and unchanged export too.
    """
    if controls < LEAST_CONTROLS:
        raise UserError(
            f"--controls {controls}: wanted at least {LEAST_CONTROLS}, since each is tested against two others"
        )
    config = read_config(folder)
    if "blocks" in config:
        raise UserError(f"{folder} is taken apart already: give the export that it was made of")
    if INHERITED in config["provenance"]:
        raise UserError(
            f"{folder} started from another model's weights ({config['provenance'][INHERITED]}), and what learning "
            "changed is told from drawn ones: wanted a model of a search without --inherit"
        )
    target = Path(out).resolve()
    if target.exists():
        raise UserError(f"--out {out}: exists; name another folder")
    if not target.parent.is_dir():
        raise UserError(f"--out {out}: the folder {target.parent} does not exist")
    joins = joins_front(store, folder, config, say)
    setting = read_setting(folder, config, data_path, device)
    deterministic(setting.space)
    original = load(folder).to(setting.device)
    nets = nets_of(original)
    if not nets:
        raise UserError(f"{folder} has no feed-forward net to take apart: wanted a Transformer")
    scratch = controls_folder(target, config)
    if config["provenance"].get("torch") != torch.__version__:
        say(
            f"trained with torch {config['provenance'].get('torch')}, here is {torch.__version__}: the evidence holds "
            "only if both draw the same initial weights from a seed"
        )
    initial = setting.build().eval()
    shuffled = [load_or_train(setting, f"control {n}", scratch, say, shuffled_by=n) for n in range(1, controls + 1)]

    moved: dict[str, list[Edges]] = {}
    evidence = {}
    for name, net in nets.items():
        before = edges_of(nets_of(initial)[name])
        final = [edges_of(nets_of(control)[name]) for control in shuffled]
        factor = shrinkage(final, before)
        moved[name] = [learned_change(weights, before, factor) for weights in final]
        evidence[name] = weigh(learned_change(edges_of(net), before, factor), moved[name])
    structures = {name: strongest(evidence[name], keep) for name in nets}
    for name in nets:
        if strongest(evidence[name], 1.0).blocks and not structures[name].blocks:
            raise UserError(f"--keep {keep:g}: its edges form no block in {name}; keep more")
    active = activities(original, setting)
    idle = [activities(control, setting) for control in (initial, *shuffled)]
    described = []
    for name, net in nets.items():
        own = [nets_of(control)[name] for control in shuffled]
        data = describe_net(net, nets_of(initial)[name], own, evidence[name], moved[name])
        data["co_activation"] = describe_activity(
            active[name], [seen[name] for seen in idle], strongest(evidence[name], 1)
        )
        described.append({"name": name, **data})
        say(describe_line(described[-1]))

    masks = masks_at(nets, evidence, keep)
    model = copy.deepcopy(original)
    annealing = [{"removed": 0.0, **compare(setting, original, model)}]
    for removed in anneal(setting, model, masks, steps, retrain):
        annealing.append({"removed": removed, **compare(setting, original, model)})
    blocked = in_blocks(model, structures)
    after = compare(setting, original, blocked)
    some = any(structure.blocks for structure in structures.values())
    cost = setting.space.cost(setting.arch)
    whole = {"method": "original", "kept": 1.0, "blocks": [1] * len(nets), "flops": float(cost.flops_total)}
    points: list[dict[str, Any]] = [
        {**whole, "parameters": cost.parameters_total, **compare(setting, original, original)}
    ]
    if some:
        points += curve(setting, original, evidence, steps, retrain, say)
        points += train_in_blocks(setting, original, scratch, say)
    report = {
        "of": {"folder": str(folder), "sha256": config["sha256"]["model.safetensors"]},
        "hypernas": version(),
        "loss": setting.task.loss,
        "levels": {"family_wise": FAMILY_LEVEL, "false_discovery_rate": DISCOVERY_LEVEL},
        "losses": {
            "trained": annealing[0][setting.task.loss],
            "untrained": compare(setting, original, initial)[setting.task.loss],
            "shuffled": [compare(setting, original, control)[setting.task.loss] for control in shuffled],
        },
        "nets": described,
        "keep": keep,
        "retrain": retrain,
        "annealing": annealing,
        "result": {"flops": flops(setting, original, masks), **after},
        "curve": points,
        "verdict": [describe_line(net) for net in described],
    }
    surprise = {name: -np.log10(np.maximum(found.p, 1e-300)).astype(np.float16) for name, found in evidence.items()}
    write_result(target, config, setting, structures, blocked.cpu(), surprise, report)
    shutil.rmtree(scratch)
    if joins:
        with Store(store or DEFAULT_STORE) as opened:
            join_front(opened, config, points, setting.task)
    return report
