//! Chat templates against jinja2 with transformers' settings (tools/chat_goldens.py).

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_mmfp4::generation::{ChatTemplate, Message, RenderOptions};
use serde::Deserialize;
use serde_json::{Map, Value, json};

#[derive(Deserialize)]
struct Case {
    name: String,
    template: String,
    messages: Vec<Message>,
    #[serde(default)]
    add_generation_prompt: bool,
    enable_thinking: Option<bool>,
    tools: Option<String>,
    #[serde(default)]
    extra: Map<String, Value>,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn data() -> PathBuf {
    root().join("tests/data/chat")
}

fn read<T: for<'a> Deserialize<'a>>(name: &str) -> anyhow::Result<T> {
    Ok(serde_json::from_slice(&std::fs::read(data().join(name))?)?)
}

/// A template in a folder as checkpoints have it.
fn template(name: &str) -> anyhow::Result<ChatTemplate> {
    let path = match name {
        "demo" => root().join("examples/demo-model/chat_template.jinja"),
        _ => data().join(format!("{name}.jinja")),
    };
    let folder = tempfile::tempdir()?;
    std::fs::copy(path, folder.path().join("chat_template.jinja"))?;
    let tokens = json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}});
    std::fs::write(folder.path().join("tokenizer_config.json"), tokens.to_string())?;
    Ok(ChatTemplate::from_dir(folder.path())?)
}

#[test]
fn every_case_renders_as_jinja2_does() -> anyhow::Result<()> {
    let goldens: HashMap<String, String> = read("goldens.json")?;
    let cases: Vec<Case> = read("cases.json")?;
    assert_eq!(goldens.len(), cases.len());
    for case in cases {
        let options = RenderOptions {
            add_generation_prompt: case.add_generation_prompt,
            enable_thinking: case.enable_thinking,
            tools: case.tools.map(|name| read(&format!("{name}.json"))).transpose()?,
            extra: case.extra,
        };
        let prompt = template(&case.template)?.render(&case.messages, &options)?;
        assert_eq!(prompt, goldens[&case.name], "{}", case.name);
    }
    Ok(())
}

#[test]
fn the_demo_models_template_writes_the_prompts_of_its_goldens() -> anyhow::Result<()> {
    let demo = ChatTemplate::from_dir(root().join("examples/demo-model"))?;
    let options = RenderOptions {
        add_generation_prompt: true,
        ..RenderOptions::default()
    };
    let prompt = demo.render(&[Message::new("user", "What does `Vec::push` do?")], &options)?;
    assert_eq!(
        prompt,
        "[gMASK]<sop><|user|>What does `Vec::push` do?<|assistant|></think>"
    );
    Ok(())
}
