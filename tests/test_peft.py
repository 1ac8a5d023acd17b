"""PEFT's layers with our forward against PEFT's own: outputs, gradients, state dicts, merging, several adapters."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("peft")
from peft import LoraConfig, MissConfig, PeftModel, RandLoraConfig, VeraConfig, get_peft_model

from w2s_fast.integrations.peft import (
    FusedLoraLinear,
    FusedRandLoraLinear,
    register_fused_adapters,
    use_fused_adapters,
)
from w2s_fast.integrations.peft.merged import bat_rows, bat_weight
from w2s_fast.testing.processes import in_two

VARIANTS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "dora": {"use_dora": True},
    "dora-pissa": {"use_dora": True, "init_lora_weights": "pissa"},
    "dora-rslora": {"use_dora": True, "use_rslora": True},
    "lora-dropout": {"lora_dropout": 0.3},
    "dora-dropout": {"use_dora": True, "lora_dropout": 0.3},
}
every = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(params=("one op", "plain PyTorch"))
def way(request, monkeypatch):
    """Both ways of the fused forward; the second is a GPU's, and that of several adapters."""
    if request.param == "plain PyTorch":
        monkeypatch.setattr("w2s_fast.integrations.peft.lora.served", lambda *_: False)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(9, 13), nn.Linear(13, 9, bias=False), nn.Linear(9, 4)

    def forward(self, x):
        return self.head(x + self.down(self.up(x).tanh()))


def config(variant="lora", **more):
    return LoraConfig(target_modules=["up", "down"], r=3, lora_alpha=5, **{**VARIANTS[variant], **more})


def disturb(model) -> None:
    """Factors that are not at their start, where B is 0 and every magnitude the norm."""
    draw = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora" in name:
            p.data += 0.3 * torch.randn(p.shape, generator=draw).to(p.dtype)


def adapted(variant="lora", dtype=torch.float64, seed=0, **more):
    torch.manual_seed(seed)
    start = torch.float32 if dtype is torch.float64 else dtype  # PiSSA refuses float64
    model = get_peft_model(Net().to(start), config(variant), **more)
    if dtype is torch.float64:
        model.double()
    disturb(model)
    return model


def outcome(model, x, seed=0, autocast=None):
    """Output and gradients of everything that wants one."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        y = model(x)
    (y.double() * torch.arange(y.numel()).view(y.shape).cos()).sum().backward()
    return {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def same(found, expected, rtol=1e-10, atol=1e-12):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def data(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


@every
@pytest.mark.parametrize("training", (True, False))
def test_outputs_and_gradients_are_pefts(variant, training, way):
    model = adapted(variant).train(training)
    single = () if "dora" in variant else (data(9),)  # PEFT's DoRA makes [1, O] of a vector, ours [O]
    for x in (data(5, 9), data(2, 3, 9), data(0, 9), *single):
        expected = outcome(model, x)
        with use_fused_adapters(model) as handle:
            same(outcome(model, x), expected)
            few = x.ndim == 1 or not len(x)
            assert all(s.startswith("PEFT: few rows" if few and "dora" not in variant else "fused")
                       for s in handle.status().values()) and len(handle.layers) == 2  # fmt: skip
            assert "lora_B" in "".join(expected)
        assert not any(isinstance(m, FusedLoraLinear) for m in model.modules())
        same(outcome(model, x), expected, 0, 0)


@pytest.mark.parametrize("variant", ("lora", "dora", "dora-dropout"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("wide", (True, False), ids=("float32 adapters", "adapters as the base"))
def test_dtypes(variant, dtype, wide, way):
    """Not further from float64 than twice PEFT's own result in the same dtypes, and of the same dtypes."""
    model = adapted(variant, dtype, autocast_adapter_dtype=wide)
    exact = copy.deepcopy(model).double()
    x = data(70, 9, dtype=dtype)
    right, theirs = outcome(exact, x.double()), outcome(model, x)
    use_fused_adapters(model)
    ours = outcome(model, x)
    assert {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in theirs.items()}
    for name, value in right.items():
        error, allowed = (float((t[name].double() - value).norm() / value.norm()) for t in (ours, theirs))
        assert error <= 2 * allowed + 2 * torch.finfo(dtype).eps, (name, error, allowed)


@pytest.mark.parametrize("variant", ("lora", "dora"))
def test_autocast(variant, way):
    model = adapted(variant, torch.float32)
    exact, x = copy.deepcopy(model).double(), data(70, 9, dtype=torch.float32)
    right, theirs = outcome(exact, x.double()), outcome(model, x, autocast=torch.bfloat16)
    use_fused_adapters(model)
    ours = outcome(model, x, autocast=torch.bfloat16)
    assert ours["y"].dtype == theirs["y"].dtype
    for name, value in right.items():
        error, allowed = (float((t[name].double() - value).norm() / value.norm()) for t in (ours, theirs))
        assert error <= 2 * allowed + 1e-3, (name, error, allowed)


@every
def test_merging_and_state_dicts_are_pefts(variant, tmp_path):
    model, plain = adapted(variant).eval(), adapted(variant).eval()
    handle = use_fused_adapters(model)
    assert model.state_dict().keys() == plain.state_dict().keys() and repr(model) == repr(plain)
    x = data(4, 9)
    expected = outcome(plain, x)
    for _ in range(2):
        for m in (model, plain):
            m.merge_adapter()
        torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)
        assert set(handle.status().values()) == {"base layer alone"}
        for m in (model, plain):
            m.unmerge_adapter()
        same(outcome(model, x), expected, 1e-8, 1e-10)
    with model.disable_adapter(), plain.disable_adapter():
        torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)

    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Net(), str(tmp_path)).eval()
    if "pissa" not in variant and "olora" not in variant:  # those store the factors of an edited base weight
        loaded.double()
        torch.testing.assert_close(loaded(x), model(x))
        use_fused_adapters(loaded)
        torch.testing.assert_close(loaded(x), model(x))
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied(x), model(x), rtol=0, atol=0)
    kept = io.BytesIO()
    torch.save(model, kept)
    kept.seek(0)
    torch.testing.assert_close(torch.load(kept, weights_only=False)(x), model(x), rtol=0, atol=0)
    torch.testing.assert_close(model.merge_and_unload()(x), plain.merge_and_unload()(x), rtol=1e-10, atol=1e-12)


def test_several_adapters_in_any_choice():
    model = adapted("lora")
    model.add_adapter("second", config("dora"))
    handle = use_fused_adapters(model)
    model.add_adapter("third", config("rslora"))
    model.double()
    disturb(model)
    x = data(4, 9)
    for chosen in ("default", "second", "third", ["default", "second"], ["second", "third", "default"], ["second"] * 2):
        model.base_model.set_adapter(chosen)
        found = outcome(model, x)
        assert set(handle.status().values()) == {"fused"}
        handle.remove()
        expected = outcome(model, x)
        handle = use_fused_adapters(model)
        same(found, expected)
    model.delete_adapter("second")
    model.set_adapter("third")
    model(x)


def test_weights_that_change_give_new_norms():
    model, plain = adapted("dora"), adapted("dora")
    use_fused_adapters(model)
    x = data(4, 9)
    changes = {
        "the base": lambda m: m.base_layer.weight.mul_(3.0),
        "B": lambda m: m.lora_B["default"].weight.mul_(2.0),
        "A, out of sight": lambda m: m.lora_A["default"].weight.data.add_(1.0),
        "the scale": lambda m: m.scale_layer(0.5),
        "nothing": lambda m: None,
        "the magnitude": lambda m: m.lora_magnitude_vector["default"].weight.mul_(2.0),
        "merging": lambda m: (m.merge(), m.unmerge()),
    }
    for change in changes.values():
        with torch.no_grad():
            for one in (model, plain):
                for m in (one.base_model.model.up, one.base_model.model.down):
                    change(m)
        same(outcome(model, x), outcome(plain, x), 1e-8, 1e-9)


@pytest.mark.parametrize("variant", ("lora", "dora-dropout"))
def test_checkpointing(variant, way):
    model = adapted(variant)
    use_fused_adapters(model)
    expected = outcome(model, data(4, 9))
    inner = model.base_model.model.up
    own = inner.forward
    inner.forward = lambda x: checkpoint(own, x, use_reentrant=False)
    same(outcome(model, data(4, 9)), expected)


def test_compile_makes_one_graph():
    model = adapted("dora", torch.float32)
    x = data(4, 9, dtype=torch.float32)
    use_fused_adapters(model)
    expected = model(x)
    torch._dynamo.reset()
    found = torch.compile(model, backend="aot_eager")(x)
    torch.testing.assert_close(found, expected)


def _sharded(rank: int) -> None:
    """Three steps of two processes with FSDP2, half a batch each: PEFT's own of one process with the whole batch."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    for variant in ("lora", "dora"):
        alone, model = adapted(variant, torch.float32), adapted(variant, torch.float32)
        handle, x = use_fused_adapters(model), data(8, 9, dtype=torch.float32)
        fully_shard(model.base_model.model.up)
        fully_shard(model)
        for net, rows in ((alone, x), (model, x[4 * rank : 4 * rank + 4])):
            optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.3)
            for _ in range(3):
                net(rows).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        assert set(handle.status().values()) == {"fused"}
        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        for name, value in alone.state_dict().items():
            if rank == 0:
                torch.testing.assert_close(whole[name], value, rtol=1e-4, atol=1e-5)


def test_fsdp2_trains_as_one_process(tmp_path):
    in_two(_sharded, tmp_path)


def test_what_is_not_served_is_pefts_with_a_reason():
    x = data(4, 9)
    model = adapted("lora")
    plain = copy.deepcopy(model)
    handle = use_fused_adapters(model)
    seen = []
    model.base_model.model.up.lora_A["default"].register_forward_hook(lambda *a: seen.append(1))
    torch.testing.assert_close(model(x), plain(x))
    name = "base_model.model.up"
    assert seen and handle.status() == {name: "PEFT: hooks on its parts", "base_model.model.down": "fused"}

    model.add_adapter("other", config("lora"))
    model.eval()
    model(x, adapter_names=["default", "other", "default", "__base__"])  # gradients are wanted
    assert "adapter_names" in handle.status()["base_model.model.down"]

    torch.manual_seed(0)
    biased = get_peft_model(nn.Sequential(nn.Linear(9, 9)), LoraConfig(target_modules=["0"], lora_bias=True, r=2))
    handle = use_fused_adapters(biased)
    biased(x.float())
    assert handle.status() == {"base_model.model.0": "PEFT: adapter 'default' has a bias"}

    mixed = nn.Sequential(nn.Embedding(5, 9), nn.Linear(9, 9))
    handle = use_fused_adapters(get_peft_model(mixed, LoraConfig(target_modules=["0", "1"], r=2)))
    assert handle.layers == ["base_model.model.1"] and "Embedding" in handle.left["base_model.model.0"]


@every
def test_registration_makes_the_layers_at_construction(variant, tmp_path):
    """PEFT builds ours, with PEFT's start, state dict and results; the saved adapter is PEFT's and loads either way."""
    made = []
    for register in (False, True):
        torch.manual_seed(0)
        settings = config(variant)
        model = get_peft_model(Net(), register_fused_adapters(settings) if register else settings)
        disturb(model)
        made.append(model.eval())
    plain, model = made
    layers = [model.base_model.model.up, model.base_model.model.down]
    assert all(type(layer) is FusedLoraLinear for layer in layers)
    assert model.state_dict().keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=0)
    x = data(4, 9, dtype=torch.float32)
    torch.testing.assert_close(model(x), plain(x))
    model.add_adapter("second", register_fused_adapters(config("rslora")))
    model.set_adapter("default")
    model.load_state_dict(model.state_dict())
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    assert "custom" not in (tmp_path / "adapter_config.json").read_text(encoding="utf-8")
    if "pissa" not in variant and "olora" not in variant:  # those store the factors of an edited base weight
        for settings in (None, register_fused_adapters(LoraConfig.from_pretrained(tmp_path))):
            torch.manual_seed(0)
            loaded = PeftModel.from_pretrained(Net(), str(tmp_path), config=settings).eval()
            assert (type(loaded.base_model.model.up) is FusedLoraLinear) == (settings is not None)
            torch.testing.assert_close(loaded(x), plain(x))
    kept = io.BytesIO()
    torch.save(model, kept)
    kept.seek(0)
    again = torch.load(kept, weights_only=False)
    assert type(again.base_model.model.up) is FusedLoraLinear
    torch.testing.assert_close(again(x), plain(x))
    torch.testing.assert_close(model.merge_and_unload()(x), plain.merge_and_unload()(x))


def test_registration_leaves_what_is_not_served_to_peft():
    class Own(nn.Linear):
        pass

    base = nn.Sequential(nn.Embedding(5, 8), Own(8, 8), nn.Linear(8, 8))
    settings = register_fused_adapters(LoraConfig(target_modules=["0", "1", "2"], r=2))
    made = get_peft_model(base, settings).base_model.model
    assert [type(layer).__name__ for layer in made] == ["Embedding", "Linear", "FusedLoraLinear"]
    turned = register_fused_adapters(LoraConfig(target_modules=["0"], r=2, fan_in_fan_out=True))
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        assert type(get_peft_model(nn.Sequential(nn.Linear(8, 8)), turned).base_model.model[0]) is FusedLoraLinear
    with pytest.raises(TypeError, match="register_fused_adapters: config must be a LoraConfig, got VeraConfig"):
        register_fused_adapters(VeraConfig(target_modules=["0"]))


def loaded_as(bits, variant, loaded, dtype=torch.float32):
    """A model on bitsandbytes' weights; ``loaded``: as transformers loads it, for which PEFT has a class of its own."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    if bits == 4:
        layer = bnb.nn.Linear4bit(64, 96, compute_dtype=dtype, quant_type="nf4")
    else:
        layer = bnb.nn.Linear8bitLt(64, 96, has_fp16_weights=False)
    base = nn.Sequential(layer, nn.Linear(96, 5, dtype=dtype))
    setattr(base, f"is_loaded_in_{bits}bit", loaded)
    settings = LoraConfig(target_modules=["0"], r=3, lora_alpha=5, **VARIANTS[variant])
    model = get_peft_model(base.to("cpu"), settings)
    disturb(model)
    return model


def distance(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def check_quantised(make, x):
    """PEFT's results of a model in training and not, and at the second call, where a norm is known.

    PEFT's are those of another model each: its DoRA over 8 bits has no second forward on a CPU.
    """
    model, tight = make(), 1e-5 if x.dtype is torch.float32 else 3e-2
    layer, keys = model.base_model.model[0], model.state_dict().keys()
    kind = type(layer)
    for training in (True, False):
        model.train(training)
        theirs = outcome(make().train(training), x)
        with use_fused_adapters(model) as handle:
            assert not handle.left
            for _ in range(2):
                ours = outcome(model, x)
                for key, value in theirs.items():
                    assert ours[key].dtype == value.dtype
                    assert distance(ours[key], value) < tight, key
            assert set(handle.status().values()) == {"fused"} and model.state_dict().keys() == keys
        assert type(layer) is kind


BITS = pytest.mark.parametrize("bits", (4, 8), ids=("4 bits", "8 bits"))


@BITS
@pytest.mark.parametrize("loaded", (False, True), ids=("alone", "as transformers loads"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("variant", ("lora", "rslora", "dora", "lora-dropout", "dora-dropout"))
def test_bitsandbytes_bases_give_pefts_results(bits, variant, dtype, loaded):
    name = {4: "Linear4bit", 8: "Linear8bitLt"}[bits]
    assert type(loaded_as(bits, variant, loaded).base_model.model[0]).__name__ == (name if loaded else "Linear")
    check_quantised(lambda: loaded_as(bits, variant, loaded, dtype), data(70, 64, dtype=dtype))


@BITS
def test_quantised_norms_follow_the_factors_and_merging(bits):
    model = loaded_as(bits, "dora", True)  # in training: evaluation repacks the weights
    use_fused_adapters(model)
    x = data(6, 64, dtype=torch.float32)

    def scaled(m, times):
        for factor in ("lora_A", "lora_B"):
            getattr(m.base_model.model[0], factor)["default"].weight.data *= times
        return m

    model(x)
    for times in (1.7, 1.7**2):
        plain = scaled(loaded_as(bits, "dora", True), times)  # whose one forward it is
        torch.testing.assert_close(scaled(model, 1.7)(x), plain(x), rtol=1e-4, atol=1e-5)
    plain, before = scaled(loaded_as(bits, "dora", True), 1.7**2), model(x).detach()
    for m in (model, plain):
        m.merge_adapter()
    torch.testing.assert_close(model(x), plain(x))
    for m in (model, plain):
        m.unmerge_adapter()
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
    assert distance(model(x), before) < 0.2, "codes of other weights than before"


def test_squares_of_an_eight_bit_weight_are_kept(monkeypatch):
    model, asked = loaded_as(8, "dora", True), []
    from w2s_fast.integrations.peft import lora

    own = lora._weight
    monkeypatch.setattr(lora, "_weight", lambda base: asked.append(base) or own(base))
    use_fused_adapters(model)
    x = data(6, 64, dtype=torch.float32)
    model(x)
    assert len(asked) == 2, "for the squares and for the product with A"
    model(x)
    assert len(asked) == 2
    model.base_model.model[0].lora_B["default"].weight.data *= 2
    model(x)
    assert len(asked) == 3, "for the product alone"


@BITS
def test_several_adapters_and_state_dicts_over_quantised_bases(bits, tmp_path):
    model = loaded_as(bits, "lora", True)
    model.add_adapter("more", LoraConfig(target_modules=["0"], r=2, use_dora=True))
    disturb(model)
    x = data(6, 64, dtype=torch.float32)
    plain = copy.deepcopy(model)
    use_fused_adapters(model)
    for name in ("default", "more"):
        for m in (model, plain):
            m.set_adapter(name)
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
    assert not torch.equal(model(x), loaded_as(bits, "lora", True)(x))
    model.save_pretrained(str(tmp_path))
    again, plain = (loaded_as(bits, "rslora", True) for _ in range(2))
    use_fused_adapters(again)
    for m in (again, plain):
        m.load_adapter(str(tmp_path / "more"), "more")
        m.set_adapter("more")
        m.train()  # evaluation repacks 4-bit weights in bfloat16
    use_fused_adapters(again)
    torch.testing.assert_close(again(x), plain(x), rtol=1e-4, atol=1e-5)
    saved, loaded = (m.state_dict() for m in (model, again))
    named = [name for name in saved if ".more." in name]
    assert len(named) == 3 and all(torch.equal(saved[name], loaded[name]) for name in named)


TORCHAO = {
    "int8": lambda q: q.Int8WeightOnlyConfig(),
    "int8 activations": lambda q: q.Int8DynamicActivationInt8WeightConfig(),
    "int4": lambda q: q.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=q.PerGroup(32)),
}


@pytest.mark.parametrize("width", TORCHAO)
@pytest.mark.parametrize("variant", ("lora", "dora", "lora-dropout", "dora-dropout"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without")
def test_torchaos_bases_give_pefts_results(variant, dtype, width):
    quantization = pytest.importorskip("torchao.quantization")
    narrow = TORCHAO[width](quantization)

    def make():
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(64, 96, dtype=dtype), nn.Linear(96, 5, dtype=dtype))
        quantization.quantize_(base[0], narrow)
        model = get_peft_model(base, LoraConfig(target_modules=["0"], r=3, lora_alpha=5, **VARIANTS[variant]))
        disturb(model)
        model.base_model.model[0].get_apply_tensor_subclass = lambda: narrow  # transformers gives it
        return model

    x = data(70, 64, dtype=dtype)
    check_quantised(make, x)
    model = make().eval()
    layer, handle = model.base_model.model[0], use_fused_adapters(model)
    before = model(x).detach()
    if "dora" not in variant:  # PEFT merges a DoRA over torchao's weights as if it were LoRA
        model.merge_adapter()
        assert distance(model(x).detach(), before) < (0.2 if width == "int4" else 3e-2)  # in codes again
        model.unmerge_adapter()
    layer.lora_B["default"].weight.data *= 2
    ours = outcome(model, x)["y"]
    handle.remove()
    assert distance(ours, outcome(model, x)["y"]) < (1e-5 if dtype is torch.float32 else 3e-2)


def test_eight_bit_layers_that_train_stay_pefts():
    """Their weights are no codes before the first forward."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(bnb.nn.Linear8bitLt(64, 64)), LoraConfig(target_modules=["0"], r=2))
    handle = use_fused_adapters(model)
    assert handle.layers == [] and "Linear8bitLt" in handle.left["base_model.model.0"]


class Even(nn.Module):
    """Sides that BAT's blocks divide; a wide, a tall and a square weight."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.flat = nn.Linear(8, 12), nn.Linear(12, 8, bias=False), nn.Linear(8, 8)

    def forward(self, x):
        return self.flat(self.down(self.up(x).tanh()))


WHOLE = {
    "bat": lambda: MissConfig(target_modules=["up", "down", "flat"], r=4, init_weights="bat"),
    "randlora": lambda: RandLoraConfig(target_modules=["up", "down", "flat"], r=3, randlora_alpha=6),
}


def whole(kind):
    torch.manual_seed(0)
    model = get_peft_model(Even(), WHOLE[kind]()).double()
    draw = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=draw).double()
    return model


@pytest.mark.parametrize("kind", WHOLE)
def test_bat_and_randlora_are_pefts(kind, tmp_path):
    model, plain = whole(kind), whole(kind)
    handle = use_fused_adapters(model)
    assert len(handle.layers) == 3 and model.state_dict().keys() == plain.state_dict().keys()
    assert repr(model) == repr(plain)
    for x in (data(20, 8), data(2, 9, 8), data(1, 8), data(0, 8)):
        same(outcome(model, x), outcome(plain, x))
        assert set(handle.status().values()) == {"fused"}
    x = data(20, 8)
    for m in (model, plain):
        m.merge_adapter()
    torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)
    for m in (model, plain):
        m.unmerge_adapter()
    with model.disable_adapter(), plain.disable_adapter():
        torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)
    for m in (model, plain):
        m.add_adapter("second", WHOLE[kind]())
        m.double()
        for i, p in enumerate(p for n, p in m.named_parameters() if "second" in n):
            p.data += 0.1 * data(*p.shape) * (i + 1)
        m.base_model.set_adapter(["default", "second"])
    same(outcome(model, x), outcome(plain, x))
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied(x), model(x), rtol=0, atol=0)
    handle.remove()
    assert {type(m) for m in model.modules()} == {type(m) for m in plain.modules()}
    model.save_pretrained(tmp_path)


@pytest.mark.parametrize("rows", (0, 1, 4))
def test_bat_of_few_rows_is_its_weights(rows):
    weight, block, grad = data(24, 16), data(3, 8, 8).requires_grad_(), data(rows, 24)
    x = data(rows, 16).requires_grad_()
    found, expected = bat_rows(x, weight, block), x @ bat_weight(weight, block).t()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    wanted = [x, block]
    ours, theirs = (torch.autograd.grad(y, wanted, grad) for y in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "rows", (3, 20, 40, 90),
    ids=("scales in the input", "scaled factors", "factors in the weight", "and the whole gradient"),
)
@pytest.mark.parametrize("wide", (True, False), ids=("expands", "narrows"))
@pytest.mark.parametrize("dropout", (0.0, 0.5))
def test_every_way_of_randlora(rows, wide, dropout):
    torch.manual_seed(0)
    name, width = ("up", 60) if wide else ("down", 80)
    net = nn.ModuleDict({"up": nn.Linear(60, 80), "down": nn.Linear(80, 60)})
    model = get_peft_model(net, RandLoraConfig(target_modules=[name], r=7, randlora_dropout=dropout)).double()
    for part in model.parameters():
        if part.requires_grad:
            part.data += 0.1 * torch.randn_like(part)
    layer, x = model.base_model.model[name], data(rows, width)
    expected = outcome(layer, x)
    with use_fused_adapters(model) as handle:
        same(outcome(layer, x), expected)
        assert set(handle.status().values()) == {"fused"}


def test_randlora_over_a_narrow_base():
    """PEFT keeps the factors in float32; 16-bit ones are left to it."""
    torch.manual_seed(0)
    model = get_peft_model(Even().bfloat16(), RandLoraConfig(target_modules=["up"], r=3))
    plain, x = copy.deepcopy(model), data(20, 8, dtype=torch.bfloat16)
    handle = use_fused_adapters(model)
    for rows in (x, x[:2]):
        torch.testing.assert_close(model(rows), plain(rows), rtol=2e-2, atol=2e-2)
        assert handle.status() == {"base_model.model.up": "fused"}
    assert isinstance(model.base_model.model.up, FusedRandLoraLinear)
    model.bfloat16()(x)
    assert handle.status() == {"base_model.model.up": "PEFT: 16-bit or mixed factors"}


def test_miss_and_vera_stay_pefts():
    torch.manual_seed(0)
    x = data(20, 8, dtype=torch.float32)
    miss = get_peft_model(Even(), MissConfig(target_modules=["up"], r=4))
    handle = use_fused_adapters(miss)
    miss(x)
    assert handle.status() == {"base_model.model.up": "PEFT: MiSS without BAT"}
    vera = get_peft_model(nn.Sequential(nn.Linear(8, 8)), VeraConfig(target_modules=["0"], r=4))
    assert use_fused_adapters(vera).left == {"base_model.model.0": "a vera.layer.Linear"}


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
@torch.no_grad()
def test_a_batch_of_several_adapters(dtype):
    model = adapted("lora", dtype)
    other = config("rslora")
    other.r = 5
    model.add_adapter("other", other)
    if dtype is torch.float64:
        model.double()
    disturb(model)
    model.eval()
    plain, handle = copy.deepcopy(model), use_fused_adapters(model)
    names = ["default", "other", "__base__", "other"]
    near = {"rtol": 2e-2, "atol": 6e-2} if dtype is torch.bfloat16 else {"rtol": 1e-12, "atol": 1e-12}
    for x in (data(4, 9, dtype=dtype), data(4, 3, 9, dtype=dtype)):
        torch.testing.assert_close(model(x, adapter_names=names), plain(x, adapter_names=names), **near)
        assert set(handle.status().values()) == {"fused"}
        torch.testing.assert_close(model(x, adapter_names=["__base__"] * 4), plain(x, adapter_names=["__base__"] * 4))
    for m in (model, plain):  # what is kept follows the factors and the scales
        m.base_model.model.up.lora_B["other"].weight.mul_(3)
        m.base_model.model.down.set_scale("default", 2.5)
    x = data(4, 9, dtype=dtype)
    torch.testing.assert_close(model(x, adapter_names=names), plain(x, adapter_names=names), **near)
    x = data(4, 17, 9, dtype=dtype)
    torch.testing.assert_close(model(x, adapter_names=names), plain(x, adapter_names=names), rtol=0, atol=0)
    assert all("adapter_names" in status for status in handle.status().values())
    with pytest.raises(ValueError, match="same as the number of inputs"):
        model(x[:3], adapter_names=names)


def test_errors_name_the_argument():
    with pytest.raises(TypeError, match="use_fused_adapters: model must be a module"):
        use_fused_adapters("model")
    with pytest.raises(ValueError, match="model must be one with layers that PEFT has adapted"):
        use_fused_adapters(nn.Linear(2, 2))
