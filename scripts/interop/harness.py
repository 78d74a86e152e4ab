"""Has lm-evaluation-harness measure base and policy through `dpo-lora serve` and by itself, and compares: run by hand.

    python scripts/interop/harness.py FOLDER --model DIR --adapter DIR [--model DIR --adapter DIR ...]

FOLDER is made, and gets the harness's files. The task is harness/facts.yaml, of this project. Each model is asked through
`--model local-completions` and loaded by `--model hf`, with PEFT for the policy; the log-likelihoods of every answer to
every question are compared, and whether it is what the model would have said. Both begin texts with a BOS, and then the base
is measured once more with the server's own tokenizer, through which the harness cannot ask for a BOS.

Needs the packages of requirements-serve.txt beside this script, and no network. docs/interop.md has what was seen.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from openai_client import served

TASKS = Path(__file__).resolve().parent / "harness"


def measure(folder, model, arguments, batch):
    """Accuracy, the answers' (log-likelihood, greedy) in order, and seconds."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HOME": str(folder / "hf"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, "-m", "lm_eval", "--model", model, "--model_args", arguments, "--tasks", "facts",
               "--include_path", ".", "--device", "cpu", "--batch_size", str(batch), "--log_samples", "--output_path", str(folder)]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=TASKS, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        sys.exit(done.stdout[-2000:] + done.stderr[-4000:])
    (results,) = folder.rglob("results_*.json")
    (samples,) = folder.rglob("samples_facts_*.jsonl")
    accuracy = json.loads(results.read_text())["results"]["facts"]["acc,none"]
    rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    return accuracy, [(float(logp), str(greedy)) for row in rows for logp, greedy in row["filtered_resps"]], seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path, action="append", required=True)
    parser.add_argument("--adapter", type=Path, action="append", required=True)
    parser.add_argument("--batch", type=int, default=16)
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    print(", ".join(f"{name} {version(name)}" for name in ("lm_eval", "transformers", "peft", "torch")))
    worst = 0.0
    for model, adapter in zip(arguments.model, arguments.adapter, strict=True):
        model, adapter = model.resolve(), adapter.resolve()
        remote, local = "tokenizer_backend=remote", f"tokenizer_backend=huggingface,tokenizer={model},add_bos_token=True"
        kinds = [("base", "", True, local), ("policy", f",peft={adapter}", True, local), ("base", "", False, remote)]
        with served(adapter, "--base", model, "--name", "policy", "--base-name", "base") as address:
            for name, peft, bos, tokenizer in kinds:
                at = folder / model.name / f"{name}-{tokenizer.split(',')[0]}"
                url = f"{address}/v1/completions"
                asked = f"model={name},base_url={url},max_length=512,{tokenizer}"
                ours = measure(at / "serve", "local-completions", asked, arguments.batch)
                loaded = f"pretrained={model},dtype=float32,add_bos_token={bos}{peft}"
                theirs = measure(at / "hf", "hf", loaded, arguments.batch)
                difference = max(abs(a - b) for (a, _), (b, _) in zip(ours[1], theirs[1], strict=True))
                greedy = sum(a != b for (_, a), (_, b) in zip(ours[1], theirs[1]))
                worst = max(worst, difference)
                print(f"{model.name} {name}, {'with' if bos else 'no'} BOS: acc {ours[0]:.4f} (hf {theirs[0]:.4f}), "
                      f"{len(ours[1])} answers, largest difference {difference:.1e}, {greedy} of another greediness; "
                      f"{ours[2]:.1f} s (hf {theirs[2]:.1f} s)", flush=True)
                assert ours[0] == theirs[0] and greedy == 0
    # sums of f32 log-probs over answers of up to ten tokens
    assert worst < 1e-4, worst


if __name__ == "__main__":
    main()
