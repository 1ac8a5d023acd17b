"""`python -m w2s_fast.testing.new_op family/op`: the skeleton of an op in every layer.

The skeleton is an op that works, ``y = scale x`` with a scale a row and kernels for its gradient, so that every test
holds before the first line is changed. It never overwrites.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

REFERENCE = '''"""{op}: y = scale x, a scale a row."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..numerics import accumulate_dtype


class {title_op}Gradients(NamedTuple):
    """Each like its argument."""

    dx: Tensor
    dscale: Tensor


def {op}(x: Tensor, scale: Tensor) -> Tensor:
    """y ``[R, D]`` in the dtype of x; scale ``[R]``. Arithmetic in float32 (float64 if an input is)."""
    acc = accumulate_dtype(x, scale)
    return (x.to(acc) * scale.to(acc).unsqueeze(1)).to(x.dtype)


def {op}_backward(grad: Tensor, x: Tensor, scale: Tensor) -> {title_op}Gradients:
    """Of grad ``[R, D]``, in the same arithmetic."""
    acc = accumulate_dtype(x, scale)
    g, wide, factor = grad.to(acc), x.to(acc), scale.to(acc).unsqueeze(1)
    return {title_op}Gradients((g * factor).to(x.dtype), (g * wide).sum(1).to(scale.dtype))
'''

OP = '''"""{op}: y = scale x, a scale a row."""

from __future__ import annotations

from torch import Tensor

from ... import checks
from ...library import Kernel, define
from ...reference.{family} import {op} as reference

{constant} = define(
    reference.{op},
    fake=lambda x, scale: x.new_empty(x.shape),
    gradient=reference.{op}_backward,
    triton=Kernel(),
)


def {op}(x: Tensor, scale: Tensor) -> Tensor:
    """``y_rd = scale_r x_rd`` in one pass.

    Args:
        x: ``[R, D]``; float32, bfloat16, float16 or float64.
        scale: ``[R]``; any of these dtypes.

    Returns:
        y like x, contiguous. Differentiable, once, in x and scale.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, w2s_fast
        >>> w2s_fast.{op}(torch.tensor([[1.0, 2.0]]), torch.tensor([3.0]))
        tensor([[3., 6.]])
    """
    op = "{op}"
    checks.is_float_tensor(op, "x", x)
    checks.is_float_tensor(op, "scale", scale)
    if x.ndim != 2:
        checks.fail(op, "x", "of shape (R, D)", tuple(x.shape))
    if scale.shape != x.shape[:1]:
        checks.fail(op, "scale", f"of shape ({{x.shape[0]}},)", tuple(scale.shape))
    checks.same_device(op, [("x", x), ("scale", scale)])
    y: Tensor = {constant}(x.contiguous(), scale.contiguous())
    return y
'''

HEADER = """#pragma once

#include <vector>

#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace w2s {{

struct {title_op} {{  // y in the forward alone; grad, dx and sums (dscale) in the backward
  int64_t R, D;
  Rows x, y, grad, dx;
  std::vector<double> scale;
  double* sums;
}};

template <class A>
struct {title_op}Kernels {{  // {op}_kernel.cpp
  void (*run)(const {title_op}& s);
  void (*backward)(const {title_op}& s);
}};

}}  // namespace w2s
"""

HOST = """#include "cpu/{family}/{op}.h"

#include "cpu/tensors.h"

namespace w2s {{
namespace {{

Tensor {op}(Tensor x, Tensor scale) {{
  expect(scale, "scale", {{x.size(0)}});
  Tensor y = empty_of(x);
  const {title_op} s{{x.size(0), x.size(1), Rows(x), Rows(y), {{}}, {{}}, numbers(scale), nullptr}};
  with_kernels<{title_op}Kernels>(is_double(x) || is_double(scale), [&](const auto& of) {{ of.run(s); }});
  return y;
}}

std::tuple<Tensor, Tensor> {op}_backward(Tensor grad, Tensor x, Tensor scale) {{
  expect_like(grad, "grad", x);
  expect(scale, "scale", {{x.size(0)}});
  Tensor dx = empty_of(x);
  std::vector<double> sums(size_t(x.size(0)));
  const {title_op} s{{x.size(0), x.size(1), Rows(x), {{}}, Rows(grad), Rows(dx), numbers(scale), sums.data()}};
  with_kernels<{title_op}Kernels>(is_double(x) || is_double(scale), [&](const auto& of) {{ of.backward(s); }});
  return {{dx, narrowed(sums, scale)}};
}}

}}  // namespace
}}  // namespace w2s

W2S_IMPLEMENTATIONS(m) {{
  m.add<&w2s::{op}>("{op}");
  m.add<&w2s::{op}_backward>("{op}_backward");
}}
"""

VECTORS = """// {op}: y = scale x, a scale a row, in one pass over segments of 8,192 elements; its gradient takes a row
// as an item, so that a sum over a row has one order. Floor: x (and grad) read once, y (dx) written once.
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

// dx, and this tile's part of dscale
template <class A>
W2S_INLINE A {op}_backward_tile(const A* grad, const A* x, int n, A scale, A* dx) {{
  using V = Vec<A>;
  const V factor = V::set(scale);
  V sums = V::set(0);
  int i = 0;
  for (; i + V::W <= n; i += V::W) {{
    const V value = V::load(x + i), g = V::load(grad + i);
    (factor * g).store(dx + i);
    sums = V::fma(g, value, sums);
  }}
  A sum = sums.sum();
  for (; i < n; ++i) {{
    const A value = x[i], g = grad[i];
    dx[i] = scale * g;
    sum += g * value;
  }}
  return sum;
}}

template <class A>
inline void {op}_as(const {title_op}& s) {{
  each_tile(s.R, s.D, [&s](int64_t row, int64_t at, int n) {{
    A wide_x[TILE], wide_y[TILE];
    const A* x = read_tile(s.x, row, at, n, wide_x);
    write_tile(s.y, row, at, n, wide_y, [&](A* y) {{ {op}_tile(x, n, A(s.scale[size_t(row)]), y); }});
  }});
}}

template <class A>
inline void {op}_backward_as(const {title_op}& s) {{
  row_sums(s.R, s.D, s.sums, [&s](int64_t row, int64_t at, int n) {{
    A wide_grad[TILE], wide_x[TILE], wide_dx[TILE], sum = 0;
    const A *grad = read_tile(s.grad, row, at, n, wide_grad), *x = read_tile(s.x, row, at, n, wide_x);
    write_tile(s.dx, row, at, n, wide_dx,
               [&](A* dx) {{ sum = {op}_backward_tile(grad, x, n, A(s.scale[size_t(row)]), dx); }});
    return sum;
  }});
}}

W2S_KERNELS({title_op}Kernels, {op}_as<Real>, {op}_backward_as<Real>)

#include "cpu/target_end.h"
"""

KERNEL = '''"""{op}: y = scale x, a scale a row.

One program a tile of a row; the gradient one a row, which sums. Floor: x (and grad) read once, y (dx) written once.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import AotCase, Meta, cdiv, launch, row_tile

BLOCK = 1024


@triton.jit
def _{op}_kernel(x, scale, size, tiles, o_y, BLOCK: tl.constexpr):
    row, tile = row_tile(tiles)
    cols = tile * BLOCK + tl.arange(0, BLOCK)
    at, mask = row * size + cols, cols < size
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(o_y + at, (tl.load(scale + row).to(tl.float32) * value).to(o_y.dtype.element_ty), mask=mask)


@triton.jit
def _{op}_backward_kernel(grad, x, scale, size, o_dx, o_dscale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(scale + row).to(tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        at, mask = row * size + cols, cols < size
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(o_dx + at, (factor * g).to(o_dx.dtype.element_ty), mask=mask)
        sums += g * value
    tl.store(o_dscale + row, tl.sum(sums, 0).to(o_dscale.dtype.element_ty))


def launch_{op}(x: Any, scale: Any) -> Any:
    """Arguments of `{op}` -> y."""
    rows, size = x.shape
    y, tiles = x.new_empty(x.shape), cdiv(size, BLOCK)
    launch(_{op}_kernel, rows * tiles, x, x, scale, size, tiles, y, BLOCK=BLOCK)
    return y


def launch_{op}_backward(grad: Any, x: Any, scale: Any) -> tuple[Any, Any]:
    """Arguments of `{op}_backward` -> (dx, dscale)."""
    dx, dscale = x.new_empty(x.shape), scale.new_empty(scale.shape)
    launch(_{op}_backward_kernel, x.shape[0], x, grad, x, scale, x.shape[1], dx, dscale, BLOCK=BLOCK)
    return dx, dscale


def aot_cases() -> list[AotCase]:
    """Both kernels on rows of a large model."""

    def both() -> None:
        x, scale = Meta((256, 4096), "bfloat16"), Meta((256,), "float32")
        launch_{op}(x, scale)
        launch_{op}_backward(x, x, scale)

    return [AotCase("bf16", both)]
'''

SAMPLES = '''"""Samples of `{op}`."""

from __future__ import annotations

from . import Sample, in_all_layouts

SAMPLES = [
    *in_all_layouts("{op}", lambda m, x: (x, m.logits(len(x)))),
    Sample("{op}", "scale-strided", lambda m: ((m.logits(4, 7), m.logits(8)[::2]), {{}})),
    Sample("{op}", "scale-float32", lambda m: ((m.logits(4, 37), m.logits(4).float()), {{}})),
    Sample("{op}", "scale-special", lambda m: ((m.logits(5, 37), m.special(5)), {{}})),
]
'''

DOMAINS = '''"""{title}."""

from __future__ import annotations

import w2s_fast

from ..domain import Domain

DOMAINS: list[Domain] = []
'''

DOMAIN = """
DOMAINS.append(
    Domain(
        "{op}", {{"R": (1, 4096), "D": (1, 8192)}},
        inputs=lambda random, sizes: (random(sizes["R"], sizes["D"]), random(sizes["R"])),
        ways=lambda sizes: {{"ours": w2s_fast.{op}, "eager": lambda x, scale: x * scale.unsqueeze(1)}},
        flops=lambda sizes: sizes["R"] * sizes["D"], elements=lambda sizes: sizes["R"] * sizes["D"], trained=(0, 1),
        cases={{"R1024-D4096": {{"R": 1024, "D": 4096}}}}, bytes=lambda sizes: 8 * sizes["R"] * sizes["D"],
        prediction="bound by memory, as the formula is; with gradient two passes instead of three",
    )
)  # fmt: skip
"""

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
    ("w2s_fast/__init__.py", "    from .ops.{family}.{op} import {op}\n", r"^    from \.ops\..*\n"),
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
    title_op = op.title().replace("_", "")
    names = {"family": family, "op": op, "constant": op.upper(), "title": title, "title_op": title_op}
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
    python = ".venv/bin/python -m"
    print(f"left: the mathematics in place of y = scale x (in prose too: grep -rn 'scale x'); then\n"
          f"make build && {python} w2s_fast.testing.aot --write --module {family}.{op} && make readme\n"
          f"{python} pytest -q tests/test_{{contract,samples,guarantee,layouts,citizenship}}.py -k {op}\n"
          f"TRITON_INTERPRET=1 {python} pytest -q tests/test_interpreter.py -k {op}")  # fmt: skip


if __name__ == "__main__":
    main()
