"""MVP (arXiv 2303.07320): classify by a prompt with a mask token instead of a new head.

A template with a mask follows the text; a class's logit is the largest (or the mean) of its label words' logits at the
mask, averaged over templates. No parameters are added, and of the language model's head only the label words' columns
are computed: ``[N, D] x [D, words]``. Adversarial training adds the loss at a step of the L2 norm 1 on the embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ... import checks
from ...attacks import PGD, frozen
from .._common.batches import shuffled
from .._common.language import check_rows, ids_of
from .._common.loop import Recipe, Trained, unsharded
from .._common.loop import train as run_loop

OP = "methods.mvp"


class MVP(nn.Module):
    """Any language model of transformers as a classifier.

    Args:
        model: a masked language model, or a causal one: then the word after the template is the answer.
        templates: token ids that follow the text; those of a masked model hold ``mask`` once.
        words: of every class, the ids of its label words, single tokens.
        mask: id of the mask token; None for a causal model.
        reduce: "max" or "mean" over a class's words.

    Raises:
        ValueError: naming `templates`, `words`, `reduce`.
    """

    def __init__(
        self, model: Any, templates: Sequence[Sequence[int]], words: Sequence[Sequence[int]], mask: int | None, *,
        reduce: Literal["max", "mean"] = "max",
    ) -> None:  # fmt: skip
        super().__init__()
        checks.choice(OP, "reduce", reduce, ("max", "mean"))
        if not templates or any(mask is not None and list(t).count(mask) != 1 for t in templates):
            checks.fail(OP, "templates", "one or more with one mask each", [list(t) for t in templates])
        if len(words) < 2 or not all(words):
            checks.fail(OP, "words", "one or more label words for each of several classes", [list(w) for w in words])
        self.model, self.templates, self.words = model, [list(t) for t in templates], [list(w) for w in words]
        self.mask, self.reduce = mask, reduce

    def columns(self, hidden: Tensor) -> list[Tensor]:
        """Logits of every class's words at states ``[N, D]`` that go into the language model's head."""
        head = self.model.get_output_embeddings()
        flat = torch.tensor([i for group in self.words for i in group], device=hidden.device)
        bias = getattr(head, "bias", None)
        z = F.linear(hidden, head.weight[flat], None if bias is None else bias[flat])
        return list(z.split([len(group) for group in self.words], -1))

    def states(self, embeddings: Tensor, mask: Tensor, template: Sequence[int]) -> Tensor:
        """What goes into the head at the answer's place: of texts' embeddings ``[N, S, D]``, padded on the right."""
        given = torch.tensor(template, device=embeddings.device)
        prompt = self.model.get_input_embeddings()(given).expand(len(embeddings), -1, -1)
        both = torch.cat((embeddings, prompt.to(embeddings)), 1)
        seen = torch.cat((mask, mask.new_ones(len(mask), len(given))), 1)
        order = (1 - seen).argsort(dim=1, stable=True)  # the template behind the text, then padding
        both, seen = both.gather(1, order[..., None].expand_as(both)), seen.gather(1, order)
        place = mask.sum(1) + (len(template) - 1 if self.mask is None else list(template).index(self.mask))
        row, found = torch.arange(len(mask), device=mask.device), list[Tensor]()

        def cut(_: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
            found.append(arguments[0][row, place])
            return (arguments[0][:, :0],)  # no logits of the vocabulary

        hook = self.model.get_output_embeddings().register_forward_pre_hook(cut)
        try:
            self.model(inputs_embeds=both, attention_mask=seen)
        finally:
            hook.remove()
        return found[0]

    def forward(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Logits ``[N, classes]``, the mean over the templates."""
        rows = []
        for template in self.templates:
            parts = self.columns(self.states(embeddings, mask, template))
            rows.append(torch.stack([p.amax(-1) if self.reduce == "max" else p.mean(-1) for p in parts], -1))
        return torch.stack(rows).mean(0)

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings ``[N, S, D]`` of token ids."""
        found: Tensor = self.model.get_input_embeddings()(ids)
        return found


def loss(mvp: MVP, ids: Tensor, mask: Tensor, y: Tensor, *, norm: float = 0.0) -> Tensor:
    """Cross-entropy; with ``norm``, also that after a step of this L2 norm on the text's embeddings."""
    embeddings = mvp.embed(ids)
    value = F.cross_entropy(mvp(embeddings, mask), y)
    if norm:
        attack = PGD(lambda e: mvp(e, mask), norm, norm="l2", steps=1, alpha=norm, start="none", clip=None)
        with frozen(mvp):
            moved = attack(embeddings.detach(), y)
        value = value + F.cross_entropy(mvp(embeddings + (moved - embeddings.detach()), mask), y)
    return value


def train(
    model: Any, tokenizer: Any, rows: Any, *, recipe: Recipe, template: str = "", words: str = "",
    norm: float = 0.0, reduce: Literal["max", "mean"] = "max", max_length: int = 512, **run: Any,
) -> Trained:  # fmt: skip
    """Fine-tune a language model of transformers as a classifier of rows with ``text`` and ``label``.

    Args:
        template: text that follows, with the tokenizer's mask token in it if the model is masked.
        words: label words of every class, single tokens each: ``"bad,poor;good,great"`` for classes 0 and 1.
        norm: of the adversarial step on the embeddings; 0 for none.

    Raises:
        ValueError: naming `rows`, `words`, `templates`.
    """
    unsharded("methods.mvp", recipe, run.get("where"))
    found = check_rows(OP, rows, "text", "label")
    groups = [group.split(",") for group in words.split(";")]
    ids = [[ids_of(tokenizer, word, completion=True) for word in group] for group in groups]
    long = [word for group, own in zip(groups, ids, strict=True) for word, i in zip(group, own, strict=True)
            if len(i) != 1]  # fmt: skip
    if long:
        checks.fail(OP, "words", "single tokens each, as 'bad,poor;good,great'", long)
    bad = [row["label"] for row in found if row["label"] not in range(len(groups))]
    if bad:
        checks.fail(OP, "label", f"a number below {len(groups)}, the classes of words", repr(bad[0]))
    prompt = ids_of(tokenizer, template, completion=True)
    mvp = MVP(model, [prompt], [[i[0] for i in own] for own in ids], tokenizer.mask_token_id, reduce=reduce)
    items = [(ids_of(tokenizer, row["text"])[: max_length - len(prompt)], int(row["label"])) for row in found]

    def collate(part: Sequence[tuple[list[int], int]]) -> tuple[Tensor, Tensor, Tensor]:
        width = max(len(text) for text, _ in part)
        padded = torch.tensor([text + [0] * (width - len(text)) for text, _ in part])
        mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text, _ in part])
        return padded, mask, torch.tensor([label for _, label in part])

    loader = shuffled(items, recipe.batch, seed=recipe.seed, where=run.get("where"), collate=collate)
    return run_loop(mvp, lambda m, batch: loss(m, *batch, norm=norm), loader, recipe, **run)
