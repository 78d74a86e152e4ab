#!/usr/bin/env python3
"""What both sides of a benchmark read: a model of random weights, an adapter to start from, and rows.

    python scripts/bench/make_inputs.py OUT --shape smollm2-135m --tokenizer FOLDER --prefs FILE.parquet --rows 16
    python scripts/bench/make_inputs.py OUT --shape llama-8b --quant nf4 --batch 32 --rows 320 --device cuda ...

OUT/model, OUT/adapter (PEFT, B = 0), OUT/rows.parquet, OUT/recipe.toml and OUT/lengths.json. The same seed gives the same
files. Rows that either side would leave out are passed over: prompts that fill the maximum length, equal completions.
"""

import argparse
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

SHAPES = {
    "stories15m": dict(
        hidden_size=288, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=6, intermediate_size=768, vocab_size=32000
    ),
    "smollm2-135m": dict(
        hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536, vocab_size=49152
    ),
    "llama-1b": dict(
        hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, intermediate_size=8192, vocab_size=128256
    ),
    "llama-8b": dict(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336, vocab_size=128256
    ),
}
UNTIED = ("llama-8b",)
RECIPE = """\
[model]
source = "model"
quant  = "{quant}"

[adapter]
init = "adapter"

[data]
train      = "rows.parquet"
max_length = {max_length}

[loss.dpo]
beta = 0.1

[train]
epochs        = 1
batch_size    = {batch_size}
learning_rate = 1e-5
schedule      = "linear"
warmup        = 0
shuffle       = false
"""


def lengths(tokenizer, row: dict, max_length: int) -> tuple[int, int, int] | None:
    """Tokens of prompt, chosen and rejected as TRL counts them, or None for a row that cannot be trained on."""
    if isinstance(row["chosen"], str):
        prompt = tokenizer(row["prompt"])["input_ids"]
        sides = [tokenizer(row["prompt"] + row[side])["input_ids"] + [tokenizer.eos_token_id] for side in ("chosen", "rejected")]
    else:
        def render(messages, **more):
            return tokenizer(tokenizer.apply_chat_template(messages, tokenize=False, **more), add_special_tokens=False)["input_ids"]

        prompt = render(row["chosen"][:-1], add_generation_prompt=True)
        sides = [render(row[side]) for side in ("chosen", "rejected")]
    shared = min(sum(1 for _ in common(prompt, side)) for side in sides)
    if shared == 0 or shared >= max_length or row["chosen"] == row["rejected"]:
        return None
    cut = [min(len(side), max_length) - shared for side in sides]
    return (shared, *cut) if min(cut) > 0 else None


def common(a: list[int], b: list[int]):
    for x, y in zip(a, b):
        if x != y:
            return
        yield x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder; its ids have to be below the shape's vocabulary")
    parser.add_argument("--prefs", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=8, help="pairs an update")
    parser.add_argument("--quant", choices=["none", "nf4"], default="none", help="what both sides keep the base in; TRL by bitsandbytes")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where both sides compute: in f32, or in bf16 on cuda")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    # dpo-lora puts a BOS before a conversation whose template forgets it; TRL takes what the template writes
    if tokenizer.bos_token and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id and "bos_token" not in tokenizer.chat_template:
        tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    table = pq.read_table(args.prefs).select(["prompt", "chosen", "rejected"])
    kept, counted = [], []
    for row in table.to_pylist():
        if len(kept) < args.rows and (of_row := lengths(tokenizer, row, args.max_length)):
            kept.append(row)
            counted.append(of_row)
    if len(kept) < args.rows:
        parser.error(f"{args.prefs} has only {len(kept)} rows that both sides can train on")
    if isinstance(kept[0]["chosen"], list):
        # the prompt as messages: both sides read the same turns
        kept = [{"prompt": row["chosen"][:-1], "chosen": row["chosen"][-1:], "rejected": row["rejected"][-1:]} for row in kept]

    args.out.mkdir(parents=True)
    model_folder, adapter_folder = args.out / "model", args.out / "adapter"
    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPES[args.shape], max_position_embeddings=8192, tie_word_embeddings=args.shape not in UNTIED, bos_token_id=1, eos_token_id=2,
        initializer_range=0.02, dtype="bfloat16" if args.device == "cuda" else "float32",
    )
    # a large model's random weights are made where that is fast
    torch.set_default_dtype(torch.bfloat16 if args.device == "cuda" else torch.float32)
    with torch.device(args.device):
        model = LlamaForCausalLM(config)
    if args.quant == "nf4":
        # as files of real models are; beside NF4 dpo-lora keeps embedding and head in bf16
        dtype = model.dtype
        model = model.to(torch.bfloat16).to(dtype)
    model.save_pretrained(model_folder)
    # as transformers has it in memory, so that both sides read the same: it builds some tokenizers anew and not quite as
    # their tokenizer.json says (Llama's with "legacy": false put no space after a special token)
    tokenizer.save_pretrained(model_folder)
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(model, lora).save_pretrained(adapter_folder)
    pq.write_table(pa.Table.from_pylist(kept), args.out / "rows.parquet")
    (args.out / "recipe.toml").write_text(RECIPE.format(max_length=args.max_length, quant=args.quant, batch_size=args.batch))
    facts = {"shape": args.shape, **SHAPES[args.shape], "max_length": args.max_length, "lengths": counted}
    facts |= {"batch_size": args.batch, "quant": args.quant, "device": args.device}
    (args.out / "lengths.json").write_text(json.dumps(facts))
    tokens = sum(2 * p + c + r for p, c, r in counted)
    print(f"{len(kept)} rows, {tokens} tokens of prompts with completions, in {args.out}")


if __name__ == "__main__":
    main()
