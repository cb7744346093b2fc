"""LangChain over a running gateway, by both of OpenAI's APIs: OPENAI_BASE_URL, OPENAI_API_KEY, MODEL."""

import os
import time

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

MODEL = os.environ["MODEL"]
ASKED = [SystemMessage("Be brief."), HumanMessage("Name three colours.")]


class Forecast(BaseModel):
    """What the weather will be."""

    town: str = Field(max_length=12)
    days: int = Field(ge=1, le=14)


@tool(args_schema=Forecast)
def forecast(town: str, days: int) -> str:
    """What the weather will be in a town."""
    return f"{days} days of rain in {town}"


def model(responses, **more):
    return ChatOpenAI(model=MODEL, max_tokens=200, seed=1, max_retries=0, use_responses_api=responses, **more)


def chat(responses):
    # the Responses API has no seed of its own
    llm = model(responses) if not responses else ChatOpenAI(
        model=MODEL, max_tokens=16, max_retries=0, use_responses_api=True, extra_body={"seed": 1}
    )
    answer = llm.invoke(ASKED, max_tokens=16)
    assert answer.text and answer.usage_metadata["output_tokens"] <= 16, answer
    pieces = list(llm.stream(ASKED, max_tokens=16))
    whole = sum(pieces[1:], pieces[0])
    assert whole.text == answer.text, (whole, answer)


def structured(_responses):
    for method in ("json_schema", "function_calling"):
        # strict: else a model that says anything may add fields for ever
        llm = model(False).with_structured_output(Forecast, method=method, strict=True)
        answer = llm.invoke("The weather in Ulm?")
        assert isinstance(answer, Forecast), (method, answer)


def tools(_responses):
    llm = model(False).bind_tools([forecast], tool_choice="required", strict=True, parallel_tool_calls=False)
    answer = llm.invoke("The weather in Ulm?")
    assert answer.tool_calls and answer.tool_calls[0]["name"] == "forecast", answer
    result = forecast.invoke(answer.tool_calls[0])
    turns = [HumanMessage("The weather in Ulm?"), answer, ToolMessage(result.content, tool_call_id=result.tool_call_id)]
    assert isinstance(model(False).invoke(turns, max_tokens=8), AIMessage)


for check in (chat, structured, tools):
    for responses in (False, True) if check is chat else (False,):
        began = time.monotonic()
        check(responses)
        print(f"{check.__name__} responses={responses}: ok, {time.monotonic() - began:.2f} s", flush=True)
