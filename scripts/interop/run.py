"""Loads the adapter of a run in PEFT and compares: run by hand, after `dpo-lora run RECIPE --out RUN`.

    python scripts/interop/run.py RUN PAIRS.jsonl

PAIRS.jsonl is the run's held-out file, rows of prompt, chosen and rejected as strings. Needs the packages of
scripts/interop/requirements.txt. Shown to be equal:

* the tensors that PEFT holds after loading and those in the file, name by name and bit for bit;
* the file that PEFT saves again and the one it loaded;
* the mean log-probs of chosen and rejected, by transformers and PEFT in f32, and those of RUN/summary.json.
"""

import json
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def same_tensors(found, expected):
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@torch.no_grad()
def logp(model, tokenizer, prompt, completion):
    """As TRL has it: prompt and text tokenised together, an end of text after it, summed over what is not prompt."""
    ids = tokenizer(prompt + completion).input_ids + [tokenizer.eos_token_id]
    shared = tokenizer(prompt).input_ids
    start = next((i for i, (a, b) in enumerate(zip(shared, ids)) if a != b), len(shared))
    logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logps[i - 1, ids[i]].item() for i in range(start, len(ids)))


def main():
    run, pairs = Path(sys.argv[1]), Path(sys.argv[2])
    summary = json.loads((run / "summary.json").read_text())
    with warnings.catch_warnings():
        # PEFT warns of adapter keys that are missing in the file, and goes on
        warnings.simplefilter("error", UserWarning)
        base = AutoModelForCausalLM.from_pretrained(summary["model"], dtype=torch.float32)
        model = PeftModel.from_pretrained(base, run / "adapter").eval()
    stored = load_file(run / "adapter" / "adapter_model.safetensors")
    same_tensors(get_peft_model_state_dict(model), stored)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        same_tensors(load_file(Path(folder) / "adapter_model.safetensors"), stored)
    print(f"{len(stored)} tensors: the same in PEFT, and as PEFT saves them again")

    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    for side in ("chosen", "rejected"):
        found = sum(logp(model, tokenizer, row["prompt"], row[side]) for row in rows) / len(rows)
        expected = summary["after"][f"logps/{side}"]
        print(f"logps/{side}: {found:.6f} in PEFT, {expected:.6f} in summary.json")
        # both are f32: a few units in the seventh digit
        assert abs(found - expected) < 1e-5 * abs(expected), "they differ"


if __name__ == "__main__":
    main()
