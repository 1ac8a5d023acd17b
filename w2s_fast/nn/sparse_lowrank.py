"""SLTrain's linear layer (arXiv 2406.02214), and a model whose linear layers are of that kind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import checks
from ..ops.sparse_lowrank.linear import sparse_lowrank_linear, sparse_lowrank_materialize
from ..ops.sparse_lowrank.support import LAYOUTS, SparseSupport, random_support

#: What the paper replaces: every linear layer with one of these in its path.
TARGET = ("attn", "mlp", "attention")


class SparseLowRankLinear(nn.Module):
    """``y = x (scale B A + S)^T + bias``: a linear layer of low rank plus a fixed random sparse support.

    SLTrain, arXiv 2406.02214. Drops in for `torch.nn.Linear`, but has no ``weight``. Initialised as the paper does: A
    and the values uniform in +-1 / sqrt(in_features), B zero, bias uniform in +-1 / sqrt(out_features), the support
    uniform over the matrix. The numbers are drawn on the CPU in the official code's order, so that a seed gives the
    layer which that code gives.

    Args:
        in_features, out_features: I and O.
        rank: r >= 0; 0 is a sparse layer.
        density: share of the O I positions that hold a value, in [0, 1); 0 is a low-rank layer, which needs values for
            B to train (see `from_linear`).
        alpha: scale = alpha / rank. The paper's: 32 (60M), 16 (130M, 350M), 8 (1B, 7B).
        bias: with a bias.
        layout: of the support, ``"csr16"``, ``"csr32"`` or ``"balanced"``; see `random_support`.
        trainable_scaling: scale = tanh(scaling), ``scaling`` a parameter that starts at 1; alpha is then unused.
        device, dtype: of the parameters.
        generator: a CPU generator for all of it; default torch's own.

    Attributes: the parameters ``A`` [r, I], ``B`` [O, r], ``values`` [K], ``bias`` and ``scaling`` (the last two None
    if absent); ``support``, a `SparseSupport`; ``scale``, a number or, if trainable, a tensor.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch
        >>> from w2s_fast.nn import SparseLowRankLinear
        >>> layer = SparseLowRankLinear(256, 128, rank=32, density=0.03)
        >>> layer(torch.randn(4, 256)).shape
        torch.Size([4, 128])
    """

    bias: nn.Parameter | None
    scaling: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        density: float = 0.03,
        alpha: float = 16.0,
        bias: bool = True,
        layout: str = "csr16",
        trainable_scaling: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        op = "SparseLowRankLinear"
        self.in_features = checks.integer(op, "in_features", in_features, low=1)
        self.out_features = checks.integer(op, "out_features", out_features, low=1)
        self.rank = checks.integer(op, "rank", rank, low=0)
        self.density = checks.number(op, "density", density, low=0.0, high=1.0, requirement="in [0, 1)")
        if density == 1.0:
            checks.fail(op, "density", "in [0, 1)", density)
        self.alpha = checks.number(op, "alpha", alpha, low=0.0, open_low=True)
        checks.choice(op, "layout", layout, [name for name in LAYOUTS if name != "flat64"])  # the ops refuse flat64

        device = torch.get_default_device() if device is None else device

        def uniform(shape: tuple[int, ...], fan: int) -> nn.Parameter:
            drawn = torch.empty(shape, dtype=dtype)
            return nn.Parameter(nn.init.uniform_(drawn, -1 / math.sqrt(fan), 1 / math.sqrt(fan), generator).to(device))

        with torch.device("cpu"):
            self.register_parameter("bias", uniform((out_features,), out_features) if bias else None)
            self.A = uniform((rank, in_features), in_features)
            if density:
                support = random_support(out_features, in_features, density, layout, generator)
            else:
                empty = torch.empty(0, dtype=torch.int64)
                support = SparseSupport.from_flat(empty, (out_features, in_features), "csr32")
            values = uniform((support.nnz,), in_features)
        self.B = nn.Parameter(torch.zeros(out_features, rank, device=device, dtype=dtype))
        one = nn.Parameter(torch.ones(1, device=device, dtype=dtype)) if trainable_scaling else None
        self.register_parameter("scaling", one)
        self.values, self.support = values, support.to(device)

    @property
    def scale(self) -> float | Tensor:
        """The factor of B A."""
        if self.scaling is not None:
            return self.scaling.tanh()
        return self.alpha / self.rank if self.rank else 1.0

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int,
        density: float = 0.03,
        alpha: float = 16.0,
        layout: str = "csr16",
        trainable_scaling: bool = False,
        generator: torch.Generator | None = None,
    ) -> SparseLowRankLinear:
        """A layer close to ``linear``: ``scale B A`` is the best rank-r approximation L of its weight W.

        L is the truncated SVD of W, its singular values shared evenly by A and B; the values are W - L on a random
        support. So the layer's weight equals W on the support and L elsewhere, and W everywhere if W has rank r; its
        error is that of the SVD without the support's share. The best pair for the support would alternate the two
        steps. Arguments: see the class; bias, device and dtype are those of ``linear``.
        """
        weight = linear.weight.detach()
        made = cls(
            linear.in_features, linear.out_features, rank, density, alpha, linear.bias is not None, layout,
            trainable_scaling, weight.device, weight.dtype, generator,
        )  # fmt: skip
        w = weight if weight.dtype == torch.float64 else weight.float()
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        r = min(rank, s.shape[0])
        with torch.no_grad():
            root = (s[:r] / made.scale).sqrt()
            made.A.zero_()[:r] = root[:, None] * vh[:r]
            made.B[:, :r] = u[:, :r] * root
            low_rank = made.B.to(w.dtype) @ made.A.to(w.dtype) * made.scale
            made.values.copy_((w - low_rank)[made.support.positions()])
            if made.bias is not None:
                made.bias.copy_(linear.bias)
        return made

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The dense layer of the same weight, for deployment."""
        made = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        weight = sparse_lowrank_materialize(self.A, self.B, self.values, self.support, self.scale)
        made.weight = nn.Parameter(weight)
        if self.bias is not None:
            made.bias = nn.Parameter(self.bias.detach().clone())
        return made

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., in_features]`` to ``[..., out_features]``."""
        return sparse_lowrank_linear(x, self.A, self.B, self.values, self.support, self.scale, self.bias)

    def extra_repr(self) -> str:
        """Sizes and scale; the support prints its own."""
        scale = "trainable" if self.scaling is not None else f"{self.scale:g}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"density={self.density:g}, scale={scale}, bias={self.bias is not None}"
        )


class ModelSize(NamedTuple):
    """What a model holds while it is trained with Adam.

    parameters: their number; weight_bytes: theirs; index_bytes: of the sparse supports; plan_bytes: the kernels'
    walking orders of csr supports, on a CPU only; optimizer_bytes: two moments in the parameters' dtypes.
    """

    parameters: int
    weight_bytes: int
    index_bytes: int
    plan_bytes: int
    optimizer_bytes: int


def model_size(model: nn.Module) -> ModelSize:
    """Count a model's parameters and bytes; what is shared counts once."""
    weights = list(model.parameters())
    supports = [m for m in model.modules() if isinstance(m, SparseSupport)]
    weight_bytes = sum(p.nbytes for p in weights)
    return ModelSize(
        sum(p.numel() for p in weights),
        weight_bytes,
        sum(s.index_bytes for s in supports),
        sum(t.nbytes for s in supports if s.layout != "flat64" for t in s.walks()),
        2 * sum(p.nbytes for p in weights if p.requires_grad),
    )


class Replaced(NamedTuple):
    """The paths of the layers that `replace_linear` replaced, and the model's size before and after."""

    layers: list[str]
    before: ModelSize
    after: ModelSize

    def __str__(self) -> str:
        lines = [f"{len(self.layers)} layers replaced"]
        for name, before, after in zip(ModelSize._fields, self.before, self.after, strict=True):
            lines.append(f"{name.replace('_', ' ')}: {before:,} -> {after:,}")
        return "\n".join(lines)


def replace_linear(
    model: nn.Module,
    target: Sequence[str] = TARGET,
    *,
    rank: int,
    density: float = 0.03,
    alpha: float = 16.0,
    layout: str = "csr16",
    trainable_scaling: bool = False,
    from_weights: bool = False,
    generator: torch.Generator | None = None,
) -> Replaced:
    """Turn a model into an SLTrain model in place, as the paper does (arXiv 2406.02214).

    Every `torch.nn.Linear` whose path contains one of ``target`` becomes a `SparseLowRankLinear`: in a Hugging Face
    LLaMA the seven matrices of a block. Embeddings, norms and the LM head stay. Make the optimizer afterwards. A layer
    at several paths is replaced at all of them, by one layer, if one of them fits. Subclasses of `torch.nn.Linear`
    stay: `torch.nn.MultiheadAttention` has one whose weight it reads without calling the layer.

    Args:
        model: any module that is not itself a linear layer.
        target: parts of a path; a single string is one part.
        rank, density, alpha, layout, trainable_scaling, generator: see `SparseLowRankLinear`.
        from_weights: start from the layers' weights (`SparseLowRankLinear.from_linear`), to continue a trained model;
            otherwise from the paper's initialisation.

    Returns:
        `Replaced`; printing it shows parameters and bytes before and after.

    Raises:
        ValueError: if no layer fits; and as `SparseLowRankLinear`. The model is then unchanged.

    Example:
        >>> import torch
        >>> from w2s_fast.nn import replace_linear
        >>> model = torch.nn.ModuleDict({"mlp": torch.nn.Linear(64, 64), "head": torch.nn.Linear(64, 10)})
        >>> replace_linear(model, rank=8).layers
        ['mlp']
    """
    parts = (target,) if isinstance(target, str) else tuple(target)
    places = list(model.named_modules(remove_duplicate=False))
    found = {
        id(layer): layer
        for name, layer in places
        if name and type(layer) is nn.Linear and any(part in name for part in parts)
    }
    if not found:
        checks.fail("replace_linear", "target", "a part of some linear layer's path", repr(target))
    before = model_size(model)
    settings: dict[str, Any] = {"layout": layout, "trainable_scaling": trainable_scaling, "generator": generator}
    made = {}
    for key, layer in found.items():
        if from_weights:
            new = SparseLowRankLinear.from_linear(layer, rank, density, alpha, **settings)
        else:
            new = SparseLowRankLinear(
                layer.in_features, layer.out_features, rank, density, alpha, layer.bias is not None,
                device=layer.weight.device, dtype=layer.weight.dtype, **settings,
            )  # fmt: skip
        made[key] = new.train(layer.training)
    names = [name for name, layer in places if id(layer) in made]
    for name, place in places:  # only now, so that an error above leaves the model as it was
        if id(place) in made:
            model.set_submodule(name, made[id(place)])
    return Replaced(names, before, model_size(model))
