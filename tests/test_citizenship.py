"""Every op in a user's program: checkpointing, offloading, autocast, torch.func, in-place changes, export, copies."""

from __future__ import annotations

import inspect
from typing import ClassVar

import pytest
import torch
from torch.func import grad, hessian, jacrev, vjp, vmap
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import w2s_fast
from w2s_fast import autocast
from w2s_fast.library import Op
from w2s_fast.testing.citizenship import Use, gradients, handed_out_once, near, same, total, upstream
from w2s_fast.testing.samples import Sample, all_samples, tensors
from w2s_fast.testing.selection import sampled

SAMPLES = all_samples()
TRAINED = [sample for sample in SAMPLES if sample.grad]


def some(samples: list[Sample], seed: int, each: int = 1) -> list:
    """``each`` sample an op; under W2S_FAST_TEST_FULL=1 all of them."""
    ops = {sample.op: [s for s in samples if s.op == sample.op] for sample in samples}
    chosen = [s for found in ops.values() for s in sampled(found, each, seed)]
    return [pytest.param(s, id=s.id) for s in chosen]


def plain(use: Use) -> tuple[list, list]:
    """Outputs and gradients of the plain call."""
    leaves = use.trainable()
    outputs = use(*leaves)
    return list(outputs), gradients(total(outputs), leaves)


@pytest.mark.parametrize("sample", some(TRAINED, 1))
def test_checkpoint(sample: Sample):
    use = Use(sample)
    outputs, wanted = plain(use)
    for reentrant in (False, True):
        leaves = use.trainable()
        found = checkpoint(use, *leaves, use_reentrant=reentrant)
        # a first pass without a gradient may take another way
        near([t.detach() for t in found], [t.detach() for t in outputs], f"output, reentrant={reentrant}")
        total(found).backward()
        got = [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]
        same(got, wanted, f"gradient, reentrant={reentrant}")


@pytest.mark.parametrize("sample", some(TRAINED, 2))
def test_saved_tensors_are_unpacked_once(sample: Sample):
    use = Use(sample)
    _, wanted = plain(use)
    leaves = use.trainable()
    with handed_out_once():
        loss = total(use(*leaves))
    same(gradients(loss, leaves), wanted, "gradient")


@pytest.mark.parametrize("sample", some(TRAINED, 3))
def test_backward_twice(sample: Sample):
    """With retain_graph, and nobody's gradient is another's memory."""
    use = Use(sample)
    outputs = use(*use.trainable())
    losses = [total, *((lambda found: found[0],) if outputs[0].ndim == 0 and outputs[0].requires_grad else ())]
    for loss_of in losses:  # a loss itself has the upstream gradient 1, which is a case of its own
        leaves = use.trainable()
        wanted = gradients(loss_of(use(*leaves)), leaves)
        loss = loss_of(use(*leaves))
        loss.backward(retain_graph=True)
        for leaf in leaves:
            if leaf.grad is not None:
                leaf.grad.fill_(7.0)
                leaf.grad = None
        loss.backward()
        same([torch.zeros_like(t) if t.grad is None else t.grad for t in leaves], wanted, "gradient")


@pytest.mark.parametrize("sample", some(TRAINED, 4))
def test_an_input_changed_before_backward_is_seen(sample: Sample):
    """Either PyTorch's own error or the gradient as if nothing had been changed."""
    use = Use(sample)
    _, wanted = plain(use)
    for index in range(len(use.floats)):
        leaves = use.trainable()
        copies = [t.clone(memory_format=torch.preserve_format) for t in leaves]
        loss = total(use(*copies))
        with torch.no_grad():
            copies[index].add_(1.0)
        try:
            found = gradients(loss, leaves)
        except RuntimeError as error:
            assert "inplace" in str(error), error
        else:
            same(found, wanted, f"gradient after input {index} changed")


@pytest.mark.parametrize("sample", some(TRAINED, 5))
def test_gradients_of_single_outputs(sample: Sample):
    """They add up to that of all outputs."""
    use = Use(sample, torch.float64)
    leaves = use.trainable()
    outputs = use(*leaves)
    trained = [i for i, t in enumerate(outputs) if t.requires_grad]
    wanted = gradients(total(outputs), leaves)
    found = [torch.zeros_like(t) for t in leaves]
    for i in trained:
        alone = gradients(total(use(*leaves), lambda index, i=i: index == i), leaves)
        found = [a + b for a, b in zip(found, alone, strict=True)]
    near(found, wanted, "gradient", 2.0**20)


@pytest.mark.parametrize("sample", some(TRAINED, 6))
def test_upstream_gradients_of_any_layout(sample: Sample):
    use = Use(sample)
    for form in ("gaps", "transposed", "expanded"):
        results = []
        for laid_out in (False, True):
            leaves = use.trainable()
            outputs = [t for t in use(*leaves) if t.requires_grad]
            given = []
            for t in outputs:
                g = upstream(t.shape, t.dtype)
                g = torch.where(torch.isfinite(t.detach()), g, 0.0) if form != "expanded" else g
                if form == "expanded":
                    g = upstream((), t.dtype).expand(t.shape)
                    g = g if laid_out else g.contiguous()
                elif laid_out and form == "gaps":
                    g = torch.stack((g, torch.full_like(g, torch.nan)), -1)[..., 0]
                elif laid_out and t.ndim > 1:
                    g = g.movedim(0, -1).contiguous().movedim(-1, 0)
                given.append(g)
            results.append(torch.autograd.grad(outputs, leaves, given, allow_unused=True))
        contiguous, other = ([torch.zeros(()) if g is None else g for g in r] for r in results)
        near(other, contiguous, f"gradient from upstream with {form}")


@pytest.mark.parametrize("sample", some(SAMPLES, 7))
def test_a_tensor_on_another_device_is_named(sample: Sample):
    use = Use(sample)
    everything = use.everything()
    places = [i for i, t in enumerate(everything) if isinstance(t, torch.Tensor)]
    for place in places[1:]:
        leaves = list(everything)
        leaves[place] = leaves[place].to("meta")
        with pytest.raises((ValueError, TypeError), match="w2s_fast"):
            use.call(leaves)


@pytest.mark.parametrize("sample", some(SAMPLES, 14))
def test_the_default_dtype_changes_nothing(sample: Sample):
    """A program that loads a model in bfloat16 leaves that behind."""
    use = Use(sample)
    outputs, wanted = plain(use) if sample.grad else (list(use(*use.floats)), [])
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            leaves = use.trainable() if sample.grad else use.floats
            found = list(use(*leaves))
            loss = total(found)
        finally:
            torch.set_default_dtype(torch.float32)
        same(found, outputs, f"output under {dtype}")
        same(gradients(loss, leaves) if sample.grad else [], wanted, f"gradient under {dtype}")


@pytest.mark.parametrize("sample", some(SAMPLES, 15))
def test_tensors_that_are_negated_later_or_are_zeros_without_memory(sample: Sample):
    """A plain type on a CPU, but not what its memory holds."""
    use = Use(sample)
    outputs = use(*use.floats)
    same(use(*(torch._neg_view(-t) for t in use.floats)), outputs, "output of views that are negated later")
    for i, t in enumerate(use.floats):
        zeros, unreal = (
            [*use.floats[:i], z, *use.floats[i + 1 :]] for z in (t * 0, torch._efficientzerotensor(t.shape))
        )
        try:
            wanted = use(*zeros)
        except ValueError:
            continue  # 0 is out of its range
        near(use(*unreal), wanted, f"output with input {i} of zeros without memory")


@pytest.mark.parametrize("sample", some(SAMPLES, 16))
def test_a_mode_and_a_profiler_see_the_op(sample: Sample, monkeypatch: pytest.MonkeyPatch):
    """Every call that a kernel serves; a short way past the dispatcher is not taken then."""
    served, kernel = [], Op.kernel
    monkeypatch.setattr(Op, "kernel", lambda self, flat: (served.append(self.name), kernel(self, flat))[1])

    class Calls(TorchDispatchMode):
        seen: ClassVar[list[str]] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(str(func).removeprefix("w2s_fast.").removesuffix(".default"))
            return func(*args, **(kwargs or {}))

    use = Use(sample)
    outputs = use(*use.floats)
    served.clear()
    with Calls() as calls:
        same(use(*use.floats), outputs, "output under a mode")
    assert [name for name in calls.seen if name in served] == served
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        use(*use.floats)
    assert {f"w2s_fast::{name}" for name in served} <= {event.key for event in profile.key_averages()}


def batched(use: Use, other: Use) -> list | None:
    """Every tensor of two draws of a sample, stacked; None where the draws differ in shape."""
    pairs = zip(use.everything(), other.everything(), strict=True)
    both = [(a, b) for a, b in pairs if isinstance(a, torch.Tensor)]
    return None if any(a.shape != b.shape for a, b in both) else [torch.stack(pair) for pair in both]


def over(use: Use, stacked: list):
    """The call as a function of all tensors."""
    everything = use.everything()
    places = [i for i, t in enumerate(everything) if isinstance(t, torch.Tensor)]

    def call(*given):
        leaves = list(everything)
        for place, tensor in zip(places, given, strict=True):
            leaves[place] = tensor
        return tuple(tensors(use.call(leaves)))

    return call


@pytest.mark.filterwarnings("ignore:torch.searchsorted")
@pytest.mark.parametrize("sample", some(SAMPLES, 8))
def test_vmap(sample: Sample):
    """Values and gradients of a loop."""
    use = Use(sample)
    stacked = batched(use, Use(sample, seed=1))
    if stacked is None:
        stacked = batched(use, use)
    call = over(use, stacked)

    def run(mapped: bool) -> tuple[list, list]:
        leaves = [t.detach().requires_grad_(sample.grad) if t.is_floating_point() else t for t in stacked]
        if mapped:
            outputs = vmap(call)(*leaves)
        else:
            calls = [call(*entry) for entry in zip(*leaves, strict=True)]
            outputs = tuple(torch.stack(column) for column in zip(*calls, strict=True))
        floats = [t for t in leaves if t.requires_grad]
        return list(outputs), gradients(total(outputs), floats) if sample.grad else []

    (found, got), (wanted, expected) = run(True), run(False)
    same(found, wanted, "output")
    assert [t.requires_grad for t in found] == [t.requires_grad for t in wanted]
    near(got, expected, "gradient")


@pytest.mark.parametrize("sample", some(TRAINED, 9))
def test_vmap_over_one_argument(sample: Sample):
    """The others, which require a gradient too, are the same for every entry; the dimension is not the first."""
    use = Use(sample)
    for index in range(len(use.floats)):
        results = []
        for mapped in (True, False):
            leaves = use.trainable()
            at = min(1, leaves[index].ndim)
            wide = torch.stack((leaves[index], leaves[index].detach()), at)
            if mapped:
                dims = tuple(at if i == index else None for i in range(len(leaves)))
                outputs = vmap(use, in_dims=dims)(*leaves[:index], wide, *leaves[index + 1 :])
            else:
                calls = [use(*leaves[:index], wide.select(at, i), *leaves[index + 1 :]) for i in range(2)]
                outputs = tuple(torch.stack(column) for column in zip(*calls, strict=True))
            results.append((list(outputs), gradients(total(outputs), leaves)))
        (found, got), (wanted, expected) = results
        same(found, wanted, f"output, input {index}")
        near(got, expected, f"gradient, input {index}")


@pytest.mark.parametrize("sample", some(TRAINED, 10))
def test_func_grad(sample: Sample):
    """grad, vjp and jacrev give what autograd gives; grad of vmap and vmap of grad too."""
    use = Use(sample)
    _, wanted = plain(use)
    every = tuple(range(len(use.floats)))
    near(grad(lambda *t: total(use(*t)), argnums=every)(*use.floats), wanted, "grad")
    value, pull = vjp(lambda *t: total(use(*t)), *use.floats)
    near(pull(torch.ones_like(value)), wanted, "vjp")
    two = jacrev(lambda *t: torch.stack((total(use(*t)), 2 * total(use(*t)))), argnums=every)(*use.floats)
    near([t[0] for t in two], wanted, "jacrev")
    stacked = [torch.stack((t, t)) for t in use.floats]
    each = vmap(grad(lambda *t: total(use(*t)), argnums=every))(*stacked)
    near([t[1] for t in each], wanted, "vmap of grad")
    both = grad(lambda *t: vmap(lambda *s: total(use(*s)))(*t).sum(), argnums=every)(*stacked)
    near([t[1] for t in both], wanted, "grad of vmap")


@pytest.mark.parametrize("sample", some(TRAINED, 11))
def test_second_and_forward_derivatives(sample: Sample):
    """Refused by name, or right: never a silent zero."""
    use = Use(sample, torch.float64)
    leaves = use.trainable()
    outputs = [t for t in use(*leaves) if t.requires_grad]
    loss = sum((torch.where(torch.isfinite(t), t, 0.0).square()).sum() for t in outputs)
    first = torch.autograd.grad(loss, leaves, allow_unused=True, create_graph=True)
    again = sum(g.sum() for g in first if g is not None)

    def once_more(*t):
        return sum((torch.where(torch.isfinite(o), o, 0.0).square()).sum() for o in use(*t) if o.is_floating_point())

    every = tuple(range(len(use.floats)))
    try:
        second = torch.autograd.grad(again, leaves, allow_unused=True)
    except NotImplementedError as error:
        assert "w2s_fast" in str(error) and "double backward" in str(error)
        with pytest.raises(NotImplementedError, match=r"w2s_fast.*double backward"):
            grad(lambda *t: sum(g.sum() for g in grad(once_more, argnums=every)(*t)), argnums=every)(*use.floats)
    else:
        found = grad(lambda *t: sum(g.sum() for g in grad(once_more, argnums=every)(*t)), argnums=every)(*use.floats)
        for a, b in zip(found, second, strict=True):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)
    tangents = tuple(torch.ones_like(t) for t in use.floats)
    try:
        _, rise = torch.func.jvp(lambda *t: total(use(*t)), tuple(t.contiguous() for t in use.floats), tangents)
    except NotImplementedError as error:
        assert "w2s_fast" in str(error) and "forward-mode" in str(error)
    else:  # made of plain PyTorch
        near([rise.float()], [sum(g.double().sum() for g in plain(use)[1]).float()], "jvp")


@pytest.mark.parametrize("sample", some(TRAINED, 15))
def test_hessian_and_several_upstream_gradients(sample: Sample):
    """Forward over reverse is refused by name; is_grads_batched gives every gradient, or names the op that cannot."""
    use = Use(sample)
    first = use.floats[0].contiguous()
    try:
        if first.numel() <= 400:
            hessian(lambda t: total(use(t, *use.floats[1:])))(first)
    except NotImplementedError as error:
        assert "w2s_fast" in str(error)
    leaves = use.trainable()
    loss = total(use(*leaves))
    wanted = gradients(loss, leaves, retain_graph=True)
    two = torch.tensor([1.0, 2.0], dtype=loss.dtype)
    try:
        found = torch.autograd.grad(loss, leaves, two, allow_unused=True, is_grads_batched=True)
    except RuntimeError as error:  # a backward with lists of tensors, which PyTorch's loop does not know
        assert "Batching rule not implemented for w2s_fast::" in str(error)
        return
    for row, factor in enumerate((1, 2)):
        got = [torch.zeros_like(t) if g is None else g[row] / factor for g, t in zip(found, leaves, strict=True)]
        near(got, wanted, f"gradient {row}")


def cast_operands(sample: Sample, arguments: tuple[tuple, dict], dtype: torch.dtype) -> tuple[tuple, dict]:
    """The arguments with the operands of the autocast rule cast to ``dtype``, as a user would by hand."""
    names = autocast.rule(sample.op)
    function = getattr(w2s_fast, sample.op)

    def cast(name: str, value):
        if name not in names:
            return value
        if name == "teachers":
            return [(t[0], *(x.to(dtype) for x in t[1:])) if t[0] == "linear" else t for t in value]
        return pytree.tree_map_only(torch.Tensor, lambda t: t if t.dtype == torch.float64 else t.to(dtype), value)

    positional = zip(inspect.signature(function).parameters, arguments[0], strict=False)
    return tuple(cast(*item) for item in positional), {name: cast(name, value) for name, value in arguments[1].items()}


def floats(value) -> list[torch.Tensor]:
    """The floating-point tensors in nested arguments."""
    return [t for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def test_autocast_rules_are_of_ops():
    assert set(autocast.RULES) < {sample.op for sample in SAMPLES}


@pytest.mark.parametrize("sample", some(SAMPLES, 12))
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autocast(sample: Sample, backend: str):
    """What a cast by hand gives, or what the op gives outside; backward inside and outside the region."""
    arguments = sample.inputs(torch.float32)
    rule = autocast.rule(sample.op)
    by_hand = cast_operands(sample, arguments, torch.bfloat16) if isinstance(rule, tuple) else arguments

    def run(given, inside: bool, backward_inside: bool = False) -> tuple[list, list]:
        flat, spec = pytree.tree_flatten(given)
        leaves = [
            t.detach().requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() and sample.grad else t
            for t in flat
        ]
        trained = [t for t in leaves if isinstance(t, torch.Tensor) and t.requires_grad]
        with w2s_fast.backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=inside):
            outputs = tensors(sample.call(*pytree.tree_unflatten(leaves, spec)))
        if not sample.grad:
            return outputs, []
        loss = total(outputs)
        with torch.autocast("cpu", torch.bfloat16, enabled=backward_inside):
            return outputs, gradients(loss, trained)

    wanted, expected = run(by_hand, False)
    for backward_inside in (False, True):
        found, got = run(arguments, True, backward_inside)
        same(found, wanted, "output")
        same([g.to(e.dtype) for g, e in zip(got, expected, strict=True)], expected, "gradient")
        assert not sample.grad or [g.dtype for g in got] == [t.dtype for t in floats(arguments)]


@pytest.mark.parametrize("op", sorted({sample.op for sample in SAMPLES}))
def test_autocast_takes_several_dtypes(op: str):
    """The first tensor comes from a layer before, in bfloat16; the parameters are float32."""
    sample = next(s for s in SAMPLES if s.op == op)
    use = Use(sample)
    flat = use.floats
    if op == "fast_reg":
        return  # bounds of one box come from one place
    with torch.autocast("cpu", torch.bfloat16):
        found = use(flat[0].bfloat16(), *flat[1:])
        rule = autocast.rule(op)
        if isinstance(rule, tuple):
            same(found, use(*flat), "output")
        elif rule == "widest" and len(flat) > 1 and op != "adaln_modulate":  # that comes in the dtype of x
            wanted = use(flat[0].bfloat16().float(), *flat[1:])
            near([t.float() for t in found], [t.float() for t in wanted], "output")


#: what has no batch in front, or whose leading size is a constant of the call
FIXED = {
    "fold_kv_projection": "weights only",
    "interval_batchnorm_stats": "the number of rows is in the statistics",
    "fast_reg": "a list of layers",
}


def has_a_batch(sample: Sample) -> bool:
    """Whether the first tensor has a leading dimension that may be left open."""
    if sample.op in FIXED:
        return False
    first = next(t for t in Use(sample).everything() if isinstance(t, torch.Tensor))
    return first.ndim >= 2 and first.shape[0] >= 2 and first.numel() > 0


@pytest.mark.parametrize("sample", some([sample for sample in SAMPLES if has_a_batch(sample)], 13))
def test_export_with_a_dynamic_leading_dimension(sample: Sample):
    """The first tensor's leading size stays open, and the exported graph gives what the op gives."""
    use = Use(sample)
    first = next(t for t in use.everything() if isinstance(t, torch.Tensor))
    everything = use.everything()
    places = [i for i, t in enumerate(everything) if isinstance(t, torch.Tensor)]
    given = tuple(everything[i] for i in places)

    class Call(torch.nn.Module):
        def forward(self, given):
            leaves = list(everything)
            for place, tensor in zip(places, given, strict=True):
                leaves[place] = tensor
            return tuple(tensors(use.call(leaves)))

    auto = torch.export.Dim.AUTO
    open_sizes = tuple({0: auto} if t.ndim and t.shape[0] == first.shape[0] else {} for t in given)
    exported = torch.export.export(Call(), (given,), dynamic_shapes=(open_sizes,))
    node = next(n for n in exported.graph.nodes if n.op == "placeholder" and n.name == "given_0")
    assert isinstance(node.meta["val"].shape[0], torch.SymInt), "the leading size became a constant"
    same(exported.module()(given), use(*use.floats), "output")
