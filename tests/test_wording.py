"""Plain English: no words and phrases that only a translation would use, in the pages and in the code."""

import re

import pytest

from helpers import ROOT

pytestmark = pytest.mark.quick

WORDS = {  # a pattern, and what to write instead
    r"whoever|who does\b": "name the person, process or worker",
    r"nobody|no-one|somebody": "name the person, process or worker, or use the passive",
    r"meanwhile|meantime": "while ..., at the same time",
    r"so many\b": "a number of, that number",
    r"as long again": "twice as long",
    r"of (its|their|his|one's) own\b": "its own ..., a separate ...",
    r"of a kind\b": "of one kind, similar",
    r"but for\b": "except for",
    r"stands? (for|before|after|behind|in)\b": "means, follows, precedes, is in",
    r"lies? (in|on|at|with|there|behind)\b": "is",
    r"tells?\b|told\b": "reports, says, names",
    r"mend(s|ed)?\b": "fix",
    r"go(es)? on\b|went on\b|going on\b": "continue",
    r"come true|comes true": "happen",
    r"in the place of": "instead of",
    r"on the way\b": "during the training",
    r"without a word": "without a message",
    r"all that (is|has|was|a|the|training)\b": "everything that",
    r"what (is|was) (there|left|missing|changed)\b": "name it: the files, the rest, the missing part",
    r"is told|are told": "receives, learns",
    r"at the moment of": "when",
    r"anew\b": "again",
    r"thereby|therein|thereof|hereby": "name the thing",
    r"leaves? nothing to wish": "is complete",
    r"made beforehand|beforehand": "in advance",
    r"the same bits again": "bit-identical",
}
PATTERN = re.compile(
    "|".join(rf"(?P<p{index}>\b(?:{word}))" for index, word in enumerate(WORDS)), re.IGNORECASE
)
FOLDERS = ("common", "pytorch", "tensorflow", "mxnet", "xgboost", "examples", "launch", "spot", "verify")
FILES = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/*.md"),
    *ROOT.glob("benchmarks/results/*.md"),
    ROOT / "Makefile",
    *(path for name in (*FOLDERS, "benchmarks", "tests") for path in ROOT.glob(f"{name}/*.py")),
    *ROOT.glob("examples/*/train.py"),
    *ROOT.glob("examples/*.md"),
]


def test_the_text_is_plain_english():
    found = []
    for path in sorted(FILES):
        if path.name == "test_wording.py":
            continue
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            for match in PATTERN.finditer(line):
                better = list(WORDS.values())[int(match.lastgroup[1:])]
                found.append(f"{path.relative_to(ROOT)}:{number}: {match[0]!r}; better: {better}")
    assert not found, f"{len(found)} phrases:\n" + "\n".join(found)
