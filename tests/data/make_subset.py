"""Make `golden_small.*` and `init_small.json`, the committed part of the shared golden data.

Usage, from the repository's root: python tests/data/make_subset.py ../shared/golden
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

CASES = (
    "tenvoo-l/conv32-32-k3-r2",
    "tenvoo-l/conv48-24-k1x3x5-r4",
    "tenvoo-l/conv1-32-k3-r2",
    "tenvoo-q/conv32-32-k3-r2",
    "tenvoo-q/conv48-24-k1x3x5-r4",
    "quanta/linear128-512-r4",
    "lycoris-locon-tucker/conv64-128-k3-r4",
    "lycoris-loha-tucker/conv64-128-k3-r4",
    "lycoris-lokr/conv64-128-k3-r4",
    "lycoris-lokr-both/linear128-512-r4",
    "lycoris-lokr-full/linear128-512-r4",
    "lycoris-lokr-fac8/linear128-512-r4",
    "ref-lokr/conv64-128-k3-r4",
    "ref-locon/linear128-512-r4",
    "ref-loha/linear128-512-r4",
    "lycoris-loha/linear128-512-r4",
)
KEPT = ("method", "layer", "cin", "cout", "kernel", "rank", "alpha", "scale", "ctor", "cores")
SAMPLES, STRIDE = 256, 40503
SUMS = ("dw_out_sum", "dw_in_sum", "dw_spatial_sum")


def main(source: Path, target: Path) -> None:
    facts = json.loads((source / "golden_public.json").read_text())
    tensors = load_file(source / "golden_public.safetensors")
    small_facts, small = {}, {}
    for case in CASES:
        fact = facts[case]
        kept = {key: fact[key] for key in (*KEPT, "dw_shape", "dw_sum", "dw_sqsum", "dw_absmax") if key in fact}
        kept["cores"] = [core for core in kept["cores"] if not core["name"].startswith("frozen.")]
        small_facts[case] = kept
        for core in kept["cores"]:
            small[f"{case}/{core['name']}"] = tensors[f"{case}/{core['name']}"]
        sample = tensors.get(f"{case}/dw_sample")
        if sample is None:
            flat = tensors[f"{case}/dw"].flatten()
            sample = flat[torch.arange(SAMPLES) * STRIDE % flat.numel()]
        small[f"{case}/dw_sample"] = sample[:SAMPLES].double().clone()
        for name in SUMS:
            if f"{case}/{name}" in tensors:
                small[f"{case}/{name}"] = tensors[f"{case}/{name}"]
    (target / "golden_small.json").write_text(json.dumps(small_facts, indent=1) + "\n")
    save_file(small, target / "golden_small.safetensors")
    spreads = json.loads((source / "init.json").read_text())
    (target / "init_small.json").write_text(json.dumps(spreads, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(__file__).parent)
