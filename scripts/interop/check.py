"""Loads what `merge` and `export` write in PEFT, transformers, llama.cpp and gguf, and compares: run by hand.

    cargo build --release --examples --bins
    python scripts/interop/check.py FOLDER [--real DIR]

FOLDER is made, and gets all files. Needs the packages of requirements.txt beside this script. Compared are small random
models of every family with the quickstart's tokenizer and a random adapter of PEFT's (rsLoRA, and another rank and alpha
for some modules); with --real also models with the tokenizers of Qwen 3 and Llama in DIR/tokenizers, and a
real model, DIR/stories260K, with TRL's adapter on it. For each:

* logits of base + adapter: PEFT on transformers against this program;
* the merged f32 folder in transformers: logits, and 40 greedy tokens;
* every key and tensor of the merged GGUF files through the gguf package;
* token ids of texts: llama.cpp from the GGUF file against transformers' own tokenizer;
* log-probs of the same ids: llama.cpp with the merged f32 and Q8_0 files, and with the base's file and the GGUF adapter,
  against this program.

docs/interop.md has what was seen.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import llama_cpp
import numpy
import peft
import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "target/release/dpo-lora"
LOGITS = ROOT / "target/release/examples/logits"
QUICKSTART = ROOT / "recipes/quickstart/model"
TEXTS = [
    "Please describe hail. It falls out of a thunderstorm, in lumps as large as a fist; how could it not hurt?",
    "Once upon a time, there was a little girl named Lily. She loved 12 red apples, and she didn't like 345 green ones!",
    "  two blanks first\n\nthen lines, a\ttab, ümläute, 日本語 and 👩‍👩‍👧‍👦",
]
GREEDY = 40


def families():
    common = dict(hidden_size=96, intermediate_size=160, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
                  vocab_size=3072, max_position_embeddings=512, initializer_range=0.15, bos_token_id=0, eos_token_id=1,
                  pad_token_id=4, tie_word_embeddings=False)
    t = transformers
    llama3 = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                  original_max_position_embeddings=64)
    # llama.cpp takes no other size of these
    square = common | dict(hidden_size=128)
    gemma = dict(query_pre_attn_scalar=32, sliding_window=16, tie_word_embeddings=True)
    return {
        "llama": t.LlamaConfig(**common, num_hidden_layers=3, attention_bias=True),
        "llama3": t.LlamaConfig(**common, num_hidden_layers=3, rope_parameters=llama3),
        "mistral": t.MistralConfig(**common, num_hidden_layers=3, sliding_window=None),
        "qwen2": t.Qwen2Config(**square, num_hidden_layers=3),
        "qwen3": t.Qwen3Config(**common, num_hidden_layers=3),
        "gemma2": t.Gemma2Config(**common | gemma, num_hidden_layers=4),
        "gemma3": t.Gemma3TextConfig(**common | gemma, num_hidden_layers=7),
        "phi3": t.Phi3Config(**square, num_hidden_layers=3, sliding_window=None),
        "smollm3": t.SmolLM3Config(**common, num_hidden_layers=5),
    }


def make(folder, name, config, tokenizer=QUICKSTART):
    """A random model with a tokenizer and a random adapter, written by transformers and PEFT."""
    torch.manual_seed(sum(map(ord, name)))
    base, adapter = folder / name / "base", folder / name / "adapter"
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # norms and biases, which are ones and zeros
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(base)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tokenizer / file).exists():
            shutil.copy(tokenizer / file, base / file)
    attention = ["qkv_proj"] if name == "phi3" else ["q_proj", "k_proj", "v_proj"]
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=6, lora_alpha=9, use_rslora=True, rank_pattern={"o_proj": 3},
                           alpha_pattern={"down_proj": 4}, target_modules=[*attention, "o_proj", "down_proj"],
                           base_model_name_or_path=str(base))
    model = peft.get_peft_model(model, lora)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn_like(parameter) * 0.08)
    model.save_pretrained(adapter)
    return base, adapter


def run(*arguments, stdin=None):
    done = subprocess.run([str(a) for a in arguments], input=stdin, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{arguments}:\n{done.stderr}")
    return done


def ours(rows, *arguments):
    """Logits and greedy ids, from this program."""
    lines = run(LOGITS, *arguments, "--greedy", GREEDY, stdin="\n".join(map(json.dumps, rows))).stdout.splitlines()
    answers = [json.loads(line) for line in lines]
    return [numpy.array(a["logits"]) for a in answers], [a["greedy"] for a in answers]


@torch.no_grad()
def theirs(rows, model):
    """The same, from transformers."""
    logits = [model(torch.tensor([ids])).logits[0, :-1].numpy() for ids in rows]
    greedy = []
    for ids in rows:
        # by hand: generate() would hold tokens back that end a text
        longer = list(ids)
        for _ in range(GREEDY):
            longer.append(int(model(torch.tensor([longer])).logits[0, -1].argmax()))
        greedy.append(longer[len(ids):])
    return logits, greedy


def llama(rows, path, **more):
    """Logits of llama.cpp, whose cache of keys and values is f16 where nothing is said."""
    f32 = llama_cpp.GGML_TYPE_F32
    model = llama_cpp.Llama(str(path), n_ctx=512, n_batch=512, n_ubatch=512, logits_all=True, verbose=False, type_k=f32,
                            type_v=f32, flash_attn=False, **more)
    found = []
    for ids in rows:
        model.reset()
        model.eval(ids)
        found.append(numpy.array(model.scores[: len(ids) - 1], dtype=numpy.float64))
    return found


def logps(logits, rows):
    """Log-probs of the ids that follow."""
    found = []
    for values, ids in zip(logits, rows):
        values = values.astype(numpy.float64)
        top = values.max(-1, keepdims=True)
        normed = values - top - numpy.log(numpy.exp(values - top).sum(-1, keepdims=True))
        found.append(normed[numpy.arange(len(ids) - 1), ids[1:]])
    return found


def mean(one, two):
    return float(numpy.abs(numpy.concatenate(one) - numpy.concatenate(two)).mean())


def largest(one, two):
    return max(float(numpy.abs(a - b).max()) for a, b in zip(one, two, strict=True))


def token_ids(path, texts):
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    return [model.tokenize(text.encode(), add_bos=True, special=True) for text in texts]


def check(name, base, adapter, folder, failures):
    def held(what, value, limit):
        good = value <= limit
        print(f"{name:<14}{what:<58}{value:>10.2e}  {'ok' if good else f'ABOVE {limit}'}", flush=True)
        if not good:
            failures.append(f"{name}: {what}")

    # AutoTokenizer would take the type of model for a reason to split texts otherwise than the file does
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(base)
    rows = [tokenizer(text).input_ids[:120] for text in TEXTS]
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    plain, _ = theirs(rows, model)
    found, greedy = ours(rows, base, adapter)
    policy = peft.PeftModel.from_pretrained(model, adapter).eval()
    expected, expected_greedy = theirs(rows, policy)
    moved = largest(plain, expected)
    print(f"{name:<14}the adapter moves logits by up to {moved:.2f}")
    held("base + adapter: logits, PEFT", largest(found, expected), 1e-4)
    held("base + adapter: greedy tokens that differ, PEFT", sum(a != b for a, b in zip(greedy, expected_greedy)), 0)

    out = folder / name
    options = ["--base", base, "--no-accounts", "-q", "--force"]
    run(PROGRAM, "merge", adapter, "--out", out / "merged", "--type", "f32", *options)
    merged = transformers.AutoModelForCausalLM.from_pretrained(out / "merged", dtype="auto").eval()
    expected, expected_greedy = theirs(rows, merged)
    held("merged folder: logits, transformers", largest(found, expected), 1e-4)
    held("merged folder: greedy tokens that differ, transformers", sum(a != b for a, b in zip(greedy, expected_greedy)), 0)

    run(PROGRAM, "merge", adapter, "--out", out / "f32.gguf", "--type", "f32", *options)
    run(PROGRAM, "merge", adapter, "--out", out / "q8_0.gguf", "--type", "q8_0", *options)
    run(PROGRAM, "merge", adapter, "--weights", "0", "--out", out / "base.gguf", "--type", "f32", *options)
    run(PROGRAM, "export", adapter, "--base", base, "--out", out / "lora.gguf", "-q", "--force")
    for file in ("f32.gguf", "q8_0.gguf", "base.gguf", "lora.gguf"):
        reader = gguf.GGUFReader(out / file)
        values = {key: field.contents() for key, field in reader.fields.items()}
        numbers = [gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors]
        assert all(numpy.isfinite(n).all() for n in numbers)
        if file == "f32.gguf":
            template = getattr(tokenizer, "chat_template", None)
            held("gguf: the chat template differs", values.get("tokenizer.chat_template") != template, 0)
            held("gguf: the end of text differs", values["tokenizer.ggml.eos_token_id"] != tokenizer.eos_token_id, 0)
            print(f"{name:<14}gguf: {len(values)} keys and {len(numbers)} tensors as {values['general.architecture']}")

    ids = token_ids(out / "f32.gguf", TEXTS)
    expected_ids = [tokenizer(text).input_ids for text in TEXTS]
    held("texts that llama.cpp makes other ids of", sum(a != b for a, b in zip(ids, expected_ids)), 0)
    target = logps(found, rows)
    # ggml looks GELU up in a table of f16
    limit = 5e-3 if name.startswith("gemma") else 1e-3
    held("merged f32 GGUF: log-probs, llama.cpp", largest(logps(llama(rows, out / "f32.gguf"), rows), target), limit)
    held("base GGUF + GGUF adapter: log-probs, llama.cpp",
         largest(logps(llama(rows, out / "base.gguf", lora_path=str(out / "lora.gguf")), rows), target), limit)
    # llama.cpp rounds activations to eight bits too, of which a tenth of a nat in the mean would be a mistake
    eight = logps(llama(rows, out / "q8_0.gguf"), rows)
    target, _ = ours(rows, out / "q8_0.gguf")
    held("merged Q8_0 GGUF: log-probs in the mean, llama.cpp", mean(eight, logps(target, rows)), 0.1)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--real", type=Path)
    parser.add_argument("--only", nargs="*")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    print(f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}, "
          f"llama-cpp-python {llama_cpp.__version__}")
    failures = []
    for name, config in families().items():
        if not arguments.only or name in arguments.only:
            check(name, *make(arguments.folder, name, config), arguments.folder, failures)
    if arguments.real:
        for name, source, rows in [("qwen3", "qwen3", 151936), ("llama", "tinyllama-1.1b", 32000)]:
            if not arguments.only or source in arguments.only:
                config = families()[name]
                config.vocab_size = rows
                made = make(arguments.folder, f"{source} (tok)", config, arguments.real / "tokenizers" / source)
                check(f"{source[:9]} tok", *made, arguments.folder, failures)
        if not arguments.only or "stories260K" in arguments.only:
            adapter = arguments.real / "adapters/trl-dpo-stories260K/sigmoid/final"
            check("stories260K", arguments.real / "stories260K", adapter, arguments.folder, failures)
    sys.exit("\n".join(["", "not held:", *failures]) if failures else 0)


if __name__ == "__main__":
    main()
