"""What things take on a kind of device: the one table from which chains are searched and modes are chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["DEVICE_MODELS", "DeviceModel", "device_model"]


@dataclass(frozen=True)
class DeviceModel:
    """Times in ns, for fp32.

    Of any operation: `start` it with its views; `move` an element that is read or written, of a tensor of more than
    `cached` elements, which no cache holds, `far` times as long.

    Predicting a mode: `shared`, to start an operation that contracts cores, which layers alike share; `contract`, to
    multiply and add there, over short bonds; `shift` along one axis to make a copy; `multiply` and add in a product, in
    a layer call (`call`), in the gradient of its weight (`weight_gradient` of a convolution's, `linear_gradient` of a
    linear layer's); `weight`: an element of a convolution's weight, which is put in another order; `functions`: the
    autograd functions of a chain. Products of fewer than `narrow` rows or columns take longer.

    Searching a chain, where only ratios matter, and a link stands for all that it does in both passes: `link` to start
    one, `link_multiply` and `link_narrow` for its product, `cluster` to start a step that contracts a cluster, and
    `cluster_move` for an element of its result.
    """

    start: float
    move: float
    cached: float
    far: float

    shared: float
    contract: float
    shift: float
    multiply: float
    call: float
    weight_gradient: float
    linear_gradient: float
    weight: float
    functions: float
    narrow: float

    link: float
    link_multiply: float
    link_narrow: float
    cluster: float
    cluster_move: float

    def distance(self, elements: float) -> float:
        """How many times as long an element of so large a tensor takes to read or write."""
        return self.far if elements > self.cached else 1.0


DEVICE_MODELS: Mapping[str, DeviceModel] = MappingProxyType(
    {
        # Fitted to two cores of a Xeon and of an EPYC, both with AVX-512 (benchmarks/modes.py).
        "cpu": DeviceModel(
            start=1e3,
            move=0.356,
            cached=1 << 22,
            far=4.0,
            shared=10.3e3,
            contract=0.00465,
            shift=20e3,
            multiply=0.0034,
            call=0.0095,
            weight_gradient=0.0077,
            linear_gradient=0.0134,
            weight=0.31,
            functions=85e3,
            narrow=32.0,
            link=60e3,
            link_multiply=0.025,
            link_narrow=8.0,
            cluster=10e3,
            cluster_move=1.0,
        ),
        # Fitted to an H200 in bf16 autocast, from calls that wait for their end: starting operations is most of it.
        "cuda": DeviceModel(
            start=44e3,
            move=6e-4,
            cached=1 << 22,
            far=4.0,
            shared=21e3,
            contract=2e-6,
            shift=1.5e3,
            multiply=2e-6,
            call=7e-6,
            weight_gradient=8e-6,
            linear_gradient=8e-6,
            weight=0.0064,
            functions=355e3,
            narrow=1.0,
            link=50e3,
            link_multiply=6e-5,
            link_narrow=8.0,
            cluster=9e3,
            cluster_move=0.005,
        ),
    }
)
"""By `torch.device.type`."""


def device_model(device: str) -> DeviceModel:
    """Kinds of device that the table lacks are taken for the GPU that it has."""
    return DEVICE_MODELS.get(device, DEVICE_MODELS["cuda"])
