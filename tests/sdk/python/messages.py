"""Anthropic's Python client, unchanged, against a running gateway: ANTHROPIC_BASE_URL, ANTHROPIC_API_KEY, MODEL."""

import asyncio
import os
import time

import anthropic
from anthropic import Anthropic, AsyncAnthropic

MODEL = os.environ["MODEL"]
MESSAGES = [{"role": "user", "content": "Name three colours."}]
SEED = {"seed": 1}
client = Anthropic(max_retries=0)


def message():
    answer = client.messages.create(model=MODEL, messages=MESSAGES, max_tokens=8, system="Be brief.")
    assert answer.type == "message" and answer.role == "assistant", answer
    assert answer.content[0].type == "text" and answer.content[0].text, answer
    assert answer.stop_reason in ("end_turn", "max_tokens"), answer
    assert answer.usage.input_tokens + answer.usage.cache_read_input_tokens > 0, answer
    assert answer.weir["nodes"], answer
    assert answer._request_id.startswith("req_")


def streamed():
    common = {"model": MODEL, "messages": MESSAGES, "max_tokens": 8, "extra_body": SEED}
    whole = client.messages.create(**common)
    with client.messages.stream(**common) as stream:
        text = "".join(stream.text_stream)
        answer = stream.get_final_message()
    assert text == whole.content[0].text, (text, whole)
    assert (answer.content[0].text, answer.stop_reason) == (text, whole.stop_reason), answer
    assert answer.usage.output_tokens == whole.usage.output_tokens, answer
    kinds = [event.type for event in client.messages.create(**common, stream=True)]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"], kinds


def several_turns():
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "I am Ada."}]},
        {"role": "assistant", "content": "Hello, Ada."},
        {"role": "user", "content": "Who am I?"},
    ]
    answer = client.messages.create(model=MODEL, messages=turns, max_tokens=4, stop_sequences=["\n\n\n\n"])
    assert answer.usage.output_tokens <= 4
    longer = client.messages.count_tokens(model=MODEL, messages=turns).input_tokens
    assert longer > client.messages.count_tokens(model=MODEL, messages=turns[:1]).input_tokens > 0


def stop_sequence():
    common = {"model": MODEL, "messages": MESSAGES, "max_tokens": 8, "extra_body": SEED}
    stop = client.messages.create(**common).content[0].text[2:4]
    answer = client.messages.create(**common, stop_sequences=["never", stop])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop), answer


def models():
    listed = client.models.list()
    assert MODEL in [model.id for model in listed], listed
    assert client.models.retrieve(MODEL).id == MODEL


def refused(kind, words, work):
    try:
        work()
    except kind as error:
        assert error.body["type"] == "error" and words in error.body["error"]["message"], error
    else:
        raise AssertionError(f"{kind} was expected")


def errors():
    create = client.messages.create
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    common = {"max_tokens": 4, "messages": MESSAGES}
    refused(anthropic.NotFoundError, "no-such", lambda: create(**common, model="no-such"))
    refused(anthropic.BadRequestError, "messages", lambda: create(model=MODEL, max_tokens=4, messages=[]))
    seen = [{"role": "user", "content": [image]}]
    refused(anthropic.BadRequestError, "text", lambda: create(model=MODEL, max_tokens=4, messages=seen))
    stranger = Anthropic(api_key="wrong", max_retries=0)
    refused(
        anthropic.AuthenticationError, "API key", lambda: stranger.messages.create(**common, model=MODEL)
    )


def leaving_early():
    with client.messages.stream(model=MODEL, messages=MESSAGES, max_tokens=500) as stream:
        for _, _text in zip(range(3), stream.text_stream):
            pass
    message()


async def at_once():
    async_client = AsyncAnthropic(max_retries=0)
    common = {"model": MODEL, "messages": MESSAGES, "max_tokens": 4, "extra_body": SEED}
    answers = await asyncio.gather(*(async_client.messages.create(**common) for _ in range(4)))
    assert len({answer.content[0].text for answer in answers}) == 1, answers


for check in (
    message, streamed, several_turns, stop_sequence, models, errors, leaving_early, at_once,
):
    began = time.monotonic()
    asyncio.run(check()) if asyncio.iscoroutinefunction(check) else check()
    print(f"{check.__name__}: ok, {time.monotonic() - began:.2f} s", flush=True)
