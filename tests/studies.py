"""A study in miniature, and the files that a finished one leaves, made without training."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from ddpm_lab.config.reader import read_config
from ddpm_lab.study.run import BASE, Outcome
from ddpm_lab.study.settings import STUDIES, StudyConfig
from ddpm_lab.support.console import Screen
from ddpm_lab.support.durable import write_json
from rich.console import Console

QUICK = (
    "{steps: 2, batch_size: 2, accumulation: 1, learning_rate: 1.0e-3, schedule: one_cycle, clip_norm: 1.0, threads: 1}"
)
TINY_STUDY = f"""\
title: A study in miniature
caveat: All subjects are deformations of one average brain.
source: {{title: healthy, made: {{domain: t1, count: 6, side: 16}}}}
datasets:
  contrast: {{title: T2-like, made: {{domain: t2, count: 6, side: 16}}}}
  lesion: {{title: Lesion, made: {{domain: lesion, count: 6, side: 16}}}}
data: {{resize: [8, 8, 8], test_share: 0.2}}
model: {{channels: [8, 8], attention_levels: [false, true], head_channels: [0, 8], res_blocks: 1, norm_groups: 4}}
diffusion: {{prediction: v_prediction}}
pretraining: {QUICK}
training: {QUICK}
validation: {{every: 1, buckets: 2}}
sampling: {{steps: 2, count: 2, batch_size: 2}}
metrics: {{encoder: random, reference: test, pairs: 2, resamples: 4}}
methods:
  full: {{title: Full fine-tuning, method: {{kind: full}}}}
  lora: {{title: LoRA, method: {{recipe: lora_ddpm}}, training: {{learning_rate: 5.0e-3}}}}
  tenvoo_l: {{title: TenVOO-L, method: {{recipe: tenvoo_l_ddpm, params: {{r: 4}}}}}}
  tenvoo_q: {{title: TenVOO-Q, note: a note, method: {{recipe: tenvoo_q_ddpm, params: {{r: 4}}}}}}
seeds: [0, 1]
table1: [full, lora, tenvoo_l]
table2: [lora]
table3: [tenvoo_l, tenvoo_q]
table4: [full, lora, tenvoo_l]
figure4: {{methods: [tenvoo_l, tenvoo_q], ranks: [1, 4]}}
start:
  methods: {{tenvoo_l: [{{std: 1}}, {{std: 0}}], lora: [{{std: 0.3}}]}}
  sampling: {{count: 0}}
cost: {{shapes: {{small: [8, 8, 8]}}, rounds: 3, warmup: 1, batch_size: 2}}
"""
SIZES = {"full": 1_802_481, "lora": 70_800, "tenvoo_l": 58_192, "tenvoo_q": 59_248}


def tiny_study(folder: Path, *overrides: str, text: str = TINY_STUDY) -> StudyConfig:
    path = folder / "study.yaml"
    path.write_text(text, encoding="utf-8")
    return read_config(path, overrides, StudyConfig)


def written_study(out: Path, config: StudyConfig) -> None:
    """The folder of a study whose runs are all done, with numbers made from names."""
    config = config.with_variants()
    write_json(
        out / "study.json",
        {"version": 1, "studies": list(STUDIES), "config": config.settled().model_dump(mode="json")},
    )
    record = {
        "versions": {"python": "3.11", "torch": "2.13"},
        "machine": {"device": "cpu", "processor": "A processor", "threads": 2},
        "revision": "0123abcd",
    }
    write_json(out / f"record-study-{STUDIES[-1]}.json", record)
    methods = {each for study in STUDIES if study != "table4" for each in config.members(study)}
    for number, method in enumerate([BASE, *sorted(methods)]):
        for place, dataset in enumerate(config.datasets):
            _volumes(out / "data" / dataset / "real", "real", place)
            for seed in config.seeds:
                folder = out / "runs" / method / dataset / f"seed-{seed}"
                _run(folder, method, number if number else 9, place, seed)  # the base has the worst distances
    for place, dataset in enumerate(config.datasets):
        for number, method in enumerate(config.members("start")[1:]):
            _shares(out / "shares" / method / dataset, number, place)
    write_json(out / "costs.json", _costs(config))


def _shares(folder: Path, number: int, place: int) -> None:
    """The first method's own start is of size 40, the next ones' 30, 20 and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    Outcome("done", "key", 9.0).write(folder)
    shares = {"tangent": 0.1 + 0.01 * number, "noise": 0.05, "reach": 0.3, "free": 0.4 + 0.1 * place}
    run = {**shares, "std": 40.0 - 10 * number, "layers": "conv1, to_q"}
    write_json(folder / "summary.json", {"run": run, "config": {"training": {"learning_rate": 1e-3}}})


def _run(folder: Path, method: str, number: int, place: int, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    summary = _summary(method, number, seed)
    after = 0.03 * (1 + summary["run"]["test_change_percent"] / 100)
    errors = {"test": {name: [0.03, after + shift] for name, shift in (("a.nii", 0.001), ("b.nii", -0.001))}}
    Outcome("done", "key", 30.0, errors=errors if method != BASE else {}).write(folder)
    write_json(folder / "evaluation.json", _evaluation(method, number, place, seed))
    _volumes(folder / "samples" / ("base" if method == BASE else folder.name), "sample", number)
    if method != BASE:
        write_json(folder / "summary.json", summary)


def _evaluation(method: str, number: int, place: int, seed: int) -> dict[str, Any]:
    def metric(value: float) -> dict[str, float]:
        return {"value": value, "low": value * 0.9, "high": value * 1.1}

    def measured(size: float) -> dict[str, Any]:
        names = ("fid", "mmd_linear", "mmd_gaussian", "mmd_rbf")
        return {name: metric(size * (k + 1)) for k, name in enumerate(names)} | {"ms_ssim": metric(0.9 - size)}

    size = 0.01 * (number + 1) + 0.02 * place + 0.002 * seed
    return {
        "encoder": "* random features, not comparable",
        "encoder_mark": "*",
        "encoder_digest": "random",
        "ms_ssim": "1 scale, window 5: non-standard, the volumes are small",
        "reference": "60 real volumes",
        "sets": {"base" if method == BASE else f"seed-{seed}": measured(size), "real, held out": measured(0.001)},
    }


def _summary(method: str, number: int, seed: int) -> dict[str, Any]:
    steps = 60
    drop = 0.3 - 0.02 * number
    losses = [0.2 + 0.2 * np.exp(-k / 15) * (1 + 0.2 * np.sin(k * (number + 1))) - drop / 5 for k in range(steps)]
    size = next((about for name, about in SIZES.items() if method.startswith(name)), 1000)
    return {
        "config": {"training": {"learning_rate": 1e-3}},
        "run": {
            "method": method,
            "trainable_parameters": size // (3 if method.endswith("r1") else 1),
            "base_parameters": 1_802_481,
            "steps": steps,
            "held_out_error_before": 0.03,
            "held_out_error_after": 0.03 * (1 - drop),
            "change_percent": -100 * drop + seed,
            "test_change_percent": -100 * drop + seed,
        },
        "history": {
            "losses": losses,
            "validation": [[k, 0.03 * (1 - drop * k / steps), [0.1]] for k in (20, 40)],
            "seconds": 5.0,
        },
    }


def _volumes(folder: Path, name: str, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    axis = np.linspace(-1, 1, 16)
    distance = np.sqrt(sum(each**2 for each in np.meshgrid(axis, axis * 0.8, axis, indexing="ij")))
    noise = np.random.default_rng(seed).uniform(0, 0.1, distance.shape)
    for number in range(3):
        volume = np.where(distance < 0.6 + 0.1 * number, 0.8 - 0.4 * distance, 0) + noise
        nibabel.save(nibabel.Nifti1Image(volume.astype(np.float32), np.eye(4)), folder / f"{name}-{number:04d}.nii.gz")


def _costs(config: StudyConfig) -> dict[str, Any]:
    def one(k: int) -> dict[str, Any]:
        ratio = {"value": 1 + 0.1 * k, "low": 1.0, "high": 1.2}
        flat = {"value": 1.0, "low": 1.0, "high": 1.0}
        return {
            "trainable_parameters": 1_802_481 if k == 0 else 70_800,
            "base_parameters": 1_802_481,
            "training": ratio,
            "training_seconds": 0.2 + 0.02 * k,
            "inference": flat,
            "inference_seconds": 0.05,
            "memory": 1 - 0.02 * k,
            "memory_bytes": 50_000_000,
        }

    names = ["full fine-tuning", *(name for name in config.table4 if name != "full")]
    sizes = {
        name: {"shape": list(shape), "methods": {each: one(k) for k, each in enumerate(names)}}
        for name, shape in config.cost.shapes.items()
    }
    return {
        "batch_size": 2,
        "rounds": 3,
        "precision": "no",
        "counted": "operations' allocations",
        "machine": {"device": "cpu", "processor": "A processor", "threads": 2},
        "versions": {},
        "revision": None,
        "sizes": sizes,
    }


class Told:
    """A screen whose lines can be read."""

    def __init__(self) -> None:
        self.console = Console(record=True, width=400, file=io.StringIO())
        self.screen = Screen(self.console)

    @property
    def text(self) -> str:
        return self.console.export_text(clear=False)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
