#!/usr/bin/env python3
"""One run of TRL + PEFT on the inputs of make_inputs.py; prints a line of JSON.

    python scripts/bench/trl_side.py INPUTS --mode default --device-batch 4

default  gradient checkpointing, the reference in each step (TRL's own defaults)
tuned    no checkpointing, the reference computed beforehand
best     as tuned, rows sorted by length; run.py sets the allocator's variables
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

THREADS = os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("MKL_NUM_THREADS", THREADS)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# TRL keeps reference log-probs beside the data set: each run starts without
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp()

import torch
from datasets import Dataset
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import DPOConfig, DPOTrainer


def memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


class Timed(DPOTrainer):
    """Rows as they stand in the file, so that losses compare update by update; the reference timed by itself."""

    seconds_reference = 0.0

    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)

    def _precompute_ref_logps(self, *arguments):
        started = time.perf_counter()
        dataset = super()._precompute_ref_logps(*arguments)
        self.seconds_reference += time.perf_counter() - started
        return dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", type=Path)
    parser.add_argument("--mode", choices=["default", "tuned", "best"], default="default")
    parser.add_argument("--device-batch", type=int, default=4)
    parser.add_argument("--memory", type=float, help="GiB of the GPU that may be taken")
    args = parser.parse_args()
    torch.set_num_threads(int(THREADS))
    facts = {"batch_size": 8, "quant": "none", "device": "cpu"} | json.loads((args.inputs / "lengths.json").read_text())
    on_gpu = facts["device"] == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    if args.memory:
        torch.cuda.set_per_process_memory_fraction(args.memory * 2**30 / torch.cuda.get_device_properties(0).total_memory)

    tokenizer = AutoTokenizer.from_pretrained(args.inputs / "model")
    # as QLoRA has it, and dpo-lora too
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    base = AutoModelForCausalLM.from_pretrained(
        args.inputs / "model", dtype=dtype, attn_implementation="sdpa", device_map="cuda:0" if on_gpu else "cpu",
        quantization_config=nf4 if facts["quant"] == "nf4" else None,
    )
    rows = Dataset.from_parquet(str(args.inputs / "rows.parquet"))
    if args.mode == "best":
        longest = [p + max(c, r) for p, c, r in facts["lengths"]]
        rows = rows.select(sorted(range(len(rows)), key=lambda i: -longest[i]))
    loaded = memory("VmRSS")

    tuned = args.mode != "default"
    adapter = LoraConfig.from_pretrained(args.inputs / "adapter")
    adapter.inference_mode = False
    trainer = Timed(
        model=base,
        args=DPOConfig(
            output_dir=tempfile.mkdtemp(),
            beta=0.1,
            learning_rate=1e-5,
            lr_scheduler_type="linear",
            warmup_steps=0,
            max_grad_norm=1.0,
            per_device_train_batch_size=args.device_batch,
            gradient_accumulation_steps=facts["batch_size"] // args.device_batch,
            num_train_epochs=1,
            max_length=facts["max_length"],
            gradient_checkpointing=not tuned,
            precompute_ref_log_probs=tuned,
            precompute_ref_batch_size=args.device_batch,
            disable_dropout=True,
            use_cpu=not on_gpu,
            bf16=on_gpu,
            optim="adamw_torch_fused" if on_gpu else "adamw_torch",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_num_workers=0,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        # given a PeftModel, TRL copies its adapter and runs the copy in every reference pass; so the base is the reference
        peft_config=adapter,
    )
    if not on_gpu:
        # over a quantized base TRL rounds adapters to bf16; here both sides compute in f32, and their losses are compared closely
        for parameter in trainer.model.parameters():
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    set_peft_model_state_dict(trainer.model, load_file(args.inputs / "adapter" / "adapter_model.safetensors"))
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    log = [line for line in trainer.state.log_history if "loss" in line]
    result = {
        "mode": args.mode,
        "device_batch": args.device_batch,
        "seconds_reference": trainer.seconds_reference,
        "seconds_updates": seconds,
        "losses": [line["loss"] for line in log],
        "grad_norms": [line["grad_norm"] for line in log],
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else memory("VmHWM"),
        "loaded_memory_bytes": loaded,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
