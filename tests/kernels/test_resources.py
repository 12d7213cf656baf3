"""What the kernels need of a GPU, from code compiled without one; and that it is the code which training launches."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hypernas.kernels import dispatch, resources
from hypernas.search_spaces.connections import recomputing_streams
from hypernas.search_spaces.gates import gate_loss, gates_of
from hypernas.search_spaces.lm import LanguageModels
from hypernas.search_spaces.vision import ImageClassifiers
from hypernas.training.device import mixed_precision

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs/kernels.md"


def assert_fits(row: resources.Resources) -> None:
    assert row.spills <= (0 if row.target == "sm_90" else resources.SPILLS_ALLOWED), row
    assert row.shared <= resources.SHARED_LIMIT[row.target], row
    # An AMD block has twice the threads a warp: half a tile's numbers each, which in bfloat16 are 64 bits.
    assert row.wide_loads > 0 or row.target == "gfx942", row


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_what_moves_four_streams_in_training_spills_nothing(target):
    launches = [
        launch
        for launch in resources.shipped_launches()
        if launch.shape.startswith("n=4 C=256") and launch.dtype == torch.float32
    ]
    assert len(launches) == 12
    for launch in launches:
        row = resources.compile_for(launch, target)
        assert_fits(row)
        assert row.spills == 0, row


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("target", resources.TARGETS)
def test_no_shipped_kernel_spills(target):
    for launch in resources.shipped_launches():
        assert_fits(resources.compile_for(launch, target))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("version", ["3.6.0", "3.7.1"])
def test_no_kernel_spills_when_another_triton_compiles_it_and_the_documented_table_is_one_of_theirs(version, tmp_path):
    """What PyTorch 2.11 and 2.13 bring, on an H100. Compiled code is cached, by version, from run to run."""
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path)]
    done = subprocess.run([*install, f"triton=={version}"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"pip cannot install triton {version}: {done.stderr.strip().splitlines()[-1]}")
    program = (
        "import triton; from hypernas.kernels import resources; print(triton.__version__)\n"
        "rows = [resources.compile_for(launch, 'sm_90') for launch in resources.shipped_launches()]\n"
        "for row in rows:\n"
        "    if row.spills or row.shared > resources.SHARED_LIMIT['sm_90']: print(row)\n"
        "print(resources.table(rows))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said, *lines = done.stdout.splitlines()
    assert said == version
    assert lines[0].startswith("| kernel |"), lines[0]  # rows that do not fit would stand before the table
    document = DOCUMENT.read_text()
    printed = re.search(r"printed\s+with triton ([\d.]+\d)", document)
    assert printed is not None
    if printed[1] == version:
        assert [line for line in lines if line not in document.splitlines()] == []


# ---- what training launches --------------------------------------------------------------------------------------

LM, VISION = LanguageModels(), ImageClassifiers()
SMALL = {"depth": 2, "d_model": 32, "head_dim": 8, "context": 16}
HOURGLASS = {"ffn.shape": "hourglass", "ffn.ratio": 0.5}
BOTH_GATES = {"gates.placement": "both"}


def streams(n: int, mixing: str = "kromhc") -> dict[str, Any]:
    return {"streams.n": n, "streams.mixing": mixing}


NETS: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (LM, SMALL),
    "gates": (LM, SMALL | BOTH_GATES),
    "steady gates": (LM, SMALL | BOTH_GATES | {"gates.consistency": "perturbation"}),
    "hourglass": (LM, SMALL | HOURGLASS),
    "blocks": (LM, SMALL | {"ffn.blocks": 2}),
    "post-norm": (LM, SMALL | {"norm.position": "post"}),
    "kromhc 2": (LM, SMALL | streams(2)),
    "kromhc 4": (LM, SMALL | streams(4)),
    "kromhc 6": (LM, SMALL | streams(6)),
    "kromhc 8": (LM, SMALL | streams(8)),
    "kromhc with all": (LM, SMALL | streams(4) | HOURGLASS | BOTH_GATES),
    "mhc": (LM, SMALL | streams(4, "mhc")),
    "mhc_lite": (LM, SMALL | streams(4, "mhc_lite")),
    "hc": (LM, SMALL | streams(4, "hc")),
    "hc_static": (LM, SMALL | streams(4, "hc_static")),
    "resnet": (VISION, {"family": "resnet", "gates.placement": "blocks"}),
    "vit": (VISION, {"family": "vit", **streams(4), **BOTH_GATES}),
    "lstm": (LM, {"family": "lstm"}),
}


def step(space: Any, flat: dict[str, Any], device: torch.device) -> None:
    """Forward and backward as in training on a GPU: products in bfloat16, streams computed again."""
    arch = space.from_json(flat)
    torch.manual_seed(0)
    model = space.build(arch).to(device).train()
    inputs = torch.randint(256, (2, 16)) if space is LM else torch.randn(2, *arch.input_shape)
    with mixed_precision(device, torch.bfloat16), recomputing_streams(model):
        logits = model(inputs.to(device))
    loss = logits.float().square().mean()
    (loss + gate_loss(model, 0.5) if gates_of(model) else loss).backward()


def launched() -> set[tuple[str, torch.dtype]]:
    return {(op, dtype) for op, choices in dispatch._chosen.items() for _, dtype in choices}


IN_THE_TABLE = {(case.op.name, case.dtype) for case in resources.shipped_cases()}


@pytest.mark.parametrize("net", NETS)
def test_training_launches_no_kernel_in_a_dtype_that_the_table_lacks(net):
    with dispatch.use_backend("reference"):
        step(*NETS[net], torch.device("cpu"))
    assert launched() or net == "lstm"
    assert launched() - IN_THE_TABLE == set()


def test_streams_norms_and_gates_train_in_float32_and_swiglu_in_bfloat16():
    """What the table's text says; a net that trains otherwise is timed by the wrong rows."""
    with dispatch.use_backend("reference"):
        step(*NETS["kromhc with all"], torch.device("cpu"))
    float32 = {"stream_boundary", "stream_chain", "rms_norm", "cosine_gate"}
    assert launched() == {(op, torch.float32) for op in float32} | {("swiglu", torch.bfloat16)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("net", NETS)
def test_a_training_step_on_a_gpu_runs_on_triton_alone_and_launches_what_the_table_holds(net):
    step(*NETS[net], torch.device("cuda"))
    assert {op: choice for op, choice in dispatch.list_choices().items() if choice.backend != "triton"} == {}
    assert launched() - IN_THE_TABLE == set()
