"""What lies between a tensor's numbers is nobody's business: every argument in every layout, the same bits.

w2s_fast/testing/layouts.py makes the layouts (gaps, rows apart, transposed, expanded, an offset; what is not the
tensor's is poisoned). Public ops first, then the dispatcher calls themselves, backward ones included, as a compiled
graph makes them. The Triton kernels' part is in test_interpreter.py.
"""

from __future__ import annotations

import pytest
import torch

import w2s_fast
from w2s_fast import extension
from w2s_fast.testing import layouts
from w2s_fast.testing.hostile import draw, judge
from w2s_fast.testing.samples import Sample, all_samples
from w2s_fast.testing.selection import amount, covering

CASES = [(sample, dtype) for sample in all_samples() for dtype in sample.dtypes]
#: Layouts of each argument of a case, others for each argument.
MOST = amount(3, len(layouts.LAYOUTS))


def named(value: Sample | torch.dtype) -> str:
    """What a test's name says of a parameter."""
    return value.id if isinstance(value, Sample) else str(value).removeprefix("torch.")


def cases(seed: int) -> list[tuple[Sample, torch.dtype]]:
    """Some of every op and some of every dtype (in full: all)."""
    return covering(CASES, lambda case: [case[0].op, case[1]], 50, seed)


#: Where the layout chooses the order of a sum, on purpose: a transposed weight is read at the units that are alive, and
#: torch's own product of a matrix and an expanded one is another.
OTHER_SUMS = {
    ("interval_linear", "[0][2] transposed"),
    ("interval_linear", "[2] transposed"),
    ("interval_linear", "[2] expanded columns"),
    ("sparse_lowrank_materialize", "[0][0] expanded rows"),
    ("linear_ce", "[1]['class_weight']"),  # torch's product with it looks at its address
}
needs_cpp = pytest.mark.skipif(extension.ERROR is not None, reason="the extension is not built")


@pytest.mark.usefixtures("own_products")
@pytest.mark.parametrize("sample, dtype", cases(0), ids=named)
def test_arguments(sample: Sample, dtype: torch.dtype):
    assert layouts.check_arguments(sample, dtype, OTHER_SUMS, MOST) == []


@pytest.mark.usefixtures("own_products")
@needs_cpp
@pytest.mark.parametrize("sample, dtype", cases(1), ids=named)
def test_calls(sample: Sample, dtype: torch.dtype):
    with w2s_fast.backend("cpp" if "cpp" not in sample.refused_by else "auto"):
        assert layouts.check_calls(sample, dtype, OTHER_SUMS, MOST) == []


def test_a_kernel_that_takes_a_vector_to_be_contiguous_is_found(monkeypatch: pytest.MonkeyPatch):
    """The check can fail: an op whose bias is read as the C++ kernel once read it, past its end."""
    original = w2s_fast.interval_linear

    def careless(a, b, weight, bias=None, **options):
        if bias is not None and not bias.is_contiguous():
            bias = bias.as_strided(bias.shape, (1,))
        return original(a, b, weight, bias, **options)

    monkeypatch.setattr(w2s_fast, "interval_linear", careless)
    sample = next(s for s in all_samples() if s.id == "interval_linear-plain")
    found = layouts.check_arguments(sample, torch.float32, OTHER_SUMS)
    assert any("[0][3] gaps" in line for line in found)


@pytest.mark.usefixtures("own_products")
@pytest.mark.parametrize("rounding", ["fast", "sound"])
def test_weight_and_bias_stored_together(rounding: str):
    """The homogeneous form: the bias is a column of the matrix."""
    torch.manual_seed(0)
    whole = torch.randn(5, 4)
    weight, bias = whole[:, :-1], whole[:, -1]
    x, y = torch.randn(2, 3), torch.tensor([0, 1])
    lower, upper = x - 0.1, x + 0.1
    options = {"rounding": rounding}
    low, high = w2s_fast.interval_linear(lower, upper, weight, bias, **options)
    middle = x @ weight.t() + bias
    assert bool(((low <= middle) & (middle <= high)).all())
    for op, rest in ((w2s_fast.interval_linear, ()), (w2s_fast.margin_logits, (y,))):
        found = op(lower, upper, weight, bias, *rest, **options)
        expected = op(lower, upper, weight, bias.contiguous(), *rest, **options)
        for a, b in zip(torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected), strict=True):
            assert torch.equal(a, b)
    none = torch.zeros(1).expand(5)
    assert torch.equal(w2s_fast.interval_linear(lower, upper, weight, none)[0],
                       w2s_fast.interval_linear(lower, upper, weight)[0])  # fmt: skip
    loss = [w2s_fast.margin_cross_entropy(lower, upper, weight, b, y).loss for b in (bias, bias.contiguous())]
    assert torch.equal(*loss)


@needs_cpp
@pytest.mark.parametrize("op, place", [("margin_logits", 4), ("linear_eisl", 3), ("linear_preference", -1)])
def test_compiled_calls_refuse_places_out_of_range(op: str, place: int):
    """A traced graph checks no values, so the kernels do."""
    sample = next(s for s in all_samples() if s.op == op)
    for call, args in layouts.recorded(sample, torch.float32):
        if call.overloadpacket._qualified_op_name != f"w2s_fast::{op}":
            continue
        place = place if place >= 0 else next(i for i, a in enumerate(call._schema.arguments) if a.name == "segments")
        bad = args[place].clone()
        bad.view(-1)[0] = 1 << 40
        with pytest.raises(RuntimeError, match=r"must be in \[0, "):
            call(*args[:place], bad, *args[place + 1 :])
        return
    pytest.fail("the op was not called")


@pytest.mark.parametrize("part", range(4))
def test_hostile_calls(part: int):
    """The reference's result or one clear error; .ci/sanitize.py runs the same under AddressSanitizer."""
    import random

    samples = all_samples()
    faults = []
    for index in range(amount(75, 1000)):
        call = draw(random.Random(part * 1_000_003 + index), samples)
        fault = judge(call)
        if fault:
            faults.append(f"{call.what}: {fault}")
    assert not faults, "\n".join(faults[:10])
