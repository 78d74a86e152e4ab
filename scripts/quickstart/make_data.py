#!/usr/bin/env python3
"""Writes the quickstart's preference data, recipes/quickstart/{train,eval}.parquet, from the subject files.

    python scripts/quickstart/make_data.py [--out DIR]

A row asks one question about one subject. `chosen` answers in plain speech and `rejected` in jargon, with the same
aspects in the same order, so that neither length nor contents tells the two apart. No subject is in both files.
"""

import argparse
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from corpus import QUESTIONS, RECIPE_DIR, Subject, load_subjects, split

SEED = 7
# Questions a subject, drawn without repetition from those that begin with each aspect, so that all kinds occur.
TRAIN_QUESTIONS, EVAL_QUESTIONS = 4, 3

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
SCHEMA = pa.schema(
    [("prompt", MESSAGES), ("chosen", MESSAGES), ("rejected", MESSAGES), ("subject", pa.string()), ("domain", pa.string())]
)


def rows(subjects: list[Subject], questions: int, rng: random.Random) -> list[dict]:
    """Preference rows in a shuffled order, so that a reader who does not shuffle meets no long run of one domain."""
    found = []
    for subject in subjects:
        for form, aspects in draw(questions, rng):
            found.append(
                {
                    "prompt": [{"role": "user", "content": subject.question(form)}],
                    "chosen": [{"role": "assistant", "content": subject.answer("plain", aspects)}],
                    "rejected": [{"role": "assistant", "content": subject.answer("jargon", aspects)}],
                    "subject": subject.name,
                    "domain": subject.domain,
                }
            )
    rng.shuffle(found)
    return found


def draw(count: int, rng: random.Random) -> list[tuple[str, tuple[str, ...]]]:
    """`count` different questions: one that begins with each aspect, the rest from all."""
    chosen = [rng.choice([q for q in QUESTIONS if q[1][0] == aspect]) for aspect in ("what", "how", "why")]
    rest = [q for q in QUESTIONS if q not in chosen]
    return chosen[:count] + rng.sample(rest, max(count - len(chosen), 0))


def write(path: Path, rows: list[dict]) -> None:
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    pq.write_table(table, path, compression="zstd", compression_level=19)
    print(f"{path}: {len(rows)} pairs, {path.stat().st_size} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RECIPE_DIR)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    train, held_out = split(load_subjects())
    write(out / "train.parquet", rows(train, TRAIN_QUESTIONS, random.Random(f"{SEED} train")))
    write(out / "eval.parquet", rows(held_out, EVAL_QUESTIONS, random.Random(f"{SEED} eval")))


if __name__ == "__main__":
    main()
