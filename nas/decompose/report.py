"""What a decomposition found, in words and files."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hypernas.decompose.evidence import (
    FAMILY_LEVEL,
    Evidence,
    Structure,
    co_active,
    largest_share,
    papers_edges,
    share_inside,
    weigh,
)
from hypernas.decompose.nets import Edges, edges_of, strongest
from hypernas.export import formats
from hypernas.export.card import CARD, digest, list_files
from hypernas.export.source import write_source
from hypernas.export.write import FOOTER
from hypernas.files import LONGEST, naming
from hypernas.training.model import name_values, score
from hypernas.training.run import Setting
from hypernas.version import version

REPORT = "decomposition.json"
EVIDENCE = "evidence.safetensors"  # of each net -log10 p of its edges (C, H), unpermuted


def describe_net(
    net: Any, initial: Any, controls: Sequence[Any], evidence: Evidence, change: Sequence[Edges]
) -> dict[str, Any]:
    """The evidence of one net as JSON: its edges, what its controls have, and what the paper's threshold would say."""
    C, H = evidence.p.shape
    structure = strongest(evidence, 1.0)
    of_controls = [weigh(own, [other for other in change if other is not own]) for own in change]
    before = edges_of(initial)

    def papers(weights: Edges) -> dict[str, float]:
        edges = papers_edges(weights, before)
        return {"edges": int(edges.sum()), "largest_component": largest_share(edges)}

    return {
        "coordinates": C,
        "units": H,
        "edges": C * H,
        "confirmed": int(evidence.confirmed.sum()),
        "discovered": int(evidence.discovered.sum()),
        "discovered_largest_component": largest_share(evidence.discovered),
        "edge_level": FAMILY_LEVEL / (C * H),
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
    pairs = co_active(activity, controls)
    inside, expected = share_inside(pairs, structure)
    return {
        "pairs": int(pairs.sum()) // 2,
        "in_controls": max(int(co_active(own, [c for c in controls if c is not own]).sum()) // 2 for own in controls),
        "inside_blocks": None if np.isnan(inside) else float(inside),
        "inside_blocks_by_chance": float(expected),
    }


def read_evidence(folder: str) -> dict[str, np.ndarray]:
    """-log10 p of the edges (C, H) of each net of a folder that `decompose` wrote."""
    return {name: found.float().numpy() for name, found in load_file(Path(folder) / EVIDENCE).items()}


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
    beside = f".{target.name[:LONGEST]}-"
    with naming(target), tempfile.TemporaryDirectory(dir=target.parent, prefix=beside) as temporary:
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
        parameters = sum(parameter.numel() for parameter in model.parameters())
        values = name_values(setting.task, scores, report["result"]["flops"], parameters)
        made = {
            "blocks": {
                name: [[len(block.coordinates), len(block.units)] for block in structure.blocks]
                for name, structure in structures.items()
            },
            "values": values,
            "sha256": {path.name: digest(path) for path in sorted(partial.iterdir())},
        }
        (partial / "config.json").write_text(json.dumps({**config, **made}, indent=2) + "\n")
        (partial / CARD).write_text(card(title, report, values, list_files(partial)))
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
