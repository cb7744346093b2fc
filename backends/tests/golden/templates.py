#!/usr/bin/env python3
"""Renders conversations as Hugging Face's `apply_chat_template` does: Jinja2 in its settings, with the models' templates.

    pip install jinja2 gguf
    python3 backends/tests/golden/templates.py FOLDER > backends/tests/golden/templates.json

FOLDER has the test models. Where a template fails, the expected prompt is null.
"""
import json
import sys

import gguf
import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


def load(path):
    reader = gguf.GGUFReader(path)
    field = lambda key: reader.fields[key].contents()
    tokens = reader.fields["tokenizer.ggml.tokens"]
    token = lambda key: bytes(tokens.parts[tokens.data[field(key)]]).decode()
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    names = {"bos_token": token("tokenizer.ggml.bos_token_id"), "eos_token": token("tokenizer.ggml.eos_token_id")}
    return environment.from_string(field("tokenizer.chat_template")), names


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city, e.g. \"Paris\" <now> & 'later' at 20°C",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1, "default": 3}, "unit": {"enum": ["C", "F", None]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
SEARCH = {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}, "x": [1.0, 2.5e-7, 1e20, -0.0, True, []]}}}
system = lambda text: {"role": "system", "content": text}
user = lambda text: {"role": "user", "content": text}
assistant = lambda text: {"role": "assistant", "content": text}
tool = lambda text: {"role": "tool", "content": text}
call = lambda name, arguments: {"type": "function", "id": "call_1", "function": {"name": name, "arguments": arguments}}

CONVERSATIONS = [
    [user("Why is the sky blue?")],
    [system("You are terse."), user("Hello")],
    [user("Hi"), assistant("Hello! How can I help?"), user("Tell me a joke.")],
    [system(""), user("")],
    [user("  leading and trailing  \n\n"), assistant("\n"), user("<|im_end|> {{ not a template }} {% raw %}")],
    [user("été 漢字 🙂 \"quoted\" \\ \t")],
    [system("a"), user("b"), system("c"), user("d")],
    [user("What is the weather in Paris?"), {"role": "assistant", "content": "", "tool_calls": [call("get_weather", {"city": "Paris", "days": 2})]}, tool("{\"t\": 21}"), assistant("21 degrees.")],
    [user("Both"), {"role": "assistant", "content": "Let me see.", "tool_calls": [call("get_weather", {"city": "Ōsaka", "unit": None}), call("search", {"q": "a<b>&'c'", "n": [1, {"z": 0, "a": 1.5}]})]}, tool("one"), tool("two"), user("Thanks")],
    [user("x"), {"role": "assistant", "content": None, "tool_calls": [call("search", {})]}],
    [assistant("I start"), user("no, I do"), assistant("partly")],
    [{"role": "user"}],
]

if __name__ == "__main__":
    templates = {name: load(f"{sys.argv[1]}/{name}.gguf") for name in ("smollm2", "qwen2")}
    cases = []
    for messages in CONVERSATIONS:
        for tools in (None, [WEATHER], [SEARCH, WEATHER]):
            for add_generation_prompt in (True, False):
                case = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
                for name, (template, names) in templates.items():
                    try:
                        case[name] = template.render(**{k: v for k, v in case.items() if k not in templates}, documents=None, **names)
                    except Exception as error:
                        print(f"{name}: {messages}: {error!r}", file=sys.stderr)
                        case[name] = None
                cases.append(case)
    print("[\n" + ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases) + "\n]")
