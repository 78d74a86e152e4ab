"""Answers a second: this program's `generate` and transformers', in one run, on a random model of SmolLM2-135M's shape.

    cargo build --release
    python scripts/bench/generate.py FOLDER [--prompts 16] [--tokens 128]

FOLDER is made and gets the model, an adapter and the prompts. Both generate greedily with the adapter on (transformers with
PEFT), the same number of tokens for every prompt; the time to load is measured apart and not counted.
"""

import argparse
import json
import shutil
import subprocess
import time
from pathlib import Path

import peft
import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]


def make(folder):
    torch.manual_seed(0)
    base, adapter = folder / "base", folder / "adapter"
    config = transformers.LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, tie_word_embeddings=True, max_position_embeddings=2048, bos_token_id=0, eos_token_id=1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(base)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ROOT / "recipes/quickstart/model" / file, base / file)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear",
                           base_model_name_or_path=str(base.resolve()))
    model = peft.get_peft_model(model, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(adapter)


def ours(folder, prompts, tokens, *more):
    """Seconds of generation: those of `tokens` less those of one token, which has loading and prompts in it."""
    def run(count):
        begun = time.perf_counter()
        command = [ROOT / "target/release/dpo-lora", "generate", folder / "adapter", "--prompts", folder / "prompts.jsonl",
                   "--base", folder / "base", "--plain", "--max-new-tokens", str(count), "--json", "-q", *more]
        done = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
        rows = [json.loads(line)["policy"] for line in done.stdout.splitlines()]
        assert len(rows) == len(prompts)
        return time.perf_counter() - begun, sum(row["tokens"] for row in rows)
    least, first = run(1)
    whole, count = run(tokens)
    return (count - first) / (whole - least)


@torch.inference_mode()
def theirs(folder, ids, tokens, batch, dtype):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype).eval()
    model = peft.PeftModel.from_pretrained(model, folder / "adapter").eval()
    longest = max(map(len, ids))
    padded = torch.tensor([[0] * (longest - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])

    def run(count):
        begun = time.perf_counter()
        for start in range(0, len(ids), batch):
            part = slice(start, start + batch)
            model.generate(input_ids=padded[part], attention_mask=mask[part], max_new_tokens=count, min_new_tokens=count,
                           do_sample=False, pad_token_id=0)
        return time.perf_counter() - begun
    run(2)
    least, whole = run(1), run(tokens)
    return len(ids) * (tokens - 1) / (whole - least)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    arguments = parser.parse_args()
    folder = arguments.folder
    if not (folder / "adapter").exists():
        make(folder)
    text = "Hail is a fall of hard lumps of ice that comes out of a thunderstorm. " * 4
    texts = [text[i:i + 120 + 10 * i] for i in range(arguments.prompts)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder / "base")
    ids = [tokenizer(text).input_ids for text in texts]
    tokens, count = arguments.tokens, arguments.prompts
    print(f"{count} prompts of {min(map(len, ids))} to {max(map(len, ids))} tokens, {tokens} new ones, "
          f"torch {torch.__version__} with {torch.get_num_threads()} threads")
    for name, measure in [
        ("ours, f32, one at a time", lambda: ours(folder, ids, tokens, "--batch", "1")),
        ("ours, bf16, one at a time", lambda: ours(folder, ids, tokens, "--batch", "1", "--quant", "bf16")),
        ("ours, q8_0, one at a time", lambda: ours(folder, ids, tokens, "--batch", "1", "--quant", "q8_0")),
        ("transformers, f32, one at a time", lambda: theirs(folder, ids, tokens, 1, torch.float32)),
        ("transformers, bf16, one at a time", lambda: theirs(folder, ids, tokens, 1, torch.bfloat16)),
        ("ours, f32, as it comes", lambda: ours(folder, ids, tokens)),
        ("ours, bf16, as it comes", lambda: ours(folder, ids, tokens, "--quant", "bf16")),
        ("ours, q8_0, as it comes", lambda: ours(folder, ids, tokens, "--quant", "q8_0")),
        (f"transformers, f32, {count} at a time", lambda: theirs(folder, ids, tokens, count, torch.float32)),
        (f"transformers, bf16, {count} at a time", lambda: theirs(folder, ids, tokens, count, torch.bfloat16)),
    ]:
        print(f"{name:<40}{measure():>8.1f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
