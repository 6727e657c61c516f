"""PEFT's folders of transformers' models, both ways: heads, embeddings, tied weights, experts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from test_experts import TOKENS, gpt_oss, mixtral
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import tnpeft

# Of PEFT and transformers, on their own behalf.
pytestmark = pytest.mark.filterwarnings("ignore")


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=3
    )
    return BertForSequenceClassification(config).eval()


def llama(tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tied_llama() -> nn.Module:
    return llama(tied=True)


def move(model: nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


def logits(model: nn.Module) -> Tensor:
    return model.eval()(TOKENS).logits


def same(found: nn.Module, expected: Tensor) -> None:
    torch.testing.assert_close(logits(found), expected, rtol=1e-5, atol=1e-5)


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
READ: dict[str, tuple[Any, dict[str, Any]]] = {
    "head": (bert, {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}),
    "embedding and head": (llama, {"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["lm_head"]}),
    "tied embedding": (tied_llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "norms": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["norm", "input_layernorm"]}),
    "experts": (mixtral, {"target_modules": ["q_proj", "embed_tokens"], "target_parameters": EXPERTS}),
    "experts turned": (gpt_oss, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "one parameter of the experts": (mixtral, {"target_modules": [], "target_parameters": EXPERTS[1:]}),
}


@pytest.mark.parametrize("case", READ)
def test_both_ways(case: str, tmp_path: Path) -> None:
    make, options = READ[case]
    theirs = peft.get_peft_model(make(), peft.LoraConfig(r=2, lora_alpha=6, **options))
    move(theirs)
    expected = logits(theirs).detach()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = make()
    tnpeft.load_foreign(ours, tmp_path / "theirs")
    same(ours, expected)
    tnpeft.save_foreign(ours, tmp_path / "ours", "peft")
    same(peft.PeftModel.from_pretrained(make(), tmp_path / "ours"), expected)


WRITTEN: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "recipe with a head": (bert, "lora_bert", {}),
    "recipe of experts": (mixtral, "lora_mixtral", {}),
    "turned experts": (gpt_oss, "lora", {"parameters": {r"experts\.(gate_up|down)_proj$": "e i o"}, "r": 3}),
    "everything": (
        llama, "lora",
        {"match": "embed_tokens|_proj$", "train": {"norm": True, "also": ["lm_head"]}, "alpha": 3,
         "ranks": {"embed": {"r": 2}}},
    ),
    "tied, whole": (tied_llama, "lora", {"match": "_proj$", "train": {"also": ["embed_tokens"]}}),
    "LoHa and a head": (bert, "loha", {"match": "query", "train": {"norm": "all", "also": ["classifier"]}}),
}  # fmt: skip


@pytest.mark.parametrize("case", WRITTEN)
def test_what_we_write_is_what_peft_computes(case: str, tmp_path: Path) -> None:
    make, what, options = WRITTEN[case]
    ours = make()
    handle = tnpeft.attach(ours, what, **options)
    move(ours)
    expected = logits(ours).detach()
    tnpeft.save_foreign(ours, tmp_path, "peft")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path)
    same(theirs, expected)
    again = make()
    back = tnpeft.load_foreign(again, tmp_path)
    same(again, expected)
    assert back.adapters.keys() == handle.adapters.keys()


@pytest.mark.parametrize("saved", [["embed_tokens", "lm_head"], ["lm_head"]])
def test_copies_of_what_is_tied_want_it_untied(saved: list[str], tmp_path: Path) -> None:
    """PEFT trains each whole module by itself, whatever it was tied to."""
    theirs = peft.get_peft_model(tied_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved))
    move(theirs)
    theirs.save_pretrained(tmp_path)
    ours = tied_llama()
    name = "model.embed_tokens.weight" if len(saved) == 2 else "lm_head.weight"
    with pytest.raises(tnpeft.AdapterFileError) as caught:
        tnpeft.load_foreign(ours, tmp_path)
    assert f"parameter '{name}', tied to " in str(caught.value)
    assert "Untie it, then load the file: `model.get_submodule(" in str(caught.value)
    ours.lm_head.weight = nn.Parameter(ours.lm_head.weight.detach().clone())
    tnpeft.load_foreign(ours, tmp_path)
    same(ours, logits(theirs).detach())


def test_dropout_draws_as_peft_does(tmp_path: Path) -> None:
    base = llama()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.3))
    move(theirs)
    theirs.save_pretrained(tmp_path)
    tnpeft.load_foreign(base, tmp_path)
    outputs = []
    for model in (base, theirs):
        torch.manual_seed(7)
        outputs.append(model.train()(TOKENS).logits)
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(outputs[0], logits(base))
