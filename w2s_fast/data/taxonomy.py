"""Chunks of text, each with its place in a taxonomy (StructTuning, paper 56, arXiv 2407.16724)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch.utils.data import Dataset

from .. import checks

#: A taxonomy: names with a taxonomy inside, or with the keys of the chunks that lie there.
Tree = Mapping[str, Any]
TEMPLATE = "{tree}\n\n{path}:\n"


class Place(NamedTuple):
    """A chunk's key and the names from the root to it."""

    key: Any
    path: tuple[str, ...]


def places(tree: Tree, path: tuple[str, ...] = ()) -> Iterator[Place]:
    """Every chunk of the tree with its path, in the order of the tree."""
    for name, node in tree.items():
        if isinstance(node, Mapping):
            yield from places(node, (*path, name))
        else:
            keys = node if isinstance(node, Sequence) and not isinstance(node, str) else [node]
            for key in keys:
                yield Place(key, (*path, name))


def outline(tree: Tree, depth: int = 0) -> str:
    """The names of a tree, one a line, indented by depth: the mind map of the paper."""
    lines = []
    for name, node in tree.items():
        lines.append("  " * depth + f"- {name}")
        if isinstance(node, Mapping):
            lines.append(outline(node, depth + 1))
    return "\n".join(line for line in lines if line)


class TaxonomyDataset(Dataset[dict[str, list[int]]]):
    """Next-token prediction of every chunk, conditioned on its taxonomy and its path; the loss counts the chunk only.

    An item has ``input_ids`` (prefix, then chunk), ``labels`` (-100 over the prefix) and ``attention_mask``, as lists:
    what transformers' ``DataCollatorForSeq2Seq`` pads and `Trainer` trains on. How the taxonomy was made is not this
    class's concern: any tree will do.

    Args:
        tree: nested mappings; the root's children are the books. Leaves are keys of ``chunks``, or lists of keys.
        chunks: texts by key, a mapping or a sequence.
        tokenize: text to ids: a Hugging Face tokenizer, or a function.
        template: the prefix; ``{tree}`` is the outline of the chunk's book, ``{path}`` its path.
        max_length: longer items lose the beginning of the prefix, then the end of the chunk.
        eos: id that ends every chunk, if any.

    Raises:
        ValueError, TypeError: naming `tree`, `max_length`.

    Example:
        >>> from w2s_fast.data import TaxonomyDataset
        >>> data = TaxonomyDataset({"book": {"one": [0]}}, ["ab"], lambda text: list(text.encode()))
        >>> sum(label >= 0 for label in data[0]["labels"])
        2
    """

    def __init__(
        self, tree: Tree, chunks: Mapping[Any, str] | Sequence[str], tokenize: Any, *, template: str = TEMPLATE,
        max_length: int | None = None, eos: int | None = None,
    ) -> None:  # fmt: skip
        op = "data.TaxonomyDataset"
        self._places, self._chunks = list(places(tree)), chunks
        if not self._places:
            checks.fail(op, "tree", "with at least one chunk", "none")
        known = range(len(chunks)) if isinstance(chunks, Sequence) else chunks
        for place in self._places:
            if place.key not in known:
                checks.fail(op, "tree", "of keys of chunks", repr(place.key), f"It lies at {' > '.join(place.path)}.")
        self._ids: Callable[[str], list[int]] = _tokens(tokenize)
        self._outlines = {book: outline({book: node}) for book, node in tree.items()}
        self._template = template
        self._longest = None if max_length is None else checks.integer(op, "max_length", max_length, low=1)
        self._end = [] if eos is None else [eos]

    def __len__(self) -> int:
        return len(self._places)

    def prefix(self, index: int) -> str:
        """What stands before the chunk."""
        path = self._places[index].path
        return self._template.format(tree=self._outlines[path[0]], path=" > ".join(path))

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        before, chunk = self._ids(self.prefix(index)), self._ids(self._chunks[self._places[index].key]) + self._end
        if self._longest is not None:
            chunk = chunk[: self._longest]
            before = before[max(0, len(before) + len(chunk) - self._longest) :]
        ids = before + chunk
        return {"input_ids": ids, "labels": [-100] * len(before) + chunk, "attention_mask": [1] * len(ids)}


def _tokens(tokenize: Any) -> Callable[[str], list[int]]:
    if hasattr(tokenize, "encode"):
        return lambda text: list(tokenize(text, add_special_tokens=False)["input_ids"])
    return lambda text: list(tokenize(text))
