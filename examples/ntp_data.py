"""Documents as rows of tokens whose boundaries are kept.

Documents are tokenised, concatenated and cut into rows of `block_size`. In a row, position_ids start
again at 0 with every document (and with the rest of a document that a cut has split): that is how
transformers separates packed sequences in its attention, and ttt_kernels in its fast weights. The first
token of each piece is nobody's target, so nothing is ever predicted across a boundary.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from ntp_config import SettingsError
from torch import Tensor
from torch.utils.data import Dataset

IGNORED = -100


def read_documents(patterns: list[str]) -> Iterator[str]:
    """Each pattern must match; files in the order of their names."""
    for pattern in patterns:
        files = [Path(f) for f in sorted(glob.glob(pattern, recursive=True))]
        if not files:
            raise SettingsError(f"data: no file matches {pattern!r}")
        for file in files:
            if file.suffix == ".txt":
                yield file.read_text(encoding="utf-8")
            elif file.suffix == ".jsonl":
                yield from (json.loads(s)["text"] for s in file.open(encoding="utf-8") if s.strip())
            else:
                raise SettingsError(f"data: a document file must be .txt or .jsonl, got {file.name}")


class PackedBlocks(Dataset):
    """Rows of `block_size` tokens; what does not fill the last one is left out.

    An item holds input_ids, position_ids and labels, each int64 [block_size].
    """

    def __init__(self, documents: Iterable[list[int]], block_size: int) -> None:
        # One tensor a document as it comes: lists of a large corpus would take ten times the memory.
        pieces = [torch.zeros(0, dtype=torch.long), *(torch.tensor(d, dtype=torch.long) for d in documents)]
        tokens, places = torch.cat(pieces), torch.cat([torch.arange(len(piece)) for piece in pieces])
        rows = len(tokens) // block_size
        if rows == 0:
            raise SettingsError(
                f"data: the documents must fill a row of block_size = {block_size}, got {len(tokens)} tokens"
            )
        self.ids = tokens[: rows * block_size].view(rows, block_size)
        self.positions = torch.stack(
            [from_zero(row) for row in places[: rows * block_size].view(rows, block_size)]
        )

    @classmethod
    def from_files(
        cls, patterns: list[str], tokenizer, block_size: int, *, prepend_bos: bool, append_eos: bool
    ) -> PackedBlocks:
        start = [tokenizer.bos_token_id] if prepend_bos else []
        end = [tokenizer.eos_token_id] if append_eos else []
        for name, ids in (("prepend_bos", start), ("append_eos", end)):
            if None in ids:
                raise SettingsError(f"data.{name} must be false: the tokenizer has no such token")
        encode = lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # noqa: E731
        return cls(([*start, *encode(text), *end] for text in read_documents(patterns)), block_size)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids, positions = self.ids[i], self.positions[i]
        return {
            "input_ids": ids,
            "position_ids": positions,
            "labels": ids.masked_fill(positions == 0, IGNORED),
        }


def from_zero(places: Tensor) -> Tensor:
    """Places in their documents [T], those of a document begun in an earlier row counted from 0."""
    starts = (places == 0).nonzero()
    first = int(starts[0]) if len(starts) else len(places)
    return torch.cat([places[:first] - places[0], places[first:]])
