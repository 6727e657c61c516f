"""Known networks in the search's space, from which it may start."""

from __future__ import annotations

import itertools

from tnpeft.searching.space import Topology

__all__ = ["known_topologies"]


def known_topologies(axes: int, cores: int) -> dict[str, Topology]:
    """LoRA, CP, Tucker with a core for each leg or for the channels only, and a tensor train, if the space has them."""
    kernel = tuple(f"k{axis}" for axis in range(axes))
    ends = ("o0",), ("i0",)
    single = (*ends, *((leg,) for leg in kernel))
    around = tuple(((0, core), 1) for core in range(1, len(single) + 1))
    train = tuple((pair, 1) for pair in itertools.pairwise(range(len(single))))
    known = {
        "lora": Topology((1, 1), (("o0",), ("i0", *kernel)), (((0, 1), 1),)),
        "cp": Topology((1, 1), single, ((tuple(range(len(single))), 1),)),
        "train": Topology((1, 1), (("o0",), *single[2:], ("i0",)), train),
    }
    if axes:
        known["tucker_2"] = Topology((1, 1), (kernel, *ends), around[:2])
        known["tucker"] = Topology((1, 1), ((), *single), around)
    return {
        name: topology
        for name, topology in known.items()
        if len(topology.legs) <= cores and (axes or name in ("lora",))
    }
