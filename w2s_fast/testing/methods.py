"""A small run of every method that has a ``train``, on models and data of transformers and plain torch.

`arguments` makes what a method's ``train`` takes, anew at every call and always the same; `run` trains by it. So a
statement about all methods (a stopped run goes on bit for bit, two processes train as one) is one test.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ..methods import available
from ..methods._common.command import inputs_of
from ..methods._common.loop import Recipe, Trained
from . import foreign

STEP = Recipe(6, 5e-3, batch=8, every=2)
WORDS = [{"prompt": f"What is {i} plus {i + 1}?", "completion": f" It is {2 * i + 1}.", "answer": str(2 * i + 1),
          "text": f"{'good' if i % 2 else 'bad'} {i}", "question": f"Is {i} even?", "answers": ["yes", "no"],
          "label": i % 2, "sentences": [f"S: {i}", "O: plus"], "labels": [0, 1]} for i in range(16)]  # fmt: skip


class Denoiser(nn.Module):
    """Of vectors and a time."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, 16), nn.SiLU(), nn.Linear(16, width))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """A shape like x's."""
        made: Tensor = self.layers(x) * (1 + t[:, None] / 1000)
        return made


class Neighbours(nn.Module):
    """A layer of a graph network."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """``[n, 3]``"""
        found: Tensor = edge_index @ self.layer(x)
        return found


class LastState(nn.Module):
    """A tower of texts: GPT-2's last hidden state of the last token."""

    def __init__(self) -> None:
        super().__init__()
        self.model = foreign.gpt2(12, width=16, dropout=0.0).transformer

    def forward(self, ids: Tensor) -> Tensor:
        """``[N, 16]``"""
        found: Tensor = self.model(input_ids=ids).last_hidden_state[:, -1]
        return found


def rows() -> list[dict[str, Any]]:
    """Token ids below 40 in the columns that language methods ask for."""
    ids = torch.randint(1, 40, (16, 9), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"prompt": r[:3], "completion": r[3:7], "chosen": r[3:7], "rejected": r[5:], "text": r,
             "completions": [r[3:7], r[5:], r[2:4]]} for r in ids]  # fmt: skip


def words() -> Any:
    """The tokenizer of `WORDS`."""
    texts = [row[name] for row in WORDS for name in ("prompt", "completion", "text", "question")]
    return foreign.tokenizer([str(text) for text in texts] + ["Say: good bad it is"] * 3)


def gpt2(seed: int = 0, vocabulary: int = 40) -> Any:
    """Without dropout, so that one process and two do the same."""
    return foreign.gpt2(vocabulary, seed, dropout=0.0)


def llama(seed: int = 0) -> Any:
    """Of two layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                        num_attention_heads=2, max_position_embeddings=64))  # fmt: skip


def mixtral() -> Any:
    """Of four experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                            num_attention_heads=2, num_key_value_heads=2, num_local_experts=4,
                                            bos_token_id=0, eos_token_id=0))  # fmt: skip


def vit(classes: int = 3, intermediate: int = 32) -> Any:
    """A vision transformer for pictures of 8 by 8."""
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=intermediate, image_size=8,
        patch_size=2, num_channels=1, num_labels=classes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    ))  # fmt: skip


def mlp(seed: int = 0, inputs: int = 64, classes: int = 3, width: int = 16) -> nn.Sequential:
    """A classifier without batch-norm, so that two processes see what one sees."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, classes))


def cnn(seed: int = 0, classes: int = 3) -> nn.Sequential:
    """Convolutions with batch-norm."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, classes))


def pictures(count: int = 32, classes: int = 3, seed: int = 0) -> TensorDataset:
    """``[count, 1, 8, 8]`` within [0, 1]."""
    draw = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.rand(count, 1, 8, 8, generator=draw), torch.arange(count) % classes)


def vectors(*shape: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _text(make: Callable[..., Any] = gpt2, **settings: Any) -> Callable[[], dict[str, Any]]:
    """A language method on rows of token ids."""
    return lambda: {"model": make(), "tokenizer": None, "rows": rows(), **settings}


def _blocks(make: Callable[..., Any] = llama, **settings: Any) -> Callable[[], dict[str, Any]]:
    """One that takes blocks of text."""
    return _text(make, length=12, **settings)


def _robust(make: Callable[..., Any] = mlp, **settings: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"model": make(), "data": pictures(), "eps": 0.1, "attack_steps": 2, **settings}


def _w2s() -> dict[str, Any]:
    return {"model": mlp(), "weak": mlp(1), "data": pictures()}


def _deception() -> dict[str, Any]:
    a = torch.rand(2, 32, 64, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(a[0], a[1], (a[0, :, 0] > a[1, :, 0]).float())
    return {"model": mlp(0, classes=1), "weak": mlp(1, classes=1), "data": data}


def _debate() -> dict[str, Any]:
    tokenizer = words()
    return {"model": gpt2(0, len(tokenizer)), "tokenizer": tokenizer, "rows": WORDS, "max_new_tokens": 3,
            "debater": gpt2(1, len(tokenizer))}  # fmt: skip


def _steps() -> dict[str, Any]:
    return {"model": gpt2(), "tokenizer": None, "rows": [{"prompt": row["prompt"]} for row in rows()], "samples": 2,
            "max_new_tokens": 4, "right": lambda problem, ids: sum(ids) % 2 == 0,
            "split": lambda ids: [ids[i : i + 2] for i in range(0, len(ids), 2)]}  # fmt: skip


def _reasoning() -> dict[str, Any]:
    tokenizer = words()
    return {"model": gpt2(0, len(tokenizer)), "tokenizer": tokenizer, "rows": WORDS, "max_new_tokens": 4, "samples": 4,
            "weak": gpt2(1, len(tokenizer)), "answer": lambda text: sum(map(ord, text)) % 2}  # fmt: skip


def _teaching() -> dict[str, Any]:
    exams = [{"prompt": row["prompt"], "completion": row["completion"][:1]} for row in rows()]
    asked = [{"prompt": row["prompt"], "exams": exams[:4]} for row in rows()[:4]]
    return {"model": gpt2(), "tokenizer": None, "rows": asked, "student": gpt2(1), "samples": 3, "margin": 1e-6,
            "by": "likelihood", "max_new_tokens": 3}  # fmt: skip


def _soap() -> dict[str, Any]:
    from ..methods.supervision.soap import Tagger

    tokenizer = words()
    return {"model": Tagger(32, 2, hidden=8), "tokenizer": tokenizer, "rows": WORDS,
            "encoder": gpt2(1, len(tokenizer))}  # fmt: skip


def _mvp() -> dict[str, Any]:
    tokenizer = words()
    names = ";".join(tokenizer.convert_ids_to_tokens([20, 21]))
    return {"model": gpt2(0, len(tokenizer)), "tokenizer": tokenizer, "rows": WORDS, "template": " it is",
            "words": names}  # fmt: skip


def _supermasks() -> dict[str, Any]:
    from ..methods.adapters.exssnet import Supermasks

    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16, bias=False), nn.ReLU(), nn.Linear(16, 3))
    return {"model": Supermasks(body, 0.3, seed=1), "data": pictures()}


def _hyperinterval() -> dict[str, Any]:
    from ..methods.certified.hyperinterval import Hypernetwork

    x, y = pictures().tensors
    return {"model": Hypernetwork((64, 8, 3), 2), "data": TensorDataset(x.flatten(1), y)}


def _rankers() -> dict[str, Any]:
    from ..methods.certified.word_substitution import Ranker

    table = torch.arange(20)
    sets = torch.stack((table, table // 2 * 2, table // 2 * 2 + 1), 1)
    sets[0] = 0
    draw = torch.Generator().manual_seed(0)
    data = TensorDataset(*(torch.randint(2, 20, (24, n), generator=draw) for n in (5, 7)))
    model = Ranker(nn.Embedding(20, 6), nn.Linear(6, 8), nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8)))
    return {"model": model, "data": data, "sets": sets}


def _shrinking() -> dict[str, Any]:
    return {"model": mlp(), "data": pictures(), "smaller": [mlp(width=4), mlp(width=8)], "delay": 0.3, "ramp": 0.3}


def _pixart() -> dict[str, Any]:
    from ..nn import PixArtSigma

    model = PixArtSigma(8, in_channels=1, out_channels=1, dim=16, depth=2, num_heads=2, caption_features=5,
                        caption_tokens=3)  # fmt: skip
    return {"model": model, "data": TensorDataset(torch.rand(16, 1, 8, 8), torch.randn(16, 3, 5))}


def _graph() -> dict[str, Any]:
    from ..methods.graphs.mowst import Mowst

    draw = torch.Generator().manual_seed(0)
    edges = (torch.rand(30, 30, generator=draw) < 0.2).float() + torch.eye(30)
    part = torch.arange(30) // 2 % 3
    data = SimpleNamespace(x=vectors(30, 3), y=torch.arange(30) % 3, edge_index=edges / edges.sum(1, keepdim=True),
                           train_mask=part == 0, val_mask=part == 1, test_mask=part == 2)  # fmt: skip
    return {"model": Mowst(nn.Linear(3, 3), Neighbours()), "data": data, "rounds": 1}


def _mip() -> dict[str, Any]:
    from ..nn import mip

    main = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 3))
    size = sum(p.numel() for p in main.parameters())
    model = mip(nn.Sequential(nn.Linear(1, 8), nn.LeakyReLU(), nn.Linear(8, size)), main)
    return {"model": model, "main": main, "data": pictures()}


def _learner() -> dict[str, Any]:
    from transformers import GPT2Config, GPT2Model

    from ..methods.meta.gpicl import Learner

    config = GPT2Config(vocab_size=1, n_embd=16, n_layer=1, n_head=2, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0,
                        attn_pdrop=0.0)  # fmt: skip
    data = TensorDataset(vectors(40, 6), torch.arange(40) % 3)
    return {"model": Learner(GPT2Model(config), 6, 3), "data": data, "count": 4, "length": 8}


def _s4() -> dict[str, Any]:
    from ..methods.state_spaces.s4 import SequenceModel

    model = SequenceModel(2, 2, width=8, layers=1, d_state=4, dropout=0.0)
    return {"model": model, "data": TensorDataset(vectors(24, 20, 2), torch.arange(24) % 2)}


def _bonsai() -> dict[str, Any]:
    parts = [(vectors(12, 64), torch.arange(12) % 2 == 0), (1 - vectors(12, 64), torch.arange(12) % 2 == 1)]
    return {"model": mlp(classes=1), "data": parts, "first": 3, "build": 3, "weight": 10.0}


def _clip() -> dict[str, Any]:
    from ..methods.representation.clip_captions import Clip

    texts = torch.tensor([[1, 2], [1, 3], [4, 2], [4, 3]])[torch.arange(32) % 4]
    return {"model": Clip(mlp(classes=16), LastState()), "data": TensorDataset(pictures().tensors[0], texts)}


def _tiles() -> dict[str, Any]:
    from ..methods.representation.weakstil import WeakStil

    x = vectors(24, 5, 6)
    items = [(x[i, : 2 + i % 4], float(x[i, 0, 0])) for i in range(24)]
    return {"model": WeakStil(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1)), 6, hidden=4), "data": items}


def _scalekd() -> dict[str, Any]:
    return {"model": foreign.resnet(3), "teacher": vit().eval(), "data": pictures(), "heads": 2,
            "layer": "resnet.encoder.stages.0", "teacher_layer": "vit.layernorm"}  # fmt: skip


def _teacher(make: Callable[..., Any] = mlp, **settings: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"model": make(), "teacher": make(1), "data": pictures(), **settings}


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "npo": lambda: {**_text()(), "retain": rows()[8:]}, "spin": _text(rounds=2, lam=1.0, max_new_tokens=4),
    "grape": _text(), "per_step_advantage": _steps,
    "weak_to_strong": _w2s, "deception": _deception, "debate": _debate, "weak_to_strong_reasoning": _reasoning,
    "soap": _soap, "learning_by_teaching": _teaching,
    "eisl": _text(), "meal_v2": _teacher(), "ferkd": _teacher(crops=3, top=2, least=0.5, discard=0.2),
    "tgeo_kd": _teacher(validation=pictures(12, seed=2)), "scalekd": _scalekd,
    "competitive_distillation": lambda: {**_text()(), "teacher": gpt2(1), "rounds": 2, "first": 6, "add": 3,
                                         "max_new_tokens": 3},
    "genarm": _text(), "weak_to_strong_search": _text(),
    "ibp": lambda: {"model": mlp(), "data": pictures(), "eps": 0.05},
    "fast": lambda: {"model": cnn(), "data": pictures(), "eps": 0.05},
    "hyperinterval": _hyperinterval, "word_substitution": _rankers,
    "adversarial_training": _robust(), "adversarial_finetuning": _robust(), "srat": _robust(),
    "doubly_robust": _robust(), "mtard": lambda: {**_robust()(), "teacher": mlp(1), "robust": mlp(2)},
    "pubdef": lambda: {**_robust(copies=2)(), "sources": nn.ModuleList([mlp(1), mlp(2)])},
    "dverge": lambda: {**_robust()(), "model": nn.ModuleList([mlp(1), mlp(2)])}, "mvp": _mvp,
    "world_knowledge": _text(),
    "demonstration_retrieval": lambda: {**_text()(), "encoder": gpt2(1), "k": 2, "width": 8},
    "sltrain": _blocks(rank=4),
    "fira": _blocks(rank=4, gap=3), "allora": _blocks(rank=4), "ast": _blocks(push=1e-2, ramp=4, renew_every=3),
    "perp": _blocks(rank=3), "sst": _blocks(rank=4, iteration=2, iterations=2, rewarm=1), "bone": _blocks(rank=4),
    "randlora": _blocks(rank=3), "spdf": _blocks(), "llm_qfa": _blocks(period=4, rank=3, group=8),
    "exssnet": _supermasks,
    "robust_mean_teacher": lambda: {"model": mlp(), "data": pictures(), "labelled": pictures(seed=1),
                                    "view": lambda x, draw: x},
    "robustify": lambda: {"model": mlp(), "teacher": mlp(1), "data": pictures(), "part": "1"},
    "shrinkmatch": lambda: {"model": mlp(), "data": pictures(), "labelled": pictures(12, seed=1), "th": 0.4},
    "bonsai": _bonsai, "clip_captions": _clip, "weakstil": _tiles,
    "few_shot_increments": lambda: {"model": mlp(), "data": pictures(), "view": lambda x, draw: x},
    "multi_level": _blocks(inner=3, first=0.25), "tleg": lambda: {**_blocks()(), "teacher": llama(1)},
    "assembling": lambda: {**_blocks()(), "parts": 2, "meta_steps": 3, "module_steps": 3},
    "delayed_shrinking": _shrinking, "global_balance": _blocks(mixtral), "mip": _mip, "mowst": _graph, "s4": _s4,
    "gpicl": _learner,
    "ict": lambda: {"model": Denoiser(), "data": TensorDataset(vectors(32, 6)), "end": 20},
    "w2sd": lambda: {"model": Denoiser(), "data": TensorDataset(vectors(32, 6))}, "pixart_sigma": _pixart,
}  # fmt: skip


def arguments(name: str) -> dict[str, Any]:
    """What the method's ``train`` takes but the recipe; random numbers outside stay as they are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CASES[name]()


def still(name: str) -> dict[str, Any]:
    """Settings under which an attack draws nothing: of radius 0."""
    return {"eps": 0.0} if available()[name].family == "adversarial" and "attack_steps" in CASES[name]() else {}


def inputs(name: str) -> list[str]:
    """What the method's ``train`` takes before the recipe."""
    return inputs_of(importlib.import_module(available()[name].module).train)


def run(name: str, recipe: Recipe = STEP, given: dict[str, Any] | None = None, **more: Any) -> Trained:
    """Train by the method; ``more`` goes to the loop."""
    train = importlib.import_module(available()[name].module).train
    found: Trained = train(**(arguments(name) if given is None else given), recipe=recipe, **more)
    return found
