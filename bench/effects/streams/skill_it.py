"""Skill-it (arXiv 2307.14430): parities in a known order of difficulty, mixtures that follow the losses.

x in {-1, 1}^40; skill i of six is the product of the first i + 1 bits, its one-hot number appended; MLP 46-128-128-2,
Adam 1e-3, batch 64, 1200 steps, ten rounds. A = identity + 0.5 on (i, i + 1). Arms: Skill-it (window 3) with eta 0.5
and 2, uniform, easy skills first, only the hardest. The mixture follows the losses on 500 dev problems a skill,
accuracy is of 1000 test problems a skill. The regime is that of the method's text; nothing was chosen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from w2s_fast.data import MixtureSampler
from w2s_fast.methods.streams._fit import fit
from w2s_fast.methods.streams.skill_it import SkillIt
from w2s_fast.metrics import segment_mean

from ..data import mlp
from ..protocol import Claim

BITS, SKILLS, STEPS, BATCH, ROUNDS = 40, 6, 1200, 64, 10
GRAPH = torch.eye(SKILLS) + 0.5 * torch.eye(SKILLS).roll(1, 1).triu(1)
ARMS = ("skill-it 0.5", "skill-it 2", "uniform", "easy first", "only hardest")
CLAIMS = [
    Claim("training on the hardest skill alone does not learn it (at most 56 %)", "hardest", "only hardest", 0.5, -0.06,
          "lower"),
    Claim("Skill-it (eta 0.5) beats a uniform mixture by 3 points in the mean", "mean", ARMS[0], "uniform", 0.03),
    Claim("Skill-it (eta 0.5) beats it by 8 points on the hardest skill", "hardest", ARMS[0], "uniform", 0.08),
    Claim("Skill-it (eta 0.5) beats easy skills first in the mean", "mean", ARMS[0], "easy first", 0.0),
    Claim("Skill-it with eta 2 beats a uniform mixture in the mean by 3 points", "mean", ARMS[1], "uniform", 0.03),
]  # fmt: skip


def problems(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs ``[SKILLS * count, 46]`` skill by skill, labels, skills."""
    draw = torch.Generator().manual_seed(seed)
    bits = torch.randint(2, (SKILLS * count, BITS), generator=draw).float() * 2 - 1
    skill = torch.arange(SKILLS).repeat_interleave(count)
    product = bits.cumprod(1).gather(1, skill[:, None])[:, 0]
    return torch.cat((bits, nn.functional.one_hot(skill, SKILLS)), 1), (product > 0).long(), skill


def run(arm: str, seed: int) -> dict[str, float]:
    count = STEPS * BATCH  # more of each skill than any arm can use: no problem comes twice
    x, y, _ = problems(count, 3 * seed)
    model = mlp(BITS + SKILLS, 128, 128, 2, seed=seed)
    dev_x, dev_y, dev_skill = problems(500, 3 * seed + 1)
    end = problems(1000, 3 * seed + 2)
    sampler = MixtureSampler([count] * SKILLS, [1.0] * SKILLS, num_samples=STEPS * BATCH, batch_size=BATCH, seed=seed)
    skill_it = SkillIt(sampler, GRAPH, float(arm.split()[1])) if arm.startswith("skill-it") else None
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batches = iter(DataLoader(TensorDataset(x, y), BATCH, sampler=sampler))
    for turn in range(ROUNDS):
        if arm == "only hardest":
            sampler.set_weights([0.0] * (SKILLS - 1) + [1.0])
        elif arm == "easy first":
            sampler.set_weights([float(i == turn * SKILLS // ROUNDS) for i in range(SKILLS)])
        elif skill_it is not None and turn:
            with torch.no_grad():
                losses = nn.functional.cross_entropy(model(dev_x), dev_y, reduction="none")
            skill_it.update(segment_mean(losses, dev_skill, SKILLS).mean)
        fit(model, (next(batches) for _ in range(STEPS // ROUNDS)), optimizer)
    with torch.no_grad():
        right = segment_mean(model(end[0]).argmax(1) == end[1], end[2], SKILLS).mean
    return {"mean": right.mean().item(), "hardest": right[-1].item()}


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {arm: run(arm, seed) for arm in ARMS}
