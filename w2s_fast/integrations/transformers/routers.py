"""Routers of mixtures of experts of transformers, their scores, choice and sums by `w2s_fast.moe_route`."""

from __future__ import annotations

from types import MethodType
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.functional import linear

from ... import checks
from ...ops.routing.moe_route import Route, Score, moe_route

OP = "integrations.transformers.use_moe_route"
_SUMS, _LOAD = "_w2s_sums", "_w2s_load"


class Rule(NamedTuple):
    """How a class of routers makes weights of logits. renormalize: None: ``router.norm_topk_prob``. cast: weights come
    in the dtype of the hidden states. wide: logits are handed on in float32."""

    score: Score
    renormalize: bool | None = False
    cast: bool = True
    wide: bool = False


_ASKS, _SHARES, _MIXTRAL = Rule("softmax", None), Rule("softmax", True), Rule("softmax", True, cast=False)
_GRANITE = Rule("topk", wide=True)
#: By class, each ``linear(hidden, weight)`` and then as `Rule` says.
RULES: dict[str, Rule] = {
    **dict.fromkeys(("Qwen2MoeTopKRouter", "Qwen3MoeTopKRouter", "Qwen3NextTopKRouter", "OlmoeTopKRouter",
                     "FlexOlmoTopKRouter"), _ASKS),
    **dict.fromkeys(("Qwen3VLMoeTextTopKRouter", "Qwen3_5MoeTopKRouter"), _SHARES),
    **dict.fromkeys(("MixtralTopKRouter", "MiniMaxTopKRouter"), _MIXTRAL),
    **dict.fromkeys(("GraniteMoeTopKRouter", "GraniteMoeSharedTopKRouter", "GraniteMoeHybridTopKRouter"), _GRANITE),
    "JambaTopKRouter": Rule("softmax"),
}  # fmt: skip


def routers(model: nn.Module) -> list[nn.Module]:
    """The routers of a model, whether there is a rule for their class or not."""
    return [m for m in model.modules() if "Router" in type(m).__name__ and hasattr(m, "top_k")]


class Sums:
    """What the routers of a model share. mask: of the next forward passes, bool ``[T]``, True at tokens that are in the
    sums. kept: whether each router's sums are left for `taken`."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self.kept = False

    def taken(self, router: nn.Module) -> Route | None:
        """The sums of a router's last forward pass, once; None of one that has its own forward."""
        found: Route | None = router.__dict__.pop(_LOAD, None)
        return found

    def of(self, tokens: int) -> Tensor | None:
        """The mask, if it is one of so many tokens."""
        return self.mask if self.mask is not None and len(self.mask) == tokens else None


# pickle looks a method up by its name: of an unpickled router this is its class's own
def forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A router's forward: logits, weights and experts."""
    rule, sums = RULES[type(self).__name__], getattr(self, _SUMS)
    hidden = hidden_states.reshape(-1, self.weight.shape[1])
    logits = linear(hidden, self.weight)
    logits = logits.float() if rule.wide else logits
    renormalize = bool(self.norm_topk_prob) if rule.renormalize is None else rule.renormalize
    mask = sums.of(len(logits))
    found = moe_route(logits, self.top_k, score=rule.score, renormalize=renormalize, mask=mask)
    if sums.kept:
        setattr(self, _LOAD, found.load)
    return logits, found.weights.to(hidden.dtype) if rule.cast else found.weights, found.indices


def is_served(module: nn.Module) -> bool:
    """Whether `use_moe_route` has its forward."""
    return getattr(module.__dict__.get("forward"), "__func__", None) is forward


class UseMoeRoute:
    """What `use_moe_route` returns: `remove`, or leaving its ``with`` block, gives the routers their own forward back.

    Attributes:
        served: the routers.
        sums: what they share.
    """

    def __init__(self, served: list[nn.Module]) -> None:
        self.served, self.sums = served, Sums()
        for router in served:
            router.__dict__[_SUMS] = self.sums
            router.forward = MethodType(forward, router)  # deepcopy gives the copy's to the copy

    def remove(self) -> None:
        """Undo; a second time is no error."""
        for router in self.served:
            for name in ("forward", _SUMS, _LOAD):
                router.__dict__.pop(name, None)
        self.served = []

    def __enter__(self) -> UseMoeRoute:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def use_moe_route(model: nn.Module) -> UseMoeRoute:
    """Let the routers of a mixture of experts choose by `w2s_fast.moe_route`, in place: the same logits, weights and
    experts up to rounding (of equal probabilities the first), forward and backward in one kernel each.

    It serves the classes of `RULES` (Mixtral, MiniMax, Qwen2-MoE, Qwen3-MoE, Qwen3-Next, Qwen3-VL-MoE, OLMoE, Granite,
    Jamba); other routers stay as they are.

    Args:
        model: any module of transformers.

    Returns:
        `UseMoeRoute`, to undo it.

    Raises:
        TypeError: naming `model`.

    Example:
        >>> import torch, transformers, w2s_fast
        >>> config = transformers.MixtralConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...     num_attention_heads=1, num_key_value_heads=1, num_local_experts=4)
        >>> w2s_fast.integrations.transformers.use_moe_route(transformers.MixtralForCausalLM(config)).served
        [MixtralTopKRouter()]
    """
    if not isinstance(model, nn.Module):
        checks.fail(OP, "model", "a torch.nn.Module", type(model).__name__, error=TypeError)
    return UseMoeRoute([m for m in routers(model) if type(m).__name__ in RULES and not is_served(m)])
