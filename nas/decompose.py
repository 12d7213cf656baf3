"""A trained model taken apart into blocks that run independently, with the evidence for them: `nas decompose`.

From an export: its architecture and seed give back the initial weights, its recipe and data train the controls (the
same training on shuffled targets). nas/blocks.py weighs each feed-forward net's change against theirs and finds the
blocks; here what is between blocks is taken out in steps, beside other ways of removing as many FLOPs, and what
that does to the model's output is measured every time. Attention, norms and the residual stream stay whole.

What is trained is kept in FOLDER.controls while the command runs, so that an interrupted one goes on where it was. The
variants along the curve join the front of the study that the model is of, as points of their own.
"""

import copy
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hypernas import blocks, formats
from hypernas.blocks import Evidence, Structure
from hypernas.config import COUNTED, SEARCHED
from hypernas.data.tasks import TASKS, Batch, Steps, Task, steps_of, to_device
from hypernas.errors import UserError
from hypernas.export import FOOTER
from hypernas.exported import CARD, digest, listed, load, read_config, space_of
from hypernas.records import Recipe
from hypernas.search_spaces.base import Space, arch_to_json
from hypernas.search_spaces.blocks import cut
from hypernas.search_spaces.layers import ACTIVATIONS, ffn_cost
from hypernas.source import write_source
from hypernas.store import Store
from hypernas.summary import training_json
from hypernas.training.device import deterministic, worker_device
from hypernas.training.inherit import INHERITED
from hypernas.training.model import checked_data, score, seeded_build
from hypernas.training.step import FINAL_RATE, Losses, make_optimizers, train_step
from hypernas.version import version

DEFAULT_STORE = "nas.db"
LEAST_CONTROLS = 3  # each is tested against two others, as the model is against all
KEPT = (1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125)  # shares of the confirmed edges along the curve
CO_ACTIVE_TOKENS = 4096  # of validation, for the graph of co-activation
REPORT = "decomposition.json"
EVIDENCE = "evidence.safetensors"  # of each net -log10 p of its edges (C, H), unpermuted
BLOCKS = "ffn.blocks"  # the key of a space that imposes blocks from the start

NETS = {kind: name for name, kind in ACTIVATIONS.items()}
Edges = np.ndarray  # (m, C, H): the weights that join coordinate c and unit h, the writing one last
Masks = Mapping[str, Edges]  # of each net, which weights stay


@dataclass(frozen=True, slots=True)
class Setting:
    """What an exported model was trained on, and how."""

    space: Space
    arch: Any
    task: Task
    data: Any
    recipe: Recipe
    data_seed: int
    device: torch.device = field(default_factory=worker_device)  # where everything is trained and compared

    @property
    def steps(self) -> Steps:
        return steps_of(self.task, self.arch, self.recipe)

    def batch(self, step: int, device: torch.device) -> Batch:
        return to_device(self.task.batch(self.data, self.arch, self.data_seed, step, self.steps.samples), device)

    def validation(self) -> Iterator[Batch]:
        return self.task.validation(self.data, self.arch, self.recipe, self.steps.samples)


def read_setting(
    folder: str, config: Mapping[str, Any], data_path: str | None, device: torch.device | None = None
) -> Setting:
    """The setting of an export. Raises UserError, and DataError when the data is not the data it was trained on."""
    space, arch = space_of(folder, config)
    training, data = config["training"], config["data"]
    if "seed" not in data:
        raise UserError(
            f"{folder} does not say in which order it saw its data, so no control can be trained: export anew"
        )
    total, batch = COUNTED[space.task]
    searched = {attribute: training[name] for name, attribute in SEARCHED.items()}
    recipe = Recipe(**searched, tokens=training[total], batch_tokens=training[batch], seed=training["train.seed"])
    found = checked_data(space.task, data_path or data["path"], data["hash"])
    return Setting(space, arch, TASKS[space.task], found, recipe, data["seed"], device or worker_device())


# ---- a net's weights as edges --------------------------------------------------------------------------------------


def nets_of(model: nn.Module) -> dict[str, Any]:
    """The feed-forward nets of a model by name."""
    return {name: module for name, module in model.named_modules() if type(module) in NETS}


def _reading(net: Any) -> nn.Linear:
    return net.gate_up if "gate_up" in net._modules else net.linear


def edges_of(net: Any) -> Edges:
    """The weights of a net by the coordinate and the unit they join, (m, C, H)."""
    read = _reading(net).weight.detach().unflatten(0, (-1, net.d_hidden)).transpose(1, 2)  # (m - 1, C, H)
    return torch.cat([read, net.out.weight.detach()[None]]).cpu().numpy()


def _parameter_masks(net: Any, mask: Edges) -> list[tuple[nn.Parameter, Tensor]]:
    """The net's parameters, each with its part of a mask over edges."""
    device = net.out.weight.device
    read = torch.from_numpy(mask[:-1].transpose(0, 2, 1).reshape(-1, mask.shape[1]))
    written = torch.from_numpy(np.ascontiguousarray(mask[-1]))
    return [(_reading(net).weight, read.to(device)), (net.out.weight, written.to(device))]


# ---- controls and evidence -----------------------------------------------------------------------------------------


def train(setting: Setting, name: str, say: Callable[[str], None], shuffled_by: int | None = None) -> nn.Module:
    """The setting's own training, from its own initial weights, on the same inputs in the same order.

    With `shuffled_by` the targets of every batch are shuffled, by that number: all that training does to weights where
    there is nothing to learn.
    """
    model = seeded_build(setting.space, setting.arch, setting.recipe.seed).to(setting.device)
    optimizers = make_optimizers(model, setting.recipe)
    device = next(model.parameters()).device
    model.train()
    steps = setting.steps.count
    losses = Losses(steps)
    for step in range(steps):
        inputs, classes = setting.batch(step, device)
        if shuffled_by is not None:
            seed = int(np.random.SeedSequence([shuffled_by, step]).generate_state(1)[0])
            order = torch.randperm(classes.numel(), generator=torch.Generator().manual_seed(seed)).to(device)
            classes = classes.flatten()[order].view_as(classes)
        losses.add(step, train_step(model, optimizers, (inputs, classes), setting.recipe, step, steps))
        if 10 * (step + 1) // steps > 10 * step // steps:
            say(f"{name}: step {step + 1} of {steps}, loss {losses.read() / setting.task.nats:.4f}")
    return model.eval()


def trained(
    setting: Setting, name: str, folder: Path, say: Callable[[str], None], shuffled_by: int | None = None
) -> nn.Module:
    """What `train` gives, or gave before: then it is in `folder`."""
    path = folder / f"{name.replace(' ', '-')}.safetensors"
    if path.exists():
        model = seeded_build(setting.space, setting.arch, setting.recipe.seed)
        model.load_state_dict(load_file(path))
        return model.eval().to(setting.device)
    model = train(setting, name, say, shuffled_by)
    partial = path.with_suffix(".partial")
    save_file({name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}, partial)
    partial.rename(path)
    return model


@torch.no_grad()
def activities(model: nn.Module, setting: Setting) -> dict[str, np.ndarray]:
    """What the hidden units of each net do on validation: (N, H), N up to CO_ACTIVE_TOKENS where no gate skips."""
    seen: dict[str, list[Tensor]] = {name: [] for name in nets_of(model)}
    hooks = [
        net.out.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0].flatten(0, -2)))
        for name, net in nets_of(model).items()
    ]
    device = next(model.parameters()).device
    for count, (inputs, _) in enumerate(setting.validation(), 1):
        model(inputs.to(device))
        if count * setting.steps.units >= CO_ACTIVE_TOKENS:
            break
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts).float().cpu().numpy() for name, parts in seen.items()}


def strongest(evidence: Evidence, share: float) -> Structure:
    """The structure of the strongest `share` of the confirmed edges."""
    confirmed = evidence.statistic[evidence.confirmed]
    if not len(confirmed):
        return blocks.take_apart(evidence.reads, evidence.writes)
    count = max(1, round(share * len(confirmed)))
    strong = evidence.statistic >= np.partition(confirmed, -count)[-count]
    return blocks.take_apart(evidence.reads & strong, evidence.writes & strong)


def mask_of(structure: Structure, m: int) -> Edges:
    """The weights inside of blocks, (m, C, H)."""
    mask = np.zeros((len(structure.coordinate_order), len(structure.unit_order)), bool)
    for block in structure.blocks:
        mask[np.ix_(block.coordinates, block.units)] = True
    return np.repeat(mask[None], m, axis=0)


def masks_at(nets: Mapping[str, Any], evidence: Mapping[str, Evidence], share: float) -> dict[str, Edges]:
    """What stays of each net at a share of its confirmed edges: blocks, but all where no evidence forms any."""
    out = {}
    for name, net in nets.items():
        edges = edges_of(net)
        known = bool(strongest(evidence[name], 1.0).blocks)
        out[name] = mask_of(strongest(evidence[name], share), len(edges)) if known else np.ones(edges.shape, bool)
    return out


def describe_net(
    net: Any, initial: Any, controls: Sequence[Any], evidence: Evidence, change: Sequence[Edges]
) -> dict[str, Any]:
    """The evidence of one net as JSON: its edges, what its controls have, and what the paper's threshold would say."""
    C, H = evidence.p.shape
    structure = strongest(evidence, 1.0)
    of_controls = [blocks.weigh(own, [other for other in change if other is not own]) for own in change]
    before = edges_of(initial)

    def papers(weights: Edges) -> dict[str, float]:
        edges = blocks.papers_edges(weights, before)
        return {"edges": int(edges.sum()), "largest_component": blocks.largest_share(edges)}

    return {
        "coordinates": C,
        "units": H,
        "edges": C * H,
        "confirmed": int(evidence.confirmed.sum()),
        "discovered": int(evidence.discovered.sum()),
        "discovered_largest_component": blocks.largest_share(evidence.discovered),
        "edge_level": blocks.FAMILY_LEVEL / (C * H),
        "controls": [
            {
                "confirmed": int(control.confirmed.sum()),
                "discovered": int(control.discovered.sum()),
                "blocks": len(strongest(control, 1.0).blocks),
            }
            for control in of_controls
        ],
        "paper": {
            "trained": papers(edges_of(net)),
            "untrained": papers(before),
            "shuffled": [papers(edges_of(control)) for control in controls],
        },
        "blocks": [
            {"coordinates": len(block.coordinates), "units": len(block.units), "edges": block.edges}
            for block in structure.blocks
        ],
        "lone_coordinates": len(structure.lone_coordinates),
        "lone_units": len(structure.lone_units),
        "strong_components": structure.strong,
        "levels": structure.levels,
        "coordinate_order": structure.coordinate_order.tolist(),
        "unit_order": structure.unit_order.tolist(),
    }


def describe_activity(
    activity: np.ndarray, controls: Sequence[np.ndarray], structure: Structure
) -> dict[str, float | int | None]:
    """The graph of co-activation as JSON, beside the blocks of the weights."""
    pairs = blocks.co_active(activity, controls)
    inside, expected = blocks.share_inside(pairs, structure)
    return {
        "pairs": int(pairs.sum()) // 2,
        "in_controls": max(
            int(blocks.co_active(own, [c for c in controls if c is not own]).sum()) // 2 for own in controls
        ),
        "inside_blocks": None if np.isnan(inside) else float(inside),
        "inside_blocks_by_chance": float(expected),
    }


# ---- taking out ----------------------------------------------------------------------------------------------------


def anneal(setting: Setting, model: nn.Module, masks: Masks, steps: int, retrain: int) -> Iterator[float]:
    """Takes out the weights beyond `masks` in equal steps, in place; yields the share taken out after each.

    After every step the model trains on `retrain / steps` tokens (or images) that it has not seen, from a tenth of its
    learning rate, while what is taken out is held where it is.
    """
    held = [
        (parameter, mask, parameter.detach().clone())
        for name, net in nets_of(model).items()
        for parameter, mask in _parameter_masks(net, masks[name])
    ]
    updates = round(retrain / (setting.steps.units * steps))
    recipe = replace(setting.recipe, learning_rate=FINAL_RATE * setting.recipe.learning_rate)
    optimizers = make_optimizers(model, recipe)
    device = next(model.parameters()).device
    losses = Losses(steps * updates)

    @torch.no_grad()
    def hold(left: float) -> None:
        for parameter, mask, start in held:
            parameter.copy_(torch.where(mask, parameter, left * start))

    for step in range(1, steps + 1):
        left = 1 - step / steps
        hold(left)
        model.train()
        for update in range((step - 1) * updates, step * updates):
            batch = setting.batch(setting.steps.count + update, device)
            losses.add(update, train_step(model, optimizers, batch, recipe, update, steps * updates))
            hold(left)
        losses.read()
        model.eval()
        yield step / steps


@torch.no_grad()
def compare(setting: Setting, original: nn.Module, model: nn.Module) -> dict[str, float]:
    """The model beside the original on validation: its loss and accuracy, KL(original || model) in nats, and how often
    their likeliest predictions agree."""
    model.eval()
    device = next(model.parameters()).device
    loss = divergence = 0.0
    agreed = right = count = 0
    for inputs, classes in setting.validation():
        wanted = original(inputs.to(device)).float().flatten(0, -2)
        got, targets = model(inputs.to(device)).float().flatten(0, -2), classes.to(device).flatten()
        loss += F.cross_entropy(got, targets, reduction="sum").item()
        divergence += F.kl_div(got.log_softmax(-1), wanted.log_softmax(-1), reduction="sum", log_target=True).item()
        agreed += int((wanted.argmax(-1) == got.argmax(-1)).sum())
        right += int((targets == got.argmax(-1)).sum())
        count += len(got)
    return {
        setting.task.loss: loss / setting.task.nats / count,
        "accuracy": right / count,
        "kl": divergence / count,
        "agreement": agreed / count,
    }


def flops(setting: Setting, model: nn.Module, masks: Masks) -> float:
    """Forward FLOPs a token (or an image) of the whole model if it computes with the masks' weights alone.

    Gates are counted as open: what they save is theirs.
    """
    total = float(setting.space.cost(setting.arch).flops_total)
    positions = 1 if setting.task.unit == "token" else setting.arch.tokens
    for name, net in nets_of(model).items():
        mask = masks[name]
        dense = ffn_cost(NETS[type(net)], net.d_model, net.d_hidden)
        idle = 1 - mask.any((0, 1)).sum() / net.d_hidden
        total -= positions * (dense.matmul - 2 * int(mask.sum()) + dense.elementwise * idle)
    return total


def parameters(setting: Setting, masks: Masks) -> int:
    """Parameters of the whole model without the weights beyond the masks."""
    gone = sum(mask.size - int(mask.sum()) for mask in masks.values())
    return setting.space.cost(setting.arch).parameters_total - gone


def equally_many(name: str, weights: Edges, mask: Edges, seed: int) -> Edges:
    """Another choice of as many weights as `mask` has: what blocks are compared with.

    `magnitude`: the largest (which no dense product can skip: a bound on what is possible). `units`: whole hidden units
    with the largest weights, which run as a smaller dense net. `random`: blocks of the same sizes, their members drawn.
    """
    m, C, H = mask.shape
    if name == "magnitude":
        order = np.argsort(-np.abs(weights), axis=None, kind="stable")
        chosen = np.zeros(mask.size, bool)
        chosen[order[: int(mask.sum())]] = True
        return chosen.reshape(mask.shape)
    if name == "units":
        squares = np.square(weights)
        size = (squares / squares.mean((1, 2), keepdims=True)).sum((0, 1))
        chosen = np.zeros(H, bool)
        chosen[np.argsort(-size, kind="stable")[: round(mask.sum() / (m * C))]] = True
        return np.broadcast_to(chosen, mask.shape).copy()
    rng = np.random.default_rng(seed)
    return np.ascontiguousarray(mask[:, rng.permutation(C)][:, :, rng.permutation(H)])


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


def imposed(
    setting: Setting, original: nn.Module, folder: Path, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Points of the curve for blocks that nobody had to find, trained as the model was."""
    for count, other in in_blocks_from_the_start(setting).items():
        model = trained(other, f"in {count} blocks", folder, say)
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


def in_blocks(model: nn.Module, structures: Mapping[str, Structure]) -> nn.Module:
    """A copy of the model whose nets run their blocks; a net without any stays dense."""
    out = copy.deepcopy(model)
    for name, structure in structures.items():
        if structure.blocks:
            parts = (
                [
                    torch.from_numpy(getattr(block, part)).to(next(model.parameters()).device)
                    for block in structure.blocks
                ]
                for part in ("coordinates", "units")
            )
            out.set_submodule(name, cut(out.get_submodule(name), *parts))
    return out.eval()


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
    joins = _joins_front(store, folder, config, say)
    setting = read_setting(folder, config, data_path, device)
    deterministic(setting.space)
    original = load(folder).to(setting.device)
    nets = nets_of(original)
    if not nets:
        raise UserError(f"{folder} has no feed-forward net to take apart: wanted a Transformer")
    scratch = _controls_folder(target, config)
    if config["provenance"].get("torch") != torch.__version__:
        say(
            f"trained with torch {config['provenance'].get('torch')}, here is {torch.__version__}: the evidence holds "
            "only if both draw the same initial weights from a seed"
        )
    initial = seeded_build(setting.space, setting.arch, setting.recipe.seed).to(setting.device).eval()
    shuffled = [trained(setting, f"control {n}", scratch, say, shuffled_by=n) for n in range(1, controls + 1)]

    moved: dict[str, list[Edges]] = {}
    evidence = {}
    for name, net in nets.items():
        before = edges_of(nets_of(initial)[name])
        final = [edges_of(nets_of(control)[name]) for control in shuffled]
        factor = blocks.shrinkage(final, before)
        moved[name] = [blocks.learned_change(weights, before, factor) for weights in final]
        evidence[name] = blocks.weigh(blocks.learned_change(edges_of(net), before, factor), moved[name])
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
        points += imposed(setting, original, scratch, say)
    report = {
        "of": {"folder": str(folder), "sha256": config["sha256"]["model.safetensors"]},
        "hypernas": version(),
        "loss": setting.task.loss,
        "levels": {"family_wise": blocks.FAMILY_LEVEL, "false_discovery_rate": blocks.DISCOVERY_LEVEL},
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


def _joins_front(store: str | None, folder: str, config: Mapping[str, Any], say: Callable[[str], None]) -> bool:
    """Whether the store holds the trial that the model is of. Raises UserError where a store is given and does not."""
    try:
        with Store(store or DEFAULT_STORE) as opened:
            row = opened.study(config["study"])
            trial = opened.trial(row, config["trial"])
            if (dict(trial.arch), training_json(row, trial)) != (config["arch"], config["training"]):
                raise UserError(
                    f"trial {trial.number} of study {row.name!r} in {opened.shown} is not the model of {folder}: it "
                    "has another architecture, or was trained otherwise"
                )
    except UserError as error:
        if store is not None:
            raise
        say(f"the curve joins no front, as its study is not here; --store URL says where it is ({error})")
        return False
    return True


def join_front(store: Store, config: Mapping[str, Any], points: Sequence[Mapping[str, Any]], task: Task) -> None:
    """Puts the variants of a trial that run as blocks beside the front of its study, by the names of objectives."""
    row = store.study(config["study"])
    variants = [
        {
            "kept": point["kept"],
            task.loss: point[task.loss],
            "accuracy": point["accuracy"],
            f"flops_per_{task.unit}": point["flops"],
            "parameters": point["parameters"],
        }
        for point in points
        if point["method"] == "blocks"
    ]
    joined = {**row.variants, str(config["trial"]): variants}
    store.update_settings(row, {**row.settings, "variants": joined})


def read_evidence(folder: str) -> dict[str, np.ndarray]:
    """-log10 p of the edges (C, H) of each net of a folder that `decompose` wrote."""
    return {name: found.float().numpy() for name, found in load_file(Path(folder) / EVIDENCE).items()}


def _controls_folder(target: Path, config: Mapping[str, Any]) -> Path:
    """Where controls are kept while the command runs. Raises UserError where those of another model are."""
    scratch = target.with_name(f"{target.name}.controls")
    scratch.mkdir(exist_ok=True)
    owner = scratch / "of"
    mine = config["sha256"]["model.safetensors"]
    if owner.exists() and owner.read_text() != mine:
        raise UserError(f"{scratch} has the controls of another model: delete it, or name another --out")
    owner.write_text(mine)
    return scratch


def describe_line(net: Mapping[str, Any]) -> str:
    """What of a net's structure survives its controls, in a line."""
    false = max(control["confirmed"] for control in net["controls"])
    sizes = ", ".join(f"{block['coordinates']} x {block['units']}" for block in net["blocks"][:8])
    co = net["co_activation"]
    inside = "" if co["inside_blocks"] is None else (
        f", {co['inside_blocks']:.0%} of them inside blocks ({co['inside_blocks_by_chance']:.0%} by chance)"
    )  # fmt: skip
    return (
        f"{net['name']}: {net['confirmed']:,} of {net['edges']:,} edges confirmed (at most {false:,} in a control); "
        f"{len(net['blocks'])} block(s) of {net['coordinates']} x {net['units']}: {sizes or 'none'}; "
        f"{net['lone_coordinates']} coordinates and {net['lone_units']} units apart; "
        f"{co['pairs']:,} co-active pairs (at most {co['in_controls']:,} in a control){inside}"
    )


def write_result(
    target: Path,
    config: Mapping[str, Any],
    setting: Setting,
    structures: Mapping[str, Structure],
    model: nn.Module,
    surprise: Mapping[str, np.ndarray],
    report: Mapping[str, Any],
) -> None:
    """Source, weights, configuration, card, evidence and report of the model in blocks, checked without hypernas."""
    title = f"Trial {config['trial']} of study {config['study']}, taken apart"
    docstring = f"{title} by hypernas {version()}. Needs torch; `load` also needs safetensors."
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
        partial = Path(temporary) / "model"
        partial.mkdir()
        footer = FOOTER.format(kind=type(model).__name__)
        source = write_source(model, docstring.replace("\\", "/").replace('"', "'"), footer)
        (partial / "model.py").write_text(source)
        tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(tensors, partial / "model.safetensors")
        (partial / REPORT).write_text(json.dumps(report, indent=2) + "\n")
        save_file({name: torch.from_numpy(found) for name, found in surprise.items()}, partial / EVIDENCE)
        scores = score(model, setting.validation(), setting.task.nats)
        made = {
            "blocks": {
                name: [[len(block.coordinates), len(block.units)] for block in structure.blocks]
                for name, structure in structures.items()
            },
            "values": {
                setting.task.loss: scores.loss,
                "accuracy": scores.accuracy,
                f"flops_per_{setting.task.unit}": report["result"]["flops"],
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
            },
            "sha256": {path.name: digest(path) for path in sorted(partial.iterdir())},
        }
        (partial / "config.json").write_text(json.dumps({**config, **made}, indent=2) + "\n")
        (partial / CARD).write_text(card(title, report, made["values"], listed(partial)))
        inputs = formats.check_inputs("py", setting.space, setting.arch, config["trial"], [None, None])
        formats.check("py", partial, model, inputs)
        partial.rename(target)


def card(title: str, report: Mapping[str, Any], values: Mapping[str, float], hashes: str) -> str:
    """What it is, what is known of its blocks, what it cost."""
    numbers = "\n".join(f"- {name} {value:.6g}" for name, value in values.items())
    lines = "\n".join(f"- {line}" for line in report["verdict"])
    return f"""# {title}

Its feed-forward nets run as the independent blocks that {report["keep"]:g} of their confirmed edges form; a net without
any is as it was. `from model import load` gives the module; it needs only torch and safetensors.

{numbers}

Against the original on its validation data: KL {report["result"]["kl"]:.4g} nats, likeliest predictions agree in
{report["result"]["agreement"]:.1%}. Evidence, controls and comparisons are in `{REPORT}`.

{lines}

{hashes}
"""
