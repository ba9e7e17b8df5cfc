"""The product's optimizer on a network in memory."""

import torch
from torch import Tensor, nn

from trainer.config.schema import OptimizerSettings
from trainer.engine.optimizer import learning_rate

CLIP = 10.0  # largest gradient norm, the product's default
ADAM_EPS = 1e-8


class Trained:
    """A network with the product's optimizer and its learning rate over `updates`."""

    def __init__(self, net: nn.Module, settings: OptimizerSettings, updates: int):
        self.net, self.settings, self.updates = net.train().requires_grad_(True), settings, updates
        rule = {"betas": settings.betas, "eps": ADAM_EPS, "weight_decay": settings.weight_decay}
        self.adam = torch.optim.AdamW(net.parameters(), lr=settings.lr, fused=True, **rule)

    def step(self, loss: Tensor, update: int) -> None:
        self.adam.param_groups[0]["lr"] = learning_rate(self.settings, update, self.updates)
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), CLIP)
        self.adam.step()
        self.adam.zero_grad()
