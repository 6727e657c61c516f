"""Lightning: a module whose network is adapted, checkpointed and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import pytorch_lightning as lightning
import torch
from torch import Tensor, nn

import tnpeft

pytestmark = pytest.mark.filterwarnings("ignore")  # of Lightning: workers, loggers, tensorboard

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 2))
        self.handle = tnpeft.attach(self.net, "lora", match="0|3", r=2, train={"bias": "adapted", "norm": True})

    def training_step(self, batch: Tensor, _number: int) -> Tensor:
        return (self.net(batch) - 1).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.handle.parameters(), 0.05)


def fit(module: Module, folder: Path, epochs: int, checkpoint: Path | None = None) -> lightning.Trainer:
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(X, batch_size=4)
    trainer.fit(module, loader, ckpt_path=checkpoint)
    return trainer


def test_a_resumed_run_ends_with_the_same_bits_and_the_base_has_its_names(tmp_path: Path):
    whole = Module()
    fit(whole, tmp_path, 4)
    half = Module()
    fit(half, tmp_path, 2).save_checkpoint(tmp_path / "half.ckpt")
    state = torch.load(tmp_path / "half.ckpt", weights_only=False)["state_dict"]
    plain = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 2))
    plain.load_state_dict({key.removeprefix("net."): value for key, value in state.items()}, strict=False)
    with tnpeft.disabled(half.net):
        assert torch.equal(plain(X), half.net(X))
    again = Module()
    fit(again, tmp_path, 4, tmp_path / "half.ckpt")
    assert torch.equal(again.net(X), whole.net(X))
