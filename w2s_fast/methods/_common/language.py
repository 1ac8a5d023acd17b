"""Prompts with completions as batches of a causal language model, and their losses without ``[B, S, V]`` logits.

A row is a mapping with texts, lists of token ids, or (a prompt) a list of chat messages. Sequences are padded on the
right; ``labels`` are -100 where a token is not scored (prompts and padding), and not shifted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ... import checks
from ...ops.linear_loss.linear_ce import linear_ce
from ...ops.linear_loss.linear_preference import linear_preference
from ...ops.linear_loss.logp import linear_logp

Row = Mapping[str, Any]
#: A text, token ids, or chat messages.
Text = str | Sequence[Any]
MAX_LENGTH = 1024


class Example(NamedTuple):
    """Token ids of a prompt and of what follows it, which counts."""

    prompt: list[int]
    completion: list[int]


class Sequences(NamedTuple):
    """``[N, S]`` each: token ids, 1 where there is a token, the ids that count."""

    ids: Tensor
    mask: Tensor
    labels: Tensor

    def at(self, index: Any) -> Sequences:
        """Some of them."""
        return Sequences(*(part[index] for part in self))


def ids_of(tokenizer: Any, text: Text, *, completion: bool = False) -> list[int]:
    """Token ids of a text (a completion's without special tokens), of chat messages, or of the ids themselves."""
    if not isinstance(text, str):
        if not isinstance(text, Sequence):
            found = type(text).__name__
            checks.fail("methods", "rows", "mappings with texts, lists of token ids or chat messages", found)
        if not text or isinstance(text[0], int):
            return list(text)
        chat = tokenizer.apply_chat_template(list(text), add_generation_prompt=True, tokenize=True)
        return list(chat["input_ids"] if isinstance(chat, Mapping) else chat)
    made: list[int] = tokenizer(text, add_special_tokens=not completion)["input_ids"]
    return made


def example(
    tokenizer: Any, prompt: Text, completion: Text, *, max_length: int = MAX_LENGTH, end: bool = True
) -> Example:
    """Of at most ``max_length`` tokens; a completion given as text ends with the end token."""
    before, after = ids_of(tokenizer, prompt), ids_of(tokenizer, completion, completion=True)
    if end and isinstance(completion, str) and tokenizer.eos_token_id is not None:
        after.append(tokenizer.eos_token_id)
    before = before[: max_length - 1]
    return Example(before, after[: max_length - len(before)])


def examples(
    tokenizer: Any, rows: Iterable[Row], prompt: str = "prompt", completion: str = "completion", **how: Any
) -> list[Example]:
    """Of the columns; a row with ``text`` alone is a completion of its first token."""
    found = []
    for row in rows:
        if "text" in row and completion not in row:
            ids = example(tokenizer, [], row["text"], **how).completion
            found.append(Example(ids[:1], ids[1:]))
        elif prompt not in row or completion not in row:
            checks.fail("methods", "rows", f"mappings with {prompt}, {completion}, or text", ", ".join(row) or "none")
        else:
            found.append(example(tokenizer, row[prompt], row[completion], **how))
    return found


def collate(rows: Sequence[Example]) -> Sequences:
    """Padded on the right with id 0, which the mask hides."""
    length = max(len(row.prompt) + len(row.completion) for row in rows)
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full((len(rows), length), -100)
    for i, (prompt, completion) in enumerate(rows):
        at = len(prompt) + len(completion)
        ids[i, :at] = torch.tensor([*prompt, *completion])
        mask[i, :at] = 1
        labels[i, len(prompt) : at] = torch.tensor(completion, dtype=torch.long)
    return Sequences(ids, mask, labels)


def join(*parts: Sequences) -> Sequences:
    """All rows of the parts, in order, padded alike."""
    length = max(part.ids.shape[1] for part in parts)

    def padded(part: Tensor, value: int) -> Tensor:
        return torch.nn.functional.pad(part, (0, length - part.shape[1]), value=value)

    return Sequences(*(torch.cat([padded(part[i], value) for part in parts]) for i, value in enumerate((0, 0, -100))))


def through(model: Any, given: Sequences, fused: Callable[[Tensor, Any, Tensor], Any]) -> Any:
    """``fused(hidden, head, target)`` of a forward pass, target ``[N, S]`` the token behind each position or -100."""
    from ...integrations.transformers.through import through_head

    target = torch.nn.functional.pad(given.labels[:, 1:], (0, 1), value=-100)
    inputs = {"input_ids": given.ids, "attention_mask": given.mask}
    return through_head(model, lambda hidden, head: fused(hidden, head, target), **inputs)


def cross_entropy(model: Any, given: Sequences) -> Tensor:
    """Mean over the tokens that count."""

    def fused(hidden: Tensor, head: Any, target: Tensor) -> Any:
        return linear_ce(hidden, head.weight, target, bias=head.bias, temperature=head.temperature,
                         softcap=head.softcap)  # fmt: skip

    return cast(Tensor, through(model, given, fused))


def logp(model: Any, given: Sequences, normalize: Any = "sum") -> Tensor:
    """``[N]`` log-probabilities, summed or averaged over the tokens that count."""

    def fused(hidden: Tensor, head: Any, target: Tensor) -> Any:
        return linear_logp(hidden, head.weight, target, bias=head.bias, temperature=head.temperature,
                           softcap=head.softcap, normalize=normalize)  # fmt: skip

    return cast(Tensor, through(model, given, fused))


@torch.no_grad()
def scores(model: Any, rows: Sequence[Example], normalize: Any = "sum", batch: int = 16) -> Tensor:
    """`logp` of all examples without gradient, in evaluation mode, on the CPU; alike long ones together."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt) + len(rows[i].completion))
    device, training = next(model.parameters()).device, model.training
    model.eval()
    found = torch.zeros(len(rows))
    for at in range(0, len(order), batch):
        part = order[at : at + batch]
        given = Sequences(*(t.to(device) for t in collate([rows[i] for i in part])))
        found[part] = logp(model, given, normalize).float().cpu()
    model.train(training)
    return found


def preference_loss(model: Any, given: Sequences, *, kind: Any, ref_logp: Tensor | None = None, **how: Any) -> Tensor:
    """`w2s_fast.linear_preference`; of pairs the first half of the rows are the chosen ones, the second the rejected.

    A kind for single sequences ("npo", "ga") takes all rows as they are.
    """
    single = kind in ("npo", "ga")
    pairs = None if single else torch.arange(len(given.ids), device=given.ids.device).view(2, -1).T
    if how.get("nll_coef"):
        how.setdefault("nll_average", "sequences")

    def fused(hidden: Tensor, head: Any, target: Tensor) -> Any:
        return linear_preference(hidden, head.weight / head.temperature, target, pairs, kind=kind, bias=head.bias,
                                 softcap=head.softcap, ref_logp=ref_logp, **how)[0]  # fmt: skip

    return cast(Tensor, through(model, given, fused))


class Pair(NamedTuple):
    """An example that is preferred to another, and the reference model's log-probabilities of both."""

    chosen: Example
    rejected: Example
    ref_chosen: float = 0.0
    ref_rejected: float = 0.0


class Pairs(NamedTuple):
    """Sequences ``[2 P, S]``, the chosen ones first, and reference log-probabilities ``[2 P]``."""

    sequences: Sequences
    ref: Tensor


def collate_pairs(rows: Sequence[Pair]) -> Pairs:
    """Of a DataLoader."""
    both = [row.chosen for row in rows] + [row.rejected for row in rows]
    ref = torch.tensor([row.ref_chosen for row in rows] + [row.ref_rejected for row in rows])
    return Pairs(collate(both), ref)


def referenced(model: Any, pairs: Sequence[tuple[Example, Example]]) -> list[Pair]:
    """Pairs with the log-probabilities of ``model`` as it is now."""
    chosen, rejected = (scores(model, [pair[i] for pair in pairs]).tolist() for i in (0, 1))
    return [Pair(a, b, x, y) for (a, b), x, y in zip(pairs, chosen, rejected, strict=True)]


@torch.no_grad()
def sample(
    model: Any, prompts: Sequence[list[int]], *, max_new_tokens: int = 256, temperature: float = 1.0,
    generator: torch.Generator | None = None, end: Sequence[int] | None = None, batch: int = 64, **how: Any,
) -> list[list[int]]:  # fmt: skip
    """A completion of each prompt (token ids) with its end token, by `integrations.transformers.generate`.

    Args:
        temperature: 0 is greedy.
        generator: on the CPU; a completion depends on it, the prompt and the model alone, up to rounding.
        end: ids that end a completion, default the model's.
    """
    from ...integrations.transformers import generate

    empty = next((i for i, ids in enumerate(prompts) if not len(ids)), None)
    if empty is not None:
        checks.fail("methods", "prompt", "of at least one token in every row", f"none in row {empty}")
    training = model.training
    model.eval()
    uniform = torch.rand(len(prompts), max_new_tokens, generator=generator)
    found: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    device = next(model.parameters()).device
    for at in range(0, len(order), batch):
        part = order[at : at + batch]
        width = max(len(prompts[i]) for i in part)
        ids, mask = torch.zeros(len(part), width, dtype=torch.long), torch.zeros(len(part), width, dtype=torch.long)
        for row, i in enumerate(part):
            ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, width - len(prompts[i]) :] = 1
        made = generate(model, input_ids=ids.to(device), attention_mask=mask.to(device), method="static",
                        max_new_tokens=max_new_tokens, temperature=temperature, uniform=uniform[part].to(device),
                        eos_token_id=end, **how)  # fmt: skip
        for row, i in enumerate(part):
            found[i] = made.sequences[row, width : width + int(made.lengths[row])].tolist()
    model.train(training)
    return found


def decode(tokenizer: Any, ids: list[int]) -> Any:
    """The text, or the ids themselves without a tokenizer."""
    return ids if tokenizer is None else tokenizer.decode(ids, skip_special_tokens=True)


def check_rows(op: str, rows: Any, *columns: str) -> list[Row]:
    """The rows as a list, at least one, each with something in these columns."""
    found = list(rows)
    if not found:
        checks.fail(op, "rows", "at least one", 0)
    for i, row in enumerate(found):
        names = {name for name, value in row.items() if value is not None} if isinstance(row, Mapping) else None
        if names is None or not names.issuperset(columns):
            got = type(row).__name__ if names is None else ", ".join(map(str, row)) or "none"
            where = getattr(row, "where", f"row {i}")
            checks.fail(op, "rows", f"mappings with {', '.join(columns)}", f"{got} in {where}")
    return found
