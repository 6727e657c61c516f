"""Training step (forward, backward, Adam) of every method as a ratio to full fine-tuning.

    python benchmarks/step_time.py --size 16 --specs all
    python benchmarks/step_time.py --size 16 --specs oft hra peers
    python benchmarks/step_time.py --model paper --shape 160,224,160 --device cuda --autocast bf16
    python benchmarks/step_time.py --profile tenvoo_l_ddpm

Methods take turns in one process, a few at a time, always with a model that trains everything (`full`) and one that
trains only biases and norms (`floor`), both with torch's own layers. A ratio compares times of the same round, and
medians are over rounds. `over the floor` is the time beyond the floor, in units of a full step. `other libraries` has
the ratios to their versions of the method. Methods in brackets need the gradient of the whole weight; they are only
reported.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import alternating, parser, show, timings, write
from methods import (
    PEERS,
    RECIPES,
    UnsuitableError,
    adapt,
    families,
    layers_of,
    modes_of,
    needs_weight_gradient,
    specs_named,
)
from models import unet
from profiling import profile
from torch import nn
from training import Setting, add_options, setting_of, step

import tnpeft

WARMUP = 2  # the first pass plans, the second groups layers
REFERENCES = ("full", "floor")


def main() -> None:
    arguments = options().parse_args()
    torch.set_num_threads(arguments.threads)
    setting = setting_of(arguments)
    if arguments.profile:
        write(arguments.out, profile(arguments.profile, setting, arguments.rounds))
    else:
        measure_steps(arguments, setting)


def options() -> argparse.ArgumentParser:
    found = parser(__doc__, "step_time.json")
    add_options(found)
    found.add_argument("--rounds", type=int, default=9)
    found.add_argument(
        "--specs",
        nargs="+",
        default=[],
        help="shipped specs besides the recipes; `all` of them, or those that other libraries have (`peers`)",
    )
    found.add_argument("--only", nargs="+", help="only these of the recipes, `--specs` and other libraries' methods")
    found.add_argument("--no-peers", action="store_true", help="leave the other libraries out")
    found.add_argument("--together", type=int, default=6, help="methods in memory at a time, besides full and floor")
    found.add_argument("--resume", action="store_true", help="keep what the output file has, measure the rest")
    found.add_argument("--profile", metavar="METHOD", help="show where one method spends its time over the floor")
    return found


def measure_steps(arguments: argparse.Namespace, setting: Setting) -> None:
    results = {**setting.as_json(), "rounds": arguments.rounds, "methods": {}, "skipped": {}}
    if arguments.resume:
        results = _known(arguments.out, results)
    done = set(results["methods"]) | set(results["skipped"])
    base = unet(setting.model)
    for names in batches(chosen(arguments), arguments.together, done):
        models, skipped = built(base, names, setting)
        results["skipped"] |= skipped
        times = timed(models, setting, arguments.rounds)
        found = report(models, times)
        for name in REFERENCES:
            _pool(results["methods"], name, found.pop(name))
        results["methods"] |= found
        for name in found:
            print("  ".join(row(name, found[name])), flush=True)
        write(arguments.out, results)
        del models
        gc.collect()
    rows = [row(name, about) for name, about in results["methods"].items()]
    columns = ("method", "layers", "trained", "ms", "ratio to full", "middle half", "over the floor", "other libraries")
    show(f"Training step, {setting}", columns, rows)
    for name, reason in results["skipped"].items():
        print(f"{name} is left out: {reason}")


def chosen(arguments: argparse.Namespace) -> list[tuple[str, ...]]:
    """Families of methods to measure."""
    found = families([*RECIPES, *specs_named(arguments.specs)], not arguments.no_peers)
    if arguments.only:
        found = [tuple(name for name in family if name in arguments.only) for family in found]
    return [family for family in found if family]


def batches(chosen: Sequence[tuple[str, ...]], together: int, done: set[str]) -> Iterator[list[str]]:
    """Whole families, so many that no batch has more than `together` methods."""
    batch: list[str] = []
    for family in chosen:
        if family[0] in done:
            continue
        if batch and len({*batch, *family}) > together:
            yield batch
            batch = []
        batch += [name for name in family if name not in batch]
    if batch:
        yield batch


def built(base: nn.Module, names: Sequence[str], setting: Setting) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Each method on a model of its own, beside the two references; what cannot be had, and why."""
    models: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    for name in (*REFERENCES, *names):
        model = setting.placed(copy.deepcopy(base))
        try:
            models[name] = adapt(model, name, setting.mode)
        except (UnsuitableError, tnpeft.TnpeftError, ImportError) as error:
            skipped[name] = str(error)
            print(f"{name} is left out: {error}", flush=True)
    return models, skipped


def timed(models: Mapping[str, nn.Module], setting: Setting, rounds: int) -> dict[str, list[float]]:
    steps = {name: step(model, setting) for name, model in models.items()}
    return alternating(steps, rounds, WARMUP, setting.on_gpu)


def report(models: Mapping[str, nn.Module], times: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """What is written of each method."""
    found = {}
    for name, timing in timings(times, "full").items():
        model = models[name]
        rounds = zip(times[name], times["floor"], times["full"], strict=True)
        peers = [peer for peer, about in PEERS.items() if name in about.versions and peer in times]
        found[name] = {
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
            **vars(timing),
            "over_floor": statistics.median((own - floor) / full for own, floor, full in rounds),
            "layers": dict(layers_of(model)),
            "modes": dict(modes_of(model)),
            "reported_only": needs_weight_gradient(model),
            "peers": {peer: timings(times, peer)[name].ratio for peer in peers},
        }
    return found


def row(name: str, about: Mapping[str, Any]) -> list[str]:
    """A method's row of the table."""
    return [
        f"({name})" if about["reported_only"] else name,
        ", ".join(f"{number} {kind}" for kind, number in about["layers"].items()),
        f"{about['trained']:,}",
        f"{about['seconds'] * 1e3:.0f}",
        f"{about['ratio']:.3f}",
        f"{about['low']:.3f} - {about['high']:.3f}",
        f"{about['over_floor']:.3f}",
        ", ".join(f"{ratio:.2f} {peer}" for peer, ratio in about["peers"].items()),
    ]


def _known(path: Path, results: dict[str, Any]) -> dict[str, Any]:
    """The results of an earlier run with the same setting, or `results` where there is none."""
    if not path.exists():
        return results
    known = json.loads(path.read_text(encoding="utf-8"))["results"]
    for key in results.keys() - {"methods", "skipped"}:
        if known[key] != results[key]:
            raise SystemExit(f"{path} has {key} {known[key]}, not {results[key]}: leave `--resume` out.")
    return dict(known)


def _pool(methods: dict[str, Any], name: str, found: dict[str, Any]) -> None:
    """A reference is measured with every batch: its medians over the batches, beside what each of them gave."""
    batch = {key: found[key] for key in ("seconds", "ratio", "low", "high", "over_floor")}
    batches = [*methods.get(name, {}).get("batches", []), batch]
    medians = {key: statistics.median(one[key] for one in batches) for key in batch}
    methods[name] = {**found, **medians, "batches": batches}


if __name__ == "__main__":
    main()
