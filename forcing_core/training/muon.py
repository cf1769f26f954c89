"""Muon for weights that are matrices, AdamW for the rest, as one optimiser.

Muon orthogonalises the step of a matrix; on the micro models it needed half the steps of AdamW. PyTorch's own
(2.9 and later) takes 2-D tensors only, so convolutions are shown to it as [out, in * kernel].
"""
from __future__ import annotations

from typing import Iterable

import torch
from torch import Tensor, nn

from ..errors import ForcingError

MOMENTUM, BETAS = 0.95, (0.9, 0.99)


def is_matrix(parameter: Tensor) -> bool:
    """True for weights of linear and convolutional layers, not for biases and gains (gains may be [c, 1, 1])."""
    return parameter.ndim >= 2 and parameter.shape[0] > 1 and parameter.numel() > parameter.shape[0]


class MuonAdamW:
    """Steps the parameters that require gradients.

    muon_lr, adamw_lr: peak learning rates, multiplied by the `factor` of each step. weight_decay: decoupled,
    on matrices only. Raises ForcingError where PyTorch is too old, and for matrices that are not contiguous.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], muon_lr: float = 0.02, adamw_lr: float = 3e-3,
                 weight_decay: float = 0.01):
        if not hasattr(torch.optim, "Muon"):
            raise ForcingError(f"PyTorch {torch.__version__} has no Muon optimiser. Install 2.9 or later to train.")
        parameters = [p for p in parameters if p.requires_grad]
        self.matrices = [p for p in parameters if is_matrix(p)]
        self.others = [p for p in parameters if not is_matrix(p)]
        # Views of the same storage: what Muon writes into them is the weights.
        self._flat = [nn.Parameter(_flat_view(p)) for p in self.matrices]
        self._lr = {"muon": muon_lr, "adamw": adamw_lr}
        self._optimisers: dict[str, torch.optim.Optimizer] = {}
        if self._flat:
            self._optimisers["muon"] = torch.optim.Muon(self._flat, lr=muon_lr, momentum=MOMENTUM,
                                                        weight_decay=weight_decay)
        if self.others:
            self._optimisers["adamw"] = torch.optim.AdamW(self.others, lr=adamw_lr, betas=BETAS, weight_decay=0.0,
                                                          fused=all(p.is_cuda for p in self.others))

    def step(self, factor: float = 1.0) -> None:
        """One step along the gradients, which are then dropped. factor: of both learning rates."""
        for flat, parameter in zip(self._flat, self.matrices):
            flat.grad = None if parameter.grad is None else parameter.grad.reshape(flat.shape)
        for name, optimiser in self._optimisers.items():
            for group in optimiser.param_groups:
                group["lr"] = self._lr[name] * factor
            optimiser.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        for parameter in (*self._flat, *self.matrices, *self.others):
            parameter.grad = None

    def state_dict(self) -> dict:
        return {name: optimiser.state_dict() for name, optimiser in self._optimisers.items()}

    def load_state_dict(self, state: dict) -> None:
        for name, optimiser in self._optimisers.items():
            optimiser.load_state_dict(state[name])


def _flat_view(parameter: nn.Parameter) -> Tensor:
    if not parameter.is_contiguous():
        raise ForcingError("Muon needs contiguous weights. Put only the inputs into the channels-last layout.")
    return parameter.detach().view(parameter.shape[0], -1)
