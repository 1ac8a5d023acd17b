"""Contrastive losses: torch's formulas, the published equations, gradients in float64, many tiles, two processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import w2s_fast
from w2s_fast import contrastive_loss, extension
from w2s_fast.nn import ClipLoss, SigLipLoss, gather_columns
from w2s_fast.testing.processes import assert_as_one, in_two

BACKENDS = ["reference"] + (["cpp"] if extension.ERROR is None else [])


def features(rows: int, columns: int, width: int = 12, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(rows + 31 * columns)
    made = (torch.randn(n, width, generator=draw, dtype=torch.float64) for n in (rows, columns))
    return [F.normalize(t, dim=1).to(dtype).requires_grad_() for t in made]


def close(found: torch.Tensor, expected: torch.Tensor, leaves: list[torch.Tensor], tolerance: float = 1e-9) -> None:
    """Both losses and their gradients."""
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    ours, theirs = (torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_clip_is_two_cross_entropies(backend: str):
    x, y = features(19, 19)
    scale = torch.tensor(14.3, dtype=torch.float64, requires_grad=True)
    z, own = scale * x @ y.t(), torch.arange(19)
    with w2s_fast.backend(backend):
        found = contrastive_loss(x, y, scale)
        one_way = contrastive_loss(x, y, scale, kind="infonce")
    close(found, (F.cross_entropy(z, own) + F.cross_entropy(z.t(), own)) / 2, [x, y, scale])
    close(one_way, F.cross_entropy(z, own), [x, y, scale])


@pytest.mark.parametrize("backend", BACKENDS)
def test_siglip_is_the_published_sum(backend: str):
    x, y = features(17, 17)
    scale, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (10.0, -10.0))
    signs = 2 * torch.eye(17, dtype=torch.float64) - 1
    with w2s_fast.backend(backend):
        found = contrastive_loss(x, y, scale, bias=bias, kind="siglip")
    close(found, -F.logsigmoid(signs * (scale * x @ y.t() + bias)).sum() / 17, [x, y, scale, bias])


@pytest.mark.parametrize("backend", BACKENDS)
def test_supcon_row_by_row(backend: str):
    """The equation as it stands in the paper; a label of its own contributes nothing and still counts."""
    z, _ = features(14, 14)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 5, 7, 1, 9, 2, 2])
    tau, losses, valid = 0.2, [], 0
    for i in range(14):
        others = [j for j in range(14) if j != i]
        same = [j for j in others if labels[j] == labels[i]]
        valid += bool(same)
        if same:
            logits = z[i] @ z[others].t() / tau
            losses.append(torch.logsumexp(logits, 0) - torch.stack([z[i] @ z[j] / tau for j in same]).mean())
    total = torch.stack(losses).sum()
    with w2s_fast.backend(backend):
        mean = contrastive_loss(z, None, 1 / tau, kind="supcon", labels=labels)
        valid_mean = contrastive_loss(z, None, 1 / tau, kind="supcon", labels=labels, reduction="valid_mean")
        halves = [
            contrastive_loss(z[i : i + 7], z, 1 / tau, kind="supcon", labels=labels[i : i + 7], column_labels=labels,
                             first=i) for i in (0, 7)
        ]  # fmt: skip
    close(mean, total / 14, [z])
    close(valid_mean, total / valid, [z])
    close(sum(halves) / 2, total / 14, [z])


@pytest.mark.parametrize("kind", ["clip", "infonce", "siglip", "supcon"])
def test_gradients_in_float64(kind: str):
    x, y = features(5, 5, 4)
    scale = torch.tensor(2.5, dtype=torch.float64, requires_grad=True)
    options = {"kind": kind, "labels": torch.tensor([0, 1, 0, 2, 1])} if kind == "supcon" else {"kind": kind}
    inputs = (x, scale) if kind == "supcon" else (x, y, scale)

    def call(*given: torch.Tensor) -> torch.Tensor:
        return contrastive_loss(given[0], None if kind == "supcon" else given[1], given[-1], **options)

    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.skipif(extension.ERROR is not None, reason="the extension is not built")
@pytest.mark.parametrize(
    "kind, rows, columns, first",
    [("clip", 4100, 4100, 0), ("infonce", 700, 2500, 1100), ("siglip", 1100, 2100, 900), ("supcon", 4100, 0, 0)],
)
def test_many_tiles(kind: str, rows: int, columns: int, first: int):
    """More tiles than are kept (seven of 1024 x 1024), edges that no vector ends at, own columns in any tile."""
    x, y = features(rows, max(columns, 1), 16, torch.float32)
    options = {"kind": kind, "first": first}
    if kind == "supcon":
        y, options["labels"] = None, torch.arange(rows) * 7 % 50
    results = []
    for backend in ("cpp", "reference"):
        with w2s_fast.backend(backend):
            loss = contrastive_loss(x, y, 9.0, **options)
        leaves = [x] if y is None else [x, y]
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.skipif(extension.ERROR is not None, reason="the extension is not built")
def test_memory_is_bounded():
    """The gradients and 32 MiB of scores; eager keeps several matrices of 64 MiB."""
    from w2s_fast.bench.memory import peak_bytes

    x, y = features(4096, 4096, 16, torch.float32)

    def call(x: torch.Tensor, y: torch.Tensor) -> None:
        with w2s_fast.backend("cpp"):
            contrastive_loss(x, y, 9.0).backward()

    peak = peak_bytes(call, (x, y), torch.device("cpu"))
    assert peak is None or 2 * x.numel() * 4 <= peak < 34 << 20


def test_threads_change_nothing(own_products):
    x, y = features(300, 300, 16, torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            loss = contrastive_loss(x, y, 9.0)
            found.append((loss.detach(), *torch.autograd.grad(loss, (x, y))))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    "change, error",
    [
        ({"y": torch.zeros(4, 3)}, "y must be of shape"),
        ({"y": torch.zeros(4, 5, dtype=torch.float64)}, "y must be of the dtype of x"),
        ({"y": torch.zeros(9, 5)}, "y must be of shape"),
        ({"kind": "infonce", "first": 1}, "y must be of at least first"),
        ({"kind": "simclr"}, "kind must be one of"),
        ({"bias": 1.0}, "bias must be None with kind 'clip'"),
        ({"labels": torch.zeros(4, dtype=torch.long)}, "labels must be None without kind 'supcon'"),
        ({"kind": "supcon", "y": None}, "labels must be an int64 tensor"),
        ({"kind": "supcon", "y": None, "labels": torch.zeros(3, dtype=torch.long)}, "labels must be of shape"),
        ({"kind": "supcon", "labels": torch.zeros(4, dtype=torch.long)}, "column_labels must be an int64 tensor"),
        ({"scale": torch.ones(2)}, "scale must be a number or a tensor of one number"),
        ({"scale": float("nan")}, "scale must be a finite number"),
        ({"reduction": "valid_mean"}, "reduction must be 'mean'"),
        ({"y": None}, "y must be a tensor"),
    ],
)
def test_errors_name_the_argument(change: dict, error: str):
    given = {"x": torch.zeros(4, 5), "y": torch.zeros(4, 5), **change}
    with pytest.raises((ValueError, TypeError), match=error):
        contrastive_loss(**given)


def test_a_softmax_ignores_the_bias_of_openclip():
    x, y = features(6, 6)
    bias = torch.tensor(-7.0, dtype=torch.float64, requires_grad=True)
    found = ClipLoss()(x, y, 3.0, bias, output_dict=True)["contrastive_loss"]
    torch.testing.assert_close(found, contrastive_loss(x, y, 3.0))
    assert torch.autograd.grad(found, bias)[0] == 0


def test_open_clips_own_words():
    """As its factory makes them, and by position in its order; what cannot be is refused."""
    x, y = features(6, 6)
    expected = contrastive_loss(x, y, 3.0)
    made = ClipLoss(
        local_loss=False, gather_with_grad=False, cache_labels=True, rank=0, world_size=1, use_horovod=False
    )
    for loss in (made, ClipLoss(True, True, True, 0, 1, False)):
        assert (loss.rank, loss.world_size) == (0, 1)
        torch.testing.assert_close(loss(x, y, 3.0), expected)
    loss = SigLipLoss(cache_labels=True, rank=0, world_size=1, dist_impl="gather")
    torch.testing.assert_close(loss(x, y, 3.0, -2.0), contrastive_loss(x, y, 3.0, bias=-2.0, kind="siglip"))
    with pytest.raises(ValueError, match="use_horovod must be False"):
        ClipLoss(use_horovod=True)


def test_open_clips_losses():
    """Its own modules, where they are installed."""
    theirs = pytest.importorskip("open_clip.loss")
    x, y = features(9, 9)
    scale, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (7.0, -3.0))
    for ours, expected, more in (
        (ClipLoss(), theirs.ClipLoss(), ()), (SigLipLoss(), theirs.SigLipLoss(), (bias,)),
    ):  # fmt: skip
        close(ours(x, y, scale, *more), expected(x, y, scale, *more), [x, y, scale, *more])


class _Towers(nn.Module):
    """Two linear towers with a scale and a bias of their own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(9, 6).double(), nn.Linear(7, 6).double()
        self.scale, self.bias = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (1.0, -2.0))

    def forward(self, images: torch.Tensor, texts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, y = F.normalize(self.image(images), dim=1), F.normalize(self.text(texts), dim=1)
        return x, y, self.scale.exp(), self.bias


def _losses(towers: nn.Module, images: torch.Tensor, texts: torch.Tensor, rank: int, world: int) -> list[torch.Tensor]:
    labels = torch.arange(len(images) * world) % 3
    x, y, scale, bias = towers(images, texts)
    own = slice(rank * len(x), (rank + 1) * len(x))
    supervised = contrastive_loss(
        x, gather_columns(x, world), 4.0, kind="supcon", labels=labels[own], column_labels=labels, first=own.start
    )
    where = {"rank": rank, "world_size": world}
    return [ClipLoss(**where)(x, y, scale, bias), SigLipLoss(**where)(x, y, scale, bias), supervised]


def _work(rank: int) -> None:
    draw = torch.Generator().manual_seed(1)
    images, texts = (torch.randn(10, n, generator=draw, dtype=torch.float64) for n in (9, 7))
    mine = slice(5 * rank, 5 * rank + 5)
    alone = _losses(_Towers(), images, texts, 0, 1)
    for which, whole in enumerate(alone):
        wanted = _Towers()
        _losses(wanted, images, texts, 0, 1)[which].backward()
        model = _Towers()
        loss = _losses(model, images[mine], texts[mine], rank, 2)[which]
        loss.backward()
        near = (1e-9, 1e-9)
        assert_as_one(loss, model, whole, wanted, loss_within=near, within=near, what=f"loss {which}")


@pytest.mark.slow(15)
def test_two_processes_equal_one(tmp_path):
    in_two(_work, tmp_path)


@pytest.mark.parametrize("columns", [2, 3])
def test_multiple_negatives_ranking(columns: int):
    from w2s_fast.integrations.sentence_transformers import MultipleNegativesRankingLoss

    draw = torch.Generator().manual_seed(columns)
    table = nn.Embedding(40, 8).double()
    tokens = [torch.randint(40, (6, 5), generator=draw) for _ in range(columns)]
    loss = MultipleNegativesRankingLoss(lambda features: {"sentence_embedding": table(features["input_ids"]).mean(1)})
    found = loss([{"input_ids": t} for t in tokens], torch.zeros(6))
    anchors, *others = (table(t).mean(1) for t in tokens)
    scores = 20 * F.cosine_similarity(anchors.unsqueeze(1), torch.cat(others), dim=2)
    close(found, F.cross_entropy(scores, torch.arange(6)), [table.weight])


def test_multiple_negatives_ranking_is_sentence_transformers_own():
    losses = pytest.importorskip("sentence_transformers.losses")
    from w2s_fast.integrations.sentence_transformers import MultipleNegativesRankingLoss

    embeddings = [t.detach() for t in (*features(5, 5), *features(5, 6)[:1])]
    found, expected = (
        made(nn.Identity()).compute_loss_from_embeddings(embeddings, torch.zeros(5))
        for made in (MultipleNegativesRankingLoss, losses.MultipleNegativesRankingLoss)
    )
    torch.testing.assert_close(found, expected)


def _encoder(folder: Path) -> nn.Module:
    """A sentence-transformers model of one small random layer."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from transformers import BertConfig, BertModel

    from w2s_fast.testing.offline import byte_tokenizer

    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sentence_transformers.SentenceTransformer(str(folder), device="cpu")


def test_the_ranking_loss_trains_in_its_own_trainer(tmp_path):
    """As many steps with either loss end at the same weights, and the loss falls."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    datasets = pytest.importorskip("datasets")
    from sentence_transformers.losses import MultipleNegativesRankingLoss as Theirs

    from w2s_fast.integrations.sentence_transformers import MultipleNegativesRankingLoss

    words = [f"{a} {b}" for a in ("red", "blue", "green", "old") for b in ("cat", "dog", "fish", "bird")]
    data = datasets.Dataset.from_dict({"anchor": words, "positive": [word[::-1] for word in words]})
    found = []
    for loss in (MultipleNegativesRankingLoss, Theirs):
        model = _encoder(tmp_path / "model")
        arguments = sentence_transformers.SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / "out"), num_train_epochs=12, per_device_train_batch_size=8, logging_steps=1,
            save_strategy="no", report_to=[], use_cpu=True, learning_rate=3e-3, disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = sentence_transformers.SentenceTransformerTrainer(
            model=model, args=arguments, train_dataset=data, loss=loss(model, scale=20.0)
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[-1] < losses[0] - 0.2, losses
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert (found[0] - found[1]).abs().max() < 1e-4
