//! What a model says, taken apart: its reasoning, its answer, its tool calls.

use std::collections::HashMap;

use serde_json::{Map, Value};

use super::detokenize::Utf8Stream;

const THINK: &str = "<think>";
const END_THINK: &str = "</think>";
const CALL: &str = "<tool_call>";
const END_CALL: &str = "</tool_call>";
const KEY: &str = "<arg_key>";
const END_KEY: &str = "</arg_key>";
const VALUE: &str = "<arg_value>";
const END_VALUE: &str = "</arg_value>";

/// A piece of what the model said. Texts that follow each other belong together.
#[derive(Debug, Clone, PartialEq)]
pub enum OutputEvent {
    /// Thinking, without its `<think>` and `</think>`.
    Reasoning(String),
    /// The answer.
    Content(String),
    /// A call of a tool, once it is complete.
    ToolCall {
        /// The tool.
        name: String,
        /// Its arguments in the order they came; of two with one name the later counts.
        arguments: Map<String, Value>,
    },
}

/// Reads GLM's output, `<think>…</think>answer<tool_call>name<arg_key>k</arg_key><arg_value>v</arg_value></tool_call>`,
/// from a stream cut anywhere, even within a character.
///
/// - White space next to a tag is dropped; all other text is passed on to the byte.
/// - `<think>` counts before any other text, and again after a tool call. A `</think>` without it is
///   dropped there, and is text elsewhere. Reasoning that never ends stays reasoning.
/// - A value is JSON where it parses as JSON of a type that the tool declares (any, where it declares
///   none); otherwise, and for parameters declared as strings, it is the string between its tags as it
///   stands: the indentation of a line of code is part of it.
/// - A call that is malformed or cut short is passed on as text. A call within reasoning counts, and
///   ends the reasoning, if the tool is declared; models do this, and the call would be lost.
///
/// ```
/// use candle_mmfp4::generation::{OutputEvent, OutputParser};
///
/// let mut parser = OutputParser::new(true, None);
/// let mut events = parser.push("Easy.</th");
/// events.extend(parser.push("ink>4"));
/// events.extend(parser.finish());
/// assert_eq!(
///     events,
///     [OutputEvent::Reasoning("Easy.".into()), OutputEvent::Content("4".into())]
/// );
/// ```
#[derive(Debug)]
pub struct OutputParser {
    bytes: Utf8Stream,
    /// What has not been decided yet; where there is a call, it begins at `call.start`.
    buffer: String,
    reasoning: bool,
    /// No text since the start or the last tag that `<think>` can follow.
    fresh: bool,
    /// The last thing was a tag, so that white space is dropped.
    after_tag: bool,
    call: Option<Call>,
    tools: Vec<Tool>,
}

impl OutputParser {
    /// Starts an output. `thinking` says that the prompt ended with an open `<think>`; `tools` is the
    /// list that the chat template was given, in OpenAI's form (a bare list of functions will do).
    pub fn new(thinking: bool, tools: Option<&Value>) -> Self {
        Self {
            bytes: Utf8Stream::default(),
            buffer: String::new(),
            reasoning: thinking,
            fresh: true,
            after_tag: thinking,
            call: None,
            tools: tools
                .and_then(Value::as_array)
                .map(|list| list.iter().filter_map(Tool::declared).collect())
                .unwrap_or_default(),
        }
    }

    /// Takes the next piece, text or bytes; gives what is certain by now.
    pub fn push(&mut self, piece: impl AsRef<[u8]>) -> Vec<OutputEvent> {
        let text = self.bytes.push(piece.as_ref());
        self.buffer.push_str(&text);
        let mut events = Vec::new();
        self.advance(&mut events);
        events
    }

    /// Ends the output; what was held back is text.
    pub fn finish(&mut self) -> Vec<OutputEvent> {
        let mut events = Vec::new();
        let rest = self.bytes.finish();
        self.buffer.push_str(&rest);
        self.advance(&mut events);
        self.call = None;
        self.text(self.buffer.len(), &mut events);
        events
    }

    fn advance(&mut self, events: &mut Vec<OutputEvent>) {
        loop {
            if let Some(call) = &mut self.call {
                match call.advance(&self.buffer) {
                    Progress::Incomplete => return,
                    Progress::Malformed => self.refuse_call(events),
                    Progress::Complete => self.accept_call(events),
                }
            } else {
                match self.find_tag() {
                    Found::Tag { start, tag: CALL } => {
                        self.call = Some(Call::new(start));
                    }
                    Found::Tag { start, tag } => {
                        self.pass_tag(start, start + tag.len(), events);
                        self.reasoning = tag == THINK;
                    }
                    Found::UndecidedFrom(start) => {
                        // White space too waits, for a tag may follow.
                        self.text(self.buffer[..start].trim_end().len(), events);
                        return;
                    }
                }
            }
        }
    }

    /// The first `<` of the buffer that is, or may become, a tag.
    fn find_tag(&self) -> Found {
        for (start, _) in self.buffer.match_indices('<') {
            let fresh = self.fresh && self.buffer[..start].trim().is_empty();
            let rest = &self.buffer[start..];
            for tag in [THINK, END_THINK, CALL] {
                let counts = match tag {
                    THINK => fresh,
                    END_THINK => fresh || self.reasoning,
                    _ => !self.reasoning || !self.tools.is_empty(),
                };
                if counts && rest.starts_with(tag) {
                    return Found::Tag { start, tag };
                }
                if counts && tag.starts_with(rest) {
                    return Found::UndecidedFrom(start);
                }
            }
        }
        Found::UndecidedFrom(self.buffer.len())
    }

    /// Gives out the buffer up to `end` as text, without white space after a tag.
    fn text(&mut self, end: usize, events: &mut Vec<OutputEvent>) {
        let text: String = self.buffer.drain(..end).collect();
        let text = if self.after_tag { text.trim_start() } else { &text };
        if text.is_empty() {
            return;
        }
        self.after_tag = false;
        self.fresh = false;
        events.push(if self.reasoning {
            OutputEvent::Reasoning(text.to_owned())
        } else {
            OutputEvent::Content(text.to_owned())
        });
    }

    /// Gives out the text before a tag and drops the tag, with the white space before it.
    fn pass_tag(&mut self, start: usize, end: usize, events: &mut Vec<OutputEvent>) {
        let before = self.buffer[..start].trim_end().len();
        self.text(before, events);
        self.buffer.drain(..end - before);
        self.fresh = true;
        self.after_tag = true;
    }

    fn refuse_call(&mut self, events: &mut Vec<OutputEvent>) {
        if let Some(call) = self.call.take() {
            self.text(call.start + CALL.len(), events);
        }
    }

    fn accept_call(&mut self, events: &mut Vec<OutputEvent>) {
        let Some(call) = self.call.take() else { return };
        let tool = self.tools.iter().find(|tool| tool.name == call.name);
        if self.reasoning && tool.is_none() {
            return self.text(call.start + CALL.len(), events);
        }
        let arguments = call
            .arguments
            .into_iter()
            .map(|(key, value)| {
                let value = Tool::typed(tool, &key, value);
                (key, value)
            })
            .collect();
        self.pass_tag(call.start, call.position, events);
        self.reasoning = false;
        events.push(OutputEvent::ToolCall {
            name: call.name,
            arguments,
        });
    }
}

enum Found {
    Tag { start: usize, tag: &'static str },
    UndecidedFrom(usize),
}

/// A call that is being read. Each byte of a value is looked at once.
#[derive(Debug)]
struct Call {
    /// Where its `<tool_call>` begins.
    start: usize,
    /// Where the part that is not yet understood begins.
    position: usize,
    /// Where to go on looking for the end of a value.
    searched: usize,
    stage: Stage,
    name: String,
    key: String,
    arguments: Vec<(String, String)>,
}

#[derive(Debug, Clone, Copy)]
enum Stage {
    Name,
    /// An argument or the end of the call must come.
    Between,
    Key,
    BeforeValue,
    Value,
}

enum Progress {
    Incomplete,
    Malformed,
    Complete,
}

impl Call {
    fn new(start: usize) -> Self {
        Self {
            start,
            position: start + CALL.len(),
            searched: 0,
            stage: Stage::Name,
            name: String::new(),
            key: String::new(),
            arguments: Vec::new(),
        }
    }

    /// Reads on. Complete leaves `position` behind the call.
    fn advance(&mut self, buffer: &str) -> Progress {
        loop {
            let rest = &buffer[self.position..];
            let step = match self.stage {
                Stage::Name => self.read_name(rest),
                Stage::Between => match skip_tag(rest, &[KEY, END_CALL]) {
                    Ok((END_CALL, length)) => {
                        self.position += length;
                        return Progress::Complete;
                    }
                    Ok((_, length)) => Ok((length, Stage::Key)),
                    Err(progress) => Err(progress),
                },
                Stage::Key => self.read_key(rest),
                Stage::BeforeValue => skip_tag(rest, &[VALUE]).map(|(_, length)| (length, Stage::Value)),
                Stage::Value => self.read_value(buffer),
            };
            match step {
                Ok((length, next)) => {
                    self.position += length;
                    self.stage = next;
                    self.searched = self.position;
                }
                Err(progress) => return progress,
            }
        }
    }

    fn read_name(&mut self, rest: &str) -> Result<(usize, Stage), Progress> {
        let end = rest.find('<');
        let name = rest[..end.unwrap_or(rest.len())].trim();
        // Refused as soon as it cannot be a name, so that prose about `<tool_call>` flows on.
        if !name.chars().all(|c| c.is_alphanumeric() || "_-.:/".contains(c)) {
            return Err(Progress::Malformed);
        }
        match end {
            None => Err(Progress::Incomplete),
            Some(_) if name.is_empty() => Err(Progress::Malformed),
            Some(end) => {
                self.name = name.to_owned();
                Ok((end, Stage::Between))
            }
        }
    }

    fn read_key(&mut self, rest: &str) -> Result<(usize, Stage), Progress> {
        let end = rest.find('<').ok_or(Progress::Incomplete)?;
        let (_, tag) = skip_tag(&rest[end..], &[END_KEY])?;
        let key = rest[..end].trim();
        if key.is_empty() {
            return Err(Progress::Malformed);
        }
        self.key = key.to_owned();
        Ok((end + tag, Stage::BeforeValue))
    }

    fn read_value(&mut self, buffer: &str) -> Result<(usize, Stage), Progress> {
        match buffer[self.searched..].find(END_VALUE) {
            None => {
                let overlap = buffer.len().saturating_sub(END_VALUE.len() - 1);
                self.searched = self.searched.max(buffer.floor_char_boundary(overlap));
                Err(Progress::Incomplete)
            }
            Some(found) => {
                let end = self.searched + found;
                let value = buffer[self.position..end].to_owned();
                self.arguments.push((std::mem::take(&mut self.key), value));
                Ok((end + END_VALUE.len() - self.position, Stage::Between))
            }
        }
    }
}

/// One of these tags after white space, and the length of both.
fn skip_tag<'t>(text: &str, tags: &[&'t str]) -> Result<(&'t str, usize), Progress> {
    let rest = text.trim_start();
    for tag in tags {
        if rest.starts_with(tag) {
            return Ok((tag, text.len() - rest.len() + tag.len()));
        }
    }
    Err(if tags.iter().any(|tag| tag.starts_with(rest)) {
        Progress::Incomplete
    } else {
        Progress::Malformed
    })
}

/// What the request said of a tool.
#[derive(Debug)]
struct Tool {
    name: String,
    /// The JSON types that each parameter may have; a parameter without any is left out.
    types: HashMap<String, Vec<String>>,
}

impl Tool {
    fn declared(tool: &Value) -> Option<Self> {
        let function = tool.get("function").unwrap_or(tool);
        let properties = function
            .pointer("/parameters/properties")
            .and_then(Value::as_object);
        Some(Self {
            name: function.get("name")?.as_str()?.to_owned(),
            types: properties
                .into_iter()
                .flatten()
                .map(|(key, schema)| (key.clone(), declared_types(schema)))
                .collect(),
        })
    }

    /// An argument as the tool wants it.
    fn typed(tool: Option<&Self>, key: &str, value: String) -> Value {
        let types = tool
            .and_then(|tool| tool.types.get(key))
            .map_or(&[][..], Vec::as_slice);
        match serde_json::from_str::<Value>(&value) {
            Ok(parsed) if accepts(types, &parsed) => parsed,
            _ => Value::String(value),
        }
    }
}

fn declared_types(schema: &Value) -> Vec<String> {
    let listed = |value: &Value| match value {
        Value::String(name) => vec![name.clone()],
        Value::Array(names) => names
            .iter()
            .filter_map(|n| n.as_str().map(str::to_owned))
            .collect(),
        _ => Vec::new(),
    };
    let mut types = schema.get("type").map(listed).unwrap_or_default();
    for union in ["anyOf", "oneOf"] {
        let schemas = schema.get(union).and_then(Value::as_array);
        types.extend(schemas.into_iter().flatten().flat_map(declared_types));
    }
    types
}

/// Whether a value that parses as JSON is that JSON, rather than a string that looks like it.
fn accepts(types: &[String], value: &Value) -> bool {
    let has = |name: &str| types.iter().any(|t| t == name);
    !has("string")
        || match value {
            Value::Null => has("null"),
            Value::Bool(_) => has("boolean"),
            Value::Number(_) => has("number") || has("integer"),
            Value::Array(_) => has("array"),
            Value::Object(_) => has("object"),
            Value::String(_) => false,
        }
}

#[cfg(test)]
mod tests;
