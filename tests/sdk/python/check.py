"""The official Python client, unchanged, against a running gateway: OPENAI_BASE_URL, OPENAI_API_KEY, MODEL."""

import asyncio
import json
import os
import time
from typing import Literal

import jsonschema
import openai
from openai import AsyncOpenAI, OpenAI, pydantic_function_tool
from pydantic import BaseModel, Field

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


def responses():
    common = {"model": MODEL, "max_output_tokens": 8, "extra_body": {"seed": 1}}
    answer = client.responses.create(**common, input="Name three colours.", instructions="Be brief.")
    assert answer.status in ("completed", "incomplete") and answer.output_text, answer
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert answer.weir["nodes"], answer
    with client.responses.stream(**common, input="Name three colours.", instructions="Be brief.") as stream:
        kinds, text = [], ""
        for event in stream:
            kinds.append(event.type)
            text += event.delta if event.type == "response.output_text.delta" else ""
    assert text == answer.output_text, (text, answer)
    assert kinds[0] == "response.created" and kinds[-1] == f"response.{answer.status}", kinds
    on = client.responses.create(**common, input="And more?", previous_response_id=answer.id)
    assert on.usage.input_tokens > answer.usage.input_tokens, on
    assert client.responses.retrieve(answer.id).output_text == answer.output_text
    client.responses.delete(answer.id)
    create = client.responses.create
    gone = {"input": "x", "previous_response_id": answer.id}
    refused(openai.BadRequestError, "previous_response_not_found", lambda: create(**common, **gone))


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


class Forecast(BaseModel):
    """What the weather will be."""

    town: str = Field(max_length=12)
    days: int = Field(ge=1, le=14)
    unit: Literal["C", "F"]
    warnings: list[Literal["storm", "frost", "flood"]] = Field(max_length=3)


def structured():
    for seed in range(2):
        common = {"model": MODEL, "messages": MESSAGES, "max_tokens": 300, "seed": seed}
        answer = client.chat.completions.parse(**common, response_format=Forecast)
        assert isinstance(answer.choices[0].message.parsed, Forecast), answer
        with client.chat.completions.stream(**common, response_format=Forecast) as stream:
            streamed = stream.get_final_completion()
        assert streamed.choices[0].message.parsed == answer.choices[0].message.parsed, (streamed, answer)


def schemas():
    node = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "pattern": "^[a-z]{1,6}$"},
            "kids": {"type": "array", "items": {"$ref": "#/$defs/leaf"}, "maxItems": 2},
        },
        "required": ["name", "kids"],
        "additionalProperties": False,
        "$defs": {"leaf": {"anyOf": [{"type": "null"}, {"type": "integer", "minimum": -5, "maximum": 99}]}},
    }
    date = {"type": "object", "properties": {"on": {"type": "string", "format": "date"}}, "required": ["on"], "additionalProperties": False}
    union = {"anyOf": [{"const": "none"}, {"enum": [1, 2.5, True]}, {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3}]}
    for number, schema in enumerate([node, date, union]):
        for seed in range(3):
            form = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}
            answer = client.chat.completions.create(
                model=MODEL, messages=MESSAGES, max_tokens=200, seed=seed, response_format=form
            )
            assert answer.choices[0].finish_reason == "stop", (number, seed, answer)
            jsonschema.validate(json.loads(answer.choices[0].message.content), schema)
    form = {"type": "json_object"}
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=100, response_format=form)
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict), answer


def tools():
    offered = [pydantic_function_tool(Forecast, name="forecast"), pydantic_function_tool(Forecast, name="almanac")]
    messages = [{"role": "user", "content": "What will the weather be in Ulm?"}]
    common = {"model": MODEL, "messages": messages, "tools": offered, "max_tokens": 400, "seed": 2}
    kinds = set()
    with client.chat.completions.stream(**common, tool_choice="required", parallel_tool_calls=False) as stream:
        for event in stream:
            kinds.add(event.type)
        answer = stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds and "tool_calls.function.arguments.done" in kinds, kinds
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls" and len(choice.message.tool_calls) == 1, answer
    call = choice.message.tool_calls[0]
    assert isinstance(call.function.parsed_arguments, Forecast), call
    named = {"type": "function", "function": {"name": "almanac"}}
    whole = client.chat.completions.create(**common, tool_choice=named, parallel_tool_calls=False)
    assert whole.choices[0].message.tool_calls[0].function.name == "almanac", whole
    assert whole.choices[0].message.content is None, whole
    result = {"role": "tool", "tool_call_id": call.id, "content": json.dumps({"high": 21})}
    asked = {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": call.function.arguments}}
    messages += [{"role": "assistant", "content": None, "tool_calls": [asked]}, result]
    after = client.chat.completions.create(**{**common, "max_tokens": 8}, tool_choice="auto")
    assert after.usage.prompt_tokens > whole.usage.prompt_tokens, after
    none = client.chat.completions.create(**{**common, "max_tokens": 8}, tool_choice="none")
    assert none.choices[0].message.tool_calls is None, none
    hostile = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": {"type": "objekt"}}}
    refused(
        openai.BadRequestError,
        "invalid_json_schema",
        lambda: client.chat.completions.create(model=MODEL, messages=MESSAGES, response_format=hostile),
    )


for check in (
    models, chat, chat_streamed, stream_helper, several_with_logprobs, completions, extra_fields, responses, errors,
    leaving_early, at_once, structured, schemas, tools,
):
    began = time.monotonic()
    asyncio.run(check()) if asyncio.iscoroutinefunction(check) else check()
    print(f"{check.__name__}: ok, {time.monotonic() - began:.2f} s", flush=True)
