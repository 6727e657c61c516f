"""What things take on a kind of device: the one table from which chains are searched and modes are chosen.

**cpu**: fitted to two cores of a Xeon and of an EPYC, both with AVX-512, from single layers (`benchmarks/modes.py`). A
saved byte counts what writing and reading it once takes. With that `auto` is within 5 % of the quickest mode on 103 of
104 rows of either machine's committed timings.

**cuda**: an H200 with activations in 16 bit and cores in fp32, and a queue that does not run dry: Python is ahead of
the device, and an operation takes its start and what the device needs for it.

* `start`, `shared`: what is left of whole training steps (`results/step_time_paper_160_h200.json`) for 111 layers
  beyond the weight gradients: 9 ms with LoRA, 50 ms with TenVOO-L and -Q, all dense. Calls that wait for their end take
  nine times as long, and say nothing of training.
* `multiply`, `linear_gradient`: 570 TFLOP/s in bf16, of 989 by the data sheet; `contract`: 50 TFLOP/s in fp32, of 67.
* `move`, `move_weight`: 3.3 TB/s, of 4.8, for 2 and 4 bytes.
* `shift`: the least with which convolutions stay dense wherever that is the quickest by single layers, waiting: on all
  79 of `results/modes_paper_160_h200.json`. No whole step was measured whose convolutions run through chains. A
  measurement may lower it. What convolutions alone have beside it is fitted to the same layers.
* `saved`: what activation checkpointing asks for a byte behind a Linear of 4096 features, 4096 multiplications for two
  bytes: for that price memory is to be had anyway. W + ΔW of a layer of 4096 x 4096 counts 0.5 ms.

Activations in fp32 make products of all modes slower, and dense ones most. No GPU was at hand for what is not marked
as measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["DEVICE_MODELS", "DeviceModel", "device_model"]


@dataclass(frozen=True)
class DeviceModel:
    """Prices on one kind of device: ns.

    The first block holds for any operation, the second predicts the time of a mode. The third is for the search of a
    chain, where only ratios matter, and the price of a link covers all that it does in both passes.
    """

    start: float  # of an operation, with its views
    move: float  # of an element of an input or output that is read or written
    move_weight: float  # of one of a weight, or of what it is made by
    cached: float  # elements of a tensor that a cache holds
    far: float  # how many times as long an element of a larger tensor takes

    shared: float  # start of an operation that contracts cores, which layers alike share
    contract: float  # of a multiplication there, over short bonds
    shift: float  # start of a copy shifted along one axis
    multiply: float  # of a multiplication in a product
    overlaps: bool  # a product takes the longer of its arithmetic and its memory traffic, not their sum
    call: float  # of a multiplication in a layer call
    weight_gradient: float  # of one in the gradient of a convolution's weight
    linear_gradient: float  # of one in the gradient of a linear layer's weight
    weight: float  # of an element of a convolution's weight, which is put in another order
    functions: float  # of the autograd functions of a chain
    views: float  # of what a link does beside its product, which moves nothing
    narrow: float  # rows or columns below which a product takes longer
    saved: float  # of a byte that a call leaves for its backward pass, beside its input: what it is worth

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
        "cpu": DeviceModel(
            start=1e3,
            move=0.356,
            move_weight=0.356,
            cached=1 << 22,
            far=4.0,
            shared=10.3e3,
            contract=0.00465,
            shift=20e3,
            multiply=0.0034,
            overlaps=False,
            call=0.0095,
            weight_gradient=0.0077,
            linear_gradient=0.0134,
            weight=0.31,
            functions=85e3,
            views=1e3,
            narrow=32.0,
            saved=0.2,
            link=60e3,
            link_multiply=0.025,
            link_narrow=8.0,
            cluster=10e3,
            cluster_move=1.0,
        ),
        "cuda": DeviceModel(
            start=5e3,
            move=6e-4,
            move_weight=1.2e-3,
            cached=1 << 22,
            far=4.0,
            shared=10e3,
            contract=4e-5,
            shift=85e3,
            multiply=3.5e-6,
            overlaps=True,
            call=5e-6,
            weight_gradient=8e-6,
            linear_gradient=3.5e-6,
            weight=0.0064,
            functions=10e3,
            views=0.0,
            narrow=1.0,
            saved=7e-3,
            link=15e3,
            link_multiply=6e-5,
            link_narrow=8.0,
            cluster=5e3,
            cluster_move=0.005,
        ),
    }
)
"""By `torch.device.type`."""


def device_model(device: str) -> DeviceModel:
    """The prices on a kind of device; kinds that the table lacks get those of its GPU."""
    return DEVICE_MODELS.get(device, DEVICE_MODELS["cuda"])
