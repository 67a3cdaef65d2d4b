"""A stage ends without carrying the model away."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy

from residency.engine.rank_strategy import end_in_place


class Carried(LightningModule):
    """Counts how often it is carried to the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.times = 0

    def cpu(self) -> Carried:
        self.times += 1
        return self


def test_the_model_stays_where_it_is() -> None:
    module = Carried()
    strategy = SingleDeviceStrategy(device=torch.device("cpu"), accelerator=CPUAccelerator())
    strategy._lightning_module = module
    strategy.teardown()
    assert module.times == 1, "Lightning carries it: if not, this is of no use any more"
    end_in_place(strategy)
    assert module.times == 1
    assert module.cpu() is module
    assert module.times == 2
