"""Spaces whose architectures fail in every way a trial can: used through `--space FILE.py:Space`."""

import os
import time

import torch
from torch import nn

from hypernas.search_spaces.lm import Arch, LanguageModels


class Space(LanguageModels):
    """`lm`, but what `depth` says happens: 2 raises, 3 runs out of memory, 4 diverges, 5 kills its process, 6 hangs."""

    def build(self, arch: Arch) -> nn.Module:
        if arch.depth == 2:
            raise RuntimeError("this architecture cannot be built")
        if arch.depth == 3:
            torch.empty(1 << 50)
        model = super().build(arch)
        if arch.depth == 4:
            with torch.no_grad():
                next(model.parameters()).fill_(float("nan"))
        if arch.depth == 5:
            os._exit(1)
        if arch.depth == 6:
            time.sleep(600)
        return model


class Slow(LanguageModels):
    """`lm`, but nets of two layers take 50 ms longer for a forward pass."""

    def build(self, arch: Arch) -> nn.Module:
        model = super().build(arch)
        if arch.depth == 2:
            model.register_forward_pre_hook(lambda *_: time.sleep(0.05))
        return model
