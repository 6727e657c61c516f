"""What things take on a kind of device: the one table from which chains are searched and modes are chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["DEVICE_MODELS", "DeviceModel", "device_model"]


@dataclass(frozen=True)
class DeviceModel:
    """Prices on one kind of device: ns, for fp32.

    The first block holds for any operation, the second predicts the time of a mode. The third is for the search of a
    chain, where only ratios matter, and the price of a link covers all that it does in both passes.
    """

    start: float  # of an operation, with its views
    move: float  # of an element that is read or written
    cached: float  # elements of a tensor that a cache holds
    far: float  # how many times as long an element of a larger tensor takes

    shared: float  # start of an operation that contracts cores, which layers alike share
    contract: float  # of a multiplication there, over short bonds
    shift: float  # start of a copy shifted along one axis
    multiply: float  # of a multiplication in a product
    call: float  # of one in a layer call
    weight_gradient: float  # of one in the gradient of a convolution's weight
    linear_gradient: float  # of one in the gradient of a linear layer's weight
    weight: float  # of an element of a convolution's weight, which is put in another order
    functions: float  # of the autograd functions of a chain
    narrow: float  # rows or columns below which a product takes longer

    link: float  # start of a link
    link_multiply: float  # of a multiplication in its product
    link_narrow: float  # as `narrow`, there
    cluster: float  # start of a step that contracts a cluster
    cluster_move: float  # of an element of its result

    def distance(self, elements: float) -> float:
        """By what factor reading or writing an element takes longer in a tensor of that many elements."""
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
    """The prices on a kind of device; kinds that the table lacks get those of its GPU."""
    return DEVICE_MODELS.get(device, DEVICE_MODELS["cuda"])
