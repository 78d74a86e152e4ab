"""Makes tests/fixtures/data and tests/fixtures/templates/expected.json: what transformers, TRL and pyarrow make of our
own small data sets and chat templates.

    venv/bin/pip install -r scripts/requirements-fixtures.txt
    venv/bin/python scripts/make_data_fixtures.py [FOLDER_OF_REAL_DATA]

Made with Python 3, torch 2.15.0, transformers 5.23.0, trl 1.16.0, tokenizers 0.23.3, pyarrow 26.0.1, jinja2 3.1.6.

    templates/*.jinja, conversations.json    written by hand: the constructs that templates are made of
    templates/expected.json                  what transformers renders, or the message that the template raises
    data/model/                              a byte-level BPE tokenizer with a chat template, made here
    data/*.jsonl                             rows of each shape that TRL reads too
    data/expected.json                       the ids that TRL's DPOTrainer and KTOTrainer make of them
    data/*.parquet                           rows as pyarrow writes them: dictionaries, lists of structs, row groups

With a folder of real data, `data/real.json` is made too: digests of the ids that TRL makes of real preference files
with real tokenizers, and of what transformers renders with real templates. The test reads the folder's path from the
variable DPO_LORA_REAL; nothing of its contents is stored.
"""

import json
import os
import sys
import tempfile
from copy import deepcopy
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pyarrow
import pyarrow.parquet
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

FIXTURES = Path(__file__).parent.parent / "tests" / "fixtures"
DATA, TEMPLATES = FIXTURES / "data", FIXTURES / "templates"
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

TEXT = """Plain words are short words. Why is the sky blue? The air scatters blue light more than red light.
How many legs has a spider? A spider has eight legs, and an ant has six. Say it in one word: yes or no.
Bread rises because yeast makes gas. What is the sum of two and two? Four. And of three and three? Six.
"""

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] | trim }}"
    "{{ '<|end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


STRINGS = [
    {"prompt": "Why is the sky blue?\n", "chosen": "Air scatters blue light.", "rejected": "It just is."},
    {"prompt": "How many legs has a spider? ", "chosen": "Eight.", "rejected": "Six, like an ant."},
    # tokens merge across the boundary: "wor" + "ds" is "words"
    {"prompt": "Plain wor", "chosen": "ds are short.", "rejected": "k is never done."},
    {"prompt": "Grüße: 你", "chosen": "好 🦀", "rejected": " hm"},
    {"prompt": "Ends itself:", "chosen": " yes</s>", "rejected": " no"},
    {"prompt": "", "chosen": "Bread rises.", "rejected": "Bread falls."},
]
MESSAGES = [
    {"prompt": [user("Why is the sky blue?")], "chosen": [assistant("Air scatters blue light.")],
     "rejected": [assistant("It just is.")]},
    {"prompt": [{"role": "system", "content": "One word."}, user("And?"), assistant("Yes."), user("And of two?  ")],
     "chosen": [assistant(" Four. ")], "rejected": [assistant("Six\n\nor more")]},
    {"prompt": [user("Say <|end|> \"please\"")], "chosen": [assistant("please")], "rejected": [assistant("no")]},
]
IMPLICIT_STRINGS = [
    {"chosen": "The sky is blue.", "rejected": "The sky is red."},
    {"chosen": "Spiders: eight legs", "rejected": "Spiders: six legs"},
    {"chosen": "One word:\nyes", "rejected": "One word:\nno"},
]
IMPLICIT_MESSAGES = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in MESSAGES]
LABELLED = [
    {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
    for row in STRINGS for side in ("chosen", "rejected")
]


def make_model(folder):
    """A tokenizer that merges and adds a BOS, its template, and a model of no use but to make a trainer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="</s>", **TOKENS)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5]}) + "\n")
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    return LlamaForCausalLM(config), AutoTokenizer.from_pretrained(folder)


ARGUMENTS = {"report_to": "none", "bf16": False, "use_cpu": True, "gradient_checkpointing": False}


def dpo_ids(model, tokenizer, rows):
    with tempfile.TemporaryDirectory() as out:
        trainer = DPOTrainer(
            model=model, ref_model=deepcopy(model), args=DPOConfig(out, **ARGUMENTS),
            train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        )
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [[row[name] for name in names] for row in trainer.train_dataset]


def kto_ids(model, tokenizer, rows):
    """[prompt, completion, label] of each row."""
    with tempfile.TemporaryDirectory() as out:
        trainer = KTOTrainer(
            model=model, ref_model=deepcopy(model), args=KTOConfig(out, per_device_train_batch_size=2, **ARGUMENTS),
            train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        )
    return [[row["prompt_ids"], row["completion_ids"], row["label"]] for row in trainer.train_dataset]


def rendered(template, messages, add_generation_prompt, tokens):
    try:
        [[text], _] = render_jinja_template(
            conversations=[messages], chat_template=template, add_generation_prompt=add_generation_prompt, **tokens
        )
        return text
    except Exception as error:  # whatever a template raises
        return {"error": str(error)}


def read_template(path):
    """A template as it is, but for the date of a day."""
    return path.read_bytes().decode().replace('strftime_now("%d %b %Y")', '"23 Nov 2026"')


def render_all(templates, tokens):
    conversations = json.loads((TEMPLATES / "conversations.json").read_text())
    return {
        path.name: {
            name: [rendered(read_template(path), messages, prompt, tokens) for prompt in (True, False)]
            for name, messages in conversations.items()
        }
        for path in sorted(templates.glob("*.jinja"))
    }


def digest(numbers):
    """FNV-1a over 64-bit words, hexadecimal."""
    state = 0xCBF29CE484222325
    for number in numbers:
        state = ((state ^ number) * 0x100000001B3) % 2**64
    return f"{state:016x}"


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def write_parquet():
    """The rows of the JSON files with what users' files have besides."""
    message = pyarrow.struct([("content", pyarrow.string()), ("role", pyarrow.string()), ("name", pyarrow.string())])
    conversation = pyarrow.list_(message)
    strings = pyarrow.table({
        "id": pyarrow.array(range(len(STRINGS))),
        **{name: pyarrow.array([row[name] for row in STRINGS]).dictionary_encode() for name in STRINGS[0]},
    })
    pyarrow.parquet.write_table(strings, DATA / "strings.parquet", compression="zstd", row_group_size=4)
    messages = pyarrow.table({
        **{name: pyarrow.array([row[name] for row in MESSAGES], conversation) for name in MESSAGES[0]},
        "score": pyarrow.array([1.5, None, 2.0]),
        "embedding": pyarrow.array([[0.5], None, []], pyarrow.list_(pyarrow.float32())),
        "extra": pyarrow.array([b"\xff\xfe", None, b""], pyarrow.binary()),
        "when": pyarrow.array([0, 1, 2], pyarrow.timestamp("ns")),
    })
    pyarrow.parquet.write_table(messages, DATA / "messages.parquet", compression="snappy")
    single = [row for row in MESSAGES if len(row["prompt"]) == 1]
    question = pyarrow.table({
        "prompt": pyarrow.array([row["prompt"][0]["content"] for row in single], pyarrow.large_string()),
        **{side: pyarrow.array([row["prompt"] + row[side] for row in single], pyarrow.large_list(message))
           for side in ("chosen", "rejected")},
    })
    pyarrow.parquet.write_table(question, DATA / "question.parquet", compression="gzip", use_dictionary=False)
    labelled = pyarrow.table({
        "prompt": [row["prompt"] for row in LABELLED],
        "completion": [row["completion"] for row in LABELLED],
        "label": pyarrow.array([int(row["label"]) for row in LABELLED], pyarrow.int8()),
    })
    pyarrow.parquet.write_table(labelled, DATA / "labelled.parquet", compression="none")


def real_digests(folder, model):
    """TRL has no BOS before a template that writes none, and this project has: that tokenizer is left to other tests."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizers" / "qwen3")
    ids = {}
    for name in ("rasbt_strings.parquet", "dpo_en_demo_explicit_prompt.parquet"):
        rows = pyarrow.parquet.read_table(folder / "prefs" / name).to_pylist()
        for trained in (row for row in dpo_ids(model, tokenizer, rows) if row[1] != row[2]):
            for part in trained:
                ids.setdefault(name, []).extend([len(part), *part])
    trl_rows = pyarrow.parquet.read_table(folder / "prefs" / "kto_en_demo.parquet").to_pylist()
    ids["kto_en_demo.parquet"] = [
        number for prompt, completion, label in kto_ids(model, tokenizer, trl_rows)
        for part in (prompt, completion) for number in (int(label), len(part), *part)
    ]
    rendered = render_all(folder / "chat_templates", TOKENS)
    return {
        "ids": {name: digest(numbers) for name, numbers in ids.items()},
        "templates": {
            name: {key: [digest(text.encode()) if isinstance(text, str) else "raises " + digest(text["error"].encode())
                         for text in texts]
                   for key, texts in outputs.items()}
            for name, outputs in rendered.items()
        },
    }


def main():
    DATA.mkdir(parents=True, exist_ok=True)
    write_json(TEMPLATES / "expected.json", render_all(TEMPLATES, TOKENS))
    (DATA / "model").mkdir(exist_ok=True)
    model, tokenizer = make_model(DATA / "model")
    expected = {}
    sets = {"strings": STRINGS, "messages": MESSAGES, "implicit_strings": IMPLICIT_STRINGS,
            "implicit_messages": IMPLICIT_MESSAGES, "labelled": LABELLED}
    for name, rows in sets.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (DATA / f"{name}.jsonl").write_text("".join(lines))
        expected[name] = (kto_ids if name == "labelled" else dpo_ids)(model, tokenizer, rows)
    expected["unpaired"] = kto_ids(model, tokenizer, STRINGS)
    (DATA / "expected.json").write_text(json.dumps(expected) + "\n")
    write_parquet()
    if len(sys.argv) > 1:
        write_json(DATA / "real.json", real_digests(Path(sys.argv[1]), model))


if __name__ == "__main__":
    main()
