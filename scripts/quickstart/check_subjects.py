#!/usr/bin/env python3
"""Checks the subject files of the quickstart: form, lengths, and that the two registers are really two.

    python3 scripts/quickstart/check_subjects.py [FILE.toml ...]      (Python 3.11, no packages)
"""

import re
import sys
import tomllib
from pathlib import Path

ASPECTS = ("what", "how", "why")
REGISTERS = ("plain", "jargon")
SUBJECTS_A_FILE = 30
# Characters of one sentence. Both registers share the bounds, so that length alone gives no answer away.
SHORTEST, LONGEST = 70, 170
# Plain and jargon of one aspect may differ by this factor in characters.
LENGTH_RATIO = 1.35
# Mean letters a word over a whole explanation (three sentences).
PLAIN_AT_MOST, JARGON_AT_LEAST = 5.0, 6.6


def words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z']+", text)


def mean_letters(sentences: list[str]) -> float:
    found = [word for sentence in sentences for word in words(sentence)]
    return sum(map(len, found)) / len(found)


def check(path: Path) -> tuple[list[str], list[str]]:
    """The file's subject names, and what is wrong with it."""
    try:
        subjects = tomllib.loads(path.read_text(encoding="utf-8")).get("subject", [])
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        return [], [f"{path}: {error}"]
    problems, names = [], []
    if len(subjects) != SUBJECTS_A_FILE:
        problems.append(f"{path}: {len(subjects)} subjects, not {SUBJECTS_A_FILE}")
    for subject in subjects:
        name = subject.get("name", "?")
        names.append(name)
        where = f"{path}: {name!r}"
        if set(subject) - {"plural"} != {"name", *REGISTERS}:
            problems.append(f"{where}: keys are {sorted(subject)}")
            continue
        for register in REGISTERS:
            if set(subject[register]) != set(ASPECTS):
                problems.append(f"{where}: {register} has {sorted(subject[register])}")
                continue
            for aspect in ASPECTS:
                text = subject[register][aspect]
                at = f"{where} {register}.{aspect}"
                if not text.isascii() or "\n" in text or "  " in text or text != text.strip():
                    problems.append(f"{at}: not one clean ASCII line")
                if not text.endswith(".") or re.search(r"[.!?]\s+[A-Z]", text[:-1]) or not text[0].isupper():
                    problems.append(f"{at}: not one sentence that begins upper case and ends in a full stop")
                if not SHORTEST <= len(text) <= LONGEST:
                    problems.append(f"{at}: {len(text)} characters, not {SHORTEST} to {LONGEST}")
        if any(set(subject[register]) != set(ASPECTS) for register in REGISTERS):
            continue
        for aspect in ASPECTS:
            plain, jargon = (len(subject[register][aspect]) for register in REGISTERS)
            if max(plain, jargon) > LENGTH_RATIO * min(plain, jargon):
                problems.append(f"{where} {aspect}: plain has {plain} characters and jargon {jargon}, too unlike")
        plain = mean_letters([subject["plain"][aspect] for aspect in ASPECTS])
        jargon = mean_letters([subject["jargon"][aspect] for aspect in ASPECTS])
        if plain > PLAIN_AT_MOST:
            problems.append(f"{where}: plain words have {plain:.1f} letters on average, over {PLAIN_AT_MOST}")
        if jargon < JARGON_AT_LEAST:
            problems.append(f"{where}: jargon words have {jargon:.1f} letters on average, under {JARGON_AT_LEAST}")
    return names, problems


def main() -> int:
    here = Path(__file__).parent / "subjects"
    paths = [Path(argument) for argument in sys.argv[1:]] or sorted(here.glob("*.toml"))
    seen: dict[str, Path] = {}
    problems = []
    for path in paths:
        names, found = check(path)
        problems += found
        for name in names:
            if name in seen:
                problems.append(f"{path}: {name!r} is in {seen[name]} too")
            seen[name] = path
    print("\n".join(problems) or f"{len(seen)} subjects in {len(paths)} files, all well formed")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
