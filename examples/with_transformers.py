"""Fine-tune a transformers model with its own Trainer; the adapter is saved with each checkpoint.

    python examples/with_transformers.py

Needs `pip install transformers accelerate`; a few seconds on a CPU, nothing is fetched. The model is a Llama of 23
thousand random weights that learns to count; the Trainer knows nothing of the adapter but a callback. It leaves
runs/with_transformers.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments

import tnpeft
from tnpeft.integrations.transformers import AdapterCallback

FOLDER = Path("runs/with_transformers")
STEPS = 60
# Rows of eight numbers that follow each other, from 0 to 31 and round again.
COUNTING = (torch.arange(32)[:, None] + torch.arange(8)) % 32


def tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    output: Tensor = model.eval()(COUNTING).logits
    return output


def right(model: nn.Module) -> str:
    """How often the most likely next number is the next one."""
    return f"{(logits(model)[:, :-1].argmax(-1) == COUNTING[:, 1:]).float().mean():.0%}"


def same(actual: Tensor, expected: Tensor) -> str:
    """Bit for bit, without a tolerance."""
    return "exact: yes" if torch.equal(actual, expected) else "exact: no"


def main() -> None:
    transformers.utils.logging.set_verbosity_error()  # `from_pretrained` would list the adapter's tensors as unused
    transformers.utils.logging.disable_progress_bar()
    transformers.set_seed(0)
    model = tiny_llama()
    base = copy.deepcopy(model)  # kept for the comparisons below

    # 1. Attach. `dense` makes the bits of a first pass those of later ones; `auto`, the default, may round otherwise.
    handle = tnpeft.attach(model, "lora", match=r"(_proj|lm_head)$", r=4, mode="dense")
    report = handle.report()
    print(f"{report.trained:,} numbers train beside a base of {report.base:,}, in {len(report.layers)} layers.")
    print(f"Before training, the model gives what the base gives: {same(logits(model), logits(base))}")
    print(f"Next numbers that it gets right: {right(model)}")

    # 2. Train. The Trainer's checkpoints each get the adapter's file beside the model's.
    arguments = TrainingArguments(
        str(FOLDER),
        max_steps=STEPS,
        save_steps=STEPS,
        per_device_train_batch_size=16,
        learning_rate=3e-2,
        report_to=[],
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    data = [{"input_ids": row, "labels": row} for row in COUNTING]
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[AdapterCallback()])
    trainer.remove_callback(PrinterCallback)  # of the training's times
    trainer.train()
    trained = logits(model)
    print(f"\nAfter {STEPS} steps: {right(model)}")

    # 3. The adapter's file on a fresh base.
    file = FOLDER / f"checkpoint-{STEPS}" / "adapter.safetensors"
    fresh = copy.deepcopy(base)
    tnpeft.load(fresh, file)
    print(f"{file} on the base gives what the trained model gives: {same(logits(fresh), trained)}")

    # 4. What transformers saves of an adapted model reloads as the base; merged, as what was trained.
    model.save_pretrained(FOLDER / "base")
    reloaded = LlamaForCausalLM.from_pretrained(FOLDER / "base")
    print(f"\nSaved and reloaded without tnpeft, it gives what the base gives: {same(logits(reloaded), logits(base))}")
    tnpeft.detach(model, merge=True)
    model.save_pretrained(FOLDER / "merged")
    merged = LlamaForCausalLM.from_pretrained(FOLDER / "merged")
    apart = float((logits(merged) - trained).abs().max())
    print(f"Saved with the update merged, it gives what was trained, but for rounding: {apart:.0e}")
    print(f"Next numbers that it gets right: {right(merged)}")


if __name__ == "__main__":
    main()
