"""Modelfiles: chat templates as Ollama's own, against what transformers renders of the Jinja ones."""

from __future__ import annotations

import re
from typing import Any

import pytest
from transformers import AutoTokenizer

from qconv.gguf import vocabulary_of
from qconv.gguf.ollama import Turns, model_file, turns_of
from tests.conftest import TINY_LLAMA

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}" + CHATML
)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m.role + ']\\n\\n' + m.content + '<eot>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\\n\\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + '</s>' }}"
    "{% else %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
)
BY_PLACE = "{% for m in messages %}{{ loop.index ~ m.role ~ ': ' ~ m.content ~ '\\n' }}{% endfor %}"
CONVERSATION = [("system", "Be brief."), ("user", "Why?\nAnd how?"), ("assistant", "So."), ("user", "Really?")]


def tokenizer_with(template: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(TINY_LLAMA)
    tokenizer.chat_template = template
    return tokenizer


def as_ollama(text: str, messages: list[tuple[str, str]]) -> str:
    """Go's template language, as far as Modelfiles here use it."""
    template = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)
    assert template is not None
    before, _, rest = template[1].partition("{{ range .Messages }}{{ ")
    head = before.removeprefix("{{ if not .System }}").removesuffix("{{ end }}")
    body, _, answer = rest.partition("{{ end }}{{ end }}")
    cases = dict(re.findall(r'(?s)if eq \.Role "(\w+)" \}\}(.*?)(?=\{\{ else |\Z)', body))
    turns = "".join(cases[role].replace("{{ .Content }}", content) for role, content in messages)
    has_system = any(role == "system" for role, _ in messages)
    return ("" if has_system else head) + turns + answer


@pytest.mark.parametrize("template", [CHATML, DEFAULT_SYSTEM, HEADERS], ids=["chatml", "default system", "with bos"])
def test_modelfiles_render_what_the_template_does(template: str) -> None:
    tokenizer = tokenizer_with(template)
    text = model_file("m.gguf", turns_of(tokenizer, adds_bos="bos_token" in template))
    assert text.startswith("FROM ./m.gguf\n")
    for messages in (CONVERSATION, CONVERSATION[1:]):
        rows = [{"role": role, "content": content} for role, content in messages]
        expected = tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=True)
        assert as_ollama(text, messages) == expected.removeprefix(tokenizer.bos_token if template == HEADERS else "")
    stop = "<eot>" if template == HEADERS else "<|im_end|>"
    assert text.endswith(f'PARAMETER stop "{stop}"\n')


@pytest.mark.parametrize("template", [LLAMA2, BY_PLACE, CHATML.replace("<|im_end|>", "{'{{'}}")])
def test_other_templates_are_left_to_the_file(template: str) -> None:
    assert turns_of(tokenizer_with(template), adds_bos=False) is None
    assert model_file("m.gguf", None) == "FROM ./m.gguf\n"


def test_the_vocabulary_has_the_turns_of_its_template() -> None:
    turns = vocabulary_of(tokenizer_with(CHATML), 2048, "here").turns
    assert isinstance(turns, Turns)
    assert turns.text([("user", "Hi")], asks=True) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert vocabulary_of(tokenizer_with(""), 2048, "here").turns is None
