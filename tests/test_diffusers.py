"""Key-value compression in diffusers' PixArt transformer, on a small model with random weights."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers")

from diffusers import PixArtTransformer2DModel

from w2s_fast.integrations.diffusers import KVCompressedPixArtTransformer2DModel, enable_kv_compression


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=3, cross_attention_dim=16, sample_size=8,
        caption_channels=6,
    )  # fmt: skip
    return made.double().eval()


def call(model, height=8, width=12, seed=0, dtype=None):
    generator = torch.Generator().manual_seed(seed)
    x, text = (torch.randn(s, generator=generator).double() for s in ((2, 4, height, width), (2, 5, 6)))
    dtype = dtype or next(model.parameters()).dtype
    return model(x.to(dtype), encoder_hidden_states=text.to(dtype), timestep=torch.tensor([3, 981])).sample


def test_ratio_one_is_the_original(model):
    before = call(model)
    assert enable_kv_compression(model, range(3), ratio=1) == []
    torch.testing.assert_close(call(model), before, rtol=1e-11, atol=1e-11)


def test_ratio_two_is_the_formula(model):
    """Against attention with keys and values averaged over windows and normalised, by a processor of the test's own."""

    class Plain:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
            q, k, v = (f(hidden_states) for f in (attn.to_q, attn.to_k, attn.to_v))
            k, v = (F.layer_norm(z.reshape(2, 2, 2, 3, 2, 16).mean((2, 4)).flatten(1, 2), (16,)) for z in (k, v))
            q, k, v = (z.unflatten(2, (2, 8)).transpose(1, 2) for z in (q, k, v))
            return attn.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    plain = copy.deepcopy(model)
    for block in plain.transformer_blocks[1:]:
        block.attn1.set_processor(Plain())
    enable_kv_compression(model, [1, 2])
    torch.testing.assert_close(call(model), call(plain), rtol=1e-9, atol=1e-9)


def test_ratio_two_trains_and_copies_follow_their_own_grid(model):
    new = enable_kv_compression(model, [1, 2])
    assert sum(p.numel() for p in new) == 2 * (4 + 1 + 2) * 16
    optimizer = torch.optim.Adam(new, lr=0.01)
    target, losses = torch.randn(2, 8, 8, 12, dtype=torch.float64), []
    for _ in range(8):
        loss = (call(model) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in new)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    twin = copy.deepcopy(model)
    call(model, 4, 4)
    torch.testing.assert_close(call(twin), call(model))


def test_gradient_checkpointing(model):
    new = enable_kv_compression(model, [2])
    model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        gradients.append(torch.autograd.grad(call(model).square().sum(), new))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_save_and_load(model, tmp_path):
    enable_kv_compression(model, [1], ratio=2)
    enable_kv_compression(model, [2], ratio=2, mode="mean")
    with torch.no_grad():
        model.transformer_blocks[1].attn1.processor.sr.weight.add_(torch.randn(16, 1, 2, 2))
    before = call(model)
    model.save_pretrained(tmp_path)
    loaded = KVCompressedPixArtTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.float64).eval()
    assert loaded.config.kv_compression == {"1": [2, "conv"], "2": [2, "mean"]}
    torch.testing.assert_close(call(loaded), before, rtol=0, atol=0)
    loaded.save_pretrained(tmp_path / "again")
    again = KVCompressedPixArtTransformer2DModel.from_pretrained(tmp_path / "again", torch_dtype=torch.float64).eval()
    torch.testing.assert_close(call(again), before, rtol=0, atol=0)


@torch.no_grad()
def test_sixteen_bits(model):
    want = call(model)
    enable_kv_compression(model, range(3), ratio=1)
    model.to(torch.bfloat16)
    found = call(model)
    assert found.dtype == torch.bfloat16
    assert (found.double() - want).abs().max() < 0.1 * want.abs().max()


def test_errors(model):
    with pytest.raises(ValueError, match=r"enable_kv_compression: layers must be in \[0, 2\], got 14"):
        enable_kv_compression(model)
    with pytest.raises(TypeError, match="transformer must be a PixArtTransformer2DModel, got Linear"):
        enable_kv_compression(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="ratio must be >= 1, got 0"):
        enable_kv_compression(model, [1], ratio=0)
    with pytest.raises(ValueError, match="mode must be one of"):
        enable_kv_compression(model, [1], mode="ave")
    assert "kv_compression" not in model.config
    enable_kv_compression(model, [1])
    with pytest.raises(RuntimeError, match="forward must run"):
        model.transformer_blocks[1].attn1(torch.zeros(1, 4, 16, dtype=torch.float64))


TINY = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 3, "cross_attention_dim": 16, "sample_size": 8}


def taps(model, block=1):
    processor = model.transformer_blocks[block].attn1.processor
    return processor.sr.weight, processor.sr.bias, processor.norm.weight, processor.norm.bias


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("low_memory", [True, False])
def test_uncompressed_checkpoint_gets_averaging_taps(model, tmp_path, low_memory, dtype):
    model.to(dtype).save_pretrained(tmp_path / "plain")
    settings = {"1": [2, "conv"], "2": [2, "mean"]}
    loaded = KVCompressedPixArtTransformer2DModel.from_pretrained(
        tmp_path / "plain", kv_compression=settings, low_cpu_mem_usage=low_memory, torch_dtype=dtype
    )
    assert all(p.device.type == "cpu" and p.dtype == dtype for p in loaded.parameters())
    for found, value in zip(taps(loaded), (0.25, 0.0, 1.0, 0.0), strict=True):
        assert (found == value).all() and found.requires_grad
    enable_kv_compression(model, [1], ratio=2)
    enable_kv_compression(model, [2], ratio=2, mode="mean")
    torch.testing.assert_close(call(loaded), call(model))
    loaded.save_pretrained(tmp_path / "compressed")
    again = KVCompressedPixArtTransformer2DModel.from_pretrained(
        tmp_path / "compressed", low_cpu_mem_usage=low_memory, torch_dtype=dtype
    )
    torch.testing.assert_close(call(again), call(model))


def test_checkpoint_that_compresses_fewer_blocks(model, tmp_path):
    enable_kv_compression(model, [1])
    with torch.no_grad():
        taps(model)[0].mul_(3)
    model.save_pretrained(tmp_path)
    loaded = KVCompressedPixArtTransformer2DModel.from_pretrained(
        tmp_path, kv_compression={"1": [2, "conv"], "2": [2, "conv"]}, torch_dtype=torch.float64
    )
    assert (taps(loaded, 1)[0] == 0.75).all() and (taps(loaded, 2)[0] == 0.25).all()


def test_device_map_and_empty_weights(model, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model.float().save_pretrained(tmp_path)
    loaded = KVCompressedPixArtTransformer2DModel.from_pretrained(
        tmp_path, kv_compression={"1": [2, "conv"]}, device_map={"": "cpu"}
    )
    enable_kv_compression(model, [1])
    torch.testing.assert_close(call(loaded), call(model))
    with accelerate.init_empty_weights():
        empty = KVCompressedPixArtTransformer2DModel.from_config(loaded.config)
    assert all(p.is_meta for p in empty.parameters())
    loaded.save_pretrained(tmp_path / "whole")
    filled = accelerate.load_checkpoint_and_dispatch(
        empty, str(tmp_path / "whole" / "diffusion_pytorch_model.safetensors"), device_map={"": "cpu"}
    ).eval()
    torch.testing.assert_close(call(filled), call(model))


def test_offloaded_weights_are_brought_before_they_are_read(model):
    """accelerate keeps weights elsewhere until a module's own call."""
    accelerate = pytest.importorskip("accelerate")
    enable_kv_compression(model, [1, 2])
    want = call(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert taps(model)[0].is_meta
    torch.testing.assert_close(call(model, dtype=torch.float64), want)


@torch.no_grad()
def test_layerwise_casting(model):
    model.float()
    enable_kv_compression(model, [1])
    want = call(model)
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert taps(model)[0].dtype == torch.bfloat16
    assert (call(model, dtype=torch.float32) - want).abs().max() < 0.05 * want.abs().max()


def test_fused_projections_in_both_orders(model):
    """The compression stays whether the projections are fused after or before it, and unfused again."""
    plain, other = copy.deepcopy(model), copy.deepcopy(model)
    enable_kv_compression(model, [1, 2])
    want = call(model)
    assert not torch.allclose(want, call(plain))
    model.fuse_qkv_projections()
    fused = model.transformer_blocks[1].attn1.to_qkv
    torch.testing.assert_close(call(model), want)
    with torch.no_grad():
        fused.weight.mul_(2)
    assert not torch.allclose(call(model), want), "the fused projection is not the one that runs"
    with torch.no_grad():
        fused.weight.div_(2)
    model.unfuse_qkv_projections()
    torch.testing.assert_close(call(model), want)

    other.fuse_qkv_projections()
    enable_kv_compression(other, [1, 2])
    torch.testing.assert_close(call(other), want)
    assert other.transformer_blocks[1].attn1.processor.fused
    other.unfuse_qkv_projections()
    torch.testing.assert_close(call(other), want)
    other.set_default_attn_processor()
    torch.testing.assert_close(call(other), want)


def test_fused_model_keeps_its_taps_in_the_checkpoint(model, tmp_path):
    enable_kv_compression(model, [1])
    with torch.no_grad():
        taps(model)[0].mul_(2)
    want = call(model)
    model.fuse_qkv_projections()
    model.save_pretrained(tmp_path)
    loaded = KVCompressedPixArtTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.float64)
    torch.testing.assert_close(call(loaded), want)


def test_another_processor_is_refused_at_a_compressed_block(model):
    enable_kv_compression(model, [1])
    with pytest.raises(ValueError, match=r"enable_kv_compression: processor must be .* Switch the block's compression"):
        model.transformer_blocks[1].attn1.set_processor(object())
    want = call(model)
    model.set_attn_processor(model.attn_processors)
    torch.testing.assert_close(call(model), want)


def test_ratio_one_takes_the_compression_away(model):
    before = call(model)
    enable_kv_compression(model, [1, 2])
    assert enable_kv_compression(model, [1, 2], ratio=1) == []
    torch.testing.assert_close(call(model), before)
    assert model.config.kv_compression == {} and not [n for n, _ in model.named_parameters() if "processor" in n]


def test_checkpointed_backward_repeats_each_pass_at_its_own_grid(model):
    """Two passes of as many tokens in other shapes, as with buckets of aspect ratios, before one backward."""
    new = enable_kv_compression(model, [1, 2])
    model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        loss = call(model, 8, 16).square().sum() + 2 * call(model, 16, 8).square().sum()
        gradients.append(torch.autograd.grad(loss, new))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("height, width", [(8, 8), (4, 20), (6, 10), (10, 6), (9, 11)])
def test_sizes(model, height, width):
    """Non-square and odd grids; what diffusers makes of latents that its patches do not cover, it still makes."""
    want = call(model, height, width).shape
    enable_kv_compression(model, [1], ratio=2)
    found = call(model, height, width)
    assert found.shape == want and found.isfinite().all()


def test_grid_smaller_than_the_window(model):
    enable_kv_compression(model, [1], ratio=4)
    with pytest.raises(ValueError, match=r"ratio must be in \[1, 2\], got 4"):
        call(model, 4, 12)


def test_attention_masks(model):
    enable_kv_compression(model, [1])
    generator = torch.Generator().manual_seed(0)
    x, text = (torch.randn(s, generator=generator).double() for s in ((2, 4, 8, 12), (2, 5, 6)))
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])

    def run(text):
        return model(x, encoder_hidden_states=text, timestep=torch.tensor([3, 981]), encoder_attention_mask=mask).sample

    other = text.clone()
    other[0, 2:] = 7
    torch.testing.assert_close(run(text), run(other))
    with pytest.raises(ValueError, match="attention_mask and encoder_hidden_states must be None"):
        model(x, encoder_hidden_states=text, timestep=torch.tensor([3, 981]), attention_mask=torch.ones(2, 24))


def test_settings_that_make_no_sense():
    for setting in ({"1": 2}, {"x": [2, "conv"]}):
        with pytest.raises(ValueError, match=r"kv_compression must be a dict of block to \(ratio, mode\)"):
            KVCompressedPixArtTransformer2DModel(**TINY, kv_compression=setting)


def test_autocast_and_pickle(model):
    model.float()
    new = enable_kv_compression(model, [1, 2])
    want = call(model)
    torch.testing.assert_close(call(pickle.loads(pickle.dumps(model))), want)
    with torch.autocast("cpu", torch.bfloat16):
        found = call(model)
        gradients = torch.autograd.grad(found.float().square().sum(), new)
    assert found.dtype == torch.bfloat16 and (found - want).abs().max() < 0.05 * want.abs().max()
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in gradients)
