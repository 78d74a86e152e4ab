"""Makes tests/fixtures/serve/stories260k.json: log-probs by transformers and PEFT, which `serve` is held to.

    python scripts/make_serve_fixtures.py DIR

DIR has stories260K and TRL's adapter on it. Needs the packages of scripts/interop/requirements-serve.txt.
"""

import json
import sys
from pathlib import Path

import peft
import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
TEXTS = [
    "Once upon a time, there was a little girl named Lily. She loved to play outside",
    "Once upon a time, there was a little girl named Lily. She went home",
    "Tom and Ben",
    "One day, a cat saw a big red ball!",
]


@torch.no_grad()
def scored(model, ids):
    logps = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    top = logps.topk(3)
    return {
        "logps": [logps[i, id].item() for i, id in enumerate(ids[1:])],
        # of each position, the one after the text too
        "top": [[[int(i), p] for i, p in zip(*row)] for row in zip(top.indices.tolist(), top.values.tolist())],
    }


def main():
    real = Path(sys.argv[1])
    folder = real / "stories260K"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer(text).input_ids for text in TEXTS]
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    golden = {"texts": TEXTS, "ids": prompts, "base": [scored(base, ids) for ids in prompts]}
    policy = peft.PeftModel.from_pretrained(base, real / "adapters/trl-dpo-stories260K/sigmoid/final").eval()
    golden["policy"] = [scored(policy, ids) for ids in prompts]
    target = ROOT / "tests/fixtures/serve/stories260k.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(golden, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
