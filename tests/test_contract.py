"""Every op of the package keeps the contract: schema, fake kernel, gradient, reference, samples, bench case, docs."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch

import w2s_fast
from w2s_fast import extension
from w2s_fast.library import OPS
from w2s_fast.testing.samples import all_samples

SAMPLES = all_samples()
PUBLIC = sorted({sample.op for sample in SAMPLES})
#: raw ops that no public function has the name of: they are a part of another op, reached through its samples
PARTS = {name for name in OPS if not hasattr(w2s_fast, name)}
ROOT = Path(w2s_fast.__file__).parent


def _public_ops() -> list[str]:
    """Public functions of tensors; a table made from numbers (a noise schedule) is no op."""
    return [
        name
        for name in w2s_fast.__all__
        if inspect.isfunction(function := getattr(w2s_fast, name))
        and "ops" in function.__module__
        and any("Tensor" in str(p.annotation) for p in inspect.signature(function).parameters.values())
    ]


def test_every_public_op_has_samples():
    missing = [name for name in _public_ops() if name not in PUBLIC]
    assert not missing, f"no samples in w2s_fast/testing/samples for {missing}"


def test_every_part_is_defined_once():
    text = "\n".join(path.read_text() for path in (ROOT / "ops").rglob("*.py"))
    for name in PARTS:
        count = len(re.findall(rf"(?:define\(\s*|gradient=)\w+\.{name},", text))
        assert count == 1, f"{name} is defined {count} times"


@pytest.mark.parametrize("name", sorted(OPS))
@pytest.mark.parametrize("suffix", ["", "_on"])
def test_registration(name, suffix):
    qualified = f"w2s_fast::{name}{suffix}"
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has(qualified, "CompositeExplicitAutograd"), "no default kernel"
    assert has(qualified, "Meta"), "no fake kernel"
    assert has(qualified, "Autograd"), "no gradient (a silent None otherwise)"
    overload = getattr(torch.ops.w2s_fast, name + suffix).default
    assert not overload._schema.is_mutable


def _types(schema: str) -> str:
    """``"Tensor, float -> Tensor"`` of ``"op(Tensor x, float eps) -> (Tensor y)"``."""
    sides = [re.sub(r"^[^(]*\(|\)$", "", re.sub(r"\([a-z]!\)", "", part)) for part in schema.rsplit(" -> ", 1)]
    return " -> ".join(", ".join(piece.split()[0] for piece in side.split(", ") if piece) for side in sides).rstrip()


@pytest.mark.skipif(extension.PATH is None, reason="the extension is not built")
def test_implementations_take_what_the_schemas_say():
    """The stable ABI hands over 64-bit words: an int where a float is meant is a wrong result without an error."""
    found = {op: types for op, types in extension.signatures().items() if hasattr(torch.ops.w2s_fast, op)}
    said = {op: _types(str(getattr(torch.ops.w2s_fast, op).default._schema)) for op in found}
    assert {op: types for op, types in found.items() if said[op] != types} == {}
    assert {op for op in OPS if OPS[op].has_cpp()} <= set(found)
    assert not extension.signatures().keys() - found.keys(), "an implementation of no op"


@pytest.mark.parametrize("name", sorted(OPS))
def test_reference_is_the_definition(name):
    reference = OPS[name].reference
    module = inspect.getmodule(reference)
    assert module is not None and ".reference." in module.__name__, "the default kernel lives outside reference/"
    assert reference.__doc__, "the reference states no definition"


@pytest.mark.parametrize("name", sorted(OPS))
def test_has_a_kernel_for_cpu_and_gpu(name):
    op = OPS[name]
    assert op.triton is not None, f"{name} has no Triton kernel"
    if w2s_fast.extension.ERROR is None:
        assert op.has_cpp(), f"{name} has no C++ kernel"


@pytest.mark.parametrize("name", _public_ops())
def test_docstring(name):
    doc = inspect.getdoc(getattr(w2s_fast, name)) or ""
    for part in ("Args:", "Returns:", "Raises:", "Example:"):
        assert part in doc, f"{name}: docstring has no {part}"
    signature = inspect.signature(getattr(w2s_fast, name))
    for parameter in signature.parameters:
        assert parameter in doc, f"{name}: the docstring says nothing of {parameter}"
    assert signature.return_annotation is not inspect.Signature.empty


@pytest.mark.parametrize("name", _public_ops())
def test_has_a_bench_case(name):
    from w2s_fast.bench.case import load

    assert any(case.op == name for case in load("cpu", full=True)), f"no case in bench/cases names {name}"


def _enumerators(name: str) -> list[str]:
    """Of a C++ enum, in order; it stands once."""
    found = [
        match.group(1)
        for path in sorted((ROOT.parent / "csrc").rglob("*"))
        if path.suffix in (".h", ".cpp", ".cu", ".cuh")
        for match in re.finditer(rf"enum (?:class )?{name}\b[^{{;]*{{([^}}]*)}}", path.read_text())
    ]
    assert len(found) == 1, f"enum {name} stands {len(found)} times"
    return [word.split("=")[0].strip() for word in found[0].split(",")]


def test_kinds_and_forms_are_the_same_in_every_language():
    """Numbers that pass from Python to C++ and Triton: each language names them once, in one order."""
    from w2s_fast.kernels.linear_loss import kd, kd_row, preference

    from w2s_fast.reference.linear_loss import distillation
    from w2s_fast.reference.linear_loss import preference as losses

    forms = [form.upper().replace(" WITH ", "_") for form in distillation.FORMS]
    kinds = [kind.upper() for kind in distillation.KINDS]
    assert _enumerators("KdKind") == kinds and _enumerators("KdForm") == forms
    arguments, functions = _enumerators("Argument"), _enumerators("Function")
    for module, names in ((kd_row, kinds), (kd_row, forms), (preference, arguments), (preference, functions)):
        assert [getattr(module, name).value for name in names] == list(range(len(names)))
    for names in (arguments, functions):
        assert [getattr(losses, name) for name in names] == list(range(len(names)))
    assert [getattr(distillation, name) for name in forms] == list(range(len(forms)))
    assert tuple(distillation.FORMS.values()) == kd.COUNTS


@pytest.mark.parametrize("layer", ["ops", "reference", "kernels"])
def test_no_argument_goes_by_position(layer):
    """Arguments and what a call keeps are read by name: neither ``*args`` nor saved tensors are indexed or sliced."""
    folder = ROOT.parent / "kernels" if layer == "kernels" else ROOT / layer
    for path in folder.rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, (ast.FunctionDef, ast.Lambda)) or not function.args.vararg:
                continue
            if getattr(function, "name", "") == "_load_from_state_dict":  # torch's own signature
                continue
            if function.args.vararg.arg == "shape":  # the sizes of one tensor
                continue
            for node in ast.walk(function):
                flat = isinstance(node, ast.Subscript) and ast.unparse(node.value) == function.args.vararg.arg
                assert not flat, f"{path}:{node.lineno}: {ast.unparse(node)}"
        assert not re.search(r"saved_tensors|needs_input_grad|ctx\b", path.read_text()), f"{path}: use the Call"


@pytest.mark.skipif(w2s_fast.extension.ERROR is not None, reason="the extension is not built")
def test_the_table_of_operations_has_every_op_with_its_backends():
    from w2s_fast.bench import catalogue

    listed = dict(re.findall(r"^\| `(\w+)` \| .* \| ([^|]+) \|$", catalogue.operations(), re.M))
    assert set(listed) >= set(_public_ops())
    assert listed["fuse_logits"] == "C++, Triton" and listed["fused_sample"] == "C++, Triton, CUDA C++"
    assert listed["karras_sigmas"] == "PyTorch"


def test_kernels_import_only_triton():
    for path in (ROOT.parent / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            else:
                continue
            allowed = {"triton", *sys.stdlib_module_names}
            assert all(n.split(".")[0] in allowed for n in names), f"{path}: imports {names}"
