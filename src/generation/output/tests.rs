//! What parsing makes of a model's output.

use super::*;
use crate::random::Random;
use serde_json::json;

fn joined(events: Vec<OutputEvent>) -> Vec<OutputEvent> {
    let mut result: Vec<OutputEvent> = Vec::new();
    for event in events {
        match (result.last_mut(), event) {
            (Some(OutputEvent::Reasoning(a)), OutputEvent::Reasoning(b)) => a.push_str(&b),
            (Some(OutputEvent::Content(a)), OutputEvent::Content(b)) => a.push_str(&b),
            (_, event) => result.push(event),
        }
    }
    result
}

fn whole(thinking: bool, tools: Option<&Value>, text: &str) -> Vec<OutputEvent> {
    let mut parser = OutputParser::new(thinking, tools);
    let mut events = parser.push(text);
    events.extend(parser.finish());
    joined(events)
}

fn reasoning(text: &str) -> OutputEvent {
    OutputEvent::Reasoning(text.into())
}

fn content(text: &str) -> OutputEvent {
    OutputEvent::Content(text.into())
}

fn call(name: &str, arguments: Value) -> OutputEvent {
    OutputEvent::ToolCall {
        name: name.into(),
        arguments: arguments.as_object().unwrap().clone(),
    }
}

fn tools() -> Value {
    json!([
        {"type": "function", "function": {"name": "edit", "parameters": {"type": "object", "properties": {
            "text": {"type": "string"},
            "line": {"type": "integer"},
            "note": {"type": ["string", "null"]},
            "either": {"anyOf": [{"type": "string"}, {"type": "object"}]}
        }}}},
        {"name": "mcp.list-files"}
    ])
}

/// Outputs with what they mean: (thinking was open, output, events). Tools are declared.
fn cases() -> Vec<(bool, &'static str, Vec<OutputEvent>)> {
    vec![
        (false, "", vec![]),
        (
            false,
            " Plain <b>text</b> 1 < 2 \n",
            vec![content(" Plain <b>text</b> 1 < 2 \n")],
        ),
        (false, "\n ", vec![content("\n ")]),
        (
            true,
            "\nHm, é🦀.\n</think>\n\nFour.\n",
            vec![reasoning("Hm, é🦀."), content("Four.\n")],
        ),
        (
            true,
            "<think>Twice</think>a",
            vec![reasoning("Twice"), content("a")],
        ),
        (
            true,
            "Never ends <think> ",
            vec![reasoning("Never ends <think> ")],
        ),
        (true, "</think>Direct", vec![content("Direct")]),
        (
            false,
            "<think>Own</think>Answer",
            vec![reasoning("Own"), content("Answer")],
        ),
        (false, "\n<think></think>", vec![]),
        (false, "</think>Lone", vec![content("Lone")]),
        (
            false,
            "Say <think> and </think>.",
            vec![content("Say <think> and </think>.")],
        ),
        (false, "Cut <tool_c", vec![content("Cut <tool_c")]),
        (
            true,
            "Look.</think>I look. \n<tool_call>mcp.list-files</tool_call>\n<tool_call>edit\n<arg_key> line </arg_key>\n\
             <arg_value> 3 </arg_value>\n</tool_call> \nDone",
            vec![
                reasoning("Look."),
                content("I look."),
                call("mcp.list-files", json!({})),
                call("edit", json!({"line": 3})),
                content("Done"),
            ],
        ),
        (
            false,
            "<tool_call>edit<arg_key>text</arg_key><arg_value>\n  </tool_call> <arg_key> é\n</arg_value>\
             <arg_key>note</arg_key><arg_value>null</arg_value><arg_key>either</arg_key><arg_value>{\"a\": 1}\
             </arg_value></tool_call>",
            vec![call(
                "edit",
                json!({"text": "\n  </tool_call> <arg_key> é\n", "note": null, "either": {"a": 1}}),
            )],
        ),
        (
            false,
            "<tool_call>edit<arg_key>text</arg_key><arg_value>42</arg_value><arg_key>note</arg_key>\
             <arg_value>true</arg_value><arg_key>other</arg_key><arg_value>[1, \"x\"]</arg_value>\
             <arg_key>line</arg_key><arg_value>many words</arg_value></tool_call>",
            vec![call(
                "edit",
                json!({"text": "42", "note": "true", "other": [1, "x"], "line": "many words"}),
            )],
        ),
        (
            false,
            "<tool_call>unknown:tool<arg_key>n</arg_key><arg_value>1</arg_value><arg_key>n</arg_key>\
             <arg_value>\"2\"</arg_value></tool_call>",
            vec![call("unknown:tool", json!({"n": "2"}))],
        ),
        // Calls within reasoning: a declared tool's counts, another's does not.
        (
            true,
            "I call <tool_call>no</tool_call> or <tool_call>edit</tool_call> </think> then",
            vec![
                reasoning("I call <tool_call>no</tool_call> or"),
                call("edit", json!({})),
                content("then"),
            ],
        ),
        // Malformed and cut short.
        (
            false,
            "A <tool_call> is a tag. <tool_call>{\"name\": 1}</tool_call>",
            vec![content(
                "A <tool_call> is a tag. <tool_call>{\"name\": 1}</tool_call>",
            )],
        ),
        (
            false,
            "<tool_call></tool_call> <tool_call>edit<arg_value>1</arg_value></tool_call>",
            vec![content(
                "<tool_call></tool_call> <tool_call>edit<arg_value>1</arg_value></tool_call>",
            )],
        ),
        (
            false,
            "x <tool_call>edit<arg_key></arg_key><arg_value>1</arg_value></tool_call>",
            vec![content(
                "x <tool_call>edit<arg_key></arg_key><arg_value>1</arg_value></tool_call>",
            )],
        ),
        (
            false,
            "x <tool_call>edit<arg_key>text</arg_key><arg_value>unfinished </arg_val",
            vec![content(
                "x <tool_call>edit<arg_key>text</arg_key><arg_value>unfinished </arg_val",
            )],
        ),
        (
            false,
            "<tool_call>edit<tool_call>edit</tool_call>",
            vec![content("<tool_call>edit"), call("edit", json!({}))],
        ),
    ]
}

#[test]
fn outputs_mean_what_they_should() {
    for (thinking, output, events) in cases() {
        assert_eq!(whole(thinking, Some(&tools()), output), events, "{output}");
    }
}

#[test]
fn every_cut_gives_the_same_events() {
    let tools = tools();
    let mut random = Random::new(12);
    for (thinking, output, events) in cases() {
        let bytes = output.as_bytes();
        let run = |cuts: &[usize]| {
            let mut parser = OutputParser::new(thinking, Some(&tools));
            let mut seen = Vec::new();
            let mut from = 0;
            for &cut in cuts {
                seen.extend(parser.push(&bytes[from..cut]));
                from = cut;
            }
            seen.extend(parser.push(&bytes[from..]));
            seen.extend(parser.finish());
            joined(seen)
        };
        for cut in 0..=bytes.len() {
            assert_eq!(run(&[cut]), events, "{output} cut at {cut}");
        }
        assert_eq!(
            run(&(0..=bytes.len()).collect::<Vec<_>>()),
            events,
            "{output} byte by byte"
        );
        for _ in 0..50 {
            let cuts: Vec<usize> = (0..=bytes.len()).filter(|_| random.below(4) == 0).collect();
            assert_eq!(run(&cuts), events, "{output} cut at {cuts:?}");
        }
    }
}

#[test]
fn any_sequence_of_tags_is_read_alike_however_it_is_cut() {
    let tools = tools();
    let parts = [
        THINK, END_THINK, CALL, END_CALL, KEY, END_KEY, VALUE, END_VALUE, "edit", "line", " ", "\n", "é",
        "<", "7",
    ];
    let mut random = Random::new(13);
    let mut calls = 0;
    for round in 0..20_000 {
        let mut text = String::new();
        for _ in 0..random.below(14) {
            // Half of the time what a call needs next, so that some come out whole.
            let next = [
                CALL, "edit", KEY, "line", END_KEY, VALUE, "7", END_VALUE, END_CALL,
            ];
            let follows = next
                .iter()
                .position(|part| text.ends_with(part))
                .map(|at| next[(at + 1) % 9]);
            text.push_str(match follows {
                Some(part) if random.below(4) != 0 => part,
                _ => parts[random.below(parts.len())],
            });
        }
        let thinking = round % 2 == 0;
        let expected = whole(thinking, Some(&tools), &text);
        calls += expected
            .iter()
            .filter(|event| matches!(event, OutputEvent::ToolCall { .. }))
            .count();
        let mut parser = OutputParser::new(thinking, Some(&tools));
        let mut seen = Vec::new();
        for byte in text.bytes() {
            seen.extend(parser.push([byte]));
        }
        seen.extend(parser.finish());
        assert_eq!(joined(seen), expected, "{text:?}");
        if !text.contains('<') && !thinking {
            assert_eq!(
                expected,
                if text.is_empty() {
                    vec![]
                } else {
                    vec![content(&text)]
                }
            );
        }
    }
    assert!(calls > 100, "{calls}");
}

#[test]
fn text_is_not_held_back_without_need() {
    let mut parser = OutputParser::new(false, None);
    assert_eq!(parser.push("a < b <i>"), [content("a < b <i>")]);
    assert_eq!(parser.push(" <tool_call>the"), []);
    assert_eq!(joined(parser.push(" end")), [content(" <tool_call>the end")]);
    // Without tools, a call within reasoning is reasoning at once.
    let mut parser = OutputParser::new(true, None);
    assert_eq!(parser.push("x <tool_call>f"), [reasoning("x <tool_call>f")]);
}

#[test]
fn a_long_value_is_read_in_linear_time() {
    let mut parser = OutputParser::new(false, None);
    parser.push("<tool_call>f<arg_key>k</arg_key><arg_value>");
    let text = "é<".repeat(200_000);
    for piece in text.split_inclusive('<') {
        assert!(parser.push(piece).is_empty());
    }
    assert_eq!(
        parser.push("</arg_value></tool_call>"),
        [call("f", json!({"k": text}))]
    );
}
