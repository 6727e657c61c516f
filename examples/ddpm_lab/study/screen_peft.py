"""PEFT's own tuners beside the specs that they are, at the same params, as anchors of `screen_linear`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ddpm_lab.config.settings import Method
from ddpm_lab.support.faults import fault

__all__ = ["ANCHORS", "attach_peft", "check_anchors"]

Params = Mapping[str, Any]


def _lora(params: Params) -> dict[str, Any]:
    return {"r": params["r"], "lora_alpha": params["r"]}


# The name of PEFT's configuration, and its settings from the spec's params. Not BOFT, which compiles a CUDA extension.
ANCHORS: Mapping[str, tuple[str, Callable[[Params], dict[str, Any]]]] = {
    "lora": ("LoraConfig", _lora),
    "rslora": ("LoraConfig", lambda params: {"r": params["r"], "lora_alpha": 16, "use_rslora": True}),
    "dora": ("LoraConfig", lambda params: {**_lora(params), "use_dora": True}),
    "vera": ("VeraConfig", lambda params: {"r": params["r"]}),
    "ia3": ("IA3Config", lambda params: {"feedforward_modules": []}),
    "oft": ("OFTConfig", lambda params: {"r": 0, "oft_block_size": params["b"]}),
    "hra": ("HRAConfig", lambda params: {"r": params["rank"]}),
    "hira": ("HiraConfig", lambda params: {"r": params["r"]}),
}


def check_anchors(names: tuple[str, ...]) -> None:
    """Raise LabError for a spec that has no tuner here, or without PEFT."""
    for name in names:
        if name not in ANCHORS:
            expected = f"some of {', '.join(ANCHORS)}"
            raise fault("screen_linear.anchors", "PEFT's tuners", expected, f"`{name}`", "Remove it.")
    if names:
        _peft()


def attach_peft(model: nn.Module, method: Method) -> nn.Module:
    """The model with PEFT's tuner on the layers of the method."""
    peft = _peft()
    kind, settings = ANCHORS[method.spec or ""]
    config = getattr(peft, kind)(target_modules=method.match, **settings(method.params))
    adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted


def _peft() -> Any:
    try:
        import peft
    except ModuleNotFoundError:
        fix = "Run `pip install 'tnpeft[peers]'`, or write `anchors: []`."
        raise fault("screen_linear.anchors", "PEFT", "its package", "none", fix) from None
    return peft
