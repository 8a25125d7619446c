#!/usr/bin/env python3
"""Remakes tests/data/chat/goldens.json: every case of cases.json as jinja2 renders it.

The environment is the one that transformers sets up for chat templates. Needs jinja2 (pip install
jinja2). Two things are done to messages before, as this crate and vLLM do them: content that is null
is an empty string, and arguments of tool calls are parsed.
"""

import json
from pathlib import Path

import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data" / "chat"
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


class Generation(jinja2.ext.Extension):
    """{% generation %}, as a block that renders its contents in a scope of its own."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("_contents"), [], [], body).set_lineno(line)

    def _contents(self, caller):
        return caller()


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def plain(message):
    message = dict(message)
    if message.get("content") is None:
        message["content"] = ""
    for call in message.get("tool_calls", []):
        arguments = call["function"]["arguments"]
        if isinstance(arguments, str):
            call["function"]["arguments"] = json.loads(arguments or "{}")
    return message


def main():
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = tojson
    goldens = {}
    for case in json.loads((DATA / "cases.json").read_text("utf-8")):
        name = case["template"]
        path = ROOT / "examples/demo-model/chat_template.jinja" if name == "demo" else DATA / f"{name}.jinja"
        context = dict(TOKENS, **case.get("extra", {}))
        if "enable_thinking" in case:
            context["enable_thinking"] = case["enable_thinking"]
        tools = json.loads((DATA / f"{case['tools']}.json").read_text("utf-8")) if "tools" in case else None
        goldens[case["name"]] = env.from_string(path.read_text("utf-8")).render(
            messages=[plain(message) for message in case["messages"]],
            tools=tools,
            documents=None,
            add_generation_prompt=case.get("add_generation_prompt", False),
            **context,
        )
    text = json.dumps(goldens, ensure_ascii=False, indent=1)
    (DATA / "goldens.json").write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
