"""`use_fused_loss` on a model class: loss and all gradients of the class itself, and whether no logits were made.

A verdict is ``fused``; ``materialised`` (right, but with logits); ``refused``; ``untested``, where the class has no
loss of its own for plain tokens; or ``wrong``.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .accuracy import EPS, measure, pooled
from .compare import DRAWS
from .sweep import Verdict
from .tiny_models import tiny_model

ROWS, LENGTH, VOCABULARY = 3, 16, 89
#: Sequence lengths that training needs, where 16 does not do.
LENGTHS = {"ReformerModelWithLMHead": 128}


class Draw(NamedTuple):
    """Loss and gradients of one batch by name: ours, the class's own, and in float64 (None where it has none)."""

    ours: dict[str, Tensor]
    own: dict[str, Tensor]
    exact: dict[str, Tensor] | None


def batch(model: Any, draw: int = 0) -> dict[str, Tensor]:
    """Ids, a mask of right padding, labels without the padding and without a prompt; a picture where one is needed."""
    generator, name = torch.Generator().manual_seed(1 + draw), type(model).__name__
    length = LENGTHS.get(name, LENGTH)
    ids = torch.randint(3, min(VOCABULARY, _rows(model)), (ROWS, length), generator=generator)
    mask = (torch.arange(length) < length - torch.arange(ROWS)[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :4] = -100
    given = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if name == "GitForCausalLM":
        size = model.config.vision_config.image_size
        pictures = torch.randn(ROWS, 3, size, size, generator=generator, dtype=torch.float64)
        given["pixel_values"] = pictures.to(model.dtype)
    return given


def _rows(model: Any) -> int:
    head = model.get_output_embeddings()
    return head.weight.shape[0] if hasattr(head, "weight") else VOCABULARY


def training_copy(name: str, dtype: torch.dtype = torch.float32, router: bool = False) -> Any:
    """A copy of the tiny model in training mode without dropout, perhaps with the loss of its router.

    A new one for every pass: some models change themselves in the first (BigBird's kind of attention).
    """
    model = copy.deepcopy(tiny_model(name, vocab_size=VOCABULARY)).to(dtype).train()
    for module in model.modules():
        for setting, value in vars(module).items():
            if isinstance(value, float) and "drop" in setting:
                setattr(module, setting, 0.0)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if router:
        model.config.output_router_logits = True
    return model


def loss_and_gradients(model: Any, given: dict[str, Any]) -> dict[str, Tensor]:
    """The loss and all gradients by name."""
    model.zero_grad()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        random.seed(0)
        numpy.random.seed(0)
        loss = model(**given).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


@contextmanager
def head_products(model: Any) -> Iterator[list[str]]:
    """The operators that make something of the size of the logits from the head's own weight."""
    weight = model.get_output_embeddings().weight
    found: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            mine = any(isinstance(a, Tensor) and a.data_ptr() == weight.data_ptr() for a in args)
            wide = isinstance(made, Tensor) and made.ndim >= 2 and made.shape[-1] == weight.shape[0]
            if mine and wide and made.data_ptr() != weight.data_ptr():
                found.append(f"{func} of shape {tuple(made.shape)}")
            return made

    with Watch():
        yield found


def check(name: str) -> Verdict:
    """See the module."""
    from ..integrations.transformers import use_fused_loss

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            use_fused_loss(training_copy(name))
        except ValueError as error:
            return Verdict("refused", str(error))
        try:
            router, own = _own(name)
        except Exception as error:
            return Verdict("untested", f"the class fails: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
        model = training_copy(name, router=router)
        with use_fused_loss(model) as handle, head_products(model) as made:
            ours = loss_and_gradients(model, batch(model))
            status = handle.status
        first = Draw(ours, own, _reference(name, router, own))
        wrong = difference([first])
        if wrong and first.exact is not None:  # what one draw errs is luck, see `accuracy`
            wrong = difference([first, *(_draw(name, router, number) for number in range(1, DRAWS))])
    if not wrong and (status == "fused") == bool(made):
        wrong = f"says it is {status}, and makes {made[:1]}"
    return Verdict("wrong", wrong) if wrong else Verdict(*status.split(": ", 1))


def _own(name: str) -> tuple[bool, dict[str, Tensor]]:
    """Whether the class takes a router's loss, and its loss and gradients."""
    model = training_copy(name, router=True)
    if hasattr(training_copy(name).config, "output_router_logits"):
        with suppress(Exception):  # some classes have the setting and no such loss
            return True, loss_and_gradients(model, batch(model))
    model = training_copy(name)
    return False, loss_and_gradients(model, batch(model))


def _draw(name: str, router: bool, number: int) -> Draw:
    """Of another batch."""
    from ..integrations.transformers import use_fused_loss

    model, fused = training_copy(name, router=router), training_copy(name, router=router)
    own = loss_and_gradients(model, batch(model, number))
    with use_fused_loss(fused):
        ours = loss_and_gradients(fused, batch(fused, number))
    return Draw(ours, own, _reference(name, router, own, number))


def _reference(name: str, router: bool, own: dict[str, Tensor], number: int = 0) -> dict[str, Tensor] | None:
    """The same in float64; None where the class cannot compute in it, or not what it does in float32."""
    try:
        model = training_copy(name, torch.float64, router)
        made = loss_and_gradients(model, batch(model, number))
    except Exception:
        return None
    same = all(torch.allclose(made[n].float(), t, rtol=0.05, atol=0.05 * float(t.abs().max())) for n, t in own.items())
    return made if same else None


def difference(draws: list[Draw]) -> str:
    """What breaks the accuracy policy over the draws together, empty if nothing does.

    Without a float64 reference ours may be 1,000 roundings of the largest entry away from the class's own.
    """
    for ours, own, _ in draws:
        if ours.keys() != own.keys():
            return f"gradients of other parameters: {sorted(ours.keys() ^ own.keys())[:3]}"
    shares = {}
    for name, tensor in draws[0].own.items():
        kind, mine = "forward" if name == "loss" else "gradient", draws[0].ours[name]
        measured = [measure(d.ours[name], d.own[name], d.exact[name], tensor.dtype, kind)
                    for d in draws if d.exact is not None and name in d.own]  # fmt: skip
        if measured:
            shares[name] = pooled(measured).worst
        else:
            allowed = 1000 * EPS[tensor.dtype] * max(float(tensor.abs().max()), 1e-3)
            shares[name] = float((mine - tensor).abs().max()) / allowed
    worst = sorted(((share, name) for name, share in shares.items() if not share <= 1), reverse=True)
    return ", ".join(f"{name}: {share:.2f} times the allowed error" for share, name in worst[:2])
