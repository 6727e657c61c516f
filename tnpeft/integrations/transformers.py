"""For transformers' `Trainer`: the adapter's own file in each of its checkpoints."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from tnpeft.adapters.processes import is_in_parts
from tnpeft.errors import AdapterFileError, TnpeftWarning, needing
from tnpeft.io import save
from tnpeft.io.files import read, refuse, shown
from tnpeft.io.same_base import other_base
from tnpeft.io.saving import chosen
from tnpeft.io.sharded import one_writer
from tnpeft.surgery import adapted, plain_keys

with needing("transformers", "tnpeft.integrations.transformers"):
    from transformers import TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

__all__ = ["AdapterCallback"]


class AdapterCallback(TrainerCallback):  # type: ignore[misc]
    """Saves an adapter with each checkpoint of a `Trainer`.

        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[AdapterCallback()])

    Each checkpoint gets a file named `file`, which `tnpeft.load` puts on the base model. `name` says which adapter, and
    may be left out where one is attached. Training does not begin if that adapter cannot be saved. With `base=False`
    the Trainer's own file of weights holds what adapters add, without the base: `resume_from_checkpoint` and
    `load_best_model_at_end` read it as they read a whole one, on the same base. It is no model for `from_pretrained`,
    which would draw the missing weights. Resuming from such a checkpoint in `output_dir` warns (TnpeftWarning) if the
    base has other values.
    """

    def __init__(self, file: str = "adapter.safetensors", *, name: str | None = None, base: bool = True) -> None:
        self.file = file
        self.name = name
        self.base = base

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_others: Any) -> None:
        """Called by the Trainer before the first step. Raises AdapterFileError for an adapter that cannot be saved."""
        path = Path(args.output_dir) / self.file
        if not self.base and is_in_parts(model):
            found = "one of which each holds parts (FSDP)"
            raise refuse(path, "`base=False`", "a model that each process holds as a whole", found, "Leave it out.")
        with one_writer(model):
            chosen(model, path, self.name)
        if state.global_step and not self.base:
            self._compare(_folder(args, state) / self.file, adapted(model)[0])

    def _compare(self, file: Path, root: nn.Module) -> None:
        """Warn where a checkpoint without its base is resumed on another one."""
        try:
            manifest, _ = read(file)
        except AdapterFileError:
            return  # saved by another callback, or elsewhere
        if problem := other_base(file, manifest, root):
            fix = "Resume on that base: the checkpoint itself holds none."
            warnings.warn(TnpeftWarning(replace(problem, fix=fix, where=shown(file))), stacklevel=2)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_others: Any) -> None:
        """Called by the Trainer after it wrote a checkpoint. Raises AdapterFileError as `tnpeft.save` does."""
        first, folder = state.is_world_process_zero, _folder(args, state)
        if first or is_in_parts(model):
            save(model, folder / self.file, self.name)
        if first and not self.base:
            _leave_base_out(model, folder)


def _folder(args: Any, state: Any) -> Path:
    """The checkpoint of the step that the Trainer is at."""
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _leave_base_out(model: nn.Module, folder: Path) -> None:
    """Write the adapters' weights alone into a checkpoint; then remove the files that held all weights."""
    root, _ = adapted(model)
    state = root.state_dict()
    plain = plain_keys(root, state)
    tensors: dict[str, Tensor] = {}
    for key, tensor in state.items():
        # A tensor with several names stands once: loading it under one of them reaches all.
        if key not in plain and not any(tensor.is_set_to(other) for other in tensors.values()):
            tensors[key] = tensor
    written = folder / f"{SAFE_WEIGHTS_NAME}.new"
    save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, written, {"format": "pt"})
    written.replace(folder / SAFE_WEIGHTS_NAME)
    index = [SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME]
    shards = [*folder.glob("model-*-of-*.safetensors"), *folder.glob("pytorch_model-*-of-*.bin")]
    for path in (*(folder / name for name in index), *shards):
        path.unlink(missing_ok=True)
