import pytest
import torch

from hypernas.bench.device import ceilings

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, gpu])])
def test_ceilings_have_their_four_rows(device):
    rows = ceilings(torch.device(device))
    assert [row["unit"] for row in rows] == ["TB/s", "TFLOP/s", "us", "us"]
    assert all(row["value"] > 0 for row in rows)
