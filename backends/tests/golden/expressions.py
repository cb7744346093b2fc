#!/usr/bin/env python3
"""Renders what chat templates are made of with Jinja2, in the settings of Hugging Face's `apply_chat_template`.

    pip install jinja2
    python3 backends/tests/golden/expressions.py > backends/tests/golden/expressions.json
"""
import json

from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

CASES = r'''
{{ '  a \n'.rstrip() }}
{{ '\n a'.lstrip() }}
{{ 'xxaxx'.rstrip('x') }}
{{ ' a ' | trim }}
{{ 'xax' | trim('x') }}
{{ ('<|user|>' + '\n' + 'hi' + '<|end|>').rstrip('|>') }}
{{ ' b'.strip() ~ 1 ~ none ~ true }}
{{ 'a-b_c'.split('-') | last }}
{{ 'a b  c'.split() | length }}
{{ 'a,b,c'.split(',', 1) }}
{{ 'a,b,c'.rsplit(',', 1) }}
{{ 'Hello World'.title() }}
{{ 'hello world' | title }}
{{ 'hello' | capitalize }}
{{ 'HELLO'.capitalize() }}
{{ 'abc' | upper | lower }}
{{ 'abc'.upper().lower() }}
{{ [3, 1, 2] | sort | join(',') }}
{{ [3, 1, 2] | sort(reverse=true) | first }}
{{ [1, 1, 2] | unique | list }}
{{ [{'a': 1, 'b': 2}, {'a': 3}] | map(attribute='a') | list }}
{{ [{'a': 1}, {'a': 2}] | selectattr('a', 'equalto', 2) | list }}
{{ [{'a': 1}, {'b': 2}] | selectattr('a', 'defined') | list | length }}
{{ [{'r': 'x'}, {'r': 'y'}] | rejectattr('r', 'equalto', 'x') | map(attribute='r') | join }}
{% for k, v in {'b': 1, 'a': 2} | dictsort %}{{ k }}{{ v }}{% endfor %}
{% for k, v in {'b': 1} | items %}{{ k }}{{ v }}{% endfor %}
{{ ({'a': {'b': 1}}.items() | list)[0][1] }}
{{ {'a': 1}.get('b', 5) }}
{{ {'a': 1}.keys() | list }}
{{ {'a': 1}.values() | list }}
{{ 'x' | default('y') }}
{{ none | default('y') }}
{{ none | default('y', true) }}
{{ missing | d('z') }}
{{ '%s and %d' | format('a', 5) }}
{{ 'a\nb' | indent(2) }}
{{ 'a\nb' | indent(2, true) }}
{{ 'a\nb' | indent(width=4, first=True) }}
{{ 'abc' | replace('b', 'x') }}
{{ 'aaa'.replace('a', 'b', 2) }}
{{ [1, 2, 3] | sum }}
{{ [1, 2, 3] | max }}
{{ [4, 2] | min }}
{{ -3 | abs }}
{{ 2.567 | round(1) }}
{{ '7' | int + 1 }}
{{ 'x' | int }}
{{ '1.5' | float }}
{{ [1, 2, 3, 4] | batch(2) | list }}
{{ [1, 2, 3] | reverse | list }}
{{ 'abc' | reverse }}
{{ 'abc' | first }}
{{ 'abc' | last }}
{{ 'abc' | length }}
{{ [1, 2] | count }}
{{ 5 | string + 'x' }}
{{ 'abc' | list }}
{{ 'ab' in 'cabd' }}
{{ 'a' in ['a'] }}
{{ 'a' in {'a': 1} }}
{{ 1 is number }}
{{ 'a' is string }}
{{ {} is mapping }}
{{ [] is iterable }}
{{ [] is sequence }}
{{ none is none }}
{{ x is undefined }}
{{ true is boolean }}
{{ 3 is odd }}
{{ 4 is divisibleby(2) }}
{{ 'a' is eq('a') }}
{{ 2 is in [1, 2] }}
{{ 7 // 2 }}
{{ 7 % 3 }}
{{ 2 ** 3 }}
{{ 7 / 2 }}
{{ 1 if false }}
{{ 'a' if 0 else 'b' }}
{{ not true }}
{{ 1 < 2 <= 2 }}
{% for a in [1, 2, 3] if a > 1 %}{{ loop.index }}{{ loop.last }}{{ loop.previtem }}{% else %}none{% endfor %}
{% set ns = namespace(found=false, items=[]) %}{% for a in [1, 2] %}{% set ns.found = true %}{% set ns.items = ns.items + [a] %}{% endfor %}{{ ns.found }}{{ ns.items }}
{% set x = [1, 2] + [3] %}{{ x[1:] }}{{ x[-1] }}{{ x[::-1] }}{{ x | length }}
{% macro m(a, b='d') %}{{ a }}{{ b }}{% endmacro %}{{ m(1) }}{{ m(1, b=2) }}
{% set a, b = 1, 2 %}{{ a }}{{ b }}{% set (c, d) = (3, [4]) %}{{ c }}{{ d }}
{%- if messages is defined and messages[0]['role'] == 'system' -%}{{ messages[0]['content'].strip() }}{%- endif -%}
{% for k, v in {'x': 1, 'y': [1, {'z': none}]}.items() %}{{ k }}={{ v }};{% endfor %}
{{ {'a': [1, 2.0, true, none, 'x"y']} }}
{{ ['a', "it's"] }}
{{ ('a', 1) }}
{{ (1,) }}
{{ 'a'.startswith('a') and 'b'.endswith('b') }}
{{ 'abc'.find('c') }}
{{ 'abc'.count('b') }}
{{ 'a\nb'.splitlines() }}
{{ 'ß'.isalpha() }}
{{ '12'.isdigit() }}
{{ ['b', 'a'] | sort | list == ['a', 'b'] }}
{{ [1, 2] * 2 }}
{{ 'ab' * 2 }}
{{ 'a b  c'.rsplit() }}
{{ 'a  b c '.rsplit(None, 1) }}
{{ 'a</think>b</think>c'.rsplit('</think>', 1)[-1] }}
{{ 'abc'.rsplit('x') }}
{{ '7x' | int(3) }}
{{ '7x' | int(default=4) }}
{{ '<' | e }}
{{ "a" "b" }}
{{ 'abc'[1] }}
{{ 'abc'[0:2] }}
{{ range(3) | list }}
{{ range(1, 6, 2) | list }}
{{ dict(a=1, b=[2]) }}
{{ [['a', 1], ['b', 2]] | map('first') | list }}
{{ ['a', 'b'] | map('upper') | join(' ') }}
{{ [0, 1] | select | list }}
{{ [1, none] | reject('none') | list }}
{{ [{'a': {'b': 'c'}}] | map(attribute='a.b') | list }}
{{ [{'k': 1, 'v': 2}, {'k': 1, 'v': 3}] | groupby('k') | length }}
'''

environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
messages = [{"role": "system", "content": " s "}]
render = lambda case: environment.from_string(case).render(messages=messages)
print(json.dumps([[case, render(case)] for case in CASES.strip("\n").split("\n")], ensure_ascii=False, indent=0))
