"""Reference numbers of other implementations, laid out as this library's cores.

Two sources: `tests/data` (a small committed subset, see `data/make_subset.py`) and `../shared/golden` beside the
repository, or wherever TNPEFT_SHARED points, which not every machine has.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).parent
DATA = HERE / "data"
SHARED = Path(os.environ.get("TNPEFT_SHARED", HERE.parent.parent / "shared"))
GOLDEN = SHARED / "golden"
SKIPPED = "the shared golden data are not here (set TNPEFT_SHARED to the folder that holds golden/)"

SAMPLES, STRIDE = 8192, 40503  # entry number i of a sample is the weight's entry (i * STRIDE) % numel

LOKR_TUCKER = """
tnpeft: 1
name: lokr_tucker
layers: any
params: {r: 4, alpha: r}
bond: r
sizes:
  ob oa: factorize(out_channels, 2)
  ib ia: factorize(in_channels, 2)
cores:
  small: oa ia
  mid:   p q k...
  up:    p ob
  down:  {legs: q ib, init: zeros}
weight: (oa ob) (ia ib) k...
scale: alpha / r
start: zero
"""

# The published LoHa for Linear makes an (in, out) matrix and views it, without transposing, as (out, in).
LOHA_VIEWED = """
tnpeft: 1
name: loha_viewed
layers: Linear
params: {r: 4, alpha: r}
sizes:
  i: in_features
  oa: out_features // in_features
  ob: in_features
  s: r
cores:
  left_1:  {legs: i r, init: normal(0.1)}
  right_1: {legs: r oa ob, init: normal(1)}
  left_2:  {legs: i s, init: zeros}
  right_2: {legs: s oa ob, init: normal(1)}
weight: (i oa) ob
scale: alpha / r
start: zero
"""


@dataclass
class Case:
    """One case: which spec on which layer, its cores in our layout, and the numbers that must come out."""

    name: str
    facts: dict[str, Any]
    tensors: dict[str, Tensor] = field(repr=False)

    @property
    def kernel(self) -> tuple[int, ...]:
        kernel = self.facts.get("kernel")
        if kernel is None:
            return ()
        return (kernel,) * 3 if isinstance(kernel, int) else tuple(kernel)

    def layer(self) -> torch.nn.Module:
        """The adapted layer, in float64."""
        ends = (self.facts["cin"], self.facts["cout"])
        if not self.kernel:
            return torch.nn.Linear(*ends, dtype=torch.float64)
        return torch.nn.Conv3d(*ends, self.kernel, dtype=torch.float64)

    @property
    def spec(self) -> str:
        """A shipped spec's name, or a spec's text."""
        names = {core["name"] for core in self.facts["cores"]}
        method = self.facts["method"]
        if self.name.startswith("ref-loha/linear"):
            return LOHA_VIEWED
        if "lokr_t2" in names:
            return LOKR_TUCKER
        if method.startswith("lokr"):
            return "krona" if "lokr_w2" in names else "lokr" if "lokr_w1" in names else "lokr_both"
        known = {"lora": "lora", "locon": "lora", "locon-tucker": "locon_tucker", "loha": "loha"}
        known |= {"loha-tucker": "loha_tucker", "tenvoo-l": "tenvoo_l", "tenvoo-q": "tenvoo_q"}
        return known.get(method, "quanta")

    @property
    def params(self) -> dict[str, float]:
        if self.spec == "krona":
            return {}
        params: dict[str, float] = {"r": self.facts["rank"]}
        if self.facts.get("alpha") is not None:
            params["alpha"] = self.facts["alpha"]
        if "factor" in self.facts.get("ctor", {}):
            params["factor"] = self.facts["ctor"]["factor"]
        return params

    def cores(self, prefix: str = "") -> list[Tensor]:
        """The reference's cores in our order, not yet in our shapes: see `fit`."""
        names = [core["name"] for core in self.facts["cores"] if not core["name"].startswith("frozen.")]
        if prefix:
            names = [name.replace("core", prefix) for name in names]
        cores = [self.tensors[name].double() for name in names]
        if self.facts["method"] == "tenvoo-q":
            clean_q_(cores)
        return cores

    def fit(self, shapes: list[tuple[int, ...]], prefix: str = "") -> list[Tensor]:
        """The cores reshaped to ours: a convolution's kernel is unfolded, axes of size one are dropped."""
        return [core.reshape(shape) for core, shape in zip(self.cores(prefix), shapes, strict=True)]

    def check(self, dw: Tensor, tolerance: float) -> None:
        """Compare a weight update with every number that the case holds."""
        assert list(dw.shape) == self.facts["dw_shape"]
        size = dw.norm()
        expected = {
            "dw": dw,
            "dw_sample": dw.flatten()[torch.arange(SAMPLES) * STRIDE % dw.numel()],
            "dw_out_sum": dw.flatten(1).sum(1),
            "dw_in_sum": dw.transpose(0, 1).flatten(1).sum(1),
            "dw_spatial_sum": dw.sum((0, 1)),
        }
        found = {name: self.tensors[name] for name in expected if name in self.tensors}
        assert found, "the case holds no update"
        for name, reference in found.items():
            ours = expected[name][: len(reference)] if name == "dw_sample" else expected[name]
            error = (ours - reference.double()).norm() / reference.double().norm()
            assert error <= tolerance, f"{self.name} {name}: relative error {error:.1e}"
        assert abs(dw.sum() - self.facts["dw_sum"]) <= tolerance * size * dw.numel() ** 0.5
        assert abs(size**2 - self.facts["dw_sqsum"]) <= tolerance * size**2 * 2
        assert abs(dw.abs().max() - self.facts["dw_absmax"]) <= tolerance * dw.abs().max()


def clean_q_(cores: list[Tensor]) -> None:
    """Published TenVOO-Q → the graph of Fig. 2(d), same update.

    The published kernel_h is (kh, 1, r, r): its second axis is broadcast against kernel_d's last
    bond, which is therefore summed on its own, and its last axis dangles and is summed too. Both
    sums go into slice 0 of the bond that joins the two cores in the clean graph.
    """
    kernel_d, kernel_h = cores[2], cores[3]
    rank = kernel_d.shape[-1]
    summed_d = torch.zeros_like(kernel_d)
    summed_d[..., 0] = kernel_d.sum(-1)
    clean_h = kernel_h.new_zeros(kernel_h.shape[0], rank, rank)
    clean_h[:, 0] = kernel_h.sum(-1)[:, 0]
    cores[2], cores[3] = summed_d, clean_h


def read_cases(json_file: Path, tensor_file: Path) -> dict[str, Case]:
    """Every case of a pair of files that holds numbers (some record that the other library refuses the layer)."""
    facts = json.loads(json_file.read_text())
    tensors = load_file(tensor_file)
    cases = {}
    for name, fact in facts.items():
        if "error" in fact:
            continue
        own = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
        cases[name] = Case(name, fact, own)
    return cases


def committed_cases() -> dict[str, Case]:
    return read_cases(DATA / "golden_small.json", DATA / "golden_small.safetensors")


def shared_cases() -> dict[str, Case]:
    """The full set, or nothing where it is absent."""
    if not GOLDEN.is_dir():
        return {}
    return read_cases(GOLDEN / "golden_public.json", GOLDEN / "golden_public.safetensors")
