#!/usr/bin/env python3
"""The quickstart with TRL and PEFT: the same base, data and settings, for comparison with `dpo-lora run`.

    python scripts/quickstart/check_with_trl.py [--learning-rate 1e-3] [--beta 0.1] [--epochs 1] [--out DIR]

Prints held-out accuracy before and after, by rewards (policy minus reference) and by plain log-probabilities, and the
share of greedy answers that are plain or word for word what the base learned.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from corpus import RECIPE_DIR, is_plain
from train_base import answers, completion_logps, encode


def measure(model, tokenizer, rows) -> dict:
    """Log-probabilities of both sides and greedy answers."""
    model.eval()
    logps = {
        side: completion_logps(model, encode(tokenizer, [row["prompt"] + row[side] for row in rows]), tokenizer.pad_token_id)[0]
        for side in ("chosen", "rejected")
    }
    said = answers(model, tokenizer, [row["prompt"][0]["content"] for row in rows])
    known = [text in (row["chosen"][0]["content"], row["rejected"][0]["content"]) for text, row in zip(said, rows)]
    return {"logps": logps, "said": said, "known": sum(known) / len(known), "plain": sum(map(is_plain, said)) / len(said)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(RECIPE_DIR / "model"))
    parser.add_argument("--data", type=Path, default=RECIPE_DIR)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("runs/trl"))
    args = parser.parse_args()
    torch.set_num_threads(2)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    files = {name: str(args.data / f"{name}.parquet") for name in ("train", "eval")}
    data = load_dataset("parquet", data_files=files).select_columns(["prompt", "chosen", "rejected"])
    held_out = list(data["eval"])
    before = measure(model, tokenizer, held_out)

    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=str(args.out),
            beta=args.beta,
            learning_rate=args.learning_rate,
            per_device_train_batch_size=args.batch,
            num_train_epochs=args.epochs,
            max_length=args.max_length,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            max_grad_norm=1.0,
            seed=42,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=data["train"],
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    started = time.time()
    trainer.train()
    seconds = time.time() - started
    after = measure(trainer.model, tokenizer, held_out)

    def accuracy(margins: torch.Tensor) -> float:
        return (margins > 0).float().mean().item()

    margin = {name: m["logps"]["chosen"] - m["logps"]["rejected"] for name, m in (("before", before), ("after", after))}
    for question, a, b in list(zip((row["prompt"][0]["content"] for row in held_out), before["said"], after["said"]))[::12]:
        print(f"\n{question}\n  before: {a}\n  after:  {b}")
    print(
        json.dumps(
            {
                "updates": trainer.state.global_step,
                "seconds": round(seconds),
                "rewards accuracy after": accuracy(margin["after"] - margin["before"]),
                "logps accuracy": [accuracy(margin[when]) for when in ("before", "after")],
                "plain answers": [before["plain"], after["plain"]],
                "word for word": [before["known"], after["known"]],
                "logps chosen": [m["logps"]["chosen"].mean().item() for m in (before, after)],
                "logps rejected": [m["logps"]["rejected"].mean().item() for m in (before, after)],
            },
        )
    )


if __name__ == "__main__":
    main()
