"""Fixtures of generation: what transformers makes of logits before it draws, and what it writes greedily on a real model.

    pip install -r scripts/requirements-fixtures.txt
    python scripts/make_generation_fixtures.py REAL

REAL is a folder with `stories260K` and `adapters/trl-dpo-stories260K`. Writes tests/fixtures/sampling.json and
tests/fixtures/data/stories_greedy.json.
"""

import json
import sys
from pathlib import Path

import peft
import torch
import transformers
from transformers.generation.logits_process import (
    LogitsProcessorList, MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper,
    TopPLogitsWarper)

FIXTURES = Path(__file__).resolve().parents[1] / "tests/fixtures"
NEUTRAL = dict(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0)


def probabilities(logits, ids, temperature, top_p, top_k, min_p, repetition_penalty):
    """In the order of transformers' `_get_logits_processor`."""
    steps = LogitsProcessorList()
    if repetition_penalty != 1.0:
        steps.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
    if temperature != 1.0:
        steps.append(TemperatureLogitsWarper(temperature))
    if top_k:
        steps.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        steps.append(TopPLogitsWarper(top_p))
    if min_p:
        steps.append(MinPLogitsWarper(min_p))
    return steps(torch.tensor([ids]), torch.tensor([logits], dtype=torch.float64)).softmax(-1)[0].tolist()


def sampling():
    generator = torch.Generator().manual_seed(7)
    cases = []
    for settings in [
        dict(), dict(temperature=0.7), dict(temperature=1.8), dict(top_k=5), dict(top_p=0.6), dict(min_p=0.2),
        dict(repetition_penalty=1.3), dict(repetition_penalty=0.8),
        dict(temperature=0.7, top_p=0.9, top_k=12), dict(temperature=1.4, top_p=0.8, min_p=0.05),
        dict(temperature=0.9, top_p=0.7, top_k=9, min_p=0.1, repetition_penalty=1.2), dict(top_p=0.01), dict(top_k=3),
    ]:
        # quarters, so that some are equal: top_k keeps what is equal to the last one
        logits = (torch.randn(24, generator=generator) * 8).round().div(4).tolist()
        ids = torch.randint(24, (9,), generator=generator).tolist()
        settings = NEUTRAL | settings
        cases.append(dict(logits=logits, ids=ids, sampling=settings, probabilities=probabilities(logits, ids, **settings)))
    (FIXTURES / "sampling.json").write_text(json.dumps(cases) + "\n")


@torch.inference_mode()
def greedy(real):
    base = transformers.AutoModelForCausalLM.from_pretrained(real / "stories260K", dtype=torch.float32).eval()
    prompt = [1, 403, 407, 261, 378]

    def answer(model):
        ids = model.generate(input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=200, min_new_tokens=200,
                             pad_token_id=0)
        return ids[0, len(prompt):].tolist()
    off = answer(base)
    on = answer(peft.PeftModel.from_pretrained(base, real / "adapters/trl-dpo-stories260K/sigmoid/final").eval())
    (FIXTURES / "data/stories_greedy.json").write_text(json.dumps(dict(prompt=prompt, base=off, policy=on)) + "\n")


if __name__ == "__main__":
    sampling()
    greedy(Path(sys.argv[1]))
