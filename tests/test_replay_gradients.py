"""A call with a gradient that was seen before leaves a node of C++ behind: the same gradients as Python's node, and
Python's own where a backward is no usual one."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import w2s_fast
from w2s_fast import extension, gradients
from w2s_fast.library import OPS, Op
from w2s_fast.testing.citizenship import Use, upstream
from w2s_fast.testing.samples import all_samples
from w2s_fast.testing.selection import sampled

pytestmark = pytest.mark.skipif(extension.CALLS is None, reason="w2s_fast._call is not built for this torch")
TRAINED = [sample for sample in all_samples() if sample.grad]
NAMES = sorted({sample.op for sample in TRAINED})


@pytest.fixture(autouse=True)
def new() -> Iterator[None]:
    """Nothing was seen before."""
    for op in OPS.values():
        op.calls.clear()
    yield


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ops whose backward Python was asked for by a node of C++."""
    names: list[str] = []
    original = gradients.Gradient.followed

    def followed(self: gradients.Gradient, *args: Any) -> Any:
        names.append(self.op.name)
        return original(self, *args)

    monkeypatch.setattr(gradients.Gradient, "followed", followed)
    return names


def nodes(*outputs: Tensor) -> list[Any]:
    """Every node behind these tensors that is C++ and ours."""
    found, todo, seen = [], [t.grad_fn for t in outputs if t.grad_fn is not None], set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name().startswith("w2s_fast::"):
            found.append(node)
        todo += [other for other, _ in node.next_functions if other is not None]
    return found


def backward(use: Use, form: str) -> tuple[list[Any], int]:
    """Outputs and gradients, and how many nodes were ours."""
    leaves = use.trainable()
    made = use(*leaves)
    outputs = [t for t in made if t.requires_grad]
    ours = len(nodes(*outputs))
    if form == "loss":
        total = torch.stack([torch.where(t.isfinite(), t, 0.0).double().sum() for t in outputs]).sum()
        return [*made, *torch.autograd.grad(total, leaves, allow_unused=True)], ours
    given = [torch.where(torch.isfinite(t.detach()), upstream(t.shape, t.dtype), 0.0) for t in outputs]
    return [*made, *torch.autograd.grad(outputs, leaves, given, allow_unused=True)], ours


def same_bits(found: list[Any], wanted: list[Any], what: str) -> None:
    assert len(found) == len(wanted)
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert (a is None) == (b is None), f"{what}: tensor {i} is None"
        if a is not None:
            assert (a.dtype, a.shape) == (b.dtype, b.shape), f"{what}: tensor {i}"
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=f"{what}: tensor {i} differs")


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_python_bit_for_bit(name: str, monkeypatch: pytest.MonkeyPatch):
    for sample in sampled([sample for sample in TRAINED if sample.op == name], 4, 21):
        for dtype in sample.dtypes:
            for form in ("given", "loss"):
                uses = [Use(sample, dtype, seed) for seed in (0, 1)]
                with monkeypatch.context() as slow:
                    slow.setattr(Op, "run", Op.anew)
                    wanted = [backward(use, form)[0] for use in uses]
                for i in (0, 1, 0, 1, 0, 1):
                    same_bits(backward(uses[i], form)[0], wanted[i], f"{sample.id}, {dtype}, {form}")


#: ops of which no sample is replayed here, and why
LEFT_TO_PYTHON = {
    "arm_loss": "plain PyTorch",
    "class_stats": "no op with a gradient",
    "fold_kv_projection": "plain PyTorch",
    "linear_eisl": "a head that is not contiguous",
    "noise_pair": "no op with a gradient",
    "sparse_lowrank_materialize": "supports that are empty or not contiguous",
    "tightness_rows": "a weight that is not contiguous",
}


@pytest.mark.parametrize("name", NAMES)
def test_every_op_is_replayed(name: str, asked: list[str]):
    quick, slow = False, list[str]()
    for sample in sampled([sample for sample in TRAINED if sample.op == name], 6, 22):
        use = Use(sample)
        for _ in range(4):
            backward(use, "given")
        asked.clear()
        _, ours = backward(use, "given")
        quick |= bool(ours) and not asked
        slow += asked
    assert quick or name in LEFT_TO_PYTHON, f"Python's backward of {slow} was asked for"


def tokens(*, grad: str = "xyg", seed: int = 0) -> list[Tensor]:
    """x, y and gate of `gate_residual`."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator) for shape in ((2, 3, 8), (2, 3, 8), (2, 1, 8))]
    return [t.requires_grad_(name in grad) for t, name in zip(made, "xyg", strict=True)]


def call(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return w2s_fast.gate_residual(x, y, gate)


def warm(function: Callable[..., Any] = call, make: Callable[[], list[Tensor]] = tokens) -> None:
    """Two calls that are seen, and one whose backward is."""
    for _ in range(3):
        given = make()
        function(*given).sum().backward()
    assert nodes(function(*make()))


def expected(x: Tensor, y: Tensor, gate: Tensor, grad: Tensor) -> list[Tensor]:
    return [grad, gate.detach() * grad, (y.detach() * grad).sum(1, keepdim=True)]


def test_the_node_is_named_after_the_op():
    warm()
    found = call(*tokens())
    assert found.grad_fn.name() == "w2s_fast::modulateBackward" and "grad_fn=<modulateBackward>" in repr(found)
    assert found.requires_grad and not found.is_leaf


def test_a_usual_backward_asks_python_nothing(asked: list[str]):
    warm()
    asked.clear()
    given = tokens()
    call(*given).sum().backward()
    torch.testing.assert_close([t.grad for t in given], expected(*given, torch.ones(2, 3, 8)))
    assert not asked


def test_a_gradient_of_another_layout_or_dtype(asked: list[str]):
    warm()
    for grad in (torch.randn(2, 8, 3).transpose(1, 2), torch.randn(2, 3, 16)[..., ::2], torch.randn(1).expand(2, 3, 8)):
        for i in range(3):
            asked.clear()
            given = tokens()
            found = torch.autograd.grad(call(*given), given, grad)
            torch.testing.assert_close(list(found), expected(*given, grad))
            assert not asked or not i


def test_backward_twice_is_pytorchs_error():
    warm()
    given = tokens()
    found = call(*given)
    found.sum().backward(retain_graph=True)
    found.sum().backward()
    torch.testing.assert_close(given[0].grad, torch.full((2, 3, 8), 2.0))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        found.sum().backward()


def test_a_change_of_what_was_saved_is_pytorchs_error():
    warm()
    given = tokens()
    found = call(*given)
    with torch.no_grad():
        given[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.sum().backward()


def test_a_change_of_a_view_of_what_was_saved_is_seen():
    """`fuse_logits` sees rows of several leading dimensions as a matrix."""
    options = {"temperature": torch.full((2, 3), 2.0)}

    def make() -> list[Tensor]:
        return [torch.randn(2, 3, 16).requires_grad_() for _ in range(3)]

    def fuse(base: Tensor, expert: Tensor, anti: Tensor) -> Tensor:
        return w2s_fast.fuse_logits(base, [expert], anti, **options)

    warm(fuse, make)
    given = make()
    found = fuse(*given)
    with torch.no_grad():
        given[0][1, 2, 3] += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.sum().backward()


def test_create_graph_and_a_second_derivative():
    warm()
    given = tokens()
    first = torch.autograd.grad(call(*given).square().sum(), given, create_graph=True)
    torch.testing.assert_close(first[0], 2 * (given[0] + given[2] * given[1]))
    with pytest.raises(NotImplementedError, match=r"w2s_fast::modulate: double backward is not supported"):
        torch.autograd.grad(first[0].sum(), given)


def test_a_backward_that_can_be_differentiated_is():
    twice = [op for op in OPS.values() if op.gradient.twice]
    for op in twice:
        samples = [sample for sample in TRAINED if sample.op == op.name]
        for sample in sampled(samples, 1, 3):
            found = []
            for _ in range(4):
                use = Use(sample, torch.float64)
                leaves = use.trainable()
                outputs = [t for t in use(*leaves) if t.requires_grad]
                first = torch.autograd.grad(sum(t.square().sum() for t in outputs), leaves, create_graph=True)
                found.append(torch.autograd.grad(first[0].sum(), leaves, allow_unused=True))
            same_bits(list(found[3]), list(found[0]), op.name)


def test_hooks_on_saved_tensors_see_them():
    warm()
    kept: list[Tensor] = []
    given = tokens()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        found = call(*given)
    assert kept and not nodes(found)
    found.sum().backward()
    torch.testing.assert_close([t.grad for t in given], expected(*given, torch.ones(2, 3, 8)))
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        assert not nodes(call(*given))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool):
    warm()
    given = tokens()
    checkpoint(call, *given, use_reentrant=reentrant).sum().backward()
    torch.testing.assert_close([t.grad for t in given], expected(*given, torch.ones(2, 3, 8)))


def test_no_grad_and_inference_mode():
    warm()
    with torch.no_grad():
        assert not call(*tokens()).requires_grad
    with torch.inference_mode():
        made = [t.detach() for t in tokens()]
        assert call(*made).is_inference()
    for _ in range(4):
        x, _, gate = tokens()
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            call(x, made[1], gate)


def test_some_inputs_only(asked: list[str]):
    warm()
    given = tokens()
    (only,) = torch.autograd.grad(call(*given).sum(), given[2:])
    torch.testing.assert_close(only, expected(*given, torch.ones(2, 3, 8))[2])
    for names in ("x", "y", "g", "xg"):
        warm(make=lambda names=names: tokens(grad=names))  # type: ignore[misc]
        given = tokens(grad=names)
        call(*given).sum().backward()
        for t, wanted in zip(given, expected(*given, torch.ones(2, 3, 8)), strict=True):
            assert (t.grad is not None) == t.requires_grad
            if t.grad is not None:
                torch.testing.assert_close(t.grad, wanted)


def test_a_result_that_nobody_uses():
    """`gate_residual_adaln` returns two: each alone, both, and both of one memory's gradient."""

    def make() -> list[Tensor]:
        x, y, gate = tokens()
        return [x, y, gate, *(torch.randn(2, 1, 8).requires_grad_() for _ in range(2))]

    def both(*given: Tensor) -> tuple[Tensor, Tensor]:
        return w2s_fast.gate_residual_adaln(*given)

    for use in (lambda a, b: a.sum(), lambda a, b: b.square().sum(), lambda a, b: a.sum() + b.sum(),
                lambda a, b: (a * 2 + b).sum()):  # fmt: skip
        given, found = make(), []
        for _ in range(6):
            found.append(torch.autograd.grad(use(*both(*given)), given, allow_unused=True))
        assert nodes(*both(*given))
        for other in found[1:]:
            same_bits(list(other), list(found[0]), "one result")


def test_anomaly_mode_names_the_call():
    warm()
    given = tokens()
    with torch.autograd.detect_anomaly(check_nan=True), pytest.warns(UserWarning, match="Error detected in"):
        found = call(*given)
        with pytest.raises(RuntimeError, match=r"Function 'w2s_fast::modulateBackward' returned nan values"):
            found.backward(torch.full((2, 3, 8), torch.nan))


def test_a_profiler_an_autocast_and_a_mode_at_backward(asked: list[str]):
    warm()
    given = tokens()
    found = call(*given)
    asked.clear()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        found.sum().backward(retain_graph=True)
    assert {"w2s_fast::modulateBackward", "w2s_fast::modulate_backward"} <= {event.name for event in seen.events()}
    with torch.autocast("cpu"):
        found.sum().backward(retain_graph=True)
    assert asked == ["modulate", "modulate"]
    torch.testing.assert_close(given[0].grad, torch.full((2, 3, 8), 2.0))


def test_several_gradients_at_once():
    warm()
    given = tokens()
    many = torch.randn(4, 2, 3, 8)
    found = torch.autograd.grad(call(*given), given, many, is_grads_batched=True)
    for i, grad in enumerate(many):
        torch.testing.assert_close([t[i] for t in found], expected(*given, grad))


def test_compiled_autograd():
    warm()
    given = tokens()
    found = call(*given)
    with torch._dynamo.compiled_autograd._enable(lambda graph: graph):
        found.sum().backward()
    torch.testing.assert_close([t.grad for t in given], expected(*given, torch.ones(2, 3, 8)))


def test_other_threads():
    """Forward here, backward in several threads, while others forget what is known."""
    warm()
    wrong: list[Any] = []

    def work(seed: int) -> None:
        try:
            for i in range(40):
                given = tokens(seed=seed)
                found = call(*given)
                if seed == 0 and i % 8 == 0:
                    OPS["modulate"].calls.clear()
                found.sum().backward()
                for t, wanted in zip(given, expected(*given, torch.ones(2, 3, 8)), strict=True):
                    torch.testing.assert_close(t.grad, wanted)
        except Exception as error:
            wrong.append(error)

    found, given = call(*tokens()), tokens()
    later = call(*given)
    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    workers.append(threading.Thread(target=lambda: later.sum().backward()))
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong, wrong[0]
    torch.testing.assert_close([t.grad for t in given], expected(*given, torch.ones(2, 3, 8)))
    assert found.requires_grad


def test_what_is_returned_is_a_tensor_like_others():
    """It may be changed, viewed and hooked; a copy of it is refused as PyTorch refuses it."""

    def fuse(base: Tensor, expert: Tensor, anti: Tensor) -> Tensor:
        return w2s_fast.fuse_logits(base, [expert], anti)

    def make() -> list[Tensor]:
        return [torch.randn(2, 3, 8).requires_grad_() for _ in range(3)]

    warm(fuse, make)
    given = make()
    changed = fuse(*given)
    changed[0].mul_(3)
    found = changed.clone().mul_(2)
    seen: list[Tensor] = []
    found.register_hook(seen.append)
    found.retain_grad()
    found.sum().backward()
    assert torch.equal(seen[0], torch.ones(2, 3, 8)) and torch.equal(found.grad, seen[0])
    torch.testing.assert_close(given[0].grad, torch.tensor([6.0, 2.0])[:, None, None].expand(2, 3, 8))
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(found)
    assert torch.equal(copy.deepcopy(found.detach()), found)


def test_hooks_on_leaves_and_accumulation():
    warm()
    given = tokens()
    seen: list[int] = []
    given[1].register_post_accumulate_grad_hook(lambda t: seen.append(1))
    for i in range(1, 4):
        call(*given).sum().backward()
        torch.testing.assert_close(given[1].grad, i * given[2].detach().expand(2, 3, 8))
    assert seen == [1, 1, 1]


def test_an_impossible_token_keeps_what_backward_needs():
    """What `fuse_logits` keeps depends on the result; both are replayed."""
    for hidden in (False, True, False, True, False, True, True):
        logits = [torch.randn(2, 5).requires_grad_() for _ in range(3)]
        if hidden:
            with torch.no_grad():
                logits[0][0, 1] = -torch.inf
        z = w2s_fast.fuse_logits(logits[0], [logits[1]], logits[2], 0.5, temperature=2.0)
        grads = torch.autograd.grad(z, logits, torch.ones_like(z))
        for grad, factor in zip(grads, (0.5, 0.25, -0.25), strict=True):
            torch.testing.assert_close(grad, torch.where(logits[0] == -torch.inf, 0.0, torch.full_like(grad, factor)))
    assert nodes(z)


def test_an_empty_tensor():
    for _ in range(4):
        given = [torch.zeros(0, 3, 8).requires_grad_(), torch.zeros(0, 3, 8).requires_grad_()]
        w2s_fast.gate_residual(*given).sum().backward()
        assert given[0].grad.shape == (0, 3, 8) and given[1].grad.shape == (0, 3, 8)


def test_an_error_of_backward_is_pythons(monkeypatch: pytest.MonkeyPatch):
    """It is raised where backward was called, as it was raised."""
    warm()

    def broken(*_: Any) -> Any:
        raise LookupError("of this test")

    monkeypatch.setattr(OPS["modulate"].gradient, "backward", broken)
    with pytest.raises(LookupError, match="of this test"):
        call(*tokens()).backward(torch.randn(2, 8, 3).transpose(1, 2))


def test_values_that_backward_reads_are_not_replayed():
    """Or later calls would do what the first one's numbers called for."""
    grad, other = torch.ones(2), torch.ones(2)
    for read in (lambda t: float(t[0]), lambda t: bool((t > 0).all()), lambda t: t.nonzero(), lambda t: t + other):
        with gradients.Followed([grad]) as seen:
            found = grad * 2
            read(grad)
        assert seen.steps_to([found]) is None
    with gradients.Followed([grad]) as seen:
        found = [grad * 2, None, grad]
    steps = seen.steps_to(found)
    assert steps is not None and steps.found == [1, -1, 0] and [name for name, *_ in steps.steps] == ["aten::mul"]


def test_two_gradients_of_one_memory_are_told_apart():
    """Addition hands one gradient to both of its terms, here in two shapes; backward makes one's shape of the other."""
    op = OPS["prototype_distance"]
    x, p, offset, labels = torch.randn(6, 5), torch.randn(4, 5), torch.randn(4), torch.tensor([0, 1, 2, 3, 0, 1])
    first, second = torch.randn(6), torch.randn(6)

    def found(same: bool, run: Callable[..., Any] = op) -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), p.clone().requires_grad_()]
        r = run(*leaves, offset, labels, 1.0, 1, True, False, False)
        top = r.top.squeeze(1)
        loss = ((top + r.at_label) * first).sum() if same else (top * first + r.at_label * second).sum()
        return list(torch.autograd.grad(loss, leaves))

    for _ in range(3):
        found(True)
    replayed = [found(same) for same in (True, False)]
    op.calls.clear()
    same_bits(replayed[0] + replayed[1], found(True) + found(False), "two gradients")


def test_tensors_that_share_their_elements_are_known_by_object():
    a, b = torch.randn(4, 1), torch.randn(3)
    seen = gradients.Followed([a, a.view(4), b])
    with seen:
        column = seen.given[1].unsqueeze(1)
        made = torch.cat((seen.given[0], column))
    steps = seen.steps_to([made])
    assert steps is not None and steps.steps[-1][2][0] == [0, 3]
    assert seen._number(a.view(4, 1)) is None, "another object of these elements is either"


def test_a_loss_of_1_and_another():
    """The gradients that `kd_loss` made in forward come as they are, times the gradient of the loss, or as copies."""
    for scale, keep in ((1.0, False), (1.0, True), (2.0, False), (1.0, False), (2.0, True), (1.0, True), (0.5, False)):
        student = torch.tensor([[1.0, 2.0, -1.0]]).requires_grad_()
        loss, _ = w2s_fast.kd_loss(student, [("logits", torch.zeros(1, 3))])
        for _ in range(1 + keep):
            (grad,) = torch.autograd.grad(loss, student, torch.tensor(scale), retain_graph=keep)
            torch.testing.assert_close(grad, scale * (student.detach().softmax(-1) - 1 / 3))
            grad.fill_(7.0)
