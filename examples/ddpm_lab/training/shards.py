"""What trains, and the state of its training, as torch.distributed.checkpoint writes it: each process its own parts.

The parts are safetensors that say which part of which tensor they are. Any number of processes reads them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ddpm_lab.training.progress import Loop
from tnpeft.documents.files import sync_folder

__all__ = ["SHARDS", "read_shards", "write_shards"]

SHARDS = "shards"  # the folder in a checkpoint
TRAINED = "trained"


def write_shards(folder: Path, loop: Loop) -> None:
    """Write the parts that this process holds; every process comes here. Raises OSError in all of them."""
    files: dict[str, Mapping[str, Tensor]] = {TRAINED: loop.parameters, **loop.tensors()}
    tensors = {f"{file}/{name}": tensor.detach() for file, values in files.items() for name, tensor in values.items()}
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _together_or_alone() as alone:
        save(tensors, storage_writer=writer, no_dist=alone)
    sync_folder(folder)


def read_shards(folder: Path, parameters: Mapping[str, nn.Parameter]) -> dict[str, dict[str, Tensor]]:
    """Set `parameters` to what was written, and give the rest by file, in the parts that this process holds."""
    reader = HuggingFaceStorageReader(str(folder))
    tensors: dict[str, Tensor] = {}
    for key, about in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(about, TensorStorageMetadata)
        parameter = parameters[_parameter(key)].detach()
        like_it = tuple(about.size) == tuple(parameter.shape)
        tensors[key] = torch.zeros_like(parameter) if like_it else torch.zeros(about.size, dtype=about.properties.dtype)
    with _together_or_alone() as alone:
        load(tensors, storage_reader=reader, no_dist=alone)
    files: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        file, _, name = key.partition("/")
        files.setdefault(file, {})[name] = tensor
    with torch.no_grad():
        for name, tensor in files.pop(TRAINED).items():
            parameters[name].copy_(tensor)
    return files


def _parameter(key: str) -> str:
    """The parameter in `trained/NAME`, `average/NAME` and `optimizer/STATE/NAME`."""
    file, _, rest = key.partition("/")
    return rest.partition("/")[2] if file == "optimizer" else rest


@contextmanager
def _together_or_alone() -> Iterator[bool]:
    """Whether this is the only process; what failed in any of them is an OSError."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            yield not (distributed.is_available() and distributed.is_initialized())
    except CheckpointException as failed:
        first = next(iter(failed.failures.values()), (failed, None))[0]
        raise first if isinstance(first, OSError) else OSError(str(first)) from failed
