#!/usr/bin/env python3
"""Seconds an update over the length of sequences and over the number of rows: dpo-lora alone, rows of exact length.

    python scripts/bench/scaling.py INPUTS

INPUTS is a folder of make_inputs.py, of which the model and the adapter are used.
"""

import argparse
import json
import os
import random
import subprocess
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

BINARY = Path(__file__).resolve().parent.parent.parent / "target" / "release" / "dpo-lora"
UPDATES = 4
BATCH = 8


def rows(tokenizer, count: int, length: int, seed: int) -> list[dict]:
    """Pairs of `length` tokens a side, a fifth of them the prompt's, of words that are one token each."""
    words = [w for w in ("time", "way", "day", "man", "thing", "life", "world", "hand", "part", "place", "case", "week")
             if len(tokenizer(" " + w, add_special_tokens=False)["input_ids"]) == 1]
    generator = random.Random(seed)
    prompt = length // 5

    def text(tokens: int) -> str:
        return "".join(" " + generator.choice(words) for _ in range(tokens))

    return [
        {"prompt": text(prompt - 1), "chosen": text(length - prompt - 1), "rejected": text(length - prompt - 1)} for _ in range(count)
    ]


def measure(inputs: Path, tokenizer, count: int, length: int) -> dict:
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(tokenizer, count, length, count + length)))
        values = {"data.train": str(place / "rows.jsonl"), "data.max_length": 2 * length, "train.steps": UPDATES,
                  "run.out": str(place / "run"), "run.checkpoint_every": 1000}
        sets = [part for key, value in values.items() for part in ("--set", f"{key}={json.dumps(value)}")]
        recipe = (inputs / "recipe.toml").read_text().replace("epochs        = 1\n", "").replace('"model"', f'"{inputs.resolve()}/model"')
        (place / "recipe.toml").write_text(recipe.replace('"adapter"', f'"{inputs.resolve()}/adapter"'))
        env = {**os.environ, "DPO_LORA_CACHE": str(place / "cache"), "RAYON_NUM_THREADS": "2"}
        command = [BINARY, "run", place / "recipe.toml", "--json", "--quiet", *sets]
        summary = json.loads(subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE).stdout)
        lines = [json.loads(line) for line in (place / "run/metrics.jsonl").read_text().splitlines()]
    tokens = lines[-1]["num_tokens"] - lines[0]["num_tokens"]
    seconds = [(b["num_tokens"] - a["num_tokens"]) / b["tokens_per_sec"] for a, b in zip(lines, lines[1:])]
    return {"seconds": sum(seconds) / len(seconds), "tokens": tokens / len(seconds), "memory": summary["peak_memory_bytes"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", type=Path)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.inputs / "model")
    print("| rows of data | tokens a sequence | tokens an update | seconds an update | tokens/s | peak memory |")
    print("|---|---|---|---|---|---|")
    shapes = [(count, 256) for count in (1000, 4000, 16000)] + [(64, length) for length in (256, 512, 1024, 2048, 4096)]
    for count, length in shapes:
        run = measure(args.inputs, tokenizer, count, length)
        print(
            f"| {count} | {length} | {run['tokens']:.0f} | {run['seconds']:.2f} | {run['tokens'] / run['seconds']:.0f} |"
            f" {run['memory'] / 2**30:.2f} GiB |",
            flush=True,
        )


if __name__ == "__main__":
    main()
