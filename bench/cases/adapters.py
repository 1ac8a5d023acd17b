"""One adapted layer, PEFT's with our forward against PEFT's own: forward and backward of LoRA, DoRA, BAT and RandLoRA,
and decoding for several adapters in one batch.

Bounds. LoRA's forward and backward are 4 N O I operations, and W A^T of DoRA's norm 2 r O I more, which nothing saves
once an optimizer has moved A: r / 2 N of LoRA's own time, half of it at 16 rows, so 1.15 times LoRA is within reach
from about 100 rows on. Where the library's product runs at the machine's peak, as on Zen 4 (100 GFLOP/s of float32 a
core, ours 101), PEFT's LoRA is within a few percent of the floor from 512 rows on, and its DoRA within 1.2 to 1.35:
1.2x and 2x are then out of reach; BAT (3 N + 2 r products of O I) and RandLoRA (7 N against 3 N + 2 d) keep 1.33 and
1.75 at most.

Two threads of a Xeon with AMX, whose library multiplies float32 at 180 GFLOP/s a core and bfloat16 at 1,100 to 1,400
(ours 140 and 850): LoRA of float32 0.91 to 1.0 of PEFT's at 1 and 16 rows, 1.05 to 1.07 at 512, 1.13 at 2048, and
never slower than compile; of bfloat16 0.6 to 1.0, 0.66 of compile at 2048 rows, where the tile product and packing are
60 % of a profile. DoRA 3.6 to 4.1 times PEFT's at 1 and 16 rows, 1.7 and 1.5 of float32 and 2.4 and 2.1 of bfloat16 at
512 and 2048; of LoRA's speed 0.39 to 0.53, 0.88 and 1.01, 0.75 and 0.91. BAT 5.6 and 2.3 at 1 and 16 rows of 1024 (34
and 2.7 of 4096), whose block goes into the input there; 1.1 (1.4 and 1.2) from 512 on. RandLoRA 2.5, 1.4, 1.0, 1.74.

Two threads of a Zen 4, quiet, 1 to 2048 rows; `base`, the layer without its adapter, is printed beside each ratio and
bounds it: LoRA of float32 1.0 to 1.12 of PEFT's (base 1.0 to 1.5), 1.26 to 1.7 at 16 rows; of bfloat16 1.02 and 1.12
at 1 and 16 rows of 1024, 1.10 (base 1.5) and 1.55 (2.0) at 512 and 2048, 1.06 (1.3) and 1.11 (1.4) of 2048 columns,
1.04 at 512 rows of 4096. DoRA 3.6 to 11 of few rows, 1.22 and 1.09 of float32 (2048 columns 1.49 and 1.39), 1.64 and
1.68 of bfloat16 (1.43 and 1.8); LoRA's time over DoRA's 0.40, 0.88, 0.87, 1.08 and 0.46, 0.64, 0.98, 1.02, of 2048
columns 0.53, 0.95, 0.76, 0.94 and 0.64, 0.74, 0.86, 1.05. BAT 9.2, 2.4, 1.20, 1.06 (dW is a third product, which base
lacks). RandLoRA 4.5, 2.3, 1.21, 1.62. A way that loses is not taken: `lora_linear`, BAT and RandLoRA race PEFT's own,
LoRA's and DoRA's also in its dtypes and behind dropouts.

Designs for many rows, one thread of that Zen 4, CPU time beside other work. bfloat16 LoRA, sums of our product kept in
float32, factors as a product, gain and rounding as passes: 15.3 and 58.5 ms at 512 and 2048 rows; the library's
product, rounded, then factors, gain, bias and rounding in one pass: 14.0 to 14.5 and 54.1 (kept). The factors' tile of
four rows by four vectors, inlined, was spilled: 2.3 ms of 2048 rows, of eight by two as a function 1.4; its products
are 0.75. Left in 24.6 ms forward are h = A x^T (1.0: x is widened for 16 rows) and first touches of y. Weighed and not
built: the factors in the weight each step saves the two thin products behind x W^T and g W (4 N r (I + O) of 12) for 2
r O I and a copy of W: 1 to 2 % of float32 at 2048 rows, and in bfloat16 the sum would be rounded to the weight's
steps; one product over [W; A] wants them next to each other, a copy of W a step; A as two bfloat16 parts for h is
2^-17 off, beyond twice eager's for dB, as three as slow as widening x. RandLoRA at 512 rows: factors apart 7 N, in the
weight 3 N + 2 d (both 7 d / 2), weight for y and dx with the scales from (g second)^T x 4 N + d: 6 d / 2, from 1.05 to
1.21 (kept). BAT: block to the input 10 N; dB without dW as sum of (g_p W_pq)^T x_q is two products in dW's place.

What was weighed for DoRA's W A^T and not built: W A^T by increments (Adam's step of A is no product of few rows, so
nothing of the last W A^T remains); A stacked under x, so that one product reads W once (two products of 16 rows take
0.78 ms of one core, one of 32 rows 0.53: 0.25 of the 2.0 ms at 16 rows, still 0.6 of LoRA's speed); W A^T in bfloat16
for a float32 layer (an error of 2^-9 of what the adapter adds, beyond twice eager's).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..case import Case, Provider, Unavailable, peer, yardstick

RANK, ALPHA = 16, 32
TARGETS = {"bat": 1.5, "randlora": 2.0}
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def _name(generator: torch.Generator, device: torch.device) -> int:
    """A number that the copies of drawn inputs keep."""
    return int(torch.randint(1 << 30, (1,), generator=generator, device=device))


def _base(x: Tensor, grad: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """The layer without an adapter, x W^T and g W: PEFT's ratio over this one's bounds what any adapter can gain."""
    return x @ weight.t(), grad @ weight


def _bound() -> Provider:
    return yardstick(lambda: _base)


class _Layer:
    """One PEFT layer a draw, made at the first call with it: (output, gradients of x, A, B and the magnitude)."""

    def __init__(self, dora: bool, fused: bool) -> None:
        self.dora, self.fused, self.made = dora, fused, {}  # type: ignore[var-annotated]

    def _make(self, weight: Tensor, A: Tensor, B: Tensor, m: Tensor) -> nn.Module:
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise Unavailable("peft is not installed") from error
        from w2s_fast.integrations.peft import use_fused_adapters

        config = LoraConfig(target_modules=["0"], r=RANK, lora_alpha=ALPHA, use_dora=self.dora)
        base = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype))
        model = get_peft_model(base.to(weight.device), config)
        given = {"lora_A.default.weight": A, "lora_B.default.weight": B, "base_layer.weight": weight}
        given |= {"lora_magnitude_vector.default.weight": m} if self.dora else {}
        layer = model.base_model.model[0]
        for name, value in given.items():
            layer.get_parameter(name).data = value.clone()
        if self.fused:
            use_fused_adapters(model)
        found: nn.Module = layer
        return found

    def __call__(
        self, x: Tensor, grad: Tensor, weight: Tensor, A: Tensor, B: Tensor, m: Tensor, draw: int
    ) -> tuple[Tensor, ...]:
        if draw not in self.made:  # copies of a draw share its layer: making one takes longer than a call
            self.made[draw] = self._make(weight, A, B, m)
        layer = self.made[draw]
        layer.__dict__.pop("_w2s_fast_norms", None)  # an optimizer changes the factors between two calls
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = layer(x)
            wanted = [p for p in layer.parameters() if p.requires_grad]
            return (y.detach(), *torch.autograd.grad(y, [x, *wanted], grad))


def _compiled_lora() -> Callable[..., Any]:
    """PEFT's formula as a compiler sees it best: no module, no look-ups; forward and backward."""
    torch.compiler.reset()

    def forward(x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
        base = nn.functional.linear(x, weight)
        low = nn.functional.linear(nn.functional.linear(x.to(A.dtype), A), B)
        return (base + low * (ALPHA / RANK)).to(x.dtype)

    made = torch.compile(forward, dynamic=False)

    def call(x: Tensor, grad: Tensor, weight: Tensor, A: Tensor, B: Tensor, m: Tensor, draw: int) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            wanted = [t.detach().requires_grad_() for t in (x, A, B)]
            y = made(wanted[0], weight, *wanted[1:])
            return (y.detach(), *torch.autograd.grad(y, wanted, grad))

    return call


def _case(dora: bool, rows: int, inside: int, outside: int, dtype: torch.dtype, hot: bool = False) -> Case:
    def inputs(generator: torch.Generator, device: torch.device) -> tuple[Any, ...]:
        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        weight = draw(outside, inside) / inside**0.5
        A, B = draw(RANK, inside) / inside**0.5, 0.1 * draw(outside, RANK)
        return (draw(rows, inside).to(dtype), draw(rows, outside).to(dtype), weight.to(dtype), A, B,
                weight.norm(dim=1) * 1.1, _name(generator, device))  # fmt: skip

    def close(actual: Any, expected: Any) -> float:
        allowed = 1e-4 if dtype is torch.float32 else 3e-2
        return max(float((a.double() - e).norm() / e.norm()) / allowed for a, e in zip(actual, expected, strict=True))

    name = "dora" if dora else "lora"
    other: Callable[..., Any] = _Layer(False, False)
    providers = {"peft": peer(lambda: _Layer(dora, False)), "base": _bound()}
    targets = {"peft": 1.2}
    if not dora and inside == 1024:  # compiling takes seconds a case
        providers["compile"] = Provider("compile", _compiled_lora)
        targets["compile"] = 1.0
    if dora:
        providers["peft-lora"] = yardstick(lambda: other, exact=lambda: _Layer(False, False))
        targets = {"peft": 2.0, "peft-lora": 1 / 1.15}
    size = torch.empty((), dtype=dtype).element_size()
    return Case(
        op="integrations.peft", name=f"{name}-N{rows}-{outside}x{inside}-{SHORT[dtype]}", dtype=str(dtype)[6:],
        shape={"N": rows, "out": outside, "in": inside, "r": RANK}, mode="fwdbwd",
        bytes=size * (2 * rows * inside + 2 * rows * outside + outside * inside),
        flops=4.0 * rows * inside * outside + 10.0 * rows * RANK * (inside + outside), hot=hot,
        floor_rate=str(dtype)[6:],
        prediction="LoRA: one op, whose float32 product runs at twice the library's rate on AMD: 1.9x; in bfloat16 the "
        "passes that are saved: 1.3x; level where rows are few. DoRA: no identity through the factors, no dense norm "
        "and its gradient: 2x, and 1.15 times LoRA's time where the products dominate. Two Zen 5 cores: LoRA 1.55, 1.9 "
        "and 2.0 in float32 at 16, 512 and 2048 rows, 1.4 and 1.6 in bfloat16 at 512 and 2048; DoRA 2 to 3. One Zen 4 "
        "core, whose library is at the peak: LoRA 1 to 1.2, in bfloat16 1.1 at 1 and 16 rows; DoRA 3.5 to 9 times "
        "PEFT's at 1 and 16 rows, 1.3 to 1.5 from 512 on",
        inputs=inputs, ours=_Layer(dora, True), reference=_Layer(dora, False), providers=providers, targets=targets,
        compare=close,
    )  # fmt: skip


class _Whole:
    """One MiSS, BAT or RandLoRA layer a draw, made at the first call: (output, gradients of x and adapter)."""

    def __init__(self, kind: str, fused: bool) -> None:
        self.kind, self.fused, self.made = kind, fused, {}  # type: ignore[var-annotated]

    def _make(self, weight: Tensor) -> nn.Module:
        try:
            from peft import MissConfig, RandLoraConfig, get_peft_model
        except ImportError as error:
            raise Unavailable("peft is not installed") from error
        from w2s_fast.integrations.peft import use_fused_adapters

        if self.kind == "randlora":
            config = RandLoraConfig(target_modules=["0"], r=32)
        else:
            config = MissConfig(target_modules=["0"], r=64, init_weights="bat" if self.kind == "bat" else True)
        model = get_peft_model(nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False)), config)
        draw = torch.Generator().manual_seed(0)
        for p in model.parameters():
            if p.requires_grad:
                p.data += 0.01 * torch.randn(p.shape, generator=draw)
        model.to(weight.device, weight.dtype)
        model.base_model.model[0].base_layer.weight.data = weight.clone()
        if self.fused:
            use_fused_adapters(model)
        found: nn.Module = model.base_model.model[0]
        return found

    def __call__(self, x: Tensor, grad: Tensor, weight: Tensor, draw: int) -> tuple[Tensor, ...]:
        if draw not in self.made:
            self.made[draw] = self._make(weight)
        layer = self.made[draw]
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = layer(x)
            wanted = [p for p in layer.parameters() if p.requires_grad]
            return (y.detach(), *torch.autograd.grad(y, [x, *wanted], grad))


def _whole_flops(kind: str, rows: int, side: int) -> float:
    """The cheaper of the adapter in the weight and the factors by themselves; MiSS has no product of its own size."""
    if kind == "randlora":  # forming the weight and the scales' gradient from (g B)^T x, from B^T (g^T x), or apart
        return side * side * min(8.0 * rows + 2.0 * side, 6.0 * rows + 4.0 * side, 14.0 * rows)
    merged = {"miss": 0.0, "bat": 4.0 * 64}[kind]
    apart = {"miss": 0.0, "bat": 4.0}[kind]
    layer = 4.0 if kind == "miss" else 6.0
    return side * side * min(layer * rows + merged, (layer + apart) * rows)


def _whole_case(kind: str, rows: int, side: int) -> Case:
    def inputs(generator: torch.Generator, device: torch.device) -> tuple[Any, ...]:
        x, grad, weight = (torch.randn(n, side, generator=generator, device=device) for n in (rows, rows, side))
        return x, grad, weight / side**0.5, _name(generator, device)

    def close(actual: Any, expected: Any) -> float:
        return max(float((a.double() - e).norm() / e.norm()) / 1e-4 for a, e in zip(actual, expected, strict=True))

    return Case(
        op="integrations.peft", name=f"{kind}-N{rows}-{side}x{side}-fp32", dtype="float32",
        shape={"N": rows, "out": side, "in": side}, mode="fwdbwd", bytes=4 * (4 * rows * side + 2 * side * side),
        flops=_whole_flops(kind, rows, side),
        prediction="BAT: two passes over the weight instead of six, 1.5x where rows are few. RandLoRA: 3 + 2 d / N "
        "products of the layer's size instead of 7: 1.75x at N = 2 d, level at d / 2; more where our product is faster "
        "than the library's (two Zen 5 cores: BAT 1.8 to 2, RandLoRA 2.7 at 2048 rows; one Zen 4 core: BAT 1.1, "
        "RandLoRA 2.1 at 16 rows, whose scales go into the input, 1.05 at 512 and 1.9 at 2048)",
        inputs=inputs, ours=_Whole(kind, True), reference=_Whole(kind, False),
        providers={"peft": peer(lambda: _Whole(kind, False)), "base": _bound()},
        targets={"peft": TARGETS[kind]} if kind in TARGETS else {}, compare=close,
    )  # fmt: skip


class _Mixed:
    """One LoRA layer with an adapter a row, evaluated."""

    def __init__(self, fused: bool) -> None:
        self.fused, self.made = fused, {}  # type: ignore[var-annotated]

    def _make(self, weight: Tensor, A: Tensor, B: Tensor) -> nn.Module:
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise Unavailable("peft is not installed") from error
        from w2s_fast.integrations.peft import use_fused_adapters

        config = LoraConfig(target_modules=["0"], r=RANK, lora_alpha=ALPHA)
        base = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype))
        model = get_peft_model(base.to(weight.device), config, adapter_name="0")
        for i in range(1, len(A)):
            model.add_adapter(str(i), config)
        layer = model.base_model.model[0].eval()
        layer.base_layer.weight.data = weight.clone()
        for i, (a, b) in enumerate(zip(A, B, strict=True)):
            layer.lora_A[str(i)].weight.data, layer.lora_B[str(i)].weight.data = a.clone(), b.clone()
        if self.fused:
            use_fused_adapters(model)
        found: nn.Module = layer
        return found

    def __call__(self, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, draw: int) -> Tensor:
        if draw not in self.made:
            self.made[draw] = self._make(weight, A, B)
        with torch.no_grad():
            y: Tensor = self.made[draw](x, adapter_names=[str(i) for i in range(len(x))])
        return y


def _mixed_case(rows: int, side: int, dtype: torch.dtype) -> Case:
    def inputs(generator: torch.Generator, device: torch.device) -> tuple[Any, ...]:
        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        A, B = draw(rows, RANK, side) / side**0.5, 0.1 * draw(rows, side, RANK)
        weight = (draw(side, side) / side**0.5).to(dtype)
        return draw(rows, 1, side).to(dtype), weight, A, B, _name(generator, device)

    def close(actual: Any, expected: Any) -> float:
        allowed = 1e-4 if dtype is torch.float32 else 3e-2
        return float((actual.double() - expected).norm() / expected.norm()) / allowed

    size = torch.empty((), dtype=dtype).element_size()
    return Case(
        op="integrations.peft", name=f"mixed-N{rows}-{side}x{side}-{SHORT[dtype]}", dtype=str(dtype)[6:],
        shape={"N": rows, "out": side, "in": side, "r": RANK}, mode="fwd",
        bytes=size * (side * side + 2 * rows * side) + 4 * 2 * rows * RANK * side,
        flops=2.0 * rows * side * side + 4.0 * rows * RANK * side,
        prediction="PEFT takes the rows out, multiplies twice and puts them back for each adapter; ours multiplies all "
        "rows by all factors and keeps what is a row's own: 1.3x (one Zen 4 core: 1.4, in bfloat16 1.6)",
        inputs=inputs, ours=_Mixed(True), reference=_Mixed(False), providers={"peft": peer(lambda: _Mixed(False))},
        targets={"peft": 1.2}, compare=close,
    )  # fmt: skip


def cases(device: str) -> list[Case]:
    """The same cases on every device."""
    f, b = torch.float32, torch.bfloat16
    layers = [_case(dora, rows, side, side, dtype, hot=rows == 512 and side == 1024) for dora in (False, True)
              for dtype in (f, b) for side in (1024, 2048, 4096) for rows in (1, 16, 512, 2048)]  # fmt: skip
    kinds = {"miss": 512, "bat": 2048, "randlora": 512}  # rows up to which 4096 is measured: seconds a call beyond
    whole = [_whole_case(kind, rows, side) for kind, most in kinds.items() for side in (1024, 4096)
             for rows in (1, 16, 512, 2048) if side == 1024 or rows <= most]  # fmt: skip
    mixed = [_mixed_case(8, 1024, dtype) for dtype in (f, b)]
    return [*layers, *whole, _whole_case("randlora", 2048, 2048), *mixed]
