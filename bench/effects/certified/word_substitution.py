"""Word substitution (arXiv 2209.06691): which rankings no rewording changes, by bounds and by smoothing.

Queries are the first lines of docstrings of Python's own library, documents the rest; half of the modules that gave no
training text are dev, half test. Substitutes overlap and are no cliques: a word's set holds itself and up to four words
with at least 85 % of the pairs of letters of both in common, so a word may have a substitute that does not have it
(sets of stems, as in an earlier run, make the smoothed ranker invariant). A word's vector starts as the mean of its
set's. Certified top 5 by interval bounds after plain training and after training on the bounds; and of the smoothed
ranker with 2,000 draws by Hoeffding's and by the empirical Bernstein bound. The rate is chosen for each training on
dev, by the certified share.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from w2s_fast.methods._common.loop import Recipe
from w2s_fast.methods.certified import word_substitution as method

from .. import text
from ..protocol import Choice, Claim, choose

LENGTH, DIM, DRAWS, TOP, STEPS, WORDS, ALIKE = 32, 128, 2000, 5, 150, 5, 0.85
RATES = (5e-4, 1e-3, 2e-3)
FULL = {"DRAWS": 10_000, "STEPS": 600, "RATES": (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)}
CLAIMS = [
    Claim("training on the bounds certifies more", "by bounds", "bounds", "plain"),
    Claim("the empirical Bernstein bound certifies more than Hoeffding's", "by smoothing", "smoothed, Bernstein",
          "smoothed, Hoeffding"),
    Claim("no certified query is broken by the attack", "certified and broken", "bounds", 0.0, -0.001, "lower"),
]  # fmt: skip


class Words(NamedTuple):
    """Ids of queries and documents ``[N, LENGTH]`` by part, sets ``[V, WORDS]``, their sizes."""

    parts: dict[str, tuple[Tensor, Tensor]]
    sets: Tensor
    sizes: Tensor


def substitutes(known: list[str]) -> tuple[Tensor, Tensor]:
    """Of each word itself and up to four of which `ALIKE` of the pairs of letters are the same; sizes of the sets."""
    grams = sorted({w[i : i + 2] for w in known for i in range(len(w) - 1)})
    place = {g: i for i, g in enumerate(grams)}
    bags = torch.zeros(len(known), len(grams))
    for i, w in enumerate(known):
        for j in range(len(w) - 1):
            bags[i, place[w[j : j + 2]]] = 1
    size = bags.sum(1).clamp_min(1)
    shared = bags @ bags.t()
    alike = shared / (size[:, None] + size[None] - shared)
    alike.fill_diagonal_(2.0)
    near, found = alike.topk(WORDS, 1)
    there = near >= ALIKE
    own = torch.arange(len(known))[:, None]
    return torch.where(there, found, own), there.sum(1)


@lru_cache(maxsize=1)
def corpus() -> Words:
    """Docstrings of the standard library with a summary of 4 and a rest of 12 words or more."""
    pairs: list[tuple[list[str], list[str], str]] = []
    seen = set()
    for name, source in text.standard_library():
        try:
            tree = ast.parse(source)
        except (SyntaxError, RecursionError):
            continue
        share = text.percentile(name)
        part = "train" if share < text.VALIDATION else "test" if share % 2 else "dev"
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                first, _, rest = (ast.get_docstring(node) or "").partition("\n\n")
                query, document = (re.findall(r"[a-z]{2,}", part.lower()) for part in (first, rest))
                if len(query) >= 4 and len(document) >= 12 and tuple(document[:LENGTH]) not in seen:
                    seen.add(tuple(document[:LENGTH]))
                    pairs.append((query[:LENGTH], document[:LENGTH], part))
    counts = Counter(w for query, document, part in pairs if part == "train" for w in (*query, *document))
    known = ["", *sorted(w for w, n in counts.items() if n >= 3)]
    number = {w: i for i, w in enumerate(known)}

    def rows(sides: list[list[str]]) -> Tensor:
        ids = [[number[w] for w in side if w in number] for side in sides]
        return torch.tensor([i + [0] * (LENGTH - len(i)) for i in ids])

    parts = {part: (rows([q for q, _, p in pairs if p == part]), rows([d for _, d, p in pairs if p == part]))
             for part in ("train", "dev", "test")}  # fmt: skip
    return Words(parts, *substitutes(known))


def ranker(seed: int) -> method.Ranker:
    """A word is the mean of its set at first, rare words count more; the layers start as q . m."""
    words, draw = corpus(), torch.Generator().manual_seed(seed)
    count = len(words.sets)
    used = torch.bincount(words.parts["train"][1].flatten(), minlength=count) + 1.0
    own = torch.randn(count, DIM, generator=draw)
    there = (torch.arange(WORDS) < words.sizes[:, None]).float()
    mean = (own[words.sets] * there[..., None]).sum(1) / words.sizes[:, None]
    table = nn.Embedding(count, DIM, _weight=mean * (used.sum() / used).log()[:, None] / 4)
    layers = [nn.Linear(DIM, 2 * DIM), nn.Linear(DIM, 2 * DIM)]
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(torch.cat((torch.eye(DIM), -torch.eye(DIM))))
            layer.bias.zero_()
    return method.Ranker(table, layers[0], nn.Sequential(layers[1], nn.ReLU()))


@lru_cache(maxsize=8)
def trained(kind: str, rate: float, seed: int) -> method.Ranker:
    words, model = corpus(), ranker(seed)
    recipe = Recipe(STEPS, rate, batch=64, schedule="constant", clip=None, seed=seed)
    data = TensorDataset(*words.parts["train"])
    method.train(model, data, recipe=recipe, sets=words.sets if kind == "bounds" else None)
    return model


def certified(kind: str, rate: float, seed: int, on: str) -> dict[str, float]:
    """Shares of the queries of a part."""
    words, model = corpus(), trained(kind, rate, seed)
    with torch.no_grad():
        queries, ids = model.queries(words.parts[on][0]), words.parts[on][1]
        scores = queries @ model.documents(ids).t()
        high = model.bounds(queries, ids, words.sets)[1].t()
        low = model.bounds(queries, ids, torch.arange(len(words.sets))[:, None])[0].t()  # as they are
        sure = method.certified(low, high, TOP)
        found = (scores > scores.diag()[:, None]).sum(1) < TOP
    share = {"by bounds": sure.double().mean().item(), "right in the top 5": found.double().mean().item()}
    if on == "test":
        order = scores.argsort(1, descending=True)[:, TOP : TOP + 10]
        broken = torch.zeros(len(queries), dtype=torch.bool)
        for i, query in enumerate(queries[:40]):
            worded = method.one_hot_attack(model, query[None], ids[order[i]], words.sets)
            with torch.no_grad():
                broken[i] = bool(((model.documents(worded[0]) @ query) >= scores[i].topk(TOP).values[-1]).any())
        share |= {"broken by the attack": broken[:40].double().mean().item(),
                  "certified and broken": (broken & sure)[:40].double().mean().item()}  # fmt: skip
    return share


@torch.no_grad()
def smoothed(rate: float, seed: int) -> dict[str, dict[str, float]]:
    """Of the plainly trained ranker: mean over draws of ``sigmoid(4 (score - middle))``."""
    words, model, draw = corpus(), trained("plain", rate, seed), torch.Generator().manual_seed(seed)
    queries, ids = model.queries(words.parts["test"][0]), words.parts["test"][1]
    middle = (queries @ model.documents(words.parts["train"][1]).t()).quantile(1 - (TOP + 0.5) / len(ids), 1)
    total, square = torch.zeros(2, len(queries), len(ids), dtype=torch.float64)
    for _ in range(DRAWS):
        made = method.reworded(ids, words.sets, words.sizes, draw)
        value = (4 * (queries @ model.documents(made).t() - middle[:, None])).sigmoid().double()
        total += value
        square += value.square()
    mean = total / DRAWS
    variance = (square / DRAWS - mean.square()) * DRAWS / (DRAWS - 1)
    gain = method.gain(ids, method.overlap(words.sets))
    found = {}
    for name, spread in (("Hoeffding", None), ("Bernstein", variance.clamp_min(0))):
        error = method.sampling_error(DRAWS, len(ids), variance=spread)
        share = method.certified(mean, mean + gain + error, TOP).double().mean().item()
        found[f"smoothed, {name}"] = {"by smoothing": share}
    return found


def choices() -> dict[str, Choice]:
    def dev(kind: str) -> Choice:
        return choose(lambda rate, seed, on: certified(kind, rate, seed, on)["by bounds"], {"rate": RATES})

    return {kind: dev(kind) for kind in ("plain", "bounds")}


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    found = {kind: certified(kind, chosen[kind]["rate"], seed, "test") for kind in ("plain", "bounds")}
    return {**found, **smoothed(chosen["plain"]["rate"], seed)}
