"""`python -m w2s_fast.testing.new_op family/op`: the skeleton of an op in every layer.

The skeleton is an op that works, ``y = scale x`` with a gradient, so that after `make build` every test holds before
the first line is changed. It never overwrites.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

REFERENCE = '''"""{op}: y = scale x."""

from __future__ import annotations

from torch import Tensor

from ..numerics import accumulate_dtype


def {op}(x: Tensor, scale: float) -> Tensor:
    """y ``[N]`` in the dtype of x ``[N]``; arithmetic in float32 (float64 if x is)."""
    return (x.to(accumulate_dtype(x)) * scale).to(x.dtype)
'''

OP = '''"""{op}: y = scale x."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ... import checks
from ...gradients import Call
from ...library import Kernel, define
from ...reference.{family} import {op} as reference


def _backward(call: Call, grad: Tensor) -> dict[str, Any]:
    return {{"x": grad * call.scale}}


{constant} = define(
    reference.{op},
    fake=lambda x, scale: x.new_empty(x.shape),
    backward=_backward,
    twice=True,
    triton=Kernel(),
)


def {op}(x: Tensor, scale: float) -> Tensor:
    """``y = scale x`` in one pass.

    Args:
        x: any shape; float32, bfloat16, float16 or float64.
        scale: a number.

    Returns:
        y like x, contiguous. Differentiable in x.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, w2s_fast
        >>> w2s_fast.{op}(torch.tensor([1.0, 2.0]), 3.0)
        tensor([3., 6.])
    """
    op = "{op}"
    checks.is_float_tensor(op, "x", x)
    y: Tensor = {constant}(x.reshape(-1).contiguous(), checks.number(op, "scale", scale))
    return y.reshape(x.shape)
'''

HEADER = """#pragma once

#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace w2s {{

template <class A>
struct {table} {{  // {op}_kernel.cpp
  void (*run)(const Rows& x, int64_t size, double scale, const Rows& y);
}};

}}  // namespace w2s
"""

HOST = """#include "cpu/{family}/{op}.h"

#include "cpu/tensors.h"

namespace w2s {{
namespace {{

Tensor {op}(Tensor x, double scale) {{
  Tensor y = fresh(x, {{x.size(0)}});
  with_kernels<{table}>(is_double(x), [&](const auto& kernels) {{ kernels.run(Rows(x), x.size(0), scale, Rows(y)); }});
  return y;
}}

}}  // namespace
}}  // namespace w2s

W2S_IMPLEMENTATIONS(m) {{ m.add<&w2s::{op}>("{op}"); }}
"""

VECTORS = """// {op}: y = scale x, one pass over segments of 8,192 elements. Floor: x read once, y written once.
#include "cpu/{family}/{op}.h"

#include "cpu/target_begin.h"

#include "cpu/tiles_kernel.h"

template <class A>
W2S_INLINE void {op}_tile(const A* x, int n, A scale, A* y) {{
  using V = Vec<A>;
  const V factor = V::set(scale);
  int i = 0;
  for (; i + V::W <= n; i += V::W) (factor * V::load(x + i)).store(y + i);
  for (; i < n; ++i) y[i] = scale * x[i];
}}

template <class A>
inline void {op}_as(const Rows& x, int64_t size, double scale, const Rows& y) {{
  each_tile(1, size, [&](int64_t row, int64_t at, int n) {{
    A wide_x[TILE], wide_y[TILE];
    const A* from = read_tile(x, row, at, n, wide_x);
    write_tile(y, row, at, n, wide_y, [&](A* to) {{ {op}_tile(from, n, A(scale), to); }});
  }});
}}

W2S_KERNELS({table}, {op}_as<Real>)

#include "cpu/target_end.h"
"""

KERNEL = '''"""{op}: y = scale x, one program a block. Floor: x read once, y written once."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import AotCase, Meta, cdiv, launch

BLOCK = 1024


@triton.jit
def _{op}_kernel(x, scale, size, o_y, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(o_y + at, (value * scale).to(o_y.dtype.element_ty), mask=at < size)


def launch_{op}(x: Any, scale: float) -> Any:
    """Arguments of `{op}` -> y."""
    y = x.new_empty(x.shape)
    launch(_{op}_kernel, cdiv(x.shape[0], BLOCK), x, x, scale, x.shape[0], y, BLOCK=BLOCK)
    return y


def aot_cases() -> list[AotCase]:
    """A million numbers."""
    return [AotCase("bf16", lambda: launch_{op}(Meta((1 << 20,), "bfloat16"), 0.5))]
'''

SAMPLES = '''"""Samples of `{op}`."""

from __future__ import annotations

from . import Sample

SAMPLES = [
    Sample("{op}", "plain", lambda m: ((m.logits(5, 7), 1.5), {{}})),
    Sample("{op}", "sliced", lambda m: ((m.logits(5, 9)[1:, 2:], -2.0), {{}})),
    Sample("{op}", "transposed", lambda m: ((m.logits(3, 11).t(), 0.3), {{}})),
    Sample("{op}", "expanded", lambda m: ((m.logits(1, 5).expand(3, 5), 1.0), {{}})),
    Sample("{op}", "empty", lambda m: ((m.logits(0, 5), 1.0), {{}})),
]
'''

DOMAINS = '''"""{title}."""

from __future__ import annotations

import w2s_fast

from ..domain import Domain

DOMAINS: list[Domain] = []
'''

DOMAIN = '''
DOMAINS.append(
    Domain(
        "{op}", {{"numbers": (1, 1 << 22)}},
        inputs=lambda random, sizes: (random(sizes["numbers"]),),
        ways=lambda sizes: {{"ours": lambda x: w2s_fast.{op}(x, 0.5), "eager": lambda x: x * 0.5}},
        flops=lambda sizes: sizes["numbers"], elements=lambda sizes: sizes["numbers"], trained=(0,),
        cases={{"4M": {{"numbers": 1 << 22}}}}, bytes=lambda sizes: 8 * sizes["numbers"],
        prediction="bound by memory, as the formula is",
    )
)  # fmt: skip
'''

LAYERS = {
    "w2s_fast/reference/{family}/{op}.py": REFERENCE,
    "w2s_fast/ops/{family}/{op}.py": OP,
    "csrc/cpu/{family}/{op}.h": HEADER,
    "csrc/cpu/{family}/{op}.cpp": HOST,
    "csrc/cpu/{family}/{op}_kernel.cpp": VECTORS,
    "kernels/{family}/{op}.py": KERNEL,
    "w2s_fast/testing/samples/{op}.py": SAMPLES,
}
#: What each file gets a line in: the file, the line, and the pattern of the lines among which it is sorted.
LINES = (
    ("w2s_fast/__init__.py", "from .ops.{family}.{op} import {op}\n", r"^from \.ops\..*\n"),
    ("w2s_fast/__init__.py", '    "{op}",\n', r'^    "[a-z]\w*",\n'),
)


def _insert(text: str, line: str, among: str) -> str:
    """``line`` before the first of the matching lines that sorts after it, or behind the last."""
    lines = list(re.finditer(among, text, re.M))
    later = [m.start() for m in lines if m.group() > line]
    at = later[0] if later else lines[-1].end()
    return text[:at] + line + text[at:]


def write(root: Path, family: str, op: str) -> list[Path]:
    """Write the skeleton under ``root``, the root of a source tree; the files it made or changed."""
    title = family.replace("_", " ").capitalize()
    table = op.title().replace("_", "") + "Kernels"
    names = {"family": family, "op": op, "constant": op.upper(), "title": title, "table": table}
    made = [root / path.format(**names) for path in LAYERS]
    for path in made:
        if path.exists():
            raise FileExistsError(f"{path} is there already")
    for layer in ("reference", "ops"):
        start = root / "w2s_fast" / layer / family / "__init__.py"
        if not start.exists():
            start.parent.mkdir()
            start.write_text(f'"""{title}."""\n', encoding="utf-8")
            made.append(start)
    for path, template in zip(made, LAYERS.values(), strict=False):
        path.parent.mkdir(exist_ok=True)
        path.write_text(template.format(**names), encoding="utf-8")
    domains = root / "bench" / "domains" / f"{family}.py"
    before = domains.read_text(encoding="utf-8") if domains.exists() else DOMAINS.format(**names)
    domains.write_text(before + DOMAIN.format(**names), encoding="utf-8")
    made.append(domains)
    for name, line, among in LINES:
        path = root / name
        text = _insert(path.read_text(encoding="utf-8"), line.format(**names), among)
        path.write_text(text, encoding="utf-8")
        if path not in made:
            made.append(path)
    return made


def main() -> None:
    """Write the skeleton and say what is left to do."""
    parser = argparse.ArgumentParser(prog="python -m w2s_fast.testing.new_op", description=main.__doc__)
    parser.add_argument("name", help="family/op, in lower case with underscores")
    family, _, op = parser.parse_args().name.partition("/")
    if not (re.fullmatch(r"[a-z]\w*", family) and re.fullmatch(r"[a-z]\w*", op)):
        parser.error("name must be family/op, as in diffusion/row_scale")
    for path in write(ROOT, family, op):
        print(path.relative_to(ROOT))
    print(f"left: the mathematics in place of y = scale x; then\nmake build readme && .venv/bin/python -m pytest -q "
          f"tests/test_contract.py tests/test_samples.py tests/test_guarantee.py -k {op}")  # fmt: skip


if __name__ == "__main__":
    main()
