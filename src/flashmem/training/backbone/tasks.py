"""Training and test rows: facts scattered in novels, and questions about them whose answers carry the loss.

Families (a row mixes some of them):
    number   RULER's needles: one value per key, or four values of one key; asked singly or several at once
    kv       lines `key: value`, asked singly or several at once
    vt       RULER's variable tracking: chains of assignments, asked by their value
    talk     what people said about themselves, with updates: the newest statement counts
    hop      two statements that must be put together
    song     a line of words longer than the window, recited
    fwe      RULER's frequent words
    pairs    a dense stream of key and value, the shortest form of recall
    lm       plain novels
Questions that ask for several things (`number`, `kv`) and `song` have answers that run over more than one window, while
everything they need is known when the answer begins.

Keys, values, variables, names and books of the test split never occur in the train split (see `Lexicon.is_test`).
Rows are assembled from token ids; every piece starts at a pre-token boundary, so a row equals its tokenised text
except where a passage of a novel is cut at its end.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from tokenizers import Tokenizer

from .corpus import Corpus, Split
from .tokenizer import BOS_ID, EOS_ID, load_tokenizer

Ids = list[int]
Style = Literal["ruler", "short", "line"]
FIRST, REST, FRAME = 2.0, 1.0, 0.3
"""Loss weights: the first token of a value (it decides), its other tokens, and commas, spaces and the end."""
TEST_SHARE = 8
"""One of so many keys, values, variables and names belongs to the test split."""
MAX_CHOICES = 8
"""Most tokens that may be right at one answer position (values of a key come in any order)."""
GAPS = ("",) * 7 + (":", ":", ": ", ": ", " =", " = ", " is: ", " is ", " has the number ")
"""What may stand between key and value of `kv`; nothing in about half of all lines."""
ATTRIBUTES = ("drink", "song", "book", "colour", "game", "flower", "dish", "street", "animal", "city", "tree", "fruit")
_ONSETS = ("B", "D", "F", "G", "H", "K", "L", "M", "N", "P", "R", "S", "T", "V", "Z")
_MIDDLES = ("ala", "ema", "iro", "ona", "uri", "ada", "eli", "oma", "ina", "aro", "esa", "ulo")
_ENDS = ("", "n", "s", "ra", "th", "ko", "mi", "del")


class Lexicon:
    """Token ids of words, numbers and fixed phrases, and the split of everything that is drawn."""

    def __init__(self, tokenizer: Tokenizer, words: Sequence[str]) -> None:
        if len(words) < 50:
            raise ValueError(f"at least 50 words are needed, got {len(words)}")
        self.tokenizer = tokenizer
        self.words = [self.text(" " + word)[0] for word in words]
        self.letters = [x for x in "ABCDEFGHKLMNPRSTVW" if len(self.text(" " + x)) == 1]
        self.space = self.text(" ")[0]
        self.comma = self.text(",")[0]

    @classmethod
    def load(cls, folder: str | Path) -> Lexicon:
        """Read `tokenizer.json` and `words.txt`."""
        words = (Path(folder) / "words.txt").read_text().split()
        return cls(load_tokenizer(folder), words)

    @lru_cache(maxsize=100_000)  # noqa: B019 - one lexicon lives as long as its process
    def _text(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def text(self, text: str) -> Ids:
        return list(self._text(text))

    @cached_property
    def digits(self) -> dict[str, int]:
        groups = (f"{v:0{width}d}" for width in (1, 2, 3) for v in range(10**width))
        return {group: self.text(group)[0] for group in groups}

    def number(self, value: str) -> Ids:
        """Ids of a string of digits: groups of three from the left."""
        return [self.digits[value[i : i + 3]] for i in range(0, len(value), 3)]

    @staticmethod
    def is_test(*parts: int) -> bool:
        """True when the thing that these integers name belongs to the test split."""
        mixed = 0
        for part in parts:
            mixed = (mixed * 1_000_003 + part + 1) * 2_654_435_761 % 2**32
        return (mixed >> 12) % TEST_SHARE == 0


@dataclass(slots=True)
class Question:
    family: str
    prompt: Ids
    answer: Ids
    weights: list[float]
    """Loss weight of every answer token."""
    also: dict[int, Ids] = field(default_factory=dict)
    """Answer position -> other token ids that are right there."""
    statements: tuple[int, ...] = ()
    """Serial numbers of the evidence statements while the row is being drawn."""

    @property
    def size(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(slots=True)
class Answer:
    """Where a question's answer lies in a row: tokens start..start+len-1 are predicted from the positions before."""

    family: str
    start: int
    weights: list[float]
    also: dict[int, Ids]
    prompt_start: int
    evidence: list[tuple[int, int]]
    """Token spans [first, last) of the statements that the answer needs."""

    @property
    def stop(self) -> int:
        return self.start + len(self.weights)


@dataclass(slots=True)
class Row:
    ids: np.ndarray
    answers: list[Answer]
    prose: np.ndarray
    """True where a token continues a passage of a novel (language-modelling target)."""


@dataclass(slots=True)
class Draw:
    """What has been drawn for one row so far; statements are in chains whose order in the document is kept."""

    random: random.Random
    lexicon: Lexicon
    split: Split
    hyphen: bool = False
    seconds: Sequence[int] = ()
    """Where given, the second words of keys come from these few, so that the first word matters."""
    chains: list[list[int]] = field(default_factory=list)
    statements: list[Ids] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    listable: list[tuple[str, Ids, Ids, int]] = field(default_factory=list)
    """(family, key, value, statement) of facts that may be asked for several at once."""
    taken: set[tuple[int, ...]] = field(default_factory=set)

    def state(self, *chain: Ids) -> tuple[int, ...]:
        """Add statements that must keep their order; returns their serial numbers."""
        serials = tuple(range(len(self.statements), len(self.statements) + len(chain)))
        self.statements += chain
        self.chains.append(list(serials))
        return serials

    def fresh(self, kind: int, draw: Callable[[], tuple[int, ...]], limit: int = 1000) -> tuple[int, ...]:
        """Draw until the thing belongs to this row's split and is new in the row."""
        for _ in range(limit):
            name = draw()
            if Lexicon.is_test(kind, *name) == (self.split == "test") and (kind, *name) not in self.taken:
                self.taken.add((kind, *name))
                return name
        raise ValueError(f"no fresh draw of kind {kind} in {limit} tries: the row asks for too many")

    def key(self) -> Ids:
        """Two words; in a row with hyphens the second is written without its space."""
        words = self.lexicon.words
        pair = self.fresh(0, lambda: (self.random.choice(words), self.random.choice(self.seconds or words)))
        if not self.hyphen:
            return list(pair)
        second = self.lexicon.tokenizer.decode([pair[1]]).strip()
        return [pair[0], *self.lexicon.text("-"), *self.lexicon.text(second)]

    def pair_value(self) -> Ids:
        words = self.lexicon.words
        return list(self.fresh(1, lambda: (self.random.choice(words), self.random.choice(words))))

    def number(self, digits: int) -> Ids:
        low, high = 10 ** (digits - 1), 10**digits
        (value,) = self.fresh(2, lambda: (self.random.randrange(low, high),))
        return self.lexicon.number(str(value))

    def variable(self) -> Ids:
        letters = self.lexicon.letters
        letter, number = self.fresh(3, lambda: (self.random.randrange(len(letters)), self.random.randrange(100, 1000)))
        return [*self.lexicon.text(" " + letters[letter]), self.lexicon.digits[str(number)]]

    def name(self) -> str:
        sizes = (len(_ONSETS), len(_MIDDLES), len(_ENDS))
        a, b, c = self.fresh(4, lambda: tuple(self.random.randrange(n) for n in sizes))
        return _ONSETS[a] + _MIDDLES[b] + _ENDS[c]

    def words(self, *parts: str | Ids) -> Ids:
        """Concatenate texts and token ids."""
        ids: Ids = []
        for part in parts:
            ids += self.lexicon.text(part) if isinstance(part, str) else part
        return ids


def _value_weights(value: Ids) -> list[float]:
    return [FIRST] + [REST] * (len(value) - 1)


def _answer(family: str, prompt: Ids, frame: Ids, value: Ids, statements: Iterable[int]) -> Question:
    """A question with one value: frame tokens, the value, the end."""
    answer = [*frame, *value, EOS_ID]
    weights = [FRAME] * len(frame) + _value_weights(value) + [FRAME]
    return Question(family, prompt, answer, weights, statements=tuple(statements))


def _any_order(draw: Draw, family: str, prompt: Ids, values: list[Ids], statements: Iterable[int]) -> Question:
    """A question with several values in any order: at each first token all values still missing are right."""
    values = draw.random.sample(values, len(values))
    answer: Ids = []
    weights: list[float] = []
    also: dict[int, Ids] = {}
    for index, value in enumerate(values):
        lead = ([draw.lexicon.comma] if index else []) + [draw.lexicon.space]
        answer += lead
        weights += [FRAME] * len(lead)
        also[len(answer)] = [other[0] for other in values[index + 1 :] if other[0] != value[0]][: MAX_CHOICES - 1]
        answer += value
        weights += _value_weights(value)
    return Question(family, prompt, [*answer, EOS_ID], [*weights, FRAME], also, statements=tuple(statements))


def number(draw: Draw, num_values: int | None = None, *, style: Style | None = None) -> None:
    """RULER's needle; four values now and then. The style of a question about one value is drawn unless given."""
    key = draw.key()
    if num_values is None:
        num_values = 4 if draw.random.random() < 0.25 else 1
    values = [draw.number(7) for _ in range(num_values)]
    serials = [
        draw.state(draw.words(" One of the special magic numbers for", key, " is: ", value, "."))[0] for value in values
    ]
    if num_values == 1:
        style = style or draw.random.choice(("ruler", "short", "line"))
        if style == "ruler":
            prompt = draw.words(
                "\nWhat is the special magic number for", key, " mentioned in the provided text?",
                " The special magic number for", key, " mentioned in the provided text is",
            )  # fmt: skip
        elif style == "short":
            prompt = draw.words("\nQuestion: What is the special magic number for", key, "?\nAnswer:")
        else:
            prompt = draw.words("\nThe special magic number for", key, " is:")
        draw.questions.append(_answer("number", prompt, [draw.lexicon.space], values[0], serials))
        draw.listable.append(("number", key, values[0], serials[0]))
    else:
        prompt = draw.words(
            "\nWhat are all the special magic numbers for", key, " mentioned in the provided text?",
            " The special magic numbers for", key, " mentioned in the provided text are",
        )  # fmt: skip
        draw.questions.append(_any_order(draw, "multivalue", prompt, values, serials))


def kv(draw: Draw, gap: str | None = None) -> None:
    """A line of key and value, with more or less between the two: a gap that is drawn unless given.

    Recall is learned where the value follows its key at once, and from there over ever longer gaps: without the short
    ones the first token of a value is not learned at all.
    """
    key, value, rng = draw.key(), draw.number(6), draw.random
    gap = rng.choice(GAPS) if gap is None else gap
    (serial,) = draw.state(draw.words("\n", key, gap, value))
    if rng.random() < 0.75:
        asked = gap if rng.random() < 0.7 else rng.choice(GAPS)
        frame = draw.words(asked)
        answer, weights = frame + value, [FRAME] * len(frame) + _value_weights(value)
        question = Question("kv", draw.words("\n", key), answer, weights, statements=(serial,))
    else:
        prompt = draw.words("\nQuestion:", key, "?\nAnswer:")
        question = _answer("kv", prompt, [draw.lexicon.space], value, (serial,))
    draw.questions.append(question)
    draw.listable.append(("kv", key, value, serial))


def several(draw: Draw, count: int, family: str | None = None) -> bool:
    """Ask for `count` facts of one family (drawn unless given) at once, answered with their keys, as asked."""
    family = family or draw.random.choice(draw.listable)[0]
    pool = [item for item in draw.listable if item[0] == family]
    if len(pool) < 2:
        return False
    asked = draw.random.sample(pool, min(count, len(pool)))
    listed: Ids = []
    for index, (_, key, _, _) in enumerate(asked):
        listed += ([] if not index else [draw.lexicon.comma]) + key
    if family == "number":
        prompt = draw.words(
            "\nWhat are all the special magic numbers for", listed, " mentioned in the provided text?",
            " The special magic numbers mentioned in the provided text are",
        )  # fmt: skip
    else:
        prompt = draw.words("\nQuestion:", listed, "?\nAnswer:")
    answer: Ids = []
    weights: list[float] = []
    for index, (_, key, value, _) in enumerate(asked):
        lead = ([draw.lexicon.comma] if index else []) + key
        gap = draw.words(": ")
        answer += lead + gap + value
        weights += [REST] * len(lead) + [FRAME] * len(gap) + _value_weights(value)
    draw.questions.append(
        Question("several", prompt, [*answer, EOS_ID], [*weights, FRAME], statements=tuple(a[3] for a in asked))
    )
    return True


def vt(draw: Draw, hops: int | None = None, *, style: Style | None = None) -> None:
    """A chain: VAR a = number, VAR b = VAR a, ...; asked for all variables that hold the number."""
    hops = draw.random.randint(0, 4) if hops is None else hops
    value, variables = draw.number(5), [draw.variable() for _ in range(hops + 1)]
    chain = [draw.words(" VAR", variables[0], " = ", value, ".")]
    chain += [draw.words(" VAR", new, " = VAR", old, ".") for old, new in pairwise(variables)]
    serials = draw.state(*chain)
    style = style or draw.random.choice(("ruler", "short"))
    if style == "ruler":
        prompt = draw.words(
            "\nQuestion: Find all variables that are assigned the value ", value, " in the text above. Answer:",
            " According to the chain(s) of variable assignment in the text above, ", str(hops + 1),
            " variables are assigned the value ", value, ", they are:",
        )  # fmt: skip
    else:
        prompt = draw.words("\nQuestion: Which variables hold ", value, "?\nAnswer:")
    answer: Ids = []
    weights: list[float] = []
    for index, variable in enumerate(variables):
        answer += ([draw.lexicon.comma] if index else []) + variable
        weights += ([REST] if index else []) + _value_weights(variable)
    draw.questions.append(Question("vt", prompt, [*answer, EOS_ID], [*weights, REST], statements=serials))


def talk(draw: Draw, changes: int | None = None) -> None:
    """Someone's favourite thing; changed once or twice now and then, unless the number of changes is given."""
    name, attribute = draw.name(), draw.random.choice(ATTRIBUTES)
    if changes is None:
        changes = (draw.random.random() < 0.5) + (draw.random.random() < 0.2)
    values = [draw.pair_value() for _ in range(1 + changes)]
    chain = [draw.words(f"\nUser: My name is {name} and my favourite {attribute} is", values[0], ".")]
    for value in values[1:]:
        chain.append(draw.words(f"\nUser: It is {name} again, my favourite {attribute} is now", value, "."))
    serials = draw.state(*chain)
    prompt = draw.words(f"\nQuestion: What is the favourite {attribute} of {name} now?\nAnswer:")
    draw.questions.append(_answer("talk", prompt, [], values[-1], serials[-1:]))


def hop(draw: Draw) -> None:
    """Two statements, one about a place and one about its keeper; the answer names both."""
    key, name, value = draw.key(), draw.name(), draw.number(6)
    first = draw.state(draw.words(" The keeper of", key, f" is {name}."))
    second = draw.state(draw.words(f" The number of {name} is ", value, "."))
    spelled = draw.words(f" {name}")
    prompt = draw.words("\nQuestion: Who is the keeper of", key, " and which number?\nAnswer:")
    gap = draw.words(": ")
    answer = [*spelled, *gap, *value, EOS_ID]
    weights = [*_value_weights(spelled), *[FRAME] * len(gap), *_value_weights(value), FRAME]
    draw.questions.append(Question("hop", prompt, answer, weights, statements=first + second))


def song(draw: Draw, length: int | None = None) -> None:
    """Words in a random order, recited in full."""
    key = draw.key()
    line = [draw.random.choice(draw.lexicon.words) for _ in range(length or draw.random.randint(12, 80))]
    (serial,) = draw.state(draw.words("\nThe song of", key, " goes:", line, "."))
    prompt = draw.words("\nQuestion: Recite the song of", key, ".\nAnswer:")
    draw.questions.append(
        Question("song", prompt, [*line, EOS_ID], [FIRST] + [REST] * (len(line) - 1) + [FRAME], statements=(serial,))
    )


FAMILIES: dict[str, Callable[[Draw], None]] = {
    "number": number, "kv": kv, "vt": vt, "talk": talk, "hop": hop, "song": song,
}  # fmt: skip
NOISE = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def compose(draw: Draw, corpus: Corpus, length: int, asked: Sequence[Question], *, noise: bool = False) -> Row:
    """Scatter the statements over a passage of exactly the length that is left, and append the questions.

    Statements go between sentences. Raises ValueError where facts and questions alone exceed `length`.
    """
    generator = np.random.default_rng(draw.random.getrandbits(64))
    fixed = 1 + sum(map(len, draw.statements)) + sum(question.size for question in asked)
    if (gap := length - fixed) < 0:
        raise ValueError(f"facts and questions take {fixed} tokens, the row has {length}")
    prose, starts = corpus.passage(generator, gap) if gap else (np.zeros(0, np.uint16), np.zeros(0, np.int64))
    if noise:
        cycle = np.array(draw.lexicon.text(NOISE), dtype=np.uint16)
        prose, starts = np.resize(cycle, gap), np.arange(0, gap, len(cycle))
    if len(starts) < 4:  # short rows: between any two tokens
        starts = np.arange(0, gap + 1)
    keys = np.empty(len(draw.statements))
    for chain in draw.chains:
        keys[chain] = np.sort(generator.random(len(chain)))
    order = np.argsort(keys)
    places = np.sort(generator.choice(starts, size=len(order)))
    pieces: list[np.ndarray] = [np.array([BOS_ID], dtype=np.uint16)]
    kept: list[np.ndarray] = [np.zeros(1, dtype=bool)]
    spans: dict[int, tuple[int, int]] = {}
    at, done = 1, 0
    for serial, place in zip(order.tolist(), places.tolist(), strict=True):
        if place > done:
            pieces.append(prose[done:place])
            kept.append(_continues(place - done, noise))
            at, done = at + place - done, place
        statement = np.array(draw.statements[serial], dtype=np.uint16)
        spans[serial] = (at, at + len(statement))
        pieces.append(statement)
        kept.append(np.zeros(len(statement), dtype=bool))
        at += len(statement)
    pieces.append(prose[done:])
    kept.append(_continues(gap - done, noise))
    at += gap - done
    answers: list[Answer] = []
    for question in asked:
        start = at + len(question.prompt)
        evidence = [spans[serial] for serial in question.statements]
        answers.append(Answer(question.family, start, question.weights, question.also, at, evidence))
        pieces.append(np.array(question.prompt + question.answer, dtype=np.uint16))
        kept.append(np.zeros(question.size, dtype=bool))
        at += question.size
    ids = np.concatenate(pieces)
    assert len(ids) == length == at, (len(ids), length, at)
    return Row(ids, answers, np.concatenate(kept))


def _continues(count: int, noise: bool) -> np.ndarray:
    mask = np.full(count, not noise)
    mask[:1] = False  # the first token after a cut cannot be known
    return mask


def recall_row(
    rng: random.Random,
    lexicon: Lexicon,
    corpus: Corpus,
    split: Split,
    length: int,
    families: Sequence[str],
    *,
    facts_share: float,
    questions_share: float,
    several_share: float = 0.12,
) -> Row:
    """A row of about the given shares of fact and question tokens; the rest is prose."""
    seconds = rng.sample(lexicon.words, min(max(6, length // 512), len(lexicon.words))) if rng.random() < 0.4 else ()
    draw = Draw(rng, lexicon, split, hyphen=rng.random() < 0.2, seconds=seconds)
    room = int(length * facts_share)
    used, song_room = 0, max(8, min(80, room // 4))
    while used < room or not draw.questions:
        before = len(draw.statements)
        family = rng.choice(families)
        if family == "song":
            song(draw, rng.randint(6, song_room))
        elif family == "number" and length < 512:
            number(draw, 1 if rng.random() < 0.9 else rng.randint(2, 3))
        else:
            FAMILIES[family](draw)
        added = sum(map(len, draw.statements[before:]))
        used += added
        if used + added + 90 > length:
            break
    asked: list[Question] = []
    left = min(int(length * questions_share), length - 1 - used)
    pool = rng.sample(draw.questions, len(draw.questions))
    while pool and left > 0:
        question = pool.pop()
        if draw.listable and rng.random() < several_share and several(draw, rng.randint(2, 4 if length < 1024 else 16)):
            question = draw.questions.pop()
        if question.size <= left:
            asked.append(question)
            left -= question.size
    return compose(draw, corpus, length, asked, noise=rng.random() < 0.08)


def pairs_row(rng: random.Random, lexicon: Lexicon, split: Split, length: int, num_keys: int) -> Row:
    """A stream `key123 other456 key123 ...`: every key that returns must bring its value."""
    draw = Draw(rng, lexicon, split)
    keys = rng.sample(lexicon.words, min(num_keys, len(lexicon.words)))
    values = {key: lexicon.digits[f"{rng.randrange(1000):03d}"] for key in keys}
    stream = [rng.choice(keys) for _ in range((length - 1) // 2)]
    ids: Ids = [BOS_ID]
    answers: list[Answer] = []
    seen: set[int] = set()
    for key in stream:
        ids += [key, values[key]]
        if key in seen:
            answers.append(Answer("pairs", len(ids) - 1, [REST], {}, len(ids) - 2, []))
        seen.add(key)
    ids += draw.lexicon.text(" ") * (length - len(ids))
    return Row(np.array(ids, dtype=np.uint16), answers, np.zeros(length, dtype=bool))


def frequent_words_row(rng: random.Random, lexicon: Lexicon, split: Split, length: int) -> Row:
    """RULER's frequent words: counts fall as rank to the power of -2; the three most frequent, in any order."""
    draw = Draw(rng, lexicon, split)
    prompt = draw.words(
        "\nQuestion: What are the three most frequently appeared words in the above coded text?",
        " Answer: According to the coded text above, the three most frequently appeared words are:",
    )
    vocabulary = rng.sample(lexicon.words, rng.randint(20, 60))
    room = length - 1 - len(prompt) - 4
    weights = [1.0 / rank**2 for rank in range(1, len(vocabulary) + 1)]
    text = rng.choices(vocabulary, weights, k=room)
    counts = dict.fromkeys(vocabulary, 0)
    for word in text:
        counts[word] += 1
    top = sorted(vocabulary, key=lambda word: -counts[word])[:3]
    rng.shuffle(top)
    also = {index: top[index + 1 :] for index in range(3)}
    answer = Answer("fwe", length - 4, [FIRST, FIRST, FIRST, FRAME], also, length - 4 - len(prompt), [])
    ids = np.array([BOS_ID, *text, *prompt, *top, EOS_ID], dtype=np.uint16)
    return Row(ids, [answer], np.zeros(length, dtype=bool))


def prose_row(rng: random.Random, corpus: Corpus, length: int) -> Row:
    """A passage of a novel."""
    text, _ = corpus.passage(np.random.default_rng(rng.getrandbits(64)), length - 1)
    prose = np.ones(length, dtype=bool)
    prose[0] = False
    return Row(np.concatenate([np.array([BOS_ID], dtype=np.uint16), text]), [], prose)


__all__ = [
    "FAMILIES",
    "MAX_CHOICES",
    "Answer",
    "Draw",
    "Lexicon",
    "Question",
    "Row",
    "compose",
    "frequent_words_row",
    "hop",
    "kv",
    "number",
    "pairs_row",
    "prose_row",
    "recall_row",
    "several",
    "song",
    "talk",
    "vt",
]
