"""TRL's chunked log-probabilities and divergence, which all of its trainers stream through, on our kernels.

Since 1.15 TRL never forms the logits of a batch: ``ChunkedLogProbFunction`` (SFT, DPO, KTO, GRPO, RLOO) and
``ChunkedDivergenceFunction`` (distillation) make them tile by tile. `use_fused_logprobs` puts `token_outputs` and
`divergence` in their places.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import checks
from ...ops.linear_loss.kd import Kind
from ...ops.linear_loss.linear_ce import linear_ce
from ...ops.linear_loss.linear_kd import linear_kd
from ...ops.linear_loss.logp import linear_logp

with checks.extra("trl"):
    import trl
    from packaging.version import Version

    from . import jsd

OP = "integrations.trl.use_fused_logprobs"
#: The versions of TRL whose functions these are, from the first up to (not with) the second.
SUPPORTED = ("1.15.0", "1.17.0")

_LOGPROB, _DIVERGENCE = "ChunkedLogProbFunction", "ChunkedDivergenceFunction"
#: module, name in it, and the arguments that its ``apply`` takes
_DOORS = (
    ("trl.kernels.chunked_logprob", _LOGPROB,
     "hidden weight bias targets temperature chunk_size final_logit_softcapping logit_scale outputs"),
    ("trl.kernels.chunked_divergence", _DIVERGENCE,
     "student_hidden student_weight student_bias teacher_hidden teacher_weight teacher_bias beta temperature "
     "student_logit_scale student_final_logit_softcapping teacher_logit_scale teacher_final_logit_softcapping"),
)  # fmt: skip
#: where TRL decides whether prompt and padding are scored too: on a CPU it does, since its tiles are faster of one size
_COMPACT = ("trl.trainer.utils", "trl.trainer.distillation_trainer")

Outputs = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def token_outputs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    outputs: Sequence[str] = (),
) -> Outputs:
    """What TRL wants to know of each token, from hidden states.

    With ``z = cap(logit_scale (W h + bias)) / temperature`` and ``p = softmax(z)``: log p of the target, the entropy of
    p, ``log sum_v p_v^2``, the mean of z over the vocabulary, and whether the target is the first largest token.

    Args:
        hidden: ``[N, D]``. weight: ``[V, D]``. bias: ``[V]`` or None. targets: ``[N]``.
        temperature, logit_scale: > 0. softcap: s makes logits x ``s tanh(x / s)``, or None.
        outputs: which of ``"entropy"``, ``"log_sum_sq_probs"``, ``"mean_logits"``, ``"is_top1"`` are wanted.

    Returns:
        (logp, entropy, log_sum_sq_probs, mean_logits, is_top1), each ``[N]`` or None if not asked for. The first two
        are differentiable in hidden, weight and bias. ``log_sum_sq_probs`` takes a second product of hidden and head,
        all else comes from one.
    """
    head: dict[str, Any] = {
        "bias": None if bias is None else bias.to(hidden.dtype),
        "temperature": temperature / logit_scale,
        "softcap": None if softcap is None else softcap / logit_scale,
    }
    weight = weight.to(hidden.dtype)
    entropy = mean = top1 = squares = None
    if not {"entropy", "mean_logits", "is_top1"} & set(outputs):
        logp: Any = linear_logp(hidden, weight, targets, **head)
    else:
        wanted: Any = ["logp", "lse", *(["entropy"] if "entropy" in outputs else [])]
        wanted += ["argmax"] if "is_top1" in outputs else []
        # a target half uniform has the row 1/2 (lse - z_y) + 1/2 (lse - mean z): the mean logit from the same pass
        half = 0.5 if "mean_logits" in outputs else 0.0
        row, found = linear_ce(
            hidden, weight, targets, **head, label_smoothing=half, reduction="none", outputs=wanted
        )  # fmt: skip
        logp, entropy = found["logp"], found.get("entropy")
        top1 = found["argmax"] == targets if "is_top1" in outputs else None
        mean = (found["lse"] - 2 * row - logp).detach() if half else None
    if "log_sum_sq_probs" in outputs:
        # lse(2 z) - 2 lse(z) = 2 log p_y - (2 z_y - lse(2 z)), the latter log p_y at half the temperature
        colder: Any = linear_logp(
            hidden, weight, targets, **{**head, "temperature": head["temperature"] / 2}, grad="none"
        )
        squares = 2 * logp.detach() - colder
    return logp, entropy, squares, mean, top1


class _Rows(torch.autograd.Function):
    """Rows whose sum has a gradient from the forward pass, which is taken where all rows get the same one."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, rows: Tensor) -> Tensor:
        return rows.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad,) = grads
        first = grad[:1].sum()
        return (first, None) if bool((grad == first).all()) else (None, grad)


def divergence(
    student: tuple[Tensor, Tensor, Tensor | None],
    teacher: tuple[Tensor, Tensor, Tensor | None],
    beta: float,
    temperature: float,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Generalised Jensen-Shannon divergence of each token's distributions, and the student's entropy.

    ``beta KL(q || m) + (1 - beta) KL(p || m)`` with ``m = beta q + (1 - beta) p`` (GKD, arXiv 2306.13649), p of the
    student, q of the teacher; KL(q || p) at beta 0 and KL(p || q) at beta 1.

    Args:
        student, teacher: (hidden ``[N, D]``, head ``[V, D]``, bias ``[V]`` or None), each with a D of its own.
        beta: in [0, 1]. temperature: > 0. logit_scale: > 0, of both.

    Returns:
        (divergence, entropy), ``[N]``; the first is differentiable in the student's tensors.
    """
    (hidden, weight, bias), (theirs, head, offset) = _same_dtype(student), _same_dtype(teacher)
    rows = weight.shape[0]
    given = ("linear", theirs.detach(), head[:rows].detach())
    with_bias = given if offset is None else (*given, offset[:rows].detach())
    kind: Kind = "fkl" if beta == 0 else "rkl" if beta == 1 else "jsd"
    total, found = linear_kd(
        hidden, weight, [with_bias], kind=kind, beta_jsd=beta, tau=temperature / logit_scale, bias=bias,
        tau_scale=False, reduction="sum", outputs=("kd", "entropy_s"),
    )  # fmt: skip
    return _Rows.apply(total, found["kd"]), found["entropy_s"]


def _same_dtype(model: tuple[Tensor, Tensor, Tensor | None]) -> tuple[Tensor, Tensor, Tensor | None]:
    hidden, weight, bias = model
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _ours(*tensors: Tensor | None, scales: Sequence[float] = ()) -> bool:
    """Whether these arguments are served here: on a CPU, whole (ZeRO-3 gathers a head again in backward), scaled up."""
    given = [t for t in tensors if t is not None]
    return all(t.is_cpu and not hasattr(t, "ds_id") for t in given) and all(scale > 0 for scale in scales)


def _logprob_door(own: Any) -> Any:
    class FusedLogProbFunction:
        """TRL's ``ChunkedLogProbFunction`` on `token_outputs`; what that does not serve goes to TRL's own."""

        @staticmethod
        def apply(
            hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, chunk_size: int,
            final_logit_softcapping: float | None = None, logit_scale: float = 1.0,
            outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
        ) -> Any:  # fmt: skip
            scaled = (hidden, weight, bias, targets, temperature)
            if not _ours(hidden, weight, bias, scales=(logit_scale,)):
                return own.apply(*scaled, chunk_size, final_logit_softcapping, logit_scale, outputs)
            return token_outputs(*scaled, final_logit_softcapping, logit_scale, outputs)

    return FusedLogProbFunction


def _divergence_door(own: Any) -> Any:
    class FusedDivergenceFunction:
        """TRL's ``ChunkedDivergenceFunction`` on `divergence`; what that does not serve goes to TRL's own."""

        @staticmethod
        def apply(
            student_hidden: Tensor, student_weight: Tensor, student_bias: Tensor | None, teacher_hidden: Tensor,
            teacher_weight: Tensor, teacher_bias: Tensor | None, beta: float, temperature: float = 1.0,
            student_logit_scale: float = 1.0, student_final_logit_softcapping: float | None = None,
            teacher_logit_scale: float = 1.0, teacher_final_logit_softcapping: float | None = None,
        ) -> Any:  # fmt: skip
            student = (student_hidden, student_weight, student_bias)
            teacher = (teacher_hidden, teacher_weight, teacher_bias)
            caps = (student_final_logit_softcapping, teacher_final_logit_softcapping)
            alike = student_logit_scale == teacher_logit_scale and caps == (None, None)
            if not (alike and _ours(*student, *teacher, scales=(student_logit_scale,))):
                return own.apply(
                    *student, *teacher, beta, temperature, student_logit_scale, caps[0], teacher_logit_scale, caps[1]
                )
            return divergence(student, teacher, beta, temperature, student_logit_scale)

    return FusedDivergenceFunction


def _check_trl() -> list[Any]:
    """TRL's functions; ValueError for a version or arguments that are not known here."""
    low, high = SUPPORTED
    if not Version(low) <= Version(trl.__version__) < Version(high):
        checks.fail(OP, "trl", f"of a version from {low} up to, not with, {high}", trl.__version__)
    found = []
    for module, name, arguments in _DOORS:
        own = getattr(importlib.import_module(module), name, None)
        has = [] if own is None else list(inspect.signature(own.forward).parameters)[1:]
        if has != arguments.split():
            checks.fail(OP, "trl", f"with {name}({arguments.replace(' ', ', ')})", ", ".join(has) or "no such function")
        found.append(own)
    return found


def _replace(old: Any, new: Any) -> None:
    """``new`` under every name by which a module of TRL knows ``old``."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "trl" and module is not None:
            for key in [key for key, value in vars(module).items() if value is old]:
                setattr(module, key, new)


#: (TRL's function, ours), and (module, its own test of a device), while a swap holds; it holds for the whole process
_SWAPPED: list[tuple[Any, Any]] = []
_COMPACTING: list[tuple[Any, Any]] = []
#: (trainer, name, its own function) of those that make logits
_TRAINERS: list[tuple[Any, str, Any]] = []


def _swap() -> None:
    logprob, spread = _check_trl()
    _SWAPPED.extend([(logprob, _logprob_door(logprob)), (spread, _divergence_door(spread))])
    for own, new in _SWAPPED:
        _replace(own, new)
    for name in _COMPACT:
        module: Any = importlib.import_module(name)
        if hasattr(module, "_use_triton"):  # 1.15 leaves prompt and padding out everywhere
            _COMPACTING.append((module, module._use_triton))
            module._use_triton = _or_cpu(module._use_triton)
    for trainer in jsd.trainers():
        step, loss = (vars(trainer)[name] for name in ("compute_loss", "generalized_jsd_loss"))
        _TRAINERS.extend([(trainer, "compute_loss", step), (trainer, "generalized_jsd_loss", loss)])
        trainer.compute_loss = jsd.promising(step)
        trainer.generalized_jsd_loss = staticmethod(jsd.fused(loss.__func__, divergence))


def _or_cpu(own: Callable[[torch.device], bool]) -> Callable[[torch.device], bool]:
    return lambda device: device.type == "cpu" or own(device)


class FusedLogprobs:
    """What `use_fused_logprobs` returns: `undo`, or leaving its ``with`` block, gives TRL its own functions back."""

    def __init__(self) -> None:
        self._applied = not _SWAPPED
        if self._applied:
            _swap()

    def undo(self) -> None:
        """Give TRL its functions back, if this call took them; a second time is no error."""
        if not self._applied:
            return
        self._applied = False
        for own, new in _SWAPPED:
            _replace(new, own)
        for module, own in _COMPACTING:
            module._use_triton = own
        for trainer, name, own in _TRAINERS:
            setattr(trainer, name, own)
        for kept in (_SWAPPED, _COMPACTING, _TRAINERS):
            kept.clear()

    def __enter__(self) -> FusedLogprobs:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def use_fused_logprobs() -> FusedLogprobs:
    """Make TRL's own trainers compute log-probabilities and divergences with our kernels, in the whole process.

    TRL's SFT, DPO, KTO, GRPO, RLOO and their kin score tokens through one function and `trl.DistillationTrainer`
    through another; both are swapped, in every module of TRL that has imported them, for one that gives the same
    values and gradients up to rounding: log-probability and entropy with gradients, log of the sum of squared
    probabilities, mean logit, top-1 match. Prompt and padding tokens are left out on a CPU too. Trainers made before or
    after the call are served alike.

    The GKD and GOLD trainers of `trl.experimental` make the logits of student and teacher; under the swap a training
    step of theirs takes the same divergence from the hidden states of the tokens that count.

    Left to TRL's own functions, call by call: tensors on another device than a CPU, a head that DeepSpeed ZeRO-3 or
    FSDP shards, logit scales <= 0; of the divergence also softcaps and scales that differ between student and teacher,
    and GOLD across tokenizers. Other trainers that make logits (`trl.experimental`: ORPO, CPO) have no such function.

    Returns:
        A handle with ``undo()``; also a context manager. Inside a swap another call changes nothing.

    Raises:
        ValueError: a TRL outside versions 1.15 and 1.16, or whose functions take other arguments.

    Example:
        >>> from w2s_fast.integrations.trl import use_fused_logprobs
        >>> with use_fused_logprobs():
        ...     pass  # trainer.train()
    """
    return FusedLogprobs()
