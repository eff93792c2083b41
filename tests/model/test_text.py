"""Networks that read: any encoder of Hugging Face, batches of like length, killed and resumed, on one rank or two, as served."""

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.linear_model import LogisticRegression

from features.tokens import Tokens, learn
from features.trainset import TrainingSet
from models.arrays import Arrays, Shape, write_arrays
from models.candidate import train_candidates
from models.custom import build
from models.data import POOL, Loader, Resident, by_length, resident, shuffled
from models.elastic import Zygote
from models.evaluate import auc
from models.export import export_onnx
from models.job import Job
from models.score import NetworkScorer
from models.words import STRENGTHS, Words, fit_words
from pipelines.errors import UsageError
from pipelines.manifest import read_json, write_json
from pipelines.spec import Text, Train
from tests.model.small import small_spec, write_small
from tests.model.test_training import assert_same, run, strike, weights

TINY = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainingSet]:
    folder = tmp_path_factory.mktemp("texts")
    return folder, write_small(folder / "set", text=True)


def training(**options: Any) -> Train:
    given = {"encoder": TINY, "network": {"width": 16, "depth": 1, "dropout": 0.1}, "max_epochs": 2, "batch_size": 64, **options}
    return Train.model_validate(given)


def wanted(folder: Path, data: TrainingSet, every_us: int = 20_000_000, **options: Any) -> Job:
    train = training(checkpoint_every=f"{every_us}us", **options)
    return Job(str(write_arrays(data, folder / "arrays", train)), train, 5, train.max_epochs)


def read(rows: int, seed: int = 3) -> Resident:
    """Rows with tokens of many lengths, numbered by their one scaled column."""
    lengths = np.random.default_rng(seed).integers(1, 40, rows)
    ends = np.cumsum(lengths)
    tokens = Tokens(np.ones(ends[-1], np.int32), ends - lengths, ends, 10, 0)
    numbered, none = torch.arange(rows, dtype=torch.float32)[:, None], torch.zeros(rows, 0, dtype=torch.int64)
    return Resident(numbered, none, torch.zeros(rows), tokens)


def test_batches_hold_texts_of_like_length_and_every_row_once() -> None:
    data, shape = read(64 * 2 * POOL + 7), Shape(64, 2 * POOL)
    assert data.tokens is not None
    lengths = torch.from_numpy(data.tokens.lengths)
    order = by_length(shuffled(len(data), 5), lengths, shape, 5)
    assert len(set(order.tolist())) == len(order) == 64 * shape.steps
    spread = lengths[order].view(-1, 64).double().std(1).mean()
    assert spread < 0.1 * lengths.double().std()
    assert not torch.equal(order, by_length(shuffled(len(data), 6), lengths, shape, 6))
    longest = [batch[2].shape[1] for batch in Loader(data, shape, 1, 0, 1)]
    assert sum(longest) / shape.steps < 0.6 * 39  # where padding would be to the longest of all


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_batches_of_texts_and_resume(world: int) -> None:
    data, shape = read(1_000), Shape(64, 15)
    whole = [batch[0][:, 0].tolist() for batch in Loader(data, shape, 7, 0, 1)]
    for rank in range(world):
        loader = Loader(data, shape, 7, rank, world)
        loader.load_state_dict({"epoch": 0, "position": 4})
        found = [(scaled[:, 0].tolist(), tokens) for scaled, _, tokens, _ in loader]
        assert [rows for rows, _ in found] == [batch[rank::world] for batch in whole[4:]]
        assert data.tokens is not None
        for rows, tokens in found:
            assert tokens.tolist() == data.tokens.take(np.array(rows, int)).padded().tolist()
    last = Loader(data, shape, 7, 0, 1)
    next(iter(last))
    assert last.last()[0].tolist() == whole[0]


def test_a_bag_of_words_is_scikit_learns(texts: tuple[Path, TrainingSet], tmp_path: Path) -> None:
    """tf-idf of the same tokens by scikit-learn's own transformer, and its answers."""
    _, data = texts
    assert data.batch.tokens is not None
    found = fit_words(data.batch, data.label, data.part)
    found.save(tmp_path / "words.json")
    logit = Words.load(tmp_path / "words.json").logit(data.batch)
    train, valid = data.rows("train"), data.rows("valid_fit")
    bags = data.batch.tokens.bag()
    tfidf = TfidfTransformer(sublinear_tf=True).fit(bags[train])
    x = np.hstack([tfidf.transform(bags).toarray(), data.batch.scaled])
    tried = [LogisticRegression(C=c, max_iter=1_000).fit(x[train], data.label[train]) for c in STRENGTHS]
    losses = [-np.log(m.predict_proba(x[valid])[np.arange(len(valid)), data.label[valid].astype(int)]).mean() for m in tried]
    np.testing.assert_allclose(logit, tried[int(np.argmin(losses))].decision_function(x), atol=2e-3)
    alone = [float(Words.load(tmp_path / "words.json").logit(data.batch.take(np.array([i])))[0]) for i in range(50)]
    assert alone == logit[:50].tolist()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_network_that_reads_learns_what_no_bag_of_words_can(
    zygote: Zygote, texts: tuple[Path, TrainingSet], tmp_path: Path
) -> None:  # fmt: skip
    """Killed twice, it ends in the same weights; what is served answers alone as it does among others."""
    folder, data = texts
    job = wanted(folder, data, learning_rate=0.005)
    calm = run(zygote, tmp_path / "calm", job)
    hit = strike(zygote, tmp_path / "hit", [6, 45], signal.SIGKILL)
    torn = run(zygote, tmp_path / "hit", wanted(folder, data, 20_000, learning_rate=0.005))
    hit.join()
    assert_same(weights(tmp_path / "calm"), weights(tmp_path / "hit"))
    assert calm.curve == torn.curve
    test = data.batch.take(data.rows("test"))
    scorer = NetworkScorer(tmp_path / "calm" / "network.onnx")
    logit, words = scorer.logit(test), fit_words(data.batch, data.label, data.part).logit(test)
    assert auc(data.label[data.rows("test")], logit) > auc(data.label[data.rows("test")], words) + 0.1
    alone = np.array([scorer.logit(test.take(np.array([i])))[0] for i in range(60)])
    np.testing.assert_allclose(alone, logit[:60], atol=2e-6)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_read_the_same_batches(zygote: Zygote, texts: tuple[Path, TrainingSet], tmp_path: Path, strategy: str) -> None:
    folder, data = texts
    plain = {"network": {"width": 16, "depth": 1, "dropout": 0.0}, "max_epochs": 1,
             "encoder": {**TINY, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}}  # fmt: skip
    run(zygote, tmp_path / "one", wanted(folder, data, **plain))
    run(zygote, tmp_path / "two", wanted(folder, data, strategy=strategy, **plain), ranks=2)
    assert_same(weights(tmp_path / "one"), weights(tmp_path / "two"), atol=2e-3)
    hit = strike(zygote, tmp_path / "hit", [4, 20], signal.SIGKILL)
    run(zygote, tmp_path / "hit", wanted(folder, data, 20_000, strategy=strategy, **plain), ranks=2)
    hit.join()
    assert_same(weights(tmp_path / "two"), weights(tmp_path / "hit"))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("bert", {}), ("roberta", {}), ("electra", {"embedding_size": 32}), ("albert", {"embedding_size": 16}), ("mpnet", {}),
        ("deberta-v2", {}), ("modernbert", {}),
        ("distilbert", {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64}),
    ],
)  # fmt: skip
def test_any_encoder_is_trained_exported_and_checkpointed(
    texts: tuple[Path, TrainingSet], tmp_path: Path, kind: str, sizes: dict[str, int]
) -> None:
    """Every weight that is trained comes into the loss, or ranks would wait for its gradient; recomputing changes nothing."""
    folder, data = texts
    encoder = {"model_type": kind, **(sizes if "dim" in sizes else {**TINY, "model_type": kind, **sizes})}
    rows = resident(Arrays.load(write_arrays(data, folder / "arrays", Train())), "train", 40)
    losses = []
    for again in (False, kind not in ("albert", "mpnet")):  # they say that they cannot
        net = build(training(encoder=encoder, gradient_checkpointing=again), data.preprocess, 3, 10)
        torch.manual_seed(1)
        loss = net.train()(*rows.inputs()).square().mean()
        loss.backward()
        assert all((w.grad is not None) == w.requires_grad for w in net.parameters())
        losses.append(float(loss.detach()))
    assert losses[0] == losses[1]
    assert export_onnx(net, data.preprocess, rows, tmp_path / "a.onnx") < 1e-5
    one, other = (build(training(encoder=encoder), data.preprocess, seed, 10).state_dict() for seed in (3, 3))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("sizes", "millions"),
    [({"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1_536}, 10),
     ({"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3_072}, 85)],
    ids=["MiniLM", "BERT base"],
)  # fmt: skip
def test_large_encoders_are_trained_and_served(
    zygote: Zygote, tmp_path: Path, sizes: dict[str, int], millions: int
) -> None:  # fmt: skip
    data = write_small(tmp_path / "set", rows=130, text=True)
    job = wanted(tmp_path, data, encoder={"model_type": "bert", **sizes}, max_epochs=1, batch_size=16, learning_rate=1e-5)
    found = run(zygote, tmp_path / "job", job)
    assert found.parameters > millions * 1e6 and found.log_loss is not None
    assert np.isfinite(NetworkScorer(tmp_path / "job" / "network.onnx").logit(data.batch)).all()


def test_training_begins_with_the_weights_of_a_folder(texts: tuple[Path, TrainingSet], tmp_path: Path) -> None:
    """Tokens, settings and weights of an encoder that save_pretrained has written; other weights are another result."""
    from transformers import BertConfig, BertModel

    _, data = texts
    assert data.preprocess.reader is not None
    torch.manual_seed(9)
    sizes = {k: v for k, v in TINY.items() if k != "model_type"}
    trained = BertModel(BertConfig(**sizes, vocab_size=data.preprocess.reader.size, max_position_embeddings=20))
    trained.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data.preprocess.reader.tokenizer))
    reader = learn(Text(columns=("remark",), max_tokens=16, pretrained=str(tmp_path)), {}, np.empty(0))
    assert reader.tokenizer == data.preprocess.reader.tokenizer and (reader.size, reader.pad) == (trained.config.vocab_size, 0)
    train = training(encoder={"pretrained": str(tmp_path)})
    net = build(train, replace(data.preprocess, reader=reader), 3, 10)
    for name, value in net.encoder.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(value, trained.state_dict()[name]), name
    with pytest.raises(UsageError, match=r"max_tokens 30: the encoder in .* reads 20 at most"):
        build(train, replace(data.preprocess, reader=replace(reader, max_tokens=30)), 3, 10)


@pytest.mark.parametrize(
    ("encoder", "said"),
    [
        ({"model_type": "brt"}, "train.encoder.model_type 'brt' is none of Hugging Face; nearest: 'bert': write such as bert"),
        ({"model_type": "bert", "hiden_size": 8}, "train.encoder.hiden_size is no setting of bert; nearest: 'hidden_size'"),
        ({**TINY, "num_attention_heads": 5}, "cannot be made, or does not read tokens .* give model_type and sizes of an enc"),
        ({**TINY, "max_position_embeddings": 9}, "train.encoder.max_position_embeddings is below features.text.max_tokens 16"),
        ({"model_type": "t5", "d_model": 16, "num_layers": 1}, "cannot be made, or does not read tokens"),
    ],
)
def test_an_encoder_that_cannot_be_made_is_one_clear_error(
    texts: tuple[Path, TrainingSet], encoder: dict[str, Any], said: str
) -> None:  # fmt: skip
    with pytest.raises(UsageError, match=said):
        build(training(encoder=encoder), texts[1].preprocess, 3, 10)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_stage_races_the_network_against_a_bag_of_words(texts: tuple[Path, TrainingSet], tmp_path: Path) -> None:
    folder, _ = texts
    write_json(tmp_path / "study" / "best.json", {})
    (tmp_path / "out").mkdir()
    spec = small_spec().model_copy(update={"train": training(learning_rate=0.005)})
    train_candidates(spec, folder / "set", tmp_path / "study", tmp_path / "run" / "work", tmp_path / "out")
    table = {c["name"]: c["log_loss"] for c in read_json(tmp_path / "out" / "choice.json")["candidates"]}
    assert table.keys() == {"words", "gbdt", "network", "blend", "blend_words"}
    assert table["network"] < min(table["words"], table["gbdt"]) - 0.02
