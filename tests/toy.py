# SPDX-License-Identifier: Apache-2.0
"""Small torch models for the tests of the debugger."""

import torch


class Scale(torch.nn.Module):
    """Multiplies by a parameter."""

    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor([2.0]))

    def forward(self, x):
        return x * self.factor


class Compiled(torch.nn.Module):
    """A module whose calls go around nn.Module.__call__, as vLLM's decorator does."""

    def __call__(self, x):
        return self.forward(x)

    def forward(self, x):
        return x + 1


class InPlace(torch.nn.Module):
    """Writes its argument and returns it."""

    def forward(self, x):
        return x.add_(1)


class Block(torch.nn.Module):
    """Linear, scale and a shared module."""

    def __init__(self, shared):
        super().__init__()
        self.proj = torch.nn.Linear(8, 8)
        self.scale = Scale()
        self.shared = shared

    def forward(self, x, *, residual=None):
        y = self.scale(self.proj(x))
        y = self.shared(y)
        return (y if residual is None else y + residual), None


class Model(torch.nn.Module):
    """Two blocks with one shared norm, like a decoder."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        shared = torch.nn.LayerNorm(8)
        self.embed = torch.nn.Embedding(16, 8)
        self.blocks = torch.nn.ModuleList([Block(shared), Block(shared)])
        self.compiled = Compiled()

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for block in self.blocks:
            x, _ = block(x, residual=x)
        return self.compiled(x)
