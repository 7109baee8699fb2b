"""Tokenizers: learnt pieces of words, bytes or characters, each saved as one tokenizer.json.

Every kind has the same special tokens and puts [CLS] first, so that an empty text still has one token.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from resseq.data.text import TextOptions
from resseq.pretrained import find_file

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]"]
"""With the ids 0, 1 and 2; `collate` pads with 0."""


def train_tokenizer(texts: Iterable[str], options: TextOptions) -> "Tokenizer":
    """Train the tokenizer that `options` ask for; the same texts give the same tokenizer.

    >>> tokenizer = train_tokenizer(["to be or not to be"], TextOptions(tokenizer="character"))
    >>> tokenizer.encode("to be<br />").tokens
    ['[CLS]', 't', 'o', ' ', 'b', 'e', ' ']
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    breaks = normalizers.Replace(Regex(r"(?i)<br\s*/?>"), " ")
    steps = [breaks, normalizers.NFC(), normalizers.Lowercase()]
    normalizer = normalizers.Sequence(steps if options.lowercase else steps[:-1])

    trainer = None
    if options.tokenizer == "bpe":
        model = models.BPE(unk_token="[UNK]")
        pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # splits on whitespace and punctuation
        trainer = trainers.BpeTrainer(vocab_size=options.vocab_size, special_tokens=SPECIAL, show_progress=False)
    elif options.tokenizer == "wordpiece":
        model = models.WordPiece(unk_token="[UNK]")
        pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        # The trainer numbers the symbols inside words in the order of a hash map, which differs from run to run, and
        # breaks ties between merges by these numbers. Naming the symbols first, as if they were special, makes the
        # vocabulary repeatable.
        texts = list(texts)
        characters = set().union(*(normalizer.normalize_str(text) for text in texts))
        inside = [f"##{character}" for character in sorted(characters) if not character.isspace()]
        trainer = trainers.WordPieceTrainer(
            vocab_size=options.vocab_size, special_tokens=SPECIAL + inside, show_progress=False
        )
    elif options.tokenizer == "character":
        model = models.WordLevel(unk_token="[UNK]")
        pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        trainer = trainers.WordLevelTrainer(
            vocab_size=options.vocab_size, min_frequency=2, special_tokens=SPECIAL, show_progress=False
        )
    else:
        symbols = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet())
        model = models.BPE(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[])
        pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def assemble(model: models.Model) -> Tokenizer:
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizer
        tokenizer.pre_tokenizer = pre_tokenizer
        return tokenizer

    if trainer is not None:
        pupil = assemble(model)
        pupil.train_from_iterator(texts, trainer)
        model = pupil.model
    tokenizer = assemble(model)  # afresh: only these three are special
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    return _read_special_as_text(tokenizer)


def load_tokenizer(path: str | Path) -> "Tokenizer":
    """Read a tokenizer.json, of a run folder or of a checkpoint.

    Raises: ValueError if the file is missing or no tokenizer.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(
            f"load_tokenizer: path must be a saved tokenizer; got path={path} ({error}). Train and save it anew."
        ) from error
    return _read_special_as_text(tokenizer)


def load_pretrained_tokenizer(folder_or_hub_id: str | Path) -> "Tokenizer":
    """The tokenizer of a Hugging Face checkpoint: its tokenizer.json, or BERT's WordPiece with its vocab.txt.

    Raises: ValueError where there is neither.
    """
    from tokenizers import BertWordPieceTokenizer, Tokenizer

    if (file := find_file(folder_or_hub_id, "tokenizer.json")) is not None:
        tokenizer = load_tokenizer(file)
    elif (file := find_file(folder_or_hub_id, "vocab.txt")) is not None:
        settings = find_file(folder_or_hub_id, "tokenizer_config.json")
        lowercase = settings is None or json.loads(settings.read_text()).get("do_lower_case", True)
        tokenizer = Tokenizer.from_str(BertWordPieceTokenizer(str(file), lowercase=lowercase).to_str())
    else:
        raise ValueError(
            f"load_pretrained_tokenizer: a checkpoint holds tokenizer.json or vocab.txt; got "
            f"folder_or_hub_id={str(folder_or_hub_id)!r} without. Save its tokenizer beside it."
        )
    tokenizer.no_padding()  # `collate` pads, and `encode` cuts
    tokenizer.no_truncation()
    return _read_special_as_text(tokenizer)


def separator_of(tokenizer: "Tokenizer") -> int:
    """Id of the token that a pretrained tokenizer ends a text with. Raises: ValueError if it adds none."""
    ids = tokenizer.encode("").ids
    if not ids:
        raise ValueError(
            "separator_of: a checkpoint's tokenizer ends a text with a special token; got one that adds none. "
            "Save it with its post-processor."
        )
    return ids[-1]


def _read_special_as_text(tokenizer: "Tokenizer") -> "Tokenizer":
    # A "[CLS]" or "[PAD]" that somebody wrote is text. The file does not keep this setting.
    tokenizer.encode_special_tokens = True
    return tokenizer
