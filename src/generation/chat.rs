//! From a conversation to the text of a prompt.

use std::path::Path;

use minijinja::Environment;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::jinja;
use crate::checkpoint::{ModelFiles, gguf_template};
use crate::error::shortened;
use crate::{Error, Result};

/// One message of a conversation, in the form of OpenAI's API.
///
/// Fields that are not named here are kept, and the template sees them, as with transformers.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant` or `tool`; the template decides which it knows.
    pub role: String,
    /// What was said. The template sees an empty string where there is nothing.
    #[serde(default)]
    pub content: Option<Content>,
    /// What an assistant thought before it spoke.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
    /// The tools that an assistant called.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_calls: Option<Vec<ToolCall>>,
    /// The call that a tool's message answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_call_id: Option<String>,
    /// Who speaks, where the role says too little.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// All other fields.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// The content of a message: a string, or parts such as `{"type": "text", "text": "…"}`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Content {
    /// A string.
    Text(String),
    /// Parts, each a JSON object with a `type`.
    Parts(Vec<Map<String, Value>>),
}

/// A call of a tool by an assistant.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ToolCall {
    /// What the tool's answer refers to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// `function`.
    #[serde(rename = "type", default = "function")]
    pub kind: String,
    /// What is called.
    pub function: FunctionCall,
}

/// The function of a [`ToolCall`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FunctionCall {
    /// Its name.
    pub name: String,
    /// A JSON object: as OpenAI's API writes it, in a string, or as it is. The template sees the
    /// object.
    #[serde(default)]
    pub arguments: Value,
}

fn function() -> String {
    "function".into()
}

impl From<&str> for Content {
    fn from(text: &str) -> Self {
        Self::Text(text.into())
    }
}

impl From<String> for Content {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl Message {
    /// A message of text alone.
    pub fn new(role: impl Into<String>, content: impl Into<Content>) -> Self {
        Self {
            role: role.into(),
            content: Some(content.into()),
            ..Self::default()
        }
    }
}

/// What a template is told beside the messages.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RenderOptions {
    /// Whether to end with what makes the assistant speak next.
    pub add_generation_prompt: bool,
    /// Whether to think first; the template's own default where it is `None`.
    pub enable_thinking: Option<bool>,
    /// The tools at hand: a list of JSON objects in OpenAI's form.
    pub tools: Option<Value>,
    /// Other variables by name (`chat_template_kwargs` of the servers), such as `clear_thinking`.
    pub extra: Map<String, Value>,
}

/// A model's chat template: Jinja, as transformers renders it.
///
/// Beside Jinja itself it has `tojson` (Python's `json.dumps`, nothing escaped for HTML),
/// `raise_exception`, `strftime_now` (in UTC), `{% break %}`, Python's methods of strings and
/// mappings, and values printed as Python prints them. `{% generation %}` blocks render as their
/// contents. Two things are as in vLLM rather than transformers: a message without content has an
/// empty one, so that no template writes `None`, and parts of text are joined by line breaks for a
/// template that knows strings alone.
///
/// ```
/// # fn main() -> candle_mmfp4::Result<()> {
/// use candle_mmfp4::generation::{ChatTemplate, Message, RenderOptions};
///
/// let template = ChatTemplate::new(
///     "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}\
///      {% if add_generation_prompt %}<|assistant|>{% endif %}",
/// )?;
/// let options = RenderOptions { add_generation_prompt: true, ..Default::default() };
/// let prompt = template.render(&[Message::new("user", "Hello")], &options)?;
/// assert_eq!(prompt, "<|user|>Hello<|assistant|>");
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct ChatTemplate {
    env: Environment<'static>,
    /// Whether there is a template of its own for conversations with tools.
    tool_use: bool,
    /// Whether the template takes content in parts.
    takes_parts: bool,
}

const DEFAULT: &str = "chat_template";
const TOOL_USE: &str = "tool_use";

impl ChatTemplate {
    /// Parses a template.
    ///
    /// # Errors
    /// [`Error::Template`] with the line, where it is no Jinja.
    pub fn new(source: &str) -> Result<Self> {
        Self::build(source, None, &Map::new())
    }

    /// Reads the template of a checkpoint's folder: `chat_template.jinja`, else `chat_template` in
    /// `tokenizer_config.json`, which may be a list of named templates (`default`, and `tool_use` for
    /// conversations with tools). The template can use the special tokens of that file (`bos_token`).
    ///
    /// # Errors
    /// [`Error::File`] where there is no template or the configuration is malformed, [`Error::Io`]
    /// where a file cannot be read, [`Error::Template`] where the template is no Jinja.
    pub fn from_dir(folder: impl AsRef<Path>) -> Result<Self> {
        Self::from_files(&ModelFiles::folder(folder.as_ref()))
    }

    /// As [`from_dir`](Self::from_dir), of files that may be in memory.
    ///
    /// # Errors
    /// As [`from_dir`](Self::from_dir).
    pub fn from_files(model: &ModelFiles) -> Result<Self> {
        Self::find(model)?.ok_or_else(|| {
            Error::file(
                model.root(),
                "no chat template: neither chat_template.jinja nor `chat_template` in tokenizer_config.json",
                "give the prompt as plain text, or put the model's template there",
            )
        })
    }

    /// As [`from_files`](Self::from_files), but `None` where there is no template.
    pub(super) fn find(model: &ModelFiles) -> Result<Option<Self>> {
        let path = model.path("tokenizer_config.json");
        let malformed = |problem: String| Error::file(&path, problem, "download the file again");
        let config: Map<String, Value> = match model.text_if_present("tokenizer_config.json")? {
            Some(text) => serde_json::from_str(&text)
                .map_err(|error| malformed(format!("expected a JSON object: {error}")))?,
            None => Map::new(),
        };
        let build = |source: &str, tool_use: Option<&str>, path: &Path| {
            let remedy = "correct the template, or give the prompt as plain text";
            Self::build(source, tool_use, &config)
                .map(Some)
                .map_err(|error| Error::file(path, error.to_string(), remedy))
        };
        if let Some(source) = model.text_if_present("chat_template.jinja")? {
            return build(&source, None, &model.path("chat_template.jinja"));
        }
        match config.get("chat_template") {
            None | Some(Value::Null) => match gguf_template(model)? {
                Some((source, path)) => build(&source, None, &path),
                None => Ok(None),
            },
            Some(Value::String(source)) => build(source, None, &path),
            Some(Value::Array(templates)) => {
                let named = |name: &str| {
                    templates
                        .iter()
                        .find(|template| template["name"] == name)
                        .and_then(|template| template["template"].as_str())
                };
                let default = named("default").ok_or_else(|| {
                    let names: Vec<String> = templates.iter().map(|t| t["name"].to_string()).collect();
                    malformed(format!(
                        "`chat_template`: expected a template named \"default\", found {}",
                        shortened(names.join(", "))
                    ))
                })?;
                build(default, named(TOOL_USE), &path)
            }
            Some(other) => Err(malformed(format!(
                "`chat_template`: expected a string or a list of named templates, found {}",
                shortened(other.to_string())
            ))),
        }
    }

    fn build(source: &str, tool_use: Option<&str>, config: &Map<String, Value>) -> Result<Self> {
        let mut env = jinja::environment();
        for (name, value) in config.iter().filter(|(name, _)| name.ends_with("_token")) {
            // Older files write a token as an object, with how it is to be matched.
            if let Some(token) = value.as_str().or_else(|| value["content"].as_str()) {
                env.add_global(name.clone(), token);
            }
        }
        for (name, source) in [(DEFAULT, Some(source)), (TOOL_USE, tool_use)] {
            if let Some(source) = source {
                env.add_template_owned(name, jinja::without_generation_tags(source))
                    .map_err(failed)?;
            }
        }
        let mut template = Self {
            env,
            tool_use: tool_use.is_some(),
            takes_parts: true,
        };
        template.takes_parts = template.try_parts();
        Ok(template)
    }

    /// Whether a text in parts comes out as that text, and not as Python's notation of the list.
    fn try_parts(&self) -> bool {
        const TEXT: &str = "words of a user";
        let part = Map::from_iter([("type".into(), "text".into()), ("text".into(), TEXT.into())]);
        let message = Message {
            role: "user".into(),
            content: Some(Content::Parts(vec![part])),
            ..Message::default()
        };
        self.render(&[message], &RenderOptions::default())
            .is_ok_and(|prompt| prompt.contains(TEXT) && !prompt.contains(&format!("'{TEXT}'")))
    }

    /// Renders a conversation.
    ///
    /// # Errors
    /// [`Error::Template`] with what the template refuses, with the message whose tool call has
    /// arguments that are no JSON object, or with the part that is no text where the template takes
    /// strings alone.
    pub fn render(&self, messages: &[Message], options: &RenderOptions) -> Result<String> {
        if let Some(tools) = options.tools.as_ref().filter(|tools| !tools.is_array()) {
            return Err(Error::Template(format!(
                "tools: expected a list of objects, found {tools}"
            )));
        }
        let messages = messages
            .iter()
            .enumerate()
            .map(|(index, message)| {
                self.visible(message)
                    .map_err(|problem| Error::Template(format!("messages[{index}]: {problem}")))
            })
            .collect::<Result<Vec<Value>>>()?;
        let mut context = options.extra.clone();
        if let Some(thinking) = options.enable_thinking {
            context.insert("enable_thinking".into(), thinking.into());
        }
        context.insert("messages".into(), messages.into());
        context.insert("tools".into(), json!(options.tools));
        context.entry("documents").or_insert(Value::Null);
        context.insert(
            "add_generation_prompt".into(),
            options.add_generation_prompt.into(),
        );

        let name = if self.tool_use && options.tools.is_some() {
            TOOL_USE
        } else {
            DEFAULT
        };
        self.env
            .get_template(name)
            .and_then(|template| template.render(context))
            .map_err(failed)
    }

    /// A message as the template sees it.
    fn visible(&self, message: &Message) -> Result<Value, String> {
        let mut fields = message.extra.clone();
        fields.insert("role".into(), message.role.clone().into());
        fields.insert("content".into(), self.visible_content(message)?);
        if let Some(reasoning) = reasoning(message) {
            // gpt-oss's template reads `thinking`, the others `reasoning_content`.
            fields.entry("thinking").or_insert(reasoning.clone());
            fields.insert("reasoning_content".into(), reasoning);
        }
        if let Some(calls) = &message.tool_calls {
            let calls = calls.iter().map(visible_call).collect::<Result<Vec<_>, _>>()?;
            fields.insert("tool_calls".into(), calls.into());
        }
        for (name, value) in [("tool_call_id", &message.tool_call_id), ("name", &message.name)] {
            if let Some(value) = value {
                fields.insert(name.into(), value.clone().into());
            }
        }
        Ok(Value::Object(fields))
    }

    fn visible_content(&self, message: &Message) -> Result<Value, String> {
        match &message.content {
            None => Ok("".into()),
            Some(Content::Text(text)) => Ok(text.clone().into()),
            Some(Content::Parts(parts)) if self.takes_parts => Ok(json!(parts)),
            Some(Content::Parts(parts)) => {
                let texts: Option<Vec<&str>> = parts.iter().map(|part| part.get("text")?.as_str()).collect();
                let texts =
                    texts.ok_or("content: this model's template takes text alone, found other parts")?;
                Ok(texts.join("\n").into())
            }
        }
    }
}

/// What was thought, under whichever of its names it was given.
fn reasoning(message: &Message) -> Option<Value> {
    let given = |name| message.extra.get(name).filter(|value| !value.is_null());
    match &message.reasoning_content {
        Some(text) => Some(text.clone().into()),
        None => given("thinking").or_else(|| given("reasoning")).cloned(),
    }
}

/// A call whose arguments are an object, for templates go through its items.
fn visible_call(call: &ToolCall) -> Result<Value, String> {
    let arguments = match &call.function.arguments {
        Value::Null => json!({}),
        Value::String(text) if text.trim().is_empty() => json!({}),
        Value::String(text) => serde_json::from_str(text).unwrap_or_else(|_| text.clone().into()),
        other => other.clone(),
    };
    if !arguments.is_object() {
        return Err(format!(
            "arguments of the call of `{}`: expected a JSON object, found {arguments}",
            call.function.name
        ));
    }
    let mut visible = json!(call);
    visible["function"]["arguments"] = arguments;
    Ok(visible)
}

fn failed(error: minijinja::Error) -> Error {
    Error::Template(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(template: &ChatTemplate, messages: Value, options: &RenderOptions) -> Result<String> {
        let messages: Vec<Message> = serde_json::from_value(messages).unwrap();
        template.render(&messages, options)
    }

    #[test]
    fn messages_are_those_of_the_api() {
        let json = json!([
            {"role": "user", "content": [{"type": "text", "text": "a"}], "name": "Ada"},
            {"role": "assistant", "content": null, "reasoning_content": "r", "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}}
            ]},
            {"role": "tool", "content": "b", "tool_call_id": "1", "other": [1]}
        ]);
        let messages: Vec<Message> = serde_json::from_value(json.clone()).unwrap();
        assert_eq!(messages[2].content, Some("b".into()));
        assert_eq!(messages[2].extra["other"], json!([1]));
        assert_eq!(serde_json::to_value(&messages).unwrap(), json);
        assert!(serde_json::from_value::<Message>(json!({"content": "no role"})).is_err());
        assert!(serde_json::from_value::<Message>(json!({"role": "user", "content": 5})).is_err());
    }

    #[test]
    fn missing_content_is_empty_and_parts_of_text_are_joined() {
        let strings = ChatTemplate::new("{% for m in messages %}[{{ m.content }}]{% endfor %}").unwrap();
        let parts = ChatTemplate::new(
            "{% for m in messages %}{% if m.content is string %}[{{ m.content }}]{% else %}\
             {% for p in m.content %}({{ p.text }}{{ p.image }}){% endfor %}{% endif %}{% endfor %}",
        )
        .unwrap();
        let text = json!([{"role": "assistant"}, {"role": "user", "content": [
            {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]);
        let image = json!([{"role": "user", "content": [{"type": "image", "image": "x"}]}]);
        let options = RenderOptions::default();
        assert_eq!(render(&strings, text.clone(), &options).unwrap(), "[][a\nb]");
        assert_eq!(render(&parts, text, &options).unwrap(), "[](a)(b)");
        assert_eq!(render(&parts, image.clone(), &options).unwrap(), "(x)");
        let error = render(&strings, image, &options).unwrap_err().to_string();
        assert!(error.contains("messages[0]: content"), "{error}");
    }

    #[test]
    fn reasoning_and_arguments_reach_the_template_under_any_spelling() {
        let template = ChatTemplate::new(
            "{% for m in messages %}{{ m.reasoning_content }}/{{ m.thinking }}\
             {% for c in m.tool_calls %}{{ c.function.arguments.items() | list }}{% endfor %};{% endfor %}",
        )
        .unwrap();
        let call = |arguments: Value| json!({"function": {"name": "f", "arguments": arguments}});
        let prompt = render(
            &template,
            json!([
                {"role": "assistant", "reasoning": "a", "tool_calls": [call(json!("{\"items\": 2}"))]},
                {"role": "assistant", "thinking": "b", "tool_calls": [call(json!({"x": true})), call(json!(""))]},
                {"role": "assistant", "reasoning_content": "c", "reasoning": "d"}
            ]),
            &RenderOptions::default(),
        );
        assert_eq!(prompt.unwrap(), "a/a[['items', 2]];b/b[['x', True]][];c/c;");
        for wrong in [json!("{broken"), json!("[1]"), json!(5)] {
            let messages = json!([{"role": "assistant", "tool_calls": [call(wrong)]}]);
            let error = render(&template, messages, &RenderOptions::default()).unwrap_err();
            assert!(
                matches!(&error, Error::Template(m) if m.contains("messages[0]") && m.contains("`f`")),
                "{error}"
            );
        }
    }

    #[test]
    fn templates_are_found_where_checkpoints_keep_them() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        let plain = RenderOptions::default();
        let with_tools = RenderOptions {
            tools: Some(json!([{"name": "f"}])),
            ..plain.clone()
        };
        let rendered = |options| ChatTemplate::from_dir(folder.path())?.render(&[], options);

        let error = rendered(&plain).unwrap_err();
        assert!(
            matches!(error, Error::File { .. }) && error.to_string().contains("no chat template"),
            "{error}"
        );
        write("tokenizer_config.json", r#"{"chat_template": 5}"#);
        assert!(matches!(rendered(&plain), Err(Error::File { .. })));
        write("tokenizer_config.json", "[]");
        assert!(matches!(rendered(&plain), Err(Error::File { .. })));
        write(
            "tokenizer_config.json",
            r#"{"chat_template": "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ add_bos_token }}",
                "bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": false}, "pad_token": null,
                "add_bos_token": true}"#,
        );
        assert_eq!(rendered(&plain).unwrap(), "<s>|</s>||");
        write(
            "tokenizer_config.json",
            r#"{"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}"#,
        );
        assert_eq!(rendered(&plain).unwrap(), "D");
        assert_eq!(rendered(&with_tools).unwrap(), "T");
        write(
            "tokenizer_config.json",
            r#"{"chat_template": [{"name": "rag", "template": "R"}]}"#,
        );
        let error = rendered(&plain).unwrap_err().to_string();
        assert!(error.contains("\"rag\""), "{error}");
        write("chat_template.jinja", "file\n");
        assert_eq!(rendered(&plain).unwrap(), "file");
    }

    #[test]
    fn errors_say_where() {
        let error = ChatTemplate::new("a\n{% if %}").unwrap_err();
        assert!(
            matches!(&error, Error::Template(m) if m.contains("chat_template:2")),
            "{error}"
        );
        let template = ChatTemplate::new("{{ raise_exception('no ' ~ messages[0].role) }}").unwrap();
        let error = template
            .render(&[Message::new("robot", "")], &RenderOptions::default())
            .unwrap_err();
        assert!(error.to_string().contains("no robot"), "{error}");
        let tools = RenderOptions {
            tools: Some(json!({})),
            ..RenderOptions::default()
        };
        assert!(matches!(template.render(&[], &tools), Err(Error::Template(_))));
    }
}
