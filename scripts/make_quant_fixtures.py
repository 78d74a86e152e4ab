"""Makes tests/fixtures/quant: what gguf and bitsandbytes make of quantized matrices.

    venv/bin/pip install -r scripts/requirements-fixtures.txt gguf==0.19.0 bitsandbytes==0.50.2
    venv/bin/python scripts/make_quant_fixtures.py

    blocks.safetensors   for each block type of GGUF: `<type>.bytes`, random blocks, and `<type>.values`, what gguf's own
                         dequantization makes of them
    nf4.safetensors      `weight` [24, 832] and, under bitsandbytes' names, what it makes of it with double quantization;
                         `dequantized`, what it makes of that; `plain.*` without double quantization
    <model>.gguf         golden/<model> as llama.cpp's converter names and changes its tensors; gqa with a tokenizer of bytes
    ../hostile/*         files that claim more than they hold, beside which tests flip and cut the good ones
"""

import json
import math
from importlib.metadata import version
from pathlib import Path

import bitsandbytes.functional as bnb
import gguf
import numpy as np
import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file

OUT = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "quant"
# where each block type has its f16 scales: random bytes there would be infinities
SCALES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
    "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
}


def blocks(random, kind):
    size, length = gguf.GGML_QUANT_SIZES[kind]
    made = random.integers(0, 256, (6, length), dtype=np.uint8)
    for at in SCALES[kind.name]:
        scale = (random.standard_normal(6) * 0.05).astype(np.float16)
        made[:, at:at + 2] = scale.view(np.uint8).reshape(6, 2)
    return made


ARCHITECTURES = {
    "gqa": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma2": gguf.MODEL_ARCH.GEMMA2, "gemma3": gguf.MODEL_ARCH.GEMMA3, "phi3": gguf.MODEL_ARCH.PHI3,
    "smollm3": gguf.MODEL_ARCH.SMOLLM3,
}


def write_gguf(model, path):
    """What llama.cpp's converter does for each architecture: its keys, its names, and what it changes in tensors."""
    folder = OUT.parent / "golden" / model
    config = json.loads((folder / "config.json").read_text())
    arch = ARCHITECTURES[model]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config["rope_parameters"]
    if model == "gemma3":
        writer.add_rope_freq_base(rope["full_attention"]["rope_theta"])
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["full_attention"]["factor"])
    else:
        writer.add_rope_freq_base(rope["rope_theta"])
    if model in ("gemma2", "gemma3", "phi3"):
        writer.add_sliding_window(config["sliding_window"])
    if model == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if model == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config["original_max_position_embeddings"])
        stretch = config["max_position_embeddings"] / config["original_max_position_embeddings"]
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(stretch) / math.log(config["original_max_position_embeddings"])))
        for name in ("long", "short"):
            writer.add_tensor(f"rope_factors_{name}.weight", np.array(rope[f"{name}_factor"], dtype=np.float32))
    if model == "gqa":
        tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(0x20, 0x20 + config["vocab_size"] - 3)]
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores([0.0] * len(tokens))
        writer.add_token_types([2, 3, 3] + [6] * (len(tokens) - 3))
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        values = tensor.float().numpy()
        if model in ("gqa", "smollm3") and name.endswith(("q_proj.weight", "k_proj.weight")):
            # the halves of each head's rows between each other
            values = values.reshape(-1, 2, head_dim // 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        if model.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_hostile(folder):
    """Claims that no file of this size can keep."""
    length = lambda n: n.to_bytes(8, "little")
    header = lambda text: length(len(text)) + text
    tensor = lambda shape, ends: json.dumps({"t": {"dtype": "F32", "shape": shape, "data_offsets": ends}}).encode()
    text = lambda text: length(len(text)) + text
    start = lambda tensors, values: b"GGUF" + (3).to_bytes(4, "little") + length(tensors) + length(values)
    dimension = lambda n: start(1, 0) + text(b"t") + (1).to_bytes(4, "little") + length(n) + bytes(4) + length(0) + bytes(64)
    files = {
        "model.safetensors": {
            "header-of-2-63": length(1 << 63) + b"{}",
            "header-of-2-27": length(1 << 27) + b"{}",
            "shape-overflows": header(tensor([1 << 40, 1 << 40], [0, 4])) + bytes(4),
            "offsets-past-the-end": header(tensor([1 << 20], [0, 1 << 22])) + bytes(4),
            "offsets-backwards": header(tensor([1], [4, 0])) + bytes(4),
            "deeply-nested": header(b"[" * 5000),
            "empty": b"",
        },
        "model.gguf": {
            "tensors-2-60": start(1 << 60, 0),
            "values-2-64": start(0, (1 << 64) - 1),
            "key-of-2-63": start(0, 1) + length(1 << 63),
            "array-of-2-60": start(0, 1) + text(b"a") + (9).to_bytes(4, "little") + (4).to_bytes(4, "little") + length(1 << 60),
            "array-of-arrays": start(0, 1) + text(b"a") + (9).to_bytes(4, "little") + (9).to_bytes(4, "little") + length(9) + bytes(64),
            "dimension-2-62": dimension(1 << 62),
            "dimension-0": dimension(0),
            "version-0": b"GGUF" + bytes(20),
            "empty": b"",
        },
        "config.json": {
            "sizes-of-2-31": json.dumps(dict(model_type="llama", hidden_size=1 << 31, num_hidden_layers=1 << 31, vocab_size=1 << 31,
                                             intermediate_size=1 << 31, num_attention_heads=1, rms_norm_eps=1e-5)).encode(),
            "head-dim-of-2-31": json.dumps(dict(model_type="llama", hidden_size=64, num_hidden_layers=2, vocab_size=64, head_dim=1 << 31,
                                                intermediate_size=64, num_attention_heads=1, rms_norm_eps=1e-5)).encode(),
            "heads-of-0": json.dumps(dict(model_type="gemma2", hidden_size=64, num_hidden_layers=2, vocab_size=64, intermediate_size=64,
                                          num_attention_heads=0)).encode(),
            "pattern-of-0": json.dumps(dict(model_type="gemma3_text", hidden_size=64, num_hidden_layers=2, intermediate_size=64,
                                            sliding_window_pattern=0)).encode(),
            "factors-of-nothing": json.dumps(dict(model_type="phi3", hidden_size=64, num_hidden_layers=2, vocab_size=64, intermediate_size=64,
                                                  num_attention_heads=2, rms_norm_eps=1e-5,
                                                  rope_scaling=dict(type="longrope", short_factor=[0], long_factor=["a"],
                                                                    original_max_position_embeddings=-1))).encode(),
            "deeply-nested": b"[" * 5000,
            "empty": b"",
        },
        "tokenizer.json": {
            "merges-of-nothing": b'{"version":"1.0","model":{"type":"BPE","vocab":{"a":0},"merges":[["b","c"]]}}',
            "ids-of-2-32": b'{"version":"1.0","model":{"type":"BPE","vocab":{"a":4294967295},"merges":[]}}',
            "pattern-that-does-not-parse": b'{"version":"1.0","pre_tokenizer":{"type":"Split","pattern":{"Regex":"("},'
                                           b'"behavior":"Isolated","invert":false},"model":{"type":"BPE","vocab":{},"merges":[]}}',
            "deeply-nested": b"[" * 5000,
            "empty": b"",
        },
    }
    for name, of_name in files.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for what, data in of_name.items():
            (folder / name / what).write_bytes(data)


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    for model in ARCHITECTURES:
        write_gguf(model, OUT / f"{model}.gguf")
    write_hostile(OUT.parent / "hostile")
    random = np.random.default_rng(1)
    tensors = {}
    for name in SCALES:
        kind = gguf.GGMLQuantizationType[name]
        made = blocks(random, kind)
        tensors[f"{name}.bytes"] = made
        tensors[f"{name}.values"] = gguf.dequantize(made, kind).astype(np.float32)
    half = random.standard_normal((2, 32)).astype(np.float32)
    for name in ("F16", "BF16"):
        kind = gguf.GGMLQuantizationType[name]
        made = gguf.quantize(half, kind)
        tensors[f"{name}.bytes"] = made.view(np.uint8)
        tensors[f"{name}.values"] = gguf.dequantize(made, kind).astype(np.float32)
    save_numpy(tensors, OUT / "blocks.safetensors")

    torch.manual_seed(1)
    # 312 blocks of 64: more than one block of scales
    weight = torch.randn(24, 832) * torch.rand(24, 1) * 0.1
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True, blocksize=64)
    tensors = {"weight": weight, "packed": packed, "dequantized": bnb.dequantize_4bit(packed, state)}
    for key, value in state.as_dict(packed=True).items():
        tensors[f"state.{key}"] = value
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=False, blocksize=64)
    tensors |= {"plain.packed": packed, "plain.absmax": state.absmax, "plain.dequantized": bnb.dequantize_4bit(packed, state)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, OUT / "nf4.safetensors")
    print({name: (tuple(t.shape), t.dtype) for name, t in tensors.items()})
    print(json.loads(bytes(tensors["state.quant_state.bitsandbytes__nf4"].tolist())))
    print("gguf", version("gguf"), "bitsandbytes", version("bitsandbytes"))


if __name__ == "__main__":
    main()
