"""World knowledge (arXiv 2405.14205): an agent that also looks up what was done in such states.

A 6 x 6 grid with a key and a door, actions north, south, east, west, take, open; 200 trajectories of an expert. Agent
and world model are MLPs 37-64-64; the world model predicts a description of the state (on which side the goal lies,
whether the key is held), and of the 30 training states nearest to it after the same previous action the actions are
counted. Percent of 300 new tasks solved within 30 actions: the agent alone, knowledge alone, their mixture with gamma
chosen on dev, and, as control, the mean of two agents and one agent of twice the width.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from w2s_fast.attacks import Stacked
from w2s_fast.methods._common.loop import Recipe, train
from w2s_fast.methods.retrieval.world_knowledge import Memory, fuse

from ..data import mlp
from ..protocol import DEV_SEEDS, SEEDS, Choice, Claim, choose
from ..robust import group

SIDE, TASKS, TRAJECTORIES, STEPS, NEAR, LIMIT = 6, 300, 200, 600, 30, 30
GAMMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
RATES = (2e-3, 5e-3, 1e-2)
MOVES = torch.tensor([[0, -1], [0, 1], [1, 0], [-1, 0]])
FULL = {"RATES": (1e-3, 2e-3, 5e-3, 1e-2, 2e-2)}
CLAIMS = [
    Claim("the mixture solves 7 points more than the agent alone", "solved", "mixture", "agent", 7.0),
    Claim("15 points more than knowledge alone", "solved", "mixture", "knowledge", 15.0),
    Claim("more than the mean of two agents", "solved", "mixture", "two agents"),
    Claim("more than an agent of twice the width", "solved", "mixture", "wide agent"),
]


class State(NamedTuple):
    """Of N games: places ``[N, 2]`` of agent, key and door, whether the key is held, whether the door is open."""

    agent: Tensor
    key: Tensor
    door: Tensor
    held: Tensor
    done: Tensor

    def towards(self) -> Tensor:
        """From the agent to its goal."""
        return torch.where(self.held[:, None], self.door, self.key) - self.agent

    def seen(self) -> Tensor:
        """``[N, 37]``: places one-hot, and whether the key is held."""
        spots = [F.one_hot(v, SIDE).float().flatten(1) for v in (self.agent, self.key, self.door)]
        return torch.cat([*spots, self.held[:, None].float()], 1)

    def described(self) -> Tensor:
        """``[N, 3]``: sides of the goal and the key, as classes."""
        return torch.cat((self.towards().sign() + 1, self.held[:, None].long()), 1)

    def expert(self) -> Tensor:
        """East-west first, then north-south, then take or open."""
        x, y = self.towards().unbind(1)
        there = torch.where(self.held, 5, 4)
        along = torch.where(y > 0, 1, torch.where(y < 0, 0, there))
        return torch.where(x > 0, 2, torch.where(x < 0, 3, along))

    def after(self, action: Tensor) -> State:
        """What the action does; nothing any more where the door is open."""
        step = torch.where((action < 4)[:, None], MOVES[action.clamp(max=3)], 0)
        moved = (self.agent + step).clamp(0, SIDE - 1)
        held = self.held | ((action == 4) & (self.agent == self.key).all(1))
        done = self.done | ((action == 5) & self.held & (self.agent == self.door).all(1))
        live = ~self.done
        return State(torch.where(live[:, None], moved, self.agent), self.key, self.door,
                     torch.where(live, held, self.held), done)  # fmt: skip


def games(count: int, draw: torch.Generator) -> State:
    places = torch.randint(SIDE, (count, 3, 2), generator=draw).unbind(1)
    return State(*places, torch.zeros(count, dtype=torch.bool), torch.zeros(count, dtype=torch.bool))


def recorded(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The expert's states, actions, descriptions and previous actions (6: none)."""
    state, rows = games(TRAJECTORIES, torch.Generator().manual_seed(seed)), []
    previous = torch.full((TRAJECTORIES,), 6)
    for _ in range(4 * SIDE):
        action, live = state.expert(), ~state.done
        rows.append((state.seen()[live], action[live], state.described()[live], previous[live]))
        state, previous = state.after(action), torch.where(live, action, previous)
    seen, actions, described, before = (torch.cat(part) for part in zip(*rows, strict=True))
    return seen, actions, described, before


def vector(logits: Tensor) -> Tensor:
    """Predicted description ``[N, 8]``: probabilities of its three parts."""
    return torch.cat([part.softmax(1) for part in logits.split((3, 3, 2), 1)], 1)


def world_loss(z: Tensor, y: Tensor) -> Tensor:
    parts = zip(z.split((3, 3, 2), -1), y.unbind(-1), strict=True)
    return torch.stack([F.cross_entropy(a.flatten(0, 1), b.flatten()) for a, b in parts]).sum()


def fitted(width: int, out: int, first: int, rate: float, seeds: tuple[int, ...]) -> list[nn.Module]:
    """A network of each seed, all trained at once on their own records."""
    data = [recorded(seed) for seed in seeds]
    stack = Stacked([mlp(37, width, width, out, seed=first + s) for s in seeds])
    draw = torch.Generator().manual_seed(first + seeds[0])

    def loss(stack: Any, _: int) -> Tensor:
        rows = [torch.randint(len(d[0]), (32,), generator=draw) for d in data]
        x = torch.stack([d[0][i] for d, i in zip(data, rows, strict=True)])
        y = torch.stack([d[1 if out == 6 else 2][i] for d, i in zip(data, rows, strict=True)])
        z = stack(x)
        return len(seeds) * (F.cross_entropy(z.flatten(0, 1), y.flatten()) if out == 6 else world_loss(z, y))

    train(stack, loss, range(100), Recipe(STEPS, rate, decay=0.05, clip=None, schedule="linear"))
    return [model.eval().requires_grad_(False) for model in stack.models()]


@lru_cache(maxsize=32)
@torch.enable_grad()
def networks(rate: float, seeds: tuple[int, ...]) -> dict[str, list[nn.Module]]:
    return {"agent": fitted(64, 6, 0, rate, seeds), "second": fitted(64, 6, 500, rate, seeds),
            "wide agent": fitted(128, 6, 0, rate, seeds), "world": fitted(64, 8, 50, rate, seeds)}  # fmt: skip


@torch.no_grad()
def solved(arm: str, gamma: float, rate: float, seed: int, seeds: tuple[int, ...], on: str) -> float:
    """Percent of new tasks."""
    found = {name: models[seeds.index(seed)] for name, models in networks(rate, seeds).items()}
    _, actions, described, before = recorded(seed)
    known = torch.cat([F.one_hot(part, n).float() for part, n in zip(described.unbind(1), (3, 3, 2), strict=True)], 1)
    memory = Memory(known, actions, before, count=6)
    draw = torch.Generator().manual_seed(900 + seed + 5000 * (on == "dev"))
    state, previous = games(TASKS, draw), torch.full((TASKS,), 6)
    for _ in range(LIMIT):
        x = state.seen()
        p = found["wide agent" if arm == "wide agent" else "agent"](x).softmax(1)
        if arm == "two agents":
            p = (p + found["second"](x).softmax(1)) / 2
        elif arm in ("mixture", "knowledge"):
            p = fuse(p, memory.probabilities(vector(found["world"](x)), previous, NEAR), gamma)
        action, live = p.argmax(1), ~state.done
        state, previous = state.after(action), torch.where(live, action, previous)
    return 100 * state.done.double().mean().item()


def choices() -> dict[str, Choice]:
    def value(arm: str, rate: float, gamma: float, seed: int, on: str) -> float:
        return solved(arm, gamma, rate, seed, DEV_SEEDS, on)

    grids = {"agent": (1.0,), "two agents": (1.0,), "wide agent": (1.0,), "knowledge": (0.0,), "mixture": GAMMAS}
    return {arm: choose(lambda rate, gamma, seed, on, arm=arm: value(arm, rate, gamma, seed, on),
                        {"rate": RATES, "gamma": gammas}) for arm, gammas in grids.items()}  # fmt: skip


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    seeds = group(seed, SEEDS)
    return {arm: {"solved": solved(arm, best["gamma"], best["rate"], seed, seeds, "test")}
            for arm, best in chosen.items()}  # fmt: skip
