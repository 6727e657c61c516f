"""A training step of a model, with the settings that all methods have in common."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import tnpeft.execution.layers

__all__ = ["AUTOCAST", "OPTIMISERS", "Setting", "add_options", "optimiser_of", "setting_of", "step"]

# `adam` is torch's own choice: a loop over the parameters on the CPU, `foreach` on a GPU.
OPTIMISERS: Mapping[str, Mapping[str, bool]] = {"adam": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Setting:
    """What is trained on: the model, the volume, the device, and how."""

    model: str
    shape: tuple[int, int, int]
    batch: int = 1
    device: str = "cpu"
    autocast: str | None = None
    channels_last: bool = False
    optimiser: str = "adam"
    mode: str = "auto"
    torch_convolutions: bool = False

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        more = [f"{self.autocast} autocast"] if self.autocast else []
        more += ["torch's convolutions"] if self.torch_convolutions else []
        return ", ".join([f"{self.model} model", size, f"batch {self.batch}", self.device, self.optimiser, *more])

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "shape": list(self.shape)}

    def placed(self, model: nn.Module) -> nn.Module:
        """The model on the device and in its memory format; adapters come afterwards, as for a user."""
        model = model.to(self.device)
        return model.to(memory_format=torch.channels_last_3d) if self.channels_last else model

    def inputs(self) -> tuple[Tensor, Tensor]:
        """A volume of noise and the timesteps of the batch."""
        x = torch.randn(self.batch, 1, *self.shape, device=self.device)
        if self.channels_last:
            x = x.to(memory_format=torch.channels_last_3d)
        return x, torch.full((self.batch,), 17, device=self.device)

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """The context of the forward pass and the loss."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(torch.device(self.device).type, AUTOCAST[self.autocast])


def step(model: nn.Module, setting: Setting) -> Callable[[], None]:
    """One training step on noise, as a function: forward, backward, Adam."""
    optimiser = optimiser_of(model, setting)
    x, timesteps = setting.inputs()
    target = torch.randn_like(x)

    def run() -> None:
        with setting.precision():
            loss = nn.functional.mse_loss(model(x, timesteps), target)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return run


def optimiser_of(model: nn.Module, setting: Setting) -> torch.optim.Optimizer:
    """Adam over what trains."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.Adam(trained, lr=1e-5, **OPTIMISERS[setting.optimiser])


def add_options(options: argparse.ArgumentParser) -> None:
    """The options of a setting."""
    options.add_argument("--model", choices=("tiny", "small", "paper"), default="small")
    options.add_argument("--size", type=int, default=16, help="side of the volume, voxels")
    options.add_argument("--shape", type=_shape, help="the volume's shape in place of `--size`, such as 160,224,160")
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--device", default="cpu", help="the device, such as cuda")
    options.add_argument("--autocast", choices=tuple(AUTOCAST))
    options.add_argument("--channels-last", action="store_true", help="model and volume in channels_last_3d")
    options.add_argument(
        "--optimiser", choices=tuple(OPTIMISERS), default="adam", help="the implementation of Adam, for all methods"
    )
    options.add_argument("--mode", default="auto", help="execution mode of tnpeft's methods")
    options.add_argument(
        "--torch-convolutions", action="store_true", help="compute all convolutions' gradients by torch's own kernels"
    )


def setting_of(arguments: argparse.Namespace) -> Setting:
    if arguments.torch_convolutions:
        tnpeft.execution.layers.convolved = lambda *_: None
    return Setting(
        model=arguments.model,
        shape=arguments.shape or (arguments.size,) * 3,
        batch=arguments.batch,
        device=arguments.device,
        autocast=arguments.autocast,
        channels_last=arguments.channels_last,
        optimiser=arguments.optimiser,
        mode=arguments.mode,
        torch_convolutions=arguments.torch_convolutions,
    )


def _shape(text: str) -> tuple[int, ...]:
    sizes = tuple(int(size) for size in text.split(","))
    if len(sizes) != 3:
        raise argparse.ArgumentTypeError("three sizes, such as 160,224,160")
    return sizes
