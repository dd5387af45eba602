# ruff: noqa: E501  (templates stand here as models ship them)
"""Which token ends an assistant's turn, read from chat templates in the shapes of the model families."""

import pytest

from app.registry.models.chat_templates import EOS, MAX_TEMPLATE_CHARACTERS, turn_end
from tests.base_model_folders import CHATML

LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
)
GEMMA3 = (
    "{%- for message in messages -%}{{ '<start_of_turn>' + role + '\\n' }}{%- if message['content'] is string -%}"
    "{{ message['content'] | trim }}{%- elif message['content'] is iterable -%}{%- for item in message['content'] -%}"
    "{%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}{%- elif item['type'] == 'text' -%}{{ item['text'] }}"
    "{%- endif -%}{%- endfor -%}{%- endif -%}{{ '<end_of_turn>\\n' }}{%- endfor -%}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
QWEN3 = (
    "{%- for message in messages %}{%- if message.content is string %}{%- set content = message.content %}{%- else %}"
    "{%- set content = '' %}{%- endif %}"
    '{%- if (message.role == "user") or (message.role == "system" and not loop.first) %}'
    "{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}"
    "{%- elif message.role == \"assistant\" %}{%- set reasoning_content = '' %}"
    "{%- if message.reasoning_content is string %}{%- set reasoning_content = message.reasoning_content %}{%- else %}"
    "{%- if '</think>' in content %}{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{%- endif %}{{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content + '\\n</think>\\n\\n' + content }}"
    '{%- if message.tool_calls %}{%- for tool_call in message.tool_calls %}{{- \'<tool_call>\\n{"name": "\' }}'
    "{{- tool_call.arguments | tojson }}{{- '}\\n</tool_call>' }}{%- endfor %}{%- endif %}{{- '<|im_end|>\\n' }}"
    "{%- elif message.role == \"tool\" %}{{- '<|im_start|>user\\n<tool_response>\\n' }}{{- content }}"
    "{{- '\\n</tool_response>' }}{{- '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
)
R1 = (
    "{{bos_token}}{%- for message in messages %}{%- if message['role'] == 'user' %}{{'<｜User｜>' + message['content']}}"
    "{%- endif %}{%- if message['role'] == 'assistant' and message['content'] is not none %}"
    "{% set content = message['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}"
    "{% endif %}{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor -%}"
    "{% if add_generation_prompt %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"
)
PHI3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\\n' + message['content'] + '<|end|>\\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\\n' + message['content'] + '<|end|>\\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\\n' + message['content'] + '<|end|>\\n'}}{% endif %}{% endfor %}"
)
QWEN2_VL = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endif %}{% endfor %}"
)
VICUNA = "{% for m in messages %}{% if m['role'] == 'user' %}USER: {{ m['content'] }}{% else %}ASSISTANT: {{ m['content'] }}</s>{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "<|im_end|>"),
        (LLAMA3, "<|eot_id|>"),
        (GEMMA, "<end_of_turn>"),
        (GEMMA3, "<end_of_turn>"),
        (MISTRAL, EOS),
        (QWEN3, "<|im_end|>"),
        (R1, "<｜end▁of▁sentence｜>"),
        (PHI3, "<|end|>"),
        (QWEN2_VL, "<|im_end|>"),
        (VICUNA, "</s>"),
    ],
    ids=["chatml", "llama3", "gemma", "gemma3", "mistral", "qwen3", "r1", "phi3", "qwen2-vl", "vicuna"],
)
def test_finds_the_end_of_a_turn(template: str, expected: str) -> None:
    assert turn_end(template) == expected
    assert turn_end(template, [expected, "<|im_start|>", "<start_of_image>"]) == expected


@pytest.mark.parametrize(
    "template",
    [
        "",
        "{{ messages }}",
        "{% for m in messages %}{{ m['content'] }}{% endfor %}",
        "{% if m.role == 'assistant' %}{{ m.content }}<|a|>{% endif %}{% if m.role == 'assistant' %}{{ m.content }}<|b|>{% endif %}",
        "{{ content" + "{% if" * 1000,
        CHATML + " " * MAX_TEMPLATE_CHARACTERS,
    ],
    ids=["empty", "all", "no-end", "two-ends", "broken", "long"],
)
def test_claims_nothing_that_it_cannot_tell(template: str) -> None:
    assert turn_end(template) is None


def test_reading_takes_time_in_proportion_to_the_template() -> None:
    assert turn_end("{{ '" * 40_000) is None
    assert turn_end("{% if 'user' %}" * 10_000) is None
    assert turn_end("{{ '" + r"\'" * 90_000 + " }}") is None
    assert turn_end("{{ content " + "<|" * 90_000 + " }}") is None
