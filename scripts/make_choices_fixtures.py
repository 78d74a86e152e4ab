"""Makes tests/fixtures/choices.json: log-likelihoods of multiple-choice questions by lm-evaluation-harness.

Made with Python 3.11, torch 2.15.0 (CPU), transformers 5.23.0, peft 0.21.2, lm_eval 0.4.13. To make it again, with those
installed and a folder with `stories260K/` and `adapters/trl-dpo-stories260K/` in DPO_LORA_REAL:

    python scripts/make_choices_fixtures.py

The questions are in tests/fixtures/choices.jsonl, in three shapes. Each is put as lm-eval's tasks put it
(`Question: ...\\nAnswer:` as in ARC, the query or the beginning of a text as it stands, ` ` before a choice, unless there
is white space already), and scored by
`HFLM.loglikelihood`, in f32: the base of the quickstart, and stories260K without and with TRL's adapter.
"""

import json
import os
from pathlib import Path

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

ROOT = Path(__file__).parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
rows = [json.loads(line) for line in (FIXTURES / "choices.jsonl").read_text().splitlines()]


def parts(row):
    if "question" in row:
        return f"Question: {row['question']}\nAnswer:", row["choices"], row["answer"]
    if "query" in row:
        return row["query"], row["choices"], row["gold"]
    return row["ctx"], row["endings"], int(row["label"])


def delimiter(context, choice):
    return "" if context[-1].isspace() or choice[0].isspace() else " "


def scored(**model):
    lm = HFLM(dtype="float32", device="cpu", batch_size=1, **model)
    questions = []
    for row in rows:
        context, choices, gold = parts(row)
        requests = [
            Instance(request_type="loglikelihood", doc=row, arguments=(context, delimiter(context, choice) + choice), idx=i)
            for i, choice in enumerate(choices)
        ]
        lls = np.array([ll for ll, _ in lm.loglikelihood(requests, disable_tqdm=True)])
        # lm_eval.api.task.ConfigurableTask.process_results
        lengths = np.array([float(len(choice)) for choice in choices])
        questions.append(
            dict(
                logps=lls.tolist(),
                acc=int(np.argmax(lls) == gold),
                acc_norm=int(np.argmax(lls / lengths) == gold),
            )
        )
    return questions


torch.manual_seed(0)
real = Path(os.environ["DPO_LORA_REAL"])
fixture = {
    "about": "By lm-evaluation-harness, see scripts/make_choices_fixtures.py.",
    "quickstart": scored(pretrained=str(ROOT / "recipes/quickstart/model")),
    "stories260K": scored(pretrained=str(real / "stories260K")),
    "stories260K_trl": scored(
        pretrained=str(real / "stories260K"), peft=str(real / "adapters/trl-dpo-stories260K/sigmoid/final")
    ),
}
lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in fixture.items())
(FIXTURES / "choices.json").write_text("{" + lines + "}\n")
