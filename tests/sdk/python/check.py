"""The official Python client, unchanged, against a running gateway: OPENAI_BASE_URL, OPENAI_API_KEY, MODEL."""

import asyncio
import os
import time

import openai
from openai import AsyncOpenAI, OpenAI

MODEL = os.environ["MODEL"]
MESSAGES = [{"role": "user", "content": "Name three colours."}]
client = OpenAI(max_retries=0)


def models():
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL


def chat():
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=8, seed=1)
    choice = answer.choices[0]
    assert choice.message.role == "assistant" and choice.message.content, answer
    assert choice.finish_reason in ("stop", "length"), answer
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0
    assert answer.weir["nodes"], answer
    assert answer._request_id.startswith("req_")


def chat_streamed():
    common = {"model": MODEL, "messages": MESSAGES, "max_tokens": 8, "seed": 1}
    whole = client.chat.completions.create(**common)
    stream = client.chat.completions.create(**common, stream=True, stream_options={"include_usage": True})
    text, usage, reason = "", None, None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
    assert text == whole.choices[0].message.content, (text, whole)
    assert reason == whole.choices[0].finish_reason
    assert usage.completion_tokens == whole.usage.completion_tokens


def stream_helper():
    with client.chat.completions.stream(model=MODEL, messages=MESSAGES, max_tokens=8) as stream:
        kinds = {event.type for event in stream}
        # the whole answer's accessor refuses one that `max_tokens` has cut
        answer = stream.current_completion_snapshot
    assert "content.delta" in kinds or not answer.choices[0].message.content, kinds
    assert answer.choices[0].message.role == "assistant"


def several_with_logprobs():
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=4, n=2, logprobs=True, top_logprobs=2, temperature=0.5
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        for token in choice.logprobs.content:
            assert token.logprob <= 0 and len(token.top_logprobs) == 2, token


def completions():
    answer = client.completions.create(model=MODEL, prompt=["One", "Two"], max_tokens=4, logprobs=1, seed=3)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert len(answer.choices[0].logprobs.tokens) == len(answer.choices[0].logprobs.text_offset)
    chunks = client.completions.create(model=MODEL, prompt="One", max_tokens=4, seed=3, stream=True)
    text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    assert text == answer.choices[0].text, (text, answer)


def extra_fields():
    answer = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_tokens=2,
        stop=["\n\n\n\n"],
        logit_bias={"5": -100},
        extra_body={"top_k": 5, "min_p": 0.01, "weir": {"priority": "background", "tags": {"a": "b"}}},
    )
    assert answer.usage.completion_tokens <= 2


def refused(kind, code, work):
    try:
        work()
    except kind as error:
        assert error.code == code, error
    else:
        raise AssertionError(f"{code} was expected")


def errors():
    create = client.chat.completions.create
    refused(openai.NotFoundError, "model_not_found", lambda: create(model="no-such", messages=MESSAGES))
    refused(openai.BadRequestError, "empty_array", lambda: create(model=MODEL, messages=[]))
    refused(
        openai.BadRequestError,
        "decimal_above_max_value",
        lambda: create(model=MODEL, messages=MESSAGES, temperature=9),
    )
    stranger = OpenAI(api_key="wrong", max_retries=0)
    refused(openai.AuthenticationError, "invalid_api_key", lambda: list(stranger.models.list()))


def leaving_early():
    stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=500, stream=True)
    for _, _chunk in zip(range(3), stream):
        pass
    stream.close()
    chat()


async def at_once():
    async_client = AsyncOpenAI(max_retries=0)
    answers = await asyncio.gather(
        *(
            async_client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=4, seed=7)
            for _ in range(4)
        )
    )
    assert len({answer.choices[0].message.content for answer in answers}) == 1, answers


for check in (
    models, chat, chat_streamed, stream_helper, several_with_logprobs, completions, extra_fields, errors, leaving_early,
    at_once,
):
    began = time.monotonic()
    asyncio.run(check()) if asyncio.iscoroutinefunction(check) else check()
    print(f"{check.__name__}: ok, {time.monotonic() - began:.2f} s", flush=True)
