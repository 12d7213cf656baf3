"""The search itself: configuration, samplers, driver, workers, store, export."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


# cuBLAS is deterministic only with workspaces of fixed size, and reads their size when it starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def load(folder: "str | Path") -> "nn.Module":
    """The trained network of a folder that `nas export` wrote, in evaluation mode, with the fast kernels of here.

    No code of the folder runs. Raises hypernas.errors.UserError for a folder that is damaged, incomplete or newer.
    """
    from hypernas.export.read import load as load_export  # brings torch

    return load_export(folder)
