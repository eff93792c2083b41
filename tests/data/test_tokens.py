"""Texts as tokens: learned from the training part alone, the same everywhere, cut, padded and counted as plain Python would."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from features.frame import feature_list
from features.preprocess import Preprocess, fit
from features.tokens import NEEDED, Reader, Tokens, learn, pretrained_digest
from pipelines.errors import UsageError
from pipelines.manifest import ROOT, digest_of
from pipelines.names import write_sample
from pipelines.spec import Text, load_spec

TEXTS = ["A late flight", "the flight was late, late!", "", None, "[SEP] [CLS] ünïcode 東京", "quokka quokka quokka"]
FRAME = {"remark": np.array(TEXTS, object), "note": np.array(["on time"] * 6, object)}
TRAIN = np.array([True, True, True, True, True, False])


def reader(**more: object) -> Reader:
    return learn(Text.model_validate({"columns": ("remark",), "vocabulary": 200, **more}), FRAME, TRAIN)


def rows(tokens: Tokens) -> list[list[int]]:
    return [tokens.values[a:b].tolist() for a, b in zip(tokens.begin, tokens.end, strict=True)]


def test_each_text_begins_ends_and_is_cut() -> None:
    whole, cut = rows(reader().read(FRAME)), rows(reader(max_tokens=4).read(FRAME))
    assert whole[2] == whole[3] == [2, 3]  # '' and missing
    assert all(row[0] == 2 and row[-1] == 3 and 0 not in row for row in whole + cut)
    assert cut == [[*row[:3], 3] if len(row) > 4 else row for row in whole]
    assert {2, 3}.isdisjoint(whole[4][1:-1])  # a text in which "[SEP]" stands is a text
    words = {v: k for k, v in reader().tokenizer["model"]["vocab"].items()}
    assert [words[t] for t in whole[0]] == ["[CLS]", "a", "late", "flight", "[SEP]"]


def test_several_texts_share_the_places() -> None:
    both = reader(columns=("remark", "note"), max_tokens=9)
    found = rows(both.read(FRAME))
    words = {v: k for k, v in both.tokenizer["model"]["vocab"].items()}
    assert [words[t] for t in found[0]] == ["[CLS]", "a", "late", "flight", "[SEP]", "on", "time", "[SEP]"]
    assert [words[t] for t in found[3]] == ["[CLS]", "[SEP]", "on", "time", "[SEP]"]
    assert (len(found[1]) == 9 and [words[t] for t in found[1]][4:] == ["[SEP]", "on", "time", "[SEP]"]) or len(found[1]) <= 9
    assert max(map(len, rows(reader(columns=("remark", "note"), max_tokens=4).read(FRAME)))) == 4


def test_only_the_training_part_is_learned_from() -> None:
    vocabulary = reader().tokenizer["model"]["vocab"]
    assert "late" in vocabulary and not any("q" in word for word in vocabulary)
    assert 1 in rows(reader().read(FRAME))[5]  # what was not learned


def test_the_same_is_learned_by_any_number_of_threads(tmp_path: Path) -> None:
    """The library's own trainer numbers tokens by the random order of a hash table."""
    write_sample(tmp_path)
    code = "import sys; from pathlib import Path; from tests.data.test_tokens import learned; print(learned(Path(sys.argv[1])))"
    env = {**os.environ, "RAYON_NUM_THREADS": "4", "TOKENIZERS_PARALLELISM": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == learned(tmp_path) == learned(tmp_path)


def learned(landing: Path) -> str:
    """Digest of what is learned from some of the names."""
    names = np.array(pq.read_table(landing / "names" / "names.parquet")["name"].to_pylist()[::20], object)
    found = learn(Text(columns=("name",), vocabulary=600), {"name": names}, np.ones(len(names), bool))
    return digest_of(asdict(found))


def test_tokens_are_padded_counted_and_kept(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    lengths = rng.integers(0, 9, 50)
    ends = np.cumsum(lengths)
    tokens = Tokens(rng.integers(1, 30, ends[-1]).astype(np.int32), ends - lengths, ends, 30, 0)
    some = tokens.take(rng.permutation(50)[:20])
    plain = rows(some)
    padded = some.padded()
    assert padded.dtype == np.int64 and padded.tolist() == [row + [0] * (max(map(len, plain)) - len(row)) for row in plain]
    assert some.bag().toarray().tolist() == [[row.count(token) for token in range(30)] for row in plain]
    assert tokens.take(np.flatnonzero(lengths == 0)).padded().tolist() == [[0]] * int((lengths == 0).sum())
    tokens.save(tmp_path / "tokens.arrow")
    kept = Tokens.load(tmp_path / "tokens.arrow")
    assert rows(kept) == rows(tokens) and (kept.size, kept.pad) == (30, 0)
    some.save(tmp_path / "some.arrow")
    alone = Tokens.load(tmp_path / "some.arrow")
    assert rows(alone) == plain and alone.values.size == sum(map(len, plain))


def test_preprocessing_with_texts_is_kept_exactly(tmp_path: Path) -> None:
    spec = load_spec("names")
    frame = {"kind": np.array(["country", None] * 3, object), "name": FRAME["remark"]}
    fitted = fit(frame, TRAIN, feature_list(spec), rare=1, text=spec.features.text)
    fitted.save(tmp_path / "preprocess.json")
    again = Preprocess.load(tmp_path / "preprocess.json")
    one, other = fitted.transform(frame), again.transform(frame)
    assert again == fitted and one.tokens is not None and other.tokens is not None
    assert rows(one.tokens) == rows(other.tokens) and np.array_equal(one.codes, other.codes)
    assert one.trees.shape == (6, 1 + one.tokens.size) and (one.trees.toarray()[:, 1:] == one.tokens.bag().toarray()).all()
    mask = np.array([True, False] * 3)
    taken = one.take(mask).tokens
    assert taken is not None and rows(taken) == rows(one.tokens)[::2]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("features={row: [], text: [nam]}", "features.text.columns 'nam' not in source 'names' .*nearest: 'name'"),
        ("features={row: [], text: [romance]}", "features.text.columns holds the label 'romance'"),
        ("features={row: [kind, name]}", "features.row 'name' is a text: leave it out there"),
        ("features={row: [], text: {columns: [name, name]}}", "features.text.columns names a column twice"),
        ("features={auto: {}}", "features: auto proposes numbers and categories: where there is text"),
        ("train.feed=stream", "train.feed: stream is for tables without features.text"),
        ("features.text.max_tokens=2", "features.text.max_tokens: .* greater than or equal to 4, found 2"),
    ],
)
def test_a_wrong_text_is_one_clear_error(options: str, said: str) -> None:
    with pytest.raises(UsageError, match=f"^names.yaml: {said}[^\n]*$"):
        load_spec("names", [options])


def test_a_folder_that_is_no_encoder_is_one_clear_error(tmp_path: Path) -> None:
    text = Text(columns=("remark",), pretrained=str(tmp_path))
    with pytest.raises(UsageError, match=r"lacks tokenizer.json, config.json, model.safetensors: give the folder that save_pre"):
        learn(text, FRAME, TRAIN)
    for name in NEEDED:
        (tmp_path / name).write_text("{}")
    with pytest.raises(UsageError, match=r"is no encoder \(.*\); give a folder that save_pretrained"):
        learn(text, FRAME, TRAIN)
    digest = pretrained_digest(text)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 200}))
    assert pretrained_digest(text) != digest and pretrained_digest(None) == {}


def test_a_spec_without_texts_stands_in_the_digests_that_it_had() -> None:
    assert "text" not in load_spec("tumours").model_dump(mode="json")["features"]
    assert digest_of(load_spec("names").model_dump(mode="json")) != digest_of(
        load_spec("names", ["features.text.max_tokens=31"]).model_dump(mode="json")
    )
