"""Asks `dpo-lora serve` through OpenAI's own Python client, and checks what comes: run by hand.

    python scripts/interop/openai_client.py RUN [--base DIR]

RUN is a run or an adapter whose base has a chat template. Needs the packages of requirements-serve.txt beside this script.
"""

import argparse
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import openai

PROGRAM = Path(__file__).resolve().parents[2] / "target/release/dpo-lora"


@contextmanager
def served(*arguments, log=subprocess.DEVNULL):
    """The address of a server that ends with the block."""
    server = subprocess.Popen([PROGRAM, "serve", *arguments, "--port", "0"], stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        address = server.stdout.readline().strip()
        if not address:
            sys.exit(f"no server: {' '.join(map(str, arguments))}")
        yield address
    finally:
        server.terminate()
        assert server.wait(30) == 0, "a requested stop ends with 0"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--base", action="append", default=[])
    arguments = parser.parse_args()
    base = [part for path in arguments.base for part in ("--base", path)]
    with served(arguments.run, *base) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        check(client)
        speed(client)


def check(client):
    base, policy = [model.id for model in client.models.list()]
    print(f"openai {openai.__version__}: models {base} (base), {policy} (policy)")
    assert client.models.retrieve(policy).parent == base
    ask = dict(messages=[{"role": "user", "content": "What is hail?"}], temperature=0, max_tokens=40)
    for model in (base, policy):
        whole = client.chat.completions.create(model=model, **ask)
        stream = client.chat.completions.create(model=model, stream=True, stream_options={"include_usage": True}, **ask)
        text, usage, ends = "", None, []
        for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                text += choice.delta.content or ""
                ends.append(choice.finish_reason)
        assert text == whole.choices[0].message.content, (text, whole)
        assert usage == whole.usage and ends[-1] == whole.choices[0].finish_reason
        print(f"  {model}: {text!r}, {usage.completion_tokens} tokens, {ends[-1]}")
    told = client.chat.completions.create(model=policy, logprobs=True, top_logprobs=3, **ask).choices[0]
    assert "".join(token.token for token in told.logprobs.content) == told.message.content
    assert all(token.logprob == token.top_logprobs[0].logprob for token in told.logprobs.content)
    several = client.chat.completions.create(model=policy, n=3, seed=7, **ask | {"temperature": 1.0})
    again = client.chat.completions.create(model=policy, n=3, seed=7, **ask | {"temperature": 1.0})
    assert [c.message.content for c in several.choices] == [c.message.content for c in again.choices]
    echoed = client.completions.create(model=base, prompt="Hail is", max_tokens=5, temperature=0, echo=True, logprobs=2)
    choice = echoed.choices[0]
    assert choice.text.startswith("Hail is") and choice.logprobs.token_logprobs[0] is None
    offset = choice.logprobs.text_offset
    assert all(choice.text[at:].startswith(token) for at, token in zip(offset[1:], choice.logprobs.tokens[1:]))
    try:
        client.chat.completions.create(model="gpt-4", **ask)
        raise AssertionError("there is no such model")
    except openai.NotFoundError as error:
        assert error.code == "model_not_found" and policy in error.message
    print("  streams, log-probabilities, several answers, echo and errors are as the client reads them")


def speed(client, tokens=64, requests=32):
    policy = client.models.list().data[1].id

    def answer(i):
        ask = dict(messages=[{"role": "user", "content": f"Tell me about number {i}."}], max_tokens=tokens, temperature=1)
        return client.chat.completions.create(model=policy, seed=i, **ask).usage.completion_tokens

    for together in (1, 16):
        start = time.perf_counter()
        with ThreadPoolExecutor(together) as pool:
            made = sum(pool.map(answer, range(requests)))
        seconds = time.perf_counter() - start
        print(f"  {together:>2} at a time: {made / seconds:.0f} tokens/s, {requests / seconds:.1f} answers/s")


if __name__ == "__main__":
    main()
