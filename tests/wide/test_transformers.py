"""transformers: models that are saved, trained by its Trainer and spread over devices, with adapters on them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import tnpeft
from tnpeft.integrations.transformers import AdapterCallback

TOKENS = torch.arange(12).reshape(2, 6) % 32
TRAIN = {"norm": True}


def llama(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def attach(model: nn.Module, train: dict[str, Any] | None = None, mode: str = "auto") -> tnpeft.Handle:
    return tnpeft.attach(model, "lora", match=r"[qv]_proj$", r=2, train=train, mode=mode)


def step(model: nn.Module, handle: tnpeft.Handle) -> None:
    optimizer = torch.optim.SGD(handle.parameters(), 1.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("train", [None, TRAIN])
def test_an_attached_model_is_saved_as_its_base(train: dict[str, Any] | None, tied: bool, tmp_path: Path):
    model = llama(tied)
    base = logits(model)
    handle = attach(model, train)
    step(model, handle)
    model.save_pretrained(tmp_path)
    again, report = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert all(".adapters.default." in key or "_tnpeft_of_default:" in key for key in report["unexpected_keys"])
    assert torch.equal(logits(again.eval()), base)


@pytest.mark.parametrize("train", [None, TRAIN])
def test_a_merged_model_is_saved_as_what_it_computes(train: dict[str, Any] | None, tmp_path: Path):
    model = llama()
    step(model, attach(model, train))
    tnpeft.merge(model)
    model.save_pretrained(tmp_path / "merged")
    again, report = LlamaForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"]
    torch.testing.assert_close(logits(again.eval()), logits(model), rtol=0, atol=1e-6)
    # Loaded where the adapter is attached, it is the base with the adapter once.
    tnpeft.unmerge(model)
    expected = logits(model)
    other = llama()
    attach(other, train)
    other.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    assert torch.equal(logits(other), expected)


def arguments(folder: Path, steps: int = 4, **more: Any) -> TrainingArguments:
    return TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=2, save_steps=2, save_total_limit=3, report_to=[],
        learning_rate=0.05, use_cpu=True, disable_tqdm=True, seed=3, logging_steps=1, **more,
    )  # fmt: skip


DATA = [
    {"input_ids": row, "labels": row}
    for row in torch.randint(0, 32, (8, 6), generator=torch.Generator().manual_seed(1))
]


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("train", [None, TRAIN])
def test_a_trainers_checkpoint_holds_the_adapters_file(base: bool, train: dict[str, Any] | None, tmp_path: Path):
    model = llama()
    attach(model, train, "dense")  # `auto` contracts layer by layer in its first pass, which rounds otherwise
    Trainer(model, arguments(tmp_path), train_dataset=DATA, callbacks=[AdapterCallback(base=base)]).train()
    expected = logits(model.eval())
    folder = tmp_path / "checkpoint-4"
    fresh = llama()
    tnpeft.load(fresh, folder / "adapter.safetensors")
    assert torch.equal(logits(fresh), expected)
    kept = load_file(folder / "model.safetensors")
    plain = set(llama().state_dict())
    assert bool(plain & set(kept)) is base
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if not base:
        assert sum(tensor.numel() for tensor in kept.values()) == trained

    # Stopped after two steps and resumed, it ends with the same bits.
    again = llama()
    attach(again, train, "dense")
    trainer = Trainer(again, arguments(tmp_path), train_dataset=DATA, callbacks=[AdapterCallback(base=base)])
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(logits(again.eval()), expected)


@pytest.mark.parametrize("names", [(), ("a", "b")])
def test_training_does_not_begin_where_its_adapter_could_not_be_saved(names: tuple[str, ...], tmp_path: Path):
    model = llama()
    for name in names:
        tnpeft.attach(model, "lora", match="q_proj", r=2, name=name)
    if not names:
        model.requires_grad_(True)
    steps: list[int] = []
    model.register_forward_pre_hook(lambda *_: steps.append(1))
    trainer = Trainer(model, arguments(tmp_path), train_dataset=DATA, callbacks=[AdapterCallback()])
    with pytest.raises(tnpeft.errors.AdapterFileError) as excinfo:
        trainer.train()
    assert str(excinfo.value) == (
        f"{tmp_path / 'adapter.safetensors'}: adapter name: expected one of 'a', 'b', found none. "
        "Pass `name=`: a file holds one adapter."
        if names
        else "model: expected an attached adapter, found none. "
        "Attach one with `tnpeft.attach`, or pass the whole model that it was attached to."
    )
    assert not steps
    assert not [*tmp_path.glob("checkpoint-*")]


def test_one_of_several_adapters_is_saved(tmp_path: Path):
    model = llama()
    for name in ("a", "b"):
        tnpeft.attach(model, "lora", match="q_proj", r=2, name=name)
    Trainer(model, arguments(tmp_path, 2), train_dataset=DATA, callbacks=[AdapterCallback(name="b")]).train()
    assert tnpeft.inspect(tmp_path / "checkpoint-2" / "adapter.safetensors").settings["name"] == "b"


def test_another_base_is_warned_of_where_the_checkpoint_holds_none(tmp_path: Path):
    def trainer(steps: int, shift: float = 0.0) -> Trainer:
        model = llama()
        with torch.no_grad():
            model.model.layers[1].self_attn.q_proj.weight.add_(shift)
        attach(model)
        return Trainer(model, arguments(tmp_path, steps), train_dataset=DATA, callbacks=[AdapterCallback(base=False)])

    trainer(2).train()
    folder = tmp_path / "checkpoint-2"
    found = tnpeft.inspect(folder / "model.safetensors")
    assert (found.format, found.settings["adapters"]) == ("cores", ["default"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", tnpeft.TnpeftWarning)
        trainer(4).train(resume_from_checkpoint=str(folder))
    with pytest.warns(tnpeft.TnpeftWarning) as caught:
        trainer(4, 0.1).train(resume_from_checkpoint=str(folder))
    (said,) = [str(each.message) for each in caught if each.category is tnpeft.TnpeftWarning]
    assert said == (
        f"{folder / 'adapter.safetensors'}: base model: expected the values that the adapter was trained on, found "
        "others in 'model.layers.1.self_attn.q_proj'. Resume on that base: the checkpoint itself holds none."
    )


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path):
    model = llama()
    attach(model)
    settings = arguments(
        tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, metric_for_best_model="loss"
    )
    trainer = Trainer(
        model, settings, train_dataset=DATA, eval_dataset=DATA[:2], callbacks=[AdapterCallback(base=False)]
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    fresh = llama()
    tnpeft.load(fresh, best / "adapter.safetensors")
    assert torch.equal(logits(model.eval()), logits(fresh))


@pytest.mark.parametrize(
    "make_map",
    [
        lambda: "auto",
        lambda: {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu",
                 "lm_head": "disk"},
    ],
    ids=["auto", "disk"],
)  # fmt: skip
@pytest.mark.parametrize("train", [None, TRAIN])
def test_a_model_that_was_loaded_with_a_device_map_is_adapted(
    make_map: Callable[[], Any], train: dict[str, Any] | None, tmp_path: Path
):
    plain = llama()
    plain.save_pretrained(tmp_path / "base")
    reference = llama()
    step(reference, attach(reference, train))
    model = LlamaForCausalLM.from_pretrained(
        tmp_path / "base", device_map=make_map(), offload_folder=tmp_path / "offload"
    ).eval()
    handle = attach(model, train)
    assert torch.equal(logits(model), logits(plain))
    step(model, handle)
    torch.testing.assert_close(logits(model), logits(reference), rtol=0, atol=1e-5)


@pytest.mark.parametrize("train", [None, TRAIN])
@pytest.mark.parametrize("merged", [False, True])
def test_an_adapted_model_is_offloaded(train: dict[str, Any] | None, merged: bool):
    import accelerate

    model = llama()
    step(model, attach(model, train))
    if merged:
        tnpeft.merge(model)
    expected = logits(model)
    accelerate.cpu_offload(model, execution_device="cpu")
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)
