"""The training loop of every method: recipe, progress, checkpoint and exact resume, one process or torchrun.

    def loss(model, batch): return F.cross_entropy(model(batch[0]), batch[1])
    train(model, loss, DataLoader(...), Recipe(steps=1000, rate=3e-4, warmup=0.05), checkpoint="out/checkpoints")

A stopped run that is started again goes on with the losses, bit for bit, of one that was never stopped, if its loss
depends on the model, the batch, random numbers of torch, numpy or Python, and what ``also`` names.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ... import checks
from ...data import StreamBatchSampler, StreamSampler
from ...files import write_tensors
from . import optim, randomness
from .cache import digest
from .console import progress as progress_bar
from .place import ALONE, Place, average_gradients, least, mean, same_start, wait

OP = "methods.train"
#: ``loss(model, batch)``, a scalar; or ``loss(model, batch, step)``.
Loss = Callable[..., Tensor]
#: ``schedule(optimizer, steps)`` makes a scheduler, as those of `w2s_fast.optim` are.
Schedule = Callable[[torch.optim.Optimizer, int], Any]
SCHEDULES = ("constant", "linear", "cosine")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train.

    Args:
        steps: updates; batches are taken epoch after epoch.
        rate: learning rate at its highest.
        batch: samples of an update of all processes together, where a method makes the batches.
        optimizer: "adamw", "sgd" (momentum 0.9), "muon", "adam8bit-per-layer" or ``make(parameters, rate)``.
        schedule: "constant", "linear", "cosine" (to ``floor`` times the rate) or ``make(optimizer, steps)``.
        warmup: share of the steps over which the rate rises linearly.
        clip: norm of the gradient, None for none.
        decay: of the weights.
        accumulate: batches of an update.
        autocast: dtype of the forward pass, "bfloat16" or "float16" (with loss scaling); None for the model's own.
        parallel: under torchrun, "replicate" (gradients are averaged, as DistributedDataParallel does) or "fsdp"
            (FSDP2: every layer of the largest list of modules, then the rest).
        every: updates between checkpoints; 0 for a tenth of the run.
        seed: of batches and of what the method draws.
    """

    steps: int
    rate: float = 1e-3
    batch: int = 8
    optimizer: str | optim.Maker = "adamw"
    schedule: str | Schedule = "cosine"
    warmup: float = 0.0
    floor: float = 0.0
    clip: float | None = 1.0
    decay: float = 0.0
    accumulate: int = 1
    autocast: str | None = None
    parallel: str = "replicate"
    every: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "every"):
            checks.integer(OP, name, getattr(self, name), low=0 if name in ("steps", "every") else 1)
        for name, high in {"rate": math.inf, "decay": math.inf, "warmup": 1.0, "floor": 1.0}.items():
            checks.number(OP, name, getattr(self, name), low=0.0, high=high)
        if self.clip is not None:  # a negative norm would turn the gradient round
            checks.number(OP, "clip", self.clip, low=0.0, open_low=True)
        if not callable(self.optimizer):
            checks.choice(OP, "optimizer", self.optimizer, optim.NAMES)
        if not callable(self.schedule):
            checks.choice(OP, "schedule", self.schedule, SCHEDULES)
        checks.choice(OP, "parallel", self.parallel, ("replicate", "fsdp"))
        if self.autocast is not None:
            checks.choice(OP, "autocast", self.autocast, ("bfloat16", "float16"))
        if self.optimizer == "adam8bit-per-layer" and (self.accumulate > 1 or self.clip is not None):
            checks.fail(OP, "optimizer", "another with accumulation or clipping", self.optimizer)

    def but(self, **changes: Any) -> Recipe:
        """With some settings changed."""
        return dataclasses.replace(self, **changes)

    def factor(self, step: int) -> float:
        """Of the rate at an update, by the named schedule."""
        warm = round(self.warmup * self.steps)
        if step < warm:
            return (step + 1) / warm
        done = (step - warm) / max(1, self.steps - warm)
        falls = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
        return self.floor + (1 - self.floor) * falls[str(self.schedule)]


class Trained(NamedTuple):
    """The loss of every update (mean over its batches and the processes), and the optimizers."""

    losses: list[float]
    optimizers: list[torch.optim.Optimizer]


def train(
    model: nn.Module, loss: Loss, batches: Iterable[Any], recipe: Recipe, *, device: Any = None,
    where: Place | None = None, checkpoint: str | Path | None = None, also: Mapping[str, Any] | None = None,
    key: Any = None, label: str = "", progress: bool = False, tick: Callable[[float], None] | None = None,
) -> Trained:  # fmt: skip
    """Minimise ``loss(model, batch)`` over batches, taken again from the start whenever they end; ``model`` in place.

    Args:
        model: any module. One that is wrapped in DistributedDataParallel or sharded by the caller stays so.
        loss: a scalar of the model and a batch; a third parameter named ``step`` gets the number of updates made.
        batches: a DataLoader, a list, ``range(n)`` for a loss of the step: anything that can be iterated over several
            times. Tensors in a batch are moved to the device. A sampler of `w2s_fast.data` or a StatefulDataLoader goes
            on in mid-epoch by its state, others draw what lies before the checkpoint again.
        device: default where the model is.
        where: of several processes (`place`); each then has batches of its own.
        checkpoint: folder; a run of the same settings found there goes on.
        also: what else is a state of the loss: generators, modules, whatever has a ``state_dict``.
        key: JSON of further settings, with which a checkpoint must agree.
        label, progress: a progress bar on stderr.
        tick: gets the loss of every update.

    Raises:
        ValueError, TypeError: no batches; a checkpoint of other settings.
    """
    home = next((p.device for p in model.parameters()), torch.device("cpu"))
    if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
        checks.fail(OP, "batches", "something to iterate over", type(batches).__name__, error=TypeError)
    where = where or ALONE._replace(device=torch.device(device) if device is not None else home)
    if home != where.device:
        model.to(where.device)
    run = _Run(model, recipe, where, dict(also or {}), key, checkpoint, batches)
    run.load()
    mode = model.training
    model.train()
    named = "step" in list(inspect.signature(loss).parameters)[2:]
    with progress_bar(not progress or where.rank > 0) as bars:
        bar = bars(label or type(model).__name__, recipe.steps)
        for value in run.losses:
            bar(value)
            if tick is not None:
                tick(value)
        source = run.source()
        while run.done < recipe.steps:
            extra = {"step": run.done} if named else {}
            value = run.update(lambda batch, extra=extra: loss(model, batch, **extra), source)  # type: ignore[misc]
            bar(value)
            if tick is not None:
                tick(value)
            run.save()
    model.train(mode)
    return Trained(run.losses, run.optimizers)


def moved(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on the device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {name: moved(part, device) for name, part in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved(part, device) for part in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(moved(part, device) for part in batch)
    return batch


class _Run:
    """A training under way, and its checkpoints: a file a process, ``<updates>.<rank>-of-<world>.pt``."""

    def __init__(
        self, model: nn.Module, recipe: Recipe, where: Place, also: dict[str, Any], key: Any,
        checkpoint: str | Path | None, batches: Iterable[Any],
    ) -> None:  # fmt: skip
        self.model, self.recipe, self.where, self.also, self.batches = model, recipe, where, also, batches
        self.folder = None if checkpoint is None else Path(checkpoint)
        self.losses: list[float] = []
        self.epoch = self.taken = 0
        self.begun = randomness.get(batches)  # at the start of the epoch
        self.resumed: Any = None  # random state at a checkpoint
        shapes = {name: list(p.shape) for name, p in model.named_parameters()}
        settings = {n: v for n, v in dataclasses.asdict(recipe).items() if n != "every" and not callable(v)}
        self.key = digest(settings, shapes, where.world, key)
        for module in model.modules():
            if hasattr(module, "reshard"):  # FSDP2 leaves the outermost module whole after a forward pass
                module.reshard()  # type: ignore[operator]
        self.wrapped = isinstance(model, nn.parallel.DistributedDataParallel)
        sharded = any(hasattr(p, "to_local") for p in model.parameters())
        if where.world > 1 and not self.wrapped and not sharded:
            same_start(model, where)
            if recipe.parallel == "fsdp":
                shard(model)
                sharded = True
        self.averages = where.world > 1 and not self.wrapped and not sharded
        if self.averages and recipe.optimizer == "adam8bit-per-layer":
            checks.fail(OP, "parallel", "'fsdp' with the optimizer adam8bit-per-layer", recipe.parallel)
        self.optimizers = optim.make(recipe.optimizer, model, recipe.rate, recipe.decay)
        self.schedulers = [self._schedule(optimizer) for optimizer in self.optimizers]
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.scaler = torch.amp.GradScaler(where.device.type, enabled=recipe.autocast == "float16")  # type: ignore[attr-defined]

    def _schedule(self, optimizer: torch.optim.Optimizer) -> Any:
        if callable(self.recipe.schedule):
            return self.recipe.schedule(optimizer, self.recipe.steps)
        return torch.optim.lr_scheduler.LambdaLR(optimizer, self.recipe.factor)

    @property
    def done(self) -> int:
        """Updates."""
        return len(self.losses)

    def source(self) -> Iterator[Any]:
        """Batches for ever, from where the run is."""
        while True:
            if self.resumed is None:
                self.begun = randomness.get(self.batches)
                _set_epoch(self.batches, self.epoch)
                found = iter(self.batches)
            else:
                found = self._forward_to()
            empty = self.taken == 0
            for batch in found:
                empty = False
                self.taken += 1
                yield batch
            if empty:
                checks.fail(OP, "batches", "not empty, and to be iterated over several times", type(self.batches))
            self.epoch, self.taken = self.epoch + 1, 0

    def _forward_to(self) -> Iterator[Any]:
        """The rest of the epoch of a checkpoint."""
        sampler = _stream(self.batches)
        state = self.resumed
        randomness.put(self.begun, self.batches)
        _set_epoch(self.batches, self.epoch)
        if state["batches"] is not None:
            self.batches.load_state_dict(state["batches"])  # type: ignore[attr-defined]
            found = iter(self.batches)
        elif sampler is not None:
            sampler.load_state_dict(state["stream"])
            found = iter(self.batches)
        else:
            found = iter(self.batches)
            for _ in range(self.taken):
                next(found)
        randomness.put(state["random"], self.batches)
        self._load_also(state["also"])  # what drawing again has changed
        self.resumed = None
        return found

    def update(self, loss: Callable[[Any], Tensor], source: Iterator[Any]) -> float:
        """One step of the optimizers; its loss."""
        recipe, total = self.recipe, torch.zeros((), device=self.where.device)
        dtype = getattr(torch, recipe.autocast) if recipe.autocast else None
        for part in range(recipe.accumulate):
            batch = moved(next(source), self.where.device)
            last = part == recipe.accumulate - 1
            with self.model.no_sync() if self.wrapped and not last else nullcontext():  # type: ignore[operator]
                with torch.autocast(self.where.device.type, dtype, enabled=dtype is not None):
                    value = loss(batch) / recipe.accumulate
                self.scaler.scale(value).backward()
            total += value.detach()
        if self.averages:
            average_gradients(self.model.parameters(), self.where)
        if recipe.clip is not None:
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
            self.scaler.step(optimizer)
            scheduler.step()
        self.scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.losses.append(mean(total, self.where))
        return self.losses[-1]

    def _path(self, step: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{step:08d}.{self.where.rank}-of-{self.where.world}.pt"

    def save(self) -> None:
        """Where it is due: this step's file, and when all processes have theirs the one before goes."""
        every = self.recipe.every or max(1, self.recipe.steps // 10)
        if self.folder is None or (self.done % every and self.done != self.recipe.steps):
            return
        sampler = _stream(self.batches)
        stateful = hasattr(self.batches, "state_dict") and hasattr(self.batches, "load_state_dict")
        write_tensors(self._path(self.done), {
            "key": self.key, "losses": self.losses, "epoch": self.epoch, "taken": self.taken, "begun": self.begun,
            "random": randomness.get(self.batches),
            "batches": cast(Any, self.batches).state_dict() if stateful else None,
            "stream": None if sampler is None else sampler.state_dict(self._drawn(sampler)),
            "model": {name: optim.local(t) for name, t in self.model.state_dict().items() if isinstance(t, Tensor)},
            "optimizers": [optim.state(optimizer) for optimizer in self.optimizers],
            "schedulers": [_plain(scheduler.state_dict()) for scheduler in self.schedulers],
            "scaler": self.scaler.state_dict(), "also": {name: _state(part) for name, part in self.also.items()},
        })  # fmt: skip
        wait(self.where)
        for path in self.folder.glob(f"*.{self.where.rank}-of-{self.where.world}.pt"):
            if path != self._path(self.done):
                path.unlink()

    def _drawn(self, sampler: StreamSampler | StreamBatchSampler) -> int:
        """What this process has taken of the sampler in this epoch."""
        if isinstance(sampler, StreamBatchSampler):
            return self.taken
        return min(len(sampler), self.taken * getattr(self.batches, "batch_size", 1))

    def load(self) -> None:
        """The latest checkpoint that all processes have."""
        if self.folder is None:
            return
        pattern = f"*.{self.where.rank}-of-{self.where.world}.pt"
        steps = [int(path.name.split(".")[0]) for path in self.folder.glob(pattern)]
        step = least(max(steps, default=0), self.where)
        if step == 0:
            return
        found = torch.load(self._path(step), map_location="cpu", weights_only=True)
        if found["key"] != self.key:
            checks.fail(OP, "checkpoint", f"a folder without a run of other settings ({self.folder} has one)",
                        f"update {step} of it", "Give another folder, or remove this one.")  # fmt: skip
        own = self.model.state_dict()
        device = self.where.device
        self.model.load_state_dict(
            {name: optim.sharded_like(t.to(device), own[name]) for name, t in found["model"].items()}, strict=False
        )
        for optimizer, state in zip(self.optimizers, found["optimizers"], strict=True):
            optim.load_state(optimizer, moved(state, device))
        for scheduler, state in zip(self.schedulers, found["schedulers"], strict=True):
            scheduler.load_state_dict(state)
        self.scaler.load_state_dict(found["scaler"])
        self._load_also(found["also"])
        self.losses, self.epoch, self.taken = found["losses"], found["epoch"], found["taken"]
        self.begun, self.resumed = found["begun"], found

    def _load_also(self, states: dict[str, Any]) -> None:
        for name, part in self.also.items():
            state = states[name]
            part.set_state(state) if isinstance(part, torch.Generator) else part.load_state_dict(state)


def _state(part: Any) -> Any:
    return part.get_state() if isinstance(part, torch.Generator) else part.state_dict()


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's state without the functions that torch.load would refuse."""
    return {name: value for name, value in state.items() if name != "lr_lambdas"} | (
        {"lr_lambdas": [None] * len(state["lr_lambdas"])} if "lr_lambdas" in state else {}
    )


def _stream(batches: Any) -> StreamSampler | StreamBatchSampler | None:
    """The sampler of `w2s_fast.data` under a DataLoader, if it has one."""
    for part in (getattr(batches, "batch_sampler", None), getattr(batches, "sampler", None)):
        if isinstance(part, (StreamSampler, StreamBatchSampler)):
            return part
    return None


def _set_epoch(batches: Any, epoch: int) -> None:
    for part in (batches, getattr(batches, "batch_sampler", None), getattr(batches, "sampler", None)):
        if part is not None and callable(getattr(part, "set_epoch", None)):
            part.set_epoch(epoch)


def unsharded(op: str, recipe: Recipe, where: Place | None) -> None:
    """Refuse FSDP2, for a method that reads the whole parameters outside the model's forward pass."""
    if where is not None and where.world > 1 and recipe.parallel == "fsdp":
        checks.fail(op, "parallel", "'replicate', this method reads the whole parameters", repr(recipe.parallel))


def shard(model: nn.Module) -> None:
    """FSDP2: every module of the longest ModuleList (a transformer's layers), then the rest.

    Lists within lists are not looked at: processes that call other experts of a layer would wait for each other.
    """
    from torch.distributed.fsdp import fully_shard

    if isinstance(model, nn.ModuleList):  # which has no forward of its own
        for part in model:
            shard(part)
        return
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    outer = [m for name, m in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    for layer in max(outer, key=len, default=()):
        fully_shard(layer)
    fully_shard(model)
