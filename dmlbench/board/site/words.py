"""What the words of the site mean, two sentences each, for who meets them first.

What a kind of protocol, a number, a flag, a status or an attack means stands in its own record; here are the words that are
of none of them.
"""

from dataclasses import dataclass
from functools import cache

from dmlbench.attacks import ATTACKS
from dmlbench.board.row import PARTS, STATUSES
from dmlbench.doubts.audit import FLAGS
from dmlbench.kinds.page import text
from dmlbench.kinds.table import KINDS, numbers
from dmlbench.metrics import CLEAN_METRICS, READOUTS
from dmlbench.protocols import load_protocol, protocol_names


@dataclass(frozen=True)
class Word:
    """A term and its meaning; terms of one ``group`` are listed together."""

    title: str
    meaning: str
    group: str


def _begun(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


SCORES, PARTS_OF_ERS, STATUS, FLAG = "Scores", "Parts of ERS", "Status", "Flags"
_TERMS = {
    "recall_at_1": Word(
        CLEAN_METRICS["recall_at_1"].title,
        "Recall at 1: the share of queries, in percent, whose nearest image in the gallery is of their class. Where a wrong image "
        "is as near as the nearest right one, the query counts as missed.",
        SCORES,
    ),
    "eps": Word(
        "eps",
        "The most that an attack may change each pixel, on the scale from 0 (black) to 1 (white); under the norm l2 it is the "
        "length of the change of the whole image. It is applied to the image as the network gets it, after resizing and cropping "
        "and before mean and standard deviation are taken out.",
        SCORES,
    ),
    "claimed_ers": Word(
        "Claimed",
        "What a paper or a README states of its model, measured by its authors. A measured number comes from a run of this "
        "benchmark whose files are here, and the two are never mixed: a claim has no rank and no interval.",
        SCORES,
    ),
    "claim_gap": Word(
        "Gap",
        "Measured minus claimed ERS of one model under one protocol. Below zero the claim was too high.",
        SCORES,
    ),
    "interval": Word(
        "Interval",
        "The two small numbers beside a score are the ends of its 95 % interval, with classes as the unit. Made in "
        "this way, they hold the score over all classes of that sort about 95 times in 100.",
        SCORES,
    ),
    "rank": Word(
        "Rank",
        "The place by the number alone, among the rows of one protocol and the same images. Claimed, disputed, stale and "
        "retracted rows have none.",
        SCORES,
    ),
    "better_than": Word(
        "Surely better than",
        "How many other ranked rows this one is better than beyond doubt. Every two are compared on the same queries, and all "
        "such statements of a board hold together at 95 % (Holm's rule); a dash says that this cannot be told.",
        SCORES,
    ),
    "worst_part": Word(
        "Weakest part",
        "The part of the score that is lowest for this model. Where it is the same for every model, the table leaves it out.",
        SCORES,
    ),
    "flags": Word(
        "Flags",
        "A flag is a doubt that a check has raised about one result, such as gradients that lead nowhere. It changes no rank: "
        "read what it says before you trust the number.",
        SCORES,
    ),
    "status": Word(
        "Status",
        "What stands behind a row. " + " ".join(f"{_begun(name)}: {standing}." for name, standing in STATUSES.items()),
        SCORES,
    ),
}


@cache
def words() -> dict[str, Word]:
    """Every word by its anchor: a column of the board, ``kind-`` and a kind, ``flag-`` and a flag, ``status-`` and a status."""
    terms = {"ers": Word("ERS", KINDS["ers"].meaning, SCORES), **_TERMS}
    terms |= {name: Word(n.title, n.meaning, SCORES) for name, n in numbers().items() if n.meaning}
    terms |= {f"kind-{name}": Word(name, k.meaning, "Kinds of protocol") for name, k in KINDS.items() if k.meaning}
    for column, meaning in _parts().items():
        title = next(name for name, begin in PARTS.items() if begin == column)
        terms[f"part-{column}"] = Word(title, meaning, PARTS_OF_ERS)
    terms |= {f"status-{name}": Word(name, f"{_begun(standing)}.", STATUS) for name, standing in STATUSES.items()}
    return terms | {f"flag-{flag}": Word(flag, meaning, FLAG) for flag, meaning in FLAGS.items()}


def word_of(column: str) -> str:
    """The anchor of the word that explains a column, "" where none does: of a part's raw value and score it is the part's."""
    known = words()
    part = f"part-{column.removesuffix('_raw').removesuffix('_score')}"
    return column if column in known else part if part in known else ""


def _parts() -> dict[str, str]:
    """By the beginning of its columns, what each part of ERS does and how it is scored."""
    meanings: dict[str, str] = {}
    for protocol in protocol_names():
        for c in load_protocol(protocol).components:
            column = PARTS.get(c.name)
            if column and column not in meanings and c.attack == c.name.partition(":")[0]:
                read = text(READOUTS[c.readout].read)
                ends = f"There, {c.worst:g} is a score of 0, and {c.best:g} is one of 100."
                meanings[column] = f"{_begun(ATTACKS[c.attack].title)}. What is read is {read} {ends}"
    return meanings
