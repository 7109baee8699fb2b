"""A generated set: nested list expressions; what digit does one come to?

    [MAX 2 9 [MIN 4 7 ] 0 ]    is 9

Operators are MIN, MAX, MED (the median, rounded down) and SM (the sum modulo 10). Nothing but the whole tree gives the
answer, so that a bag of tokens learns little.

``--data listops`` draws short expressions, of 14 tokens in the mean. The majority class has 11 % of them, and a linear
bag of tokens gets about 35 % right. ``--data listops:length=100,depth=4,rows=20000`` sets the most tokens, the most
operators inside one another, and the number of expressions.

The long-range setting of the Long Range Arena (Tay et al. 2020, arXiv:2011.04006; published 36.37 %), for a GPU:

    resseq train --data listops:shortest=500,length=2000,depth=10,arguments=10,rows=120000 --max-length 2700
      --scheme pre --depth 4 --dim 512 --heads 8 --kernel-size 0 --warmup-steps 1000 --max-steps 5000 --bf16

Its expressions and budget are those of the arena. Here the feed-forward nets are 2048 wide, not 1024, and the tokenizer
cuts ``[MAX`` in two, hence the greater length.

Source: Nangia and Bowman 2018, arXiv:1804.06028.
"""

import random
import statistics
from dataclasses import dataclass, fields

OPERATORS = {
    "MIN": min,
    "MAX": max,
    "MED": lambda digits: int(statistics.median(digits)),
    "SM": lambda digits: sum(digits) % 10,
}
NESTED = 0.25  # probability that an argument is an expression, where depth is left
SHARES = {"validation": 0.1, "test": 0.1}


@dataclass(frozen=True)
class ListOps:
    """What ``listops:name=value,…`` can set."""

    length: int = 50
    """Tokens of an expression, at most: a bracket with its operator is one, a closing bracket another."""
    shortest: int = 4
    """Tokens of an expression, at least: an operator, two digits and a bracket are four."""
    depth: int = 3
    """Operators inside one another, at most."""
    arguments: int = 5
    """Of an operator, at most; at least 2."""
    rows: int = 12000
    """Expressions in all splits together."""


def parse(name: str) -> ListOps:
    """The settings of ``listops:length=50,depth=3``. Raises: ValueError for an unknown setting or a bad value."""
    _, _, given = name.partition(":")
    known = [field.name for field in fields(ListOps)]
    settings = {}
    for pair in filter(None, given.split(",")):
        key, _, value = pair.partition("=")
        if key not in known or not value.isdecimal() or int(value) < (2 if key == "arguments" else 1):
            raise ValueError(
                f"listops: settings are {', '.join(known)}, each with a number; got {pair}. "
                f"Use for example listops:length=50,depth=3."
            )
        settings[key] = int(value)
    options = ListOps(**settings)
    if options.length < max(4, options.shortest):
        raise ValueError(
            f"listops: length must be at least 4, and at least shortest; got length={options.length}, "
            f"shortest={options.shortest}. Use a greater length."
        )
    return options


def read_listops(name: str, seed: int) -> dict[str, tuple[list[str], list[str]]]:
    """Draw the expressions of each split, and what each comes to. None occurs twice.

    Raises: ValueError for unknown settings, and for more rows than there are such expressions.
    """
    options, rng = parse(name), random.Random(seed)
    drawn: dict[str, int] = {}
    for _ in range(200 * options.rows):
        tokens: list[str] = []
        value = _draw(rng, options, options.depth, tokens)
        if options.shortest <= len(tokens) <= options.length:
            drawn.setdefault(" ".join(tokens), value)
        if len(drawn) == options.rows:
            break
    else:
        raise ValueError(
            f"listops: found only {len(drawn)} different expressions; got {name}. Use fewer rows or more length."
        )
    rows = list(drawn.items())
    rng.shuffle(rows)  # of the short ones the later are repeats: as drawn, the first rows are shorter than the last
    splits, start = {}, 0
    for split, share in SHARES.items():
        stop = start + max(1, round(share * len(rows)))
        splits[split], start = rows[start:stop], stop
    splits = {"train": rows[start:]} | splits
    return {split: ([text for text, _ in part], [str(value) for _, value in part]) for split, part in splits.items()}


def _draw(rng: random.Random, options: ListOps, depth: int, tokens: list[str]) -> int:
    """Append an expression to the tokens; returns its value."""
    operator = rng.choice(list(OPERATORS))
    tokens.append(f"[{operator}")
    values = []
    for _ in range(rng.randint(2, options.arguments)):
        # One that is too long already will be thrown away: it need not grow on, which at a great depth takes for ever.
        if depth > 1 and len(tokens) <= options.length and rng.random() < NESTED:
            values.append(_draw(rng, options, depth - 1, tokens))
        else:
            values.append(rng.randrange(10))
            tokens.append(str(values[-1]))
    tokens.append("]")
    return OPERATORS[operator](values)
