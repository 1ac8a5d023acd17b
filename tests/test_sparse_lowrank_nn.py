"""SLTrain's linear layer, converted models, and official checkpoints."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import w2s_fast
from w2s_fast.nn import SparseLowRankLinear, model_size, replace_linear

LAYOUTS = ["csr16", "csr32", "balanced"]


def weight_of(layer: SparseLowRankLinear) -> torch.Tensor:
    """The layer's matrix in float64, by its definition."""
    s = layer.scaling.double().tanh() if layer.scaling is not None else layer.alpha / max(layer.rank, 1)
    return s * (layer.B.double() @ layer.A.double()) + layer.support.to_dense(layer.values.double())


def trained(layer: SparseLowRankLinear, seed: int = 0) -> SparseLowRankLinear:
    """With a B that is not zero."""
    with torch.no_grad():
        layer.B.normal_(generator=torch.Generator().manual_seed(seed))
    return layer


def llama(**changes):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | {"num_attention_heads": 4} | changes))


def test_a_seed_gives_the_official_initialisation():
    rows, columns, rank = 33, 70, 8
    torch.manual_seed(5)
    made = SparseLowRankLinear(columns, rows, rank, 0.05, layout="csr16")
    torch.manual_seed(5)  # the draws of the official code, one after the other
    bias = nn.init.uniform_(torch.empty(rows), -1 / math.sqrt(rows), 1 / math.sqrt(rows))
    a = nn.init.kaiming_uniform_(torch.empty(rank, columns), a=math.sqrt(5))
    index = torch.randperm(rows * columns)[: int(0.05 * rows * columns)].sort().values
    values = nn.init.uniform_(torch.empty(len(index)), -1 / math.sqrt(columns), 1 / math.sqrt(columns))
    assert torch.equal(made.bias, bias) and torch.equal(made.values, values) and not made.B.any()
    torch.testing.assert_close(made.A, a, atol=1e-7, rtol=0)  # its bound 1 / sqrt(I) comes from sqrt(5), rounded
    assert torch.equal(made.support.flat_indices(), index)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trainable", [False, True])
def test_forward_is_the_dense_layer_of_its_weight(layout, dtype, trainable):
    made = trained(SparseLowRankLinear(130, 37, 5, 0.05, 4.0, layout=layout, trainable_scaling=trainable, dtype=dtype))
    x = torch.randn(2, 3, 130, dtype=dtype)
    wanted = nn.functional.linear(x.double(), weight_of(made), made.bias.double())
    torch.testing.assert_close(made(x).double(), wanted, atol=0.05 if dtype == torch.bfloat16 else 1e-5, rtol=1e-2)
    dense = made.to_linear()
    assert type(dense) is nn.Linear and dense.weight.dtype == dtype and dense.weight.requires_grad
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(dense.weight.double(), weight_of(made), atol=4 * rounding, rtol=4 * rounding)
    assert torch.equal(dense.bias, made.bias)


@pytest.mark.parametrize("trainable", [False, True])
def test_gradients(trainable):
    made = trained(SparseLowRankLinear(9, 7, 3, 0.2, trainable_scaling=trainable, dtype=torch.float64))
    names = [name for name, _ in made.named_parameters()]
    assert names == ["bias", "A", "B", *(["scaling"] if trainable else []), "values"]

    def run(x, *parameters):
        return torch.func.functional_call(made, dict(zip(names, parameters, strict=True)), (x,))

    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *made.parameters()))


def test_degenerate_sizes():
    sparse = SparseLowRankLinear(20, 10, 0, 0.1, bias=False)
    low = trained(SparseLowRankLinear(20, 10, 4, 0.0))
    x = torch.randn(3, 20)
    assert sparse.scale == 1.0 and sparse.bias is None and not low.values.numel()
    for made in (sparse, low):
        torch.testing.assert_close(made(x), made.to_linear()(x))
        made(x).sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_features": 0}, "in_features must be >= 1, got 0"),
        ({"rank": -1}, "rank must be >= 0, got -1"),
        ({"density": 1.5}, r"density must be in \[0, 1\), got 1.5"),
        ({"density": 1.0}, r"density must be in \[0, 1\), got 1.0"),
        ({"alpha": 0.0}, "alpha must be a finite number > 0, got 0.0"),
        ({"layout": "coo"}, "layout must be one of"),
        ({"layout": "flat64"}, "layout must be one of 'csr16', 'csr32', 'balanced', got 'flat64'"),
        ({"layout": "flat64", "density": 0.0}, "layout must be one of"),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        SparseLowRankLinear(**{"in_features": 20, "out_features": 10, "rank": 2} | change)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(30, 50), (50, 30)])
def test_from_linear(rows, columns, trainable):
    dense = nn.Linear(columns, rows, dtype=torch.float64)
    made = SparseLowRankLinear.from_linear(dense, 6, 0.1, trainable_scaling=trainable)
    w, ours = dense.weight, weight_of(made)
    row, column = made.support.positions()
    torch.testing.assert_close(ours[row, column], w[row, column])
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    low = u[:, :6] * s[:6] @ vh[:6]
    outside = torch.ones_like(w).index_put((row, column), torch.tensor(0.0, dtype=w.dtype))
    torch.testing.assert_close(ours * outside, low * outside)
    assert torch.linalg.norm(ours - w) < torch.linalg.norm(low - w)
    torch.testing.assert_close(made.A.norm(), made.B.norm())
    assert torch.equal(made.bias, dense.bias)


def test_from_linear_is_exact_where_the_rank_suffices():
    dense = nn.Linear(12, 20)
    x = torch.randn(5, 12)
    for rank in (12, 15):  # a rank above the matrix's own leaves rows of A zero
        made = SparseLowRankLinear.from_linear(dense, rank, 0.05)
        torch.testing.assert_close(made(x), dense(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(made.to_linear()(x), dense(x), atol=1e-5, rtol=1e-5)


def test_repr():
    text = repr(SparseLowRankLinear(256, 128, 32, 0.03, alpha=8))
    assert "in_features=256, out_features=128, rank=32, density=0.03, scale=0.25, bias=True" in text
    assert "128x256, csr16, nnz=983" in text
    assert "scale=trainable" in repr(SparseLowRankLinear(256, 128, 32, trainable_scaling=True))


def test_a_default_device_gets_the_layer():
    with torch.device("meta"):
        made = SparseLowRankLinear(64, 32, 4, generator=torch.Generator().manual_seed(0))
    assert {t.device.type for t in made.state_dict().values()} == {"meta"} and made.support.nnz == 61


def test_dtype_moves_with_to_and_the_index_does_not():
    made = trained(SparseLowRankLinear(64, 32, 4)).to(torch.bfloat16)
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    assert made.support.cols.dtype == torch.uint16 and made.support.row_ptr.dtype == torch.int32
    assert made(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_dict_carries_the_support(layout, tmp_path):
    made = trained(SparseLowRankLinear(200, 48, 4, 0.05, layout=layout))
    twin = copy.deepcopy(made)
    other = SparseLowRankLinear(200, 48, 4, 0.05, layout=layout)
    x = torch.randn(3, 200)
    assert torch.equal(twin(x), made(x)) and twin.support.cols.data_ptr() != made.support.cols.data_ptr()
    torch.save(made.state_dict(), tmp_path / "layer.pt")
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    assert torch.equal(other.support.flat_indices(), made.support.flat_indices())
    assert torch.equal(other(x), made(x))  # the kernels' walking order follows the loaded index


def test_a_corrupt_index_is_refused_on_loading():
    made = SparseLowRankLinear(200, 48, 4)
    state = made.state_dict()
    state["support.cols"] = state["support.cols"].view(torch.uint16).int().flip(0).to(torch.uint16)
    with pytest.raises(ValueError, match="cols must be"):
        made.load_state_dict(state)


def test_a_converted_llama(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = llama()
    ids = torch.randint(96, (2, 16))
    report = replace_linear(model, rank=12, density=0.05, alpha=3.0)
    assert len(report.layers) == 14 and all("attn" in name or "mlp" in name for name in report.layers)
    assert type(model.lm_head) is nn.Linear and report.before.parameters > report.after.parameters
    kinds = {type(m) for name, m in model.named_modules() if name in report.layers}
    assert kinds == {SparseLowRankLinear} and "14 layers replaced" in str(report)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    for layer in (m for m in model.modules() if isinstance(m, SparseLowRankLinear)):
        trained(layer)
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        model.save_pretrained(tmp_path)
        again = llama()
        replace_linear(again, rank=12, density=0.05, alpha=3.0)
        again.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))
        assert torch.equal(again(input_ids=ids).logits, wanted)
        for name in report.layers:
            again.set_submodule(name, again.get_submodule(name).to_linear())
        torch.testing.assert_close(again(input_ids=ids).logits, wanted, atol=1e-4, rtol=1e-4)


def test_replace_linear_from_weights_keeps_the_function():
    model = llama()
    ids = torch.randint(96, (1, 16))
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        replace_linear(model, rank=48, density=0.05, from_weights=True)
        torch.testing.assert_close(model(input_ids=ids).logits, wanted, atol=1e-4, rtol=1e-4)


def test_replace_linear_refuses_a_target_that_is_nowhere():
    with pytest.raises(ValueError, match="target must be a part of some linear layer's path"):
        replace_linear(nn.Sequential(nn.Linear(4, 4)), rank=2)


@pytest.mark.parametrize("from_weights", [False, True])
def test_replace_linear_keeps_a_layer_at_two_paths_one(from_weights):
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"mlp": shared, "attn": shared, "head": shared, "other": nn.Linear(8, 8)})
    report = replace_linear(model, rank=2, density=0.1, from_weights=from_weights)
    assert report.layers == ["mlp", "attn", "head"] and type(model["mlp"]) is SparseLowRankLinear
    assert model["mlp"] is model["attn"] and model["mlp"] is model["head"] and type(model["other"]) is nn.Linear


def test_an_error_midway_leaves_the_model_unconverted():
    model = nn.ModuleDict({"mlp_a": nn.Linear(64, 64), "mlp_b": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"density must be at least 0\.25"):
        replace_linear(model, rank=2, density=0.1)
    assert type(model["mlp_a"]) is nn.Linear and type(model["mlp_b"]) is nn.Linear


def test_replace_linear_leaves_subclasses_of_linear():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "mlp": nn.Linear(8, 8)})
    before = model["attn"].out_proj
    assert replace_linear(model, rank=2, density=0.1).layers == ["mlp"] and model["attn"].out_proj is before
    x = torch.randn(3, 1, 8)
    assert model["attn"](x, x, x)[0].shape == x.shape


def test_sizes_are_those_of_the_paper():
    """60M: 58M and 44M parameters; 6 bytes a bfloat16 parameter in training, 0.35 GB and 0.26 GB without the index."""
    model = llama(vocab_size=32000, hidden_size=512, intermediate_size=1376, num_hidden_layers=8).to(torch.bfloat16)
    report = replace_linear(model, rank=128, density=0.03, alpha=32.0)
    assert round(report.before.parameters / 1e6) == 58 and round(report.after.parameters / 1e6) == 44
    supports = [m for m in model.modules() if isinstance(m, w2s_fast.SparseSupport)]
    after = report.after
    assert round((report.before.weight_bytes + report.before.optimizer_bytes) / 1e9, 2) == 0.35
    assert round((after.weight_bytes + after.optimizer_bytes) / 1e9, 2) == 0.26
    assert after.index_bytes == sum(2 * s.nnz + 4 * (s.shape[0] + 1) for s in supports)
    assert after == model_size(model)


def official_layer(rows: int, columns: int, rank: int, seed: int = 0, dtype=torch.float32, **more):
    draw = torch.Generator().manual_seed(seed)
    index = torch.randperm(rows * columns, generator=draw)[: rows * columns // 20].sort().values
    return {
        "lora_A": torch.randn(rank, columns, generator=draw).to(dtype),
        "lora_B": torch.randn(rows, rank, generator=draw).to(dtype),
        "sparse_index": index, "sparse_value": torch.randn(len(index), generator=draw).to(dtype), **more,
    }  # fmt: skip


def official_weight(tensors, alpha):
    """By the official code's steps: the dense product, then scatter_add of the values into the flat matrix."""
    s = tensors["scaling"].double().tanh() if "scaling" in tensors else alpha / len(tensors["lora_A"])
    w = tensors["lora_B"].double() @ (tensors["lora_A"].double() * s)
    return w.view(-1).scatter_add(0, tensors["sparse_index"], tensors["sparse_value"].double()).view_as(w)


@pytest.mark.parametrize("layout", ["csr16", "csr32", "flat64"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("more", [{}, {"bias": torch.randn(31)}, {"scaling": torch.tensor([0.7])}])
def test_an_official_layer_comes_back_bit_for_bit(layout, dtype, more):
    from w2s_fast.integrations.sltrain import export_layer, import_layer

    tensors = official_layer(31, 45, 6, dtype=dtype, **{k: t.to(dtype) for k, t in more.items()})
    made = import_layer(tensors, 16.0, layout)
    back = export_layer(made)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[k], t) and back[k].dtype == t.dtype for k, t in tensors.items())
    if layout != "flat64":
        torch.testing.assert_close(weight_of(made), official_weight(tensors, 16.0), atol=1e-12, rtol=1e-12)
        x = torch.randn(3, 45, dtype=dtype)
        wanted = x.double() @ official_weight(tensors, 16.0).t() + more.get("bias", torch.zeros(31)).to(dtype).double()
        torch.testing.assert_close(made(x).double(), wanted, atol=0.3 if dtype == torch.bfloat16 else 1e-4, rtol=0.01)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sparse_index", lambda t: t.flip(0), "cols must be sorted"),
        ("sparse_index", lambda t: t + 1_000_000, r"cols must be in \[0, 600\)"),
        ("sparse_index", lambda t: torch.cat((t[:1], t[:-1])), "cols must be without duplicates"),
        ("sparse_value", lambda t: t[:-1], r"sparse_value must be of shape \[30\]"),
        ("lora_B", lambda t: t[:, :-1], "lora_B must be of shape"),
        ("lora_A", None, "tensors must be with lora_A"),
        ("lora_A", lambda t: t.long(), "lora_A must be float32, .*, got torch.int64"),
        ("bias", lambda t: torch.zeros(19), r"bias must be of shape \[20\], got \(19,\)"),
        ("scaling", lambda t: torch.ones(2), r"scaling must be of one element, got shape \(2,\)"),
        ("weight", lambda t: torch.ones(20, 30), "tensors must be of the names lora_A, .*, got 'weight'"),
    ],
)
def test_corrupt_official_tensors_are_refused(name, change, message):
    from w2s_fast.integrations.sltrain import import_layer

    tensors = official_layer(20, 30, 4)
    tensors = tensors | {name: change(tensors.get(name))} if change else {k: t for k, t in tensors.items() if k != name}
    with pytest.raises((ValueError, TypeError), match=f"w2s_fast.*: {message}"):
        import_layer(tensors, 16.0)


def small_state(**changes):
    """A checkpoint of ``ModuleDict(mlp=Linear(30, 4), norm=LayerNorm(4))``."""
    state = {f"mlp.{k}": t for k, t in official_layer(4, 30, 3, bias=torch.ones(4)).items()}
    state |= {"norm.weight": torch.full((4,), 2.0), "norm.bias": torch.ones(4)} | changes
    return {name: tensor for name, tensor in state.items() if tensor is not None}


WRONG_SIZE = {f"mlp.{k}": t for k, t in official_layer(40, 300, 3, bias=torch.ones(40)).items()}


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (WRONG_SIZE, ValueError, r"mlp.lora_A must be of shape \[r, 30\], got \(3, 300\)"),
        ({"mlp.lora_B": torch.ones(5, 3)}, ValueError, r"mlp.lora_B must be of shape \[4, 3\], got \(5, 3\)"),
        ({"mlp.bias": torch.ones(5)}, ValueError, r"bias must be of shape \[4\], got \(5,\)\. In layer mlp"),
        ({"mlp.sparse_index": torch.zeros(6, dtype=torch.int64)}, ValueError, "cols must be without duplicates"),
        ({"norm.bias": torch.ones(5)}, ValueError, r"norm.bias must be of shape \[4\], got \(5,\)"),
        ({"norm.bias": None}, RuntimeError, r"missing: \['norm.bias'\], not expected: \[\]"),
        ({"mlp.bias": None}, RuntimeError, r"missing: \['mlp.bias'\]"),
        ({"mlp.lora_A": None}, RuntimeError, r"missing: \['mlp.lora_A'\]"),
        ({"mlp.sparse_index": None}, RuntimeError, r"missing: \['mlp\."),
        ({"mlp.weight": torch.ones(4, 30)}, RuntimeError, r"not expected: \['mlp.weight'\]"),
        ({"other.sparse_index": torch.arange(3)}, RuntimeError, r"not expected: \['other.sparse_index'\]"),
        ({"norm.sparse_index": torch.arange(3)}, RuntimeError, r"not expected: \['norm.sparse_index'\]"),
    ],
)
def test_a_refused_checkpoint_leaves_the_model_unchanged(converted, changes, error, message):
    from w2s_fast.integrations.sltrain import load_state_dict

    model = nn.ModuleDict({"mlp": nn.Linear(30, 4), "norm": nn.LayerNorm(4)})
    if converted:
        replace_linear(model, rank=2, density=0.1)
    modules, state = dict(model.named_modules()), {k: t.clone() for k, t in model.state_dict().items()}
    with pytest.raises(error, match=f"w2s_fast.*{message}"):
        load_state_dict(model, small_state(**changes), 16.0)
    assert dict(model.named_modules()) == modules and model.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())
    load_state_dict(model.eval(), small_state(), 16.0)
    assert torch.equal(model["mlp"].A, small_state()["mlp.lora_A"]) and not model["mlp"].training
    assert torch.equal(model["norm"].weight, torch.full((4,), 2.0))


def test_a_layer_at_two_paths_stays_one_in_a_checkpoint():
    from w2s_fast.integrations.sltrain import export_state_dict, load_state_dict

    shared = nn.Linear(30, 4)
    model = nn.ModuleDict({"mlp": shared, "attn": shared})
    layer = official_layer(4, 30, 3, bias=torch.ones(4))
    state = {f"{path}.{k}": t for path in ("mlp", "attn") for k, t in layer.items()}
    load_state_dict(model, state, 16.0)
    assert model["mlp"] is model["attn"] and torch.equal(model["mlp"].A, layer["lora_A"])
    back = export_state_dict(model)
    assert back.keys() == state.keys() and all(torch.equal(back[k], t) for k, t in state.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_official_checkpoint_comes_back_bit_for_bit(tmp_path, dtype):
    from w2s_fast.integrations import sltrain

    model = llama().to(dtype)
    state = {k: t.clone() for k, t in model.state_dict().items()}
    for seed, name in enumerate(sorted(n for n in state if "proj" in n)):
        weight = state.pop(name)
        layer = official_layer(*weight.shape, 6, seed, dtype)
        state |= {f"{name.removesuffix('.weight')}.{k}": t for k, t in layer.items()}
    frequencies = (1.0 / 10000 ** (torch.arange(0, 12, 2).float() / 12)).to(dtype)
    state |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": frequencies for i in range(2)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    model.config.save_pretrained(tmp_path)
    (tmp_path / "splora_config.json").write_text('{"r": 6, "lora_alpha": 32, "lora_dropout": 0, "sp_ratio": 0.05}')

    made = sltrain.load_pretrained(tmp_path)
    layer = made.model.layers[1].mlp.down_proj
    assert layer.scale == 32 / 6 and layer.density == pytest.approx(0.05, abs=1e-3) and layer.values.dtype == dtype
    sltrain.save_pretrained(made, tmp_path / "again")
    back = torch.load(tmp_path / "again" / "pytorch_model.bin", weights_only=True)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], t) and back[k].dtype == t.dtype for k, t in state.items())
    ids = torch.randint(96, (1, 8))
    with torch.no_grad():
        again = sltrain.load_pretrained(tmp_path / "again")
        assert torch.equal(again(input_ids=ids).logits, made(input_ids=ids).logits)
    del state["model.norm.weight"]
    with pytest.raises(RuntimeError, match=r"missing: \['model.norm.weight'\]"):
        sltrain.load_state_dict(made, state, 32)
    with pytest.raises(ValueError, match="model must be with SparseLowRankLinear layers"):
        sltrain.save_pretrained(model, tmp_path)
