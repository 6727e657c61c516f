"""Whether the encoder of a study sees what sets each data set apart; where it does not, distances say nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddpm_lab.config.settings import Config, Data, Metrics
from ddpm_lab.data.files import find_volumes
from ddpm_lab.evaluation.distances import Measured
from ddpm_lab.evaluation.encoder import Encoder
from ddpm_lab.evaluation.permutation import LEVEL, PERMUTATIONS, p_value
from ddpm_lab.evaluation.real_volumes import RealVolumes
from ddpm_lab.model.accelerator import make_accelerator
from ddpm_lab.study.data import identity, settled
from ddpm_lab.study.plan import Plan
from ddpm_lab.study.run import digest
from ddpm_lab.support.console import Screen
from ddpm_lab.support.durable import read_json, write_json, writing
from ddpm_lab.support.locks import alone

__all__ = ["read_domain", "tell_domains", "unseen"]


def tell_domains(plan: Plan, encoder: Encoder, screen: Screen) -> None:
    """Compare the held-out volumes of each data set with the source's, unless an earlier command did.

    Nothing is done without samples, which are what distances are of, or without a source, as beside a given base.
    """
    config, out = plan.config, plan.out
    has_source = config.source.made is not None or config.source.data.root or config.source.data.manifest
    if config.sampling.count == 0 or not has_source:
        return
    source = settled("source", config, config.pretrained_on, out, screen)
    whole = config.metrics.model_copy(update={"reference": "all"})
    healthy: Measured | None = None
    for name, about in plan.datasets.items():
        depends = {
            "encoder": encoder.digest,
            "volumes": [identity(config, source), identity(config, about)],
            "metrics": config.metrics.model_dump(mode="json", include={"most", "seed"}),
            "permutations": PERMUTATIONS,
        }
        path, key = out / "data" / name / "domain.json", digest(depends)
        found = read_json(path)
        if found is None or found["key"] != key:
            if healthy is None:
                healthy = _measured(plan, "source", config.data_of(source), whole, encoder, screen)
            own = _measured(plan, name, config.data_of(about), config.metrics, encoder, screen)
            found = {
                "key": key,
                "encoder_digest": encoder.digest,
                "p": p_value(own.features, healthy.features, config.metrics.seed),
                "permutations": PERMUTATIONS,
                "counts": [len(own), len(healthy)],
            }
            with writing(path, "what the encoder tells apart"):
                write_json(path, found)
        screen.line(_told(name, found))


def _measured(plan: Plan, name: str, data: Data, metrics: Metrics, encoder: Encoder, screen: Screen) -> Measured:
    """Real volumes and their features, which the runs on the data set then find in the same cache."""
    config = Config(data=data, training=plan.config.training, metrics=metrics)
    cache = plan.out / "cache" / name
    with alone(cache / "lock", wait=True):
        real = RealVolumes(config, cache, find_volumes(data, changed_too=data.skip_damaged), screen)
        real.encode(encoder, make_accelerator(config.training), screen)
    return real.reference()


def _told(name: str, found: dict[str, Any]) -> str:
    if found["p"] is None:
        return f"{name}: too few volumes to say whether the encoder tells them from the source's"
    return f"{name}: {'not seen' if unseen(found) else 'seen'} by the encoder of FID and MMD (p = {found['p']:.2g})"


def read_domain(out: Path, dataset: str, encoder_digest: str | None) -> dict[str, Any] | None:
    """What was found of a data set with this encoder; None where nothing was."""
    found = read_json(out / "data" / dataset / "domain.json")
    return found if found is not None and found["encoder_digest"] == encoder_digest else None


def unseen(found: dict[str, Any] | None) -> bool:
    """Whether the encoder cannot tell a data set from the source."""
    return found is not None and found["p"] is not None and found["p"] > LEVEL
