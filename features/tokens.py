"""Texts as tokens: learned from the training part, or those of a pretrained encoder; applied everywhere by one function.

B rows, L tokens of the longest of them, V different tokens.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipelines.errors import UsageError
from pipelines.manifest import digest_of, file_digest
from pipelines.spec import Text

if TYPE_CHECKING:
    from scipy.sparse import csr_array
    from tokenizers import Tokenizer

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
NEEDED = ("tokenizer.json", "config.json", "model.safetensors")  # in the folder of a pretrained encoder
CHUNK = 20_000  # texts at a time: the tokenizer keeps much about each


@dataclass(frozen=True)
class Tokens:
    """Token numbers of B rows: those of row i are `values[begin[i]:end[i]]`. int32 and int64.

    `size`: V; `pad`: the number that stands where no token is.
    """

    values: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    size: int
    pad: int

    def __len__(self) -> int:
        return len(self.begin)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 (B)."""
        length: np.ndarray = self.end - self.begin
        return length

    def take(self, rows: np.ndarray | slice) -> "Tokens":
        """The rows at these positions, or where this mask is true; no token is copied."""
        return replace(self, begin=self.begin[rows], end=self.end[rows])

    def padded(self) -> np.ndarray:
        """int64 (B, L), with `pad` after the tokens of a row; L is at least 1."""
        place = np.arange(max(1, int(self.lengths.max(initial=0))))
        there = place < self.lengths[:, None]
        found = np.full(there.shape, self.pad, np.int64)
        found[there] = self.values[(self.begin[:, None] + place)[there]]
        return found

    def bag(self) -> "csr_array":
        """How often each token is in a row: float64 (B, V)."""
        from scipy.sparse import csr_array

        values, ends = self._together()
        found = csr_array((np.ones(len(values)), values, ends), (len(self), self.size))
        found.sum_duplicates()
        return found

    def _together(self) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of these rows alone, and where each row ends, after a 0."""
        lengths = self.lengths
        at = np.repeat(self.begin - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())
        return self.values[at], np.concatenate([[0], np.cumsum(lengths)])

    def save(self, path: Path) -> None:
        """As one column of an Arrow file, which readers map into memory."""
        values, ends = self._together()
        column = pa.LargeListArray.from_arrays(pa.array(ends), pa.array(values))
        table = pa.table({"tokens": column}, metadata={"size": str(self.size), "pad": str(self.pad)})
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=len(self))

    @classmethod
    def load(cls, path: Path) -> "Tokens":
        """What was saved, mapped into memory: the rows may be more than fit into it."""
        with pa.memory_map(str(path)) as file:
            table = pa.ipc.open_file(file).read_all()
        column, about = table["tokens"].chunk(0), table.schema.metadata
        ends = column.offsets.to_numpy()
        return cls(column.values.to_numpy(), ends[:-1], ends[1:], int(about[b"size"]), int(about[b"pad"]))


@dataclass(frozen=True)
class Reader:
    """How the columns of text of a row become its tokens; `tokenizer` is what the tokenizers library writes.

    `size`: V; `pad`: the number that stands where no token is.
    """

    columns: tuple[str, ...]
    tokenizer: Mapping[str, Any]
    max_tokens: int
    pad: int
    size: int

    def read(self, frame: Mapping[str, np.ndarray]) -> Tokens:
        """The tokens of B rows: a begin, and each text with an end after it, cut to `max_tokens`. None reads as ''."""
        columns = [[text or "" for text in frame[name].tolist()] for name in self.columns]
        parts: list[np.ndarray] = []
        lengths: list[int] = []
        for at in range(0, len(columns[0]), CHUNK):
            found = [self._library.encode_batch_fast(c[at : at + CHUNK], add_special_tokens=False) for c in columns]
            rows = [self._joined([text.ids for text in row]) for row in zip(*found, strict=True)]
            lengths += map(len, rows)
            parts.append(np.fromiter((token for row in rows for token in row), np.int32, sum(map(len, rows))))
        ends = np.cumsum(lengths, dtype=np.int64)
        return Tokens(np.concatenate(parts or [np.empty(0, np.int32)]), ends - lengths, ends, self.size, self.pad)

    def _joined(self, texts: Sequence[list[int]]) -> list[int]:
        begin, end = self._around
        found, left = [*begin], self.max_tokens - len(begin) - len(end) * len(texts)
        for i, ids in enumerate(texts):
            some = ids[: max(0, left // (len(texts) - i))]
            found += [*some, *end]
            left -= len(some)
        return found[: self.max_tokens]

    @cached_property
    def _library(self) -> "Tokenizer":
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a process that has used its threads cannot fork
        from tokenizers import Tokenizer

        library = Tokenizer.from_str(json.dumps(self.tokenizer))
        library.no_truncation()
        library.no_padding()
        library.encode_special_tokens = True  # a text in which "[SEP]" stands is a text
        return library

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """What this tokenizer puts before and after a text."""
        ids = self._library.encode("").ids
        return ids[:1], ids[-1:] if len(ids) > 1 else []


def learn(text: Text, frame: Mapping[str, np.ndarray], train: np.ndarray) -> Reader:
    """Tokens for the texts of the rows where `train` is true: those of the pretrained encoder, or learned from them."""
    if text.pretrained:
        return _pretrained(text)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    found = Tokenizer(models.WordPiece(unk_token=SPECIAL[1]))
    found.normalizer = normalizers.BertNormalizer(lowercase=text.lowercase, strip_accents=False)
    found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    found.post_processor = processors.BertProcessing((SPECIAL[3], 3), (SPECIAL[2], 2))
    texts = [found.normalizer.normalize_str(value) for name in text.columns for value in frame[name][train].tolist() if value]
    inner = {letter for text in texts for word, _ in found.pre_tokenizer.pre_tokenize_str(text) for letter in word[1:]}
    # the trainer numbers letters within words in the random order of a hash table, unless it is given them as special tokens
    first = [*SPECIAL, *(f"##{letter}" for letter in sorted(inner))]
    trainer = trainers.WordPieceTrainer(vocab_size=text.vocabulary, special_tokens=first, show_progress=False)
    found.train_from_iterator(texts, trainer)
    body = json.loads(found.to_str())
    body["added_tokens"] = body["added_tokens"][: len(SPECIAL)]
    return Reader(text.columns, body, text.max_tokens, 0, found.get_vocab_size())


def _pretrained(text: Text) -> Reader:
    folder = pretrained_folder(text)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        reader = Reader(text.columns, tokenizer, text.max_tokens, config.get("pad_token_id") or 0, config["vocab_size"])
        reader.read({name: np.array(["text"], object) for name in text.columns})
    except Exception as error:  # not JSON, no field, or what the library does not know
        raise UsageError(
            f"features.text.pretrained {text.pretrained!r} is no encoder ({type(error).__name__}: {error}); give a folder "
            "that save_pretrained of a fast tokenizer and its model has written"
        ) from None
    return reader


def pretrained_folder(text: Text) -> Path:
    """The folder of the pretrained encoder. Raises UsageError naming what it lacks."""
    folder = Path(text.pretrained).expanduser()
    if lacks := [name for name in NEEDED if not (folder / name).is_file()]:
        raise UsageError(
            f"features.text.pretrained {text.pretrained!r} lacks {', '.join(lacks)}: give the folder that save_pretrained "
            "of a fast tokenizer and its model has written; nothing is downloaded"
        )
    return folder


def pretrained_digest(text: Text | None) -> dict[str, str]:
    """Digest of the files of the pretrained encoder, if one is named: what is made of them is made anew with others."""
    if text is None or not text.pretrained:
        return {}
    folder = pretrained_folder(text)
    return {"pretrained": digest_of([file_digest(folder / name) for name in NEEDED])}
