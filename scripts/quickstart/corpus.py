"""The quickstart's subjects, the questions asked about them, and the answers in both registers."""

import random
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
RECIPE_DIR = HERE.parent.parent / "recipes" / "quickstart"

# One in five subjects of every domain is held out: the preference data never shows it in training.
HELD_OUT_A_DOMAIN = 6
SPLIT_SEED = 2026

# A question, and the aspects that its answer covers, in this order. {is}, {does}, {it} and {s} follow the
# number of the subject, but "What is the idea" and "What is so special" do not.
QUESTIONS = [
    ("What {is} {subject}?", ("what", "how")),
    ("Can you explain what {subject} {is}?", ("what", "how")),
    ("Please describe {subject}.", ("what", "how")),
    ("I keep hearing about {subject}. What {is} {it}?", ("what", "why")),
    ("What do you know about {subject}?", ("what", "why")),
    ("Tell me about {subject}.", ("what", "how", "why")),
    ("What should I know about {subject}?", ("what", "how", "why")),
    ("How {does} {subject} work?", ("how", "what")),
    ("What is the idea behind {subject}?", ("how", "what")),
    ("I wonder how {subject} work{s}.", ("how", "why")),
    ("Could you tell me how {subject} work{s}?", ("how", "why")),
    ("Why {does} {subject} matter?", ("why", "what")),
    ("Why should I care about {subject}?", ("why", "what")),
    ("What makes {subject} interesting?", ("why", "how")),
    ("Why {is} {subject} worth knowing about?", ("why", "how")),
    ("What is so special about {subject}?", ("why", "how")),
]


@dataclass(frozen=True)
class Subject:
    name: str
    domain: str
    plural: bool
    # register -> aspect -> sentence
    text: dict[str, dict[str, str]]

    def question(self, form: str) -> str:
        number = (
            {"is": "are", "does": "do", "it": "they", "s": ""}
            if self.plural
            else {"is": "is", "does": "does", "it": "it", "s": "s"}
        )
        return form.format(subject=self.name, **number)

    def answer(self, register: str, aspects: tuple[str, ...]) -> str:
        return " ".join(self.text[register][aspect] for aspect in aspects)


def load_subjects() -> list[Subject]:
    """All subjects, by domain and then in file order."""
    subjects = []
    for path in sorted((HERE / "subjects").glob("*.toml")):
        for entry in tomllib.loads(path.read_text(encoding="utf-8"))["subject"]:
            text = {register: entry[register] for register in ("plain", "jargon")}
            subjects.append(Subject(entry["name"], path.stem, entry.get("plural", False), text))
    return subjects


def split(subjects: list[Subject]) -> tuple[list[Subject], list[Subject]]:
    """Subjects for training and held-out ones, every domain in both."""
    held_out = set()
    for domain in sorted({subject.domain for subject in subjects}):
        names = sorted(subject.name for subject in subjects if subject.domain == domain)
        held_out |= set(random.Random(f"{SPLIT_SEED} {domain}").sample(names, HELD_OUT_A_DOMAIN))
    return (
        [subject for subject in subjects if subject.name not in held_out],
        [subject for subject in subjects if subject.name in held_out],
    )


def mean_letters(text: str) -> float:
    """Letters a word: plain explanations stay below 5, jargon above 6.6 (check_subjects.py sees to it)."""
    words = re.findall(r"[A-Za-z']+", text)
    return sum(map(len, words)) / max(len(words), 1)


def is_plain(text: str) -> bool:
    return mean_letters(text) < 5.8
