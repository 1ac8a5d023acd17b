"""``rounding="deployed"``: bounds of what any floating-point evaluation of the model gives, not of its real values.

**The claim.** Every activation of the deployed model, evaluated on any floating-point input of the box, lies in the box
of that activation, whatever the order in which sums are added, with or without fused multiply-add, whether or not a
compiler keeps a result in more digits than its dtype has. Assumed is what IEEE arithmetic and PyTorch's products do:

- each +, *, / and square root is rounded to nearest, with unit u = 2^-24 for sums of float32, bfloat16 and float16
  (2^-53 for float64); results in 16 bits are rounded to them, at most twice (a product, then its bias);
- a sum of products is a sum of those products: no Winograd or FFT convolution (refused where PyTorch chooses a
  library that has them), no batch-norm folded into a weight, no TF32 or bfloat16 in place of float32 and no partial
  sums in 16 bits (refused where PyTorch's settings allow them);
- numbers are not flushed to 0 by more than 1e-30.

**Why.** By induction over the operations; let x be the deployed input of one, in its box by assumption.

1. An operation that moves or selects entries (views, ReLU, max) is exact and increasing: the box's ends go through.
2. One rounded operation y = fl(f(x)): f(x) lies between real ends, fl is increasing, and the ends are rounded outward
   to y's dtype, so they contain fl(f(x)) and f(x) itself: a compiler that skips the rounding stays inside. A Python
   number is taken as the box between the numbers of the dtype next to it, as libraries round it to one or the other.
3. A sum of n products and a bias, y_j = sum_k W_jk x_k + b_j. However it is put together, each product meets at most
   n + 1 roundings (its own, n - 1 additions, the bias), so with gamma_n = n u / (1 - n u)

       |fl(y_j) - y_j| <= gamma_(n + 2) (sum_k |W_jk| |x_k| + |b_j|),   |x_k| <= |c_k| + r_k .

   Hence the radius operand of the product is r + gamma (|c| + r), and gamma |b| joins the result's radius (`spread` of
   `w2s_fast.interval_linear`): |W| is read once, as ever. An exact 0 (a dead unit) stays one: 0 is added exactly.
   With 16-bit results the first of two roundings moves y + b by at most u' (|y| + |b|) + eta', the second is 2.
4. Where sum |W| |x| could overflow, partial sums could, and infinity - infinity is NaN: there nothing is known. The
   radius holds gamma times that sum, so it is compared with gamma times the largest number. A clamp must not make
   something known of it again (`HIDES`).
5. Batch-norm is evaluated as (x - mean) s + bias or x s + (bias - mean s), s = weight / sqrt(variance + eps): 16 u
   times |s| (|x| + |mean|) + |bias| covers both.
6. Linear bounds (CROWN): a . fl(f(x)) <= a . f(x) + |a| . gamma size, size the sum of absolute terms over the box, on
   top of what float64 rounds; every box at hand is a deployed one.
7. Margins z_k = f_k - f_y of a merged last layer: its two logits err apart, by gamma (|W_k| |x| + |b_k|) each.

Constants are what the model holds; those that the trace computes must be exact (views, casts), as another evaluation
could round them otherwise. Under `torch.autocast` the operands of a product are rounded to 16 bits before it
(`lowered`): of an activation the ends are, outward; a weight is rounded as it is. Linear bounds end at the box of such
a product.
"""

from __future__ import annotations

import functools
import math
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import checks
from ...reference.interval_bounds.boxes import outward, unit
from .boxes import HALVES, OP, Box, Lost

if TYPE_CHECKING:
    from .program import Program, Step

#: Roundings of one entry besides those of its sum; 0: exact. What is not here is refused.
ROUNDS = {
    **dict.fromkeys((
        "relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max", "abs", "neg", "negative", "max", "min",
        "maximum", "minimum", "amax", "amin", "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d",
        "adaptive_max_pool2d", "max_pool2d_with_indices", "view", "reshape", "_unsafe_view", "flatten", "unflatten",
        "view_as", "alias", "squeeze", "unsqueeze", "permute", "transpose", "t", "movedim", "swapaxes", "numpy_T",
        "flip", "roll", "adjoint", "clone", "contiguous", "detach", "lift_fresh_copy", "slice", "select",
        "index_select", "narrow", "gather", "unfold", "diagonal", "split", "split_with_sizes", "chunk", "unbind",
        "tensor_split", "expand", "expand_as", "repeat", "repeat_interleave", "broadcast_to", "cat", "stack", "concat",
        "hstack", "vstack", "slice_scatter", "select_scatter", "pad", "constant_pad_nd", "reflection_pad1d",
        "reflection_pad2d", "replication_pad1d", "replication_pad2d", "zero_pad2d", "pixel_shuffle",
        "pixel_unshuffle", "channel_shuffle", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
        "index", "masked_fill", "dropout", "feature_dropout", "alpha_dropout", "embedding",
    ), 0),
    **dict.fromkeys(("to", "_to_copy", "type_as"), 1),
    "leaky_relu": 2, "prelu": 2, "_prelu_kernel": 2, "add": 3, "sub": 3, "rsub": 3, "mul": 3, "div": 4, "sum": 2,
    **dict.fromkeys(("mean", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
                     "adaptive_avg_pool3d", "_adaptive_avg_pool2d"), 3),
    **dict.fromkeys(("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
                     "matmul", "mm", "bmm", "mv", "addmm", "baddbmm"), 2),
    **dict.fromkeys(("batch_norm", "_native_batch_norm_legit_functional", "_native_batch_norm_legit_no_training",
                     "native_batch_norm", "cudnn_batch_norm"), 16),
}  # fmt: skip
#: Where something finite may come of what is not a number.
HIDES = frozenset({"relu6", "hardtanh", "clamp", "clamp_min", "clamp_max", "min", "minimum", "amin", "div"})
#: Results that may be rounded to 16 bits twice, or of a number that is.
TWICE = frozenset({"sum", "mean", "leaky_relu"}) | {n for n in ROUNDS if "avg_pool" in n}
#: Whose operands autocast rounds to 16 bits, which the trace does not show.
PRODUCTS = frozenset({"linear", "matmul", "mm", "bmm", "mv", "addmm", "baddbmm", "prelu", "_prelu_kernel"}) | {
    n for n in ROUNDS if n.startswith("conv")
}
#: Constants that are the same however they are computed.
EXACT = frozenset({
    "zeros", "zeros_like", "ones", "ones_like", "full", "full_like", "new_zeros", "new_ones", "new_full", "empty_like",
    "arange", "eye", "scalar_tensor", "abs", "neg",
}) | {n for n, count in ROUNDS.items() if count == 0} | {"to", "_to_copy", "type_as"}  # fmt: skip


def name_of(target: Any) -> str:
    """The operation's name, without aten."""
    schema = getattr(target, "_schema", None)
    return "" if schema is None else str(schema.name).removeprefix("aten::")


def _shape(value: Any) -> torch.Size:
    return (value.lower if isinstance(value, Box) else value).shape  # type: ignore[no-any-return]


def terms(name: str, given: dict[str, Any]) -> int:
    """Terms of the sum of one entry; 0 if there is none."""
    if name == "linear":
        return int(_shape(given["weight"])[-1])
    if name.startswith("conv_transpose"):
        shape = _shape(given["weight"])
        return int(shape[0] // given["groups"] * shape[2:].numel())
    if name.startswith("conv"):
        return int(_shape(given["weight"])[1:].numel())
    if name in ("matmul", "mm", "bmm", "mv"):
        return _shape(given["self"])[-1]
    if name in ("addmm", "baddbmm"):
        return _shape(given.get("mat1", given.get("batch1")))[-1]
    if name in ("sum", "mean"):
        shape, dims = _shape(given["self"]), given.get("dim")
        dims = [dims] if isinstance(dims, int) else dims or range(len(shape))
        return math.prod(shape[d] for d in dims)
    if name.startswith("avg_pool"):
        kernel = given["kernel_size"]
        return int(math.prod(kernel) ** (int(name[8]) if len(kernel) == 1 else 1))
    if "adaptive_avg_pool" in name:
        size = given["output_size"]
        return math.prod(n // max(out, 1) + 2 for n, out in zip(_shape(given["self"])[-len(size) :], size, strict=True))
    return 0


def gamma(count: int, dtype: torch.dtype) -> float:
    """``n u / (1 - n u)``, rounded up.

    Raises:
        ValueError: naming `rounding`.
    """
    share = count * unit(torch.float64 if dtype == torch.float64 else torch.float32)
    if share > 0.25:
        checks.fail(OP, "rounding", '"sound" for sums of this length: float sums leave nothing known', "deployed")
    return share / (1 - share) * (1 + 2.0**-30)


def lost(name: str, given: dict[str, Any], dtype: torch.dtype) -> Lost:
    """What an evaluation of the operation in ``dtype`` may be off by; see `Lost`."""
    count = ROUNDS[name]
    if not count:
        return Lost()
    size = gamma(count + terms(name, given), dtype)
    if dtype not in HALVES:
        return Lost(size, 0.0, 1e-30 if dtype == torch.float32 else 1e-290)
    least = max(2 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps, 1e-30)  # of denormal numbers
    return Lost(size, 2 * unit(dtype) if name in TWICE else 0.0, least, 3 * unit(dtype))


def lowers(name: str, given: dict[str, Any], dtype: torch.dtype) -> bool:
    """Whether autocast rounds the operands of this operation, whose result is of 16 bits."""
    if dtype not in HALVES or name in ("to", "_to_copy", "type_as"):
        return False
    flat = [v for value in given.values() for v in (value if isinstance(value, (list, tuple)) else (value,))]
    kinds = [v.lower.dtype for v in flat if isinstance(v, Box)]
    if name in PRODUCTS:
        kinds += [v.dtype for v in flat if isinstance(v, Tensor) and v.is_floating_point()]
    return any(kind.is_floating_point and kind not in HALVES for kind in kinds)


def lowered(value: Any, dtype: torch.dtype) -> Any:
    """An argument as autocast gives it to a product; of a box the ends are rounded outward."""
    if isinstance(value, Box):
        low, high = outward(value.lower.double(), dtype, True), outward(value.upper.double(), dtype, False)
        return Box(low, high, value.clean, value.statistics)
    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
        return value.to(dtype)
    return [lowered(v, dtype) for v in value] if isinstance(value, list) else value


def hidden(name: str, boxes: list[Box], found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """``found``, or nothing known, if anything that went into one of `HIDES` is not finite."""
    if name not in HIDES:
        return found
    known = torch.stack([(b.upper - b.lower < torch.inf).all() for b in boxes]).all()
    return torch.where(known, found[0], -torch.inf), torch.where(known, found[1], torch.inf)


def analysed(steps: Program) -> None:
    """Refuse, by name, what has no bound of its rounding.

    Raises:
        ValueError: naming `rounding`.
    """
    for step in steps.steps:
        where = _refused(step)
        if where:
            hint = f"Deployed rounding is analysed for: {', '.join(sorted(ROUNDS))}."
            checks.fail(OP, "rounding", '"sound" or "fast" for this model', f'"deployed" with {where}', hint)


def _refused(step: Step) -> str:
    names = [name_of(node.target) for node in step.nodes]
    if not step.boxes:
        integers = step.node.dtype is not None and not step.node.dtype.is_floating_point
        exact = not names[0] or names[0] in EXACT or integers
        return "" if exact else f"a constant that is computed: {step.node.where}"
    if step.rule is None:
        return ""
    unknown = [node.where for node, name in zip(step.nodes, names, strict=True) if name not in ROUNDS]
    if step.node.dtype in HALVES and names[0].startswith("conv_transpose"):
        return f"a transposed convolution that may be summed in 16 bits: {step.node.where}"
    if names[0] in ("sum", "mean", "to", "_to_copy") and step.node.dtype is None:
        return step.node.where
    if names[0] in ("sum", "mean") and step.bound.get("dtype") is not None:
        return f"a sum in another dtype: {step.node.where}"
    if names[0] == "div" and len(step.boxes) == 2:
        return f"a quotient of two activations: {step.node.where}"
    return unknown[0] if unknown else ""


#: PyTorch's convolutions that are no sums of products, or may be: NNPACK's and cuDNN's choose among algorithms.
_TRANSFORMS = ("Winograd3x3Depthwise", "NnpackSpatial", "Cudnn", "CudnnTranspose", "Miopen", "MiopenTranspose",
               "MiopenDepthwise")  # fmt: skip
_GEOMETRY = ("stride", "padding", "dilation", "output_padding")


def convolution(step: Step, shapes: list[tuple[int, ...]], device: torch.device) -> None:
    """Refuse one of two operands of these shapes that may be transformed, for its own batch, one of 1 and one of 16.

    Raises:
        ValueError: naming `rounding`.
    """
    bound, dtype = step.bound, step.node.dtype
    axes = len(shapes[1]) - 2
    options = []
    for name in _GEOMETRY:
        value = bound.get(name, 0)
        own = [0 if isinstance(value, str) else value] if isinstance(value, (int, str)) else list(value)
        options.append(own * axes if len(own) == 1 else own)
    transposed = name_of(step.node.target).startswith("conv_transpose")
    weight = torch.empty(shapes[1], dtype=dtype, device=device)
    for batch in {shapes[0][0] if len(shapes[0]) == axes + 2 else 1, 1, 16}:
        x = torch.empty(batch, *shapes[0][-axes - 1 :], dtype=dtype, device=device)
        given = (*options[:3], transposed, options[3], bound["groups"])
        found = torch._C._select_conv_backend(x, weight, None, *given, None).name  # type: ignore[call-arg]
        if found in _TRANSFORMS:
            hint = "Turn off cuDNN (torch.backends.cudnn.enabled = False), turn on oneDNN on a CPU."
            checks.fail(OP, "rounding", '"deployed" with convolutions that are sums of products', found, hint)


_FULL = frozenset({"none", "ieee"})


@functools.lru_cache
def _libraries(cpu: bool) -> tuple[tuple[str, Any], ...]:
    """PyTorch's settings of the libraries of products, by name."""
    backends: Any = torch.backends
    cuda = () if cpu else (("cuda.matmul", backends.cuda.matmul), ("cudnn.conv", getattr(backends.cudnn, "conv", None)))
    mkldnn = backends.mkldnn
    return cuda or tuple((f"mkldnn.{name}", getattr(mkldnn, name, None)) for name in ("matmul", "conv"))


#: Variables that leave products fewer digits, and what they may be.
_STRICT = (("ONEDNN_DEFAULT_FPMATH_MODE", ("", "STRICT")), ("NVIDIA_TF32_OVERRIDE", ("", "0")))


def settings(device: torch.device, dtypes: set[torch.dtype | None]) -> None:
    """Refuse settings that leave products fewer digits.

    Raises:
        ValueError: naming `rounding`.
    """
    backends = torch.backends
    if torch.float32 in dtypes:
        for variable, fine in _STRICT:
            value = os.environ.get(variable, "") if variable in os.environ else ""
            if value.upper() not in fine:
                checks.fail(OP, "rounding", '"deployed" with float32 products in float32', f"{variable}={value}")
        for name, library in _libraries(device.type == "cpu"):
            value = getattr(library, "fp32_precision", "none")
            if value not in _FULL:
                hint = f'Set torch.backends.{name}.fp32_precision = "ieee".'
                checks.fail(OP, "rounding", '"deployed" with float32 products in float32', f"{name} in {value}", hint)
    if device.type == "cuda" and dtypes & {torch.bfloat16, torch.float16}:
        for kind in ("bf16", "fp16"):
            flag = f"allow_{kind}_reduced_precision_reduction"
            if getattr(backends.cuda.matmul, flag, False):
                hint = f"Set torch.backends.cuda.matmul.{flag} = False."
                checks.fail(OP, "rounding", '"deployed" with 16-bit products summed in float32', flag, hint)
