//! Repositories by name, against a local server that speaks the hub's URL scheme.

#![cfg(feature = "hub")]

mod common {
    pub mod hub_server;
}

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use candle_mmfp4::checkpoint::hub::{self, HubSettings, Plan, Progress, RepoId};
use candle_mmfp4::checkpoint::{LoadOptions, ModelFiles};
use candle_mmfp4::models::glm4_moe_lite::Model;
use candle_mmfp4::{Error, Result};
use common::hub_server::{Server, State, etag};

const REPO: &str = "org/demo";
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const INDEX: &str = "model.safetensors.index.json";
const OPTIONAL: [&str; 4] = [
    "generation_config.json",
    "quantization_config.json",
    "tokenizer_config.json",
    "chat_template.jinja",
];

/// The demo model, or where there is none, files of its names and small sizes; and some that no model needs.
fn demo_files() -> BTreeMap<String, Vec<u8>> {
    let folder = std::env::var_os("MMFP4_HUB_DEMO").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/demo-model"),
        PathBuf::from,
    );
    let mut files = BTreeMap::new();
    if folder.is_dir() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            files.insert(
                path.file_name().unwrap().to_str().unwrap().to_string(),
                fs::read(path).unwrap(),
            );
        }
    } else {
        let mut random = 1u64;
        let mut noise = |count: usize| -> Vec<u8> {
            std::iter::repeat_with(|| {
                random = random
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                (random >> 56) as u8
            })
            .take(count)
            .collect()
        };
        let shards = [
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
        ];
        files.insert(shards[0].to_string(), noise(700_001));
        files.insert(shards[1].to_string(), noise(300_000));
        files.insert("tokenizer.json".to_string(), noise(90_000));
        let index = serde_json::json!({ "weight_map": { "a": shards[0], "b": shards[1], "c": shards[0] } });
        files.insert(INDEX.to_string(), index.to_string().into_bytes());
        files.insert("config.json".to_string(), br#"{ "dtype": "bfloat16" }"#.to_vec());
        for name in OPTIONAL {
            files.insert(name.to_string(), format!("{{ \"{name}\": 1 }}").into_bytes());
        }
    }
    let quantization = br#"{ "format": "mmfp4_e2m1_marlin" }"#;
    files.insert("quantization_config.json".to_string(), quantization.to_vec());
    files.insert("README.md".to_string(), b"read me".to_vec());
    files.insert("original/consolidated.safetensors".to_string(), vec![7; 1000]);
    files
}

fn demo() -> State {
    State {
        repo: REPO.to_string(),
        commit: COMMIT.to_string(),
        revisions: ["main", "v1.0", "refs/pr/1"].map(String::from).into(),
        files: demo_files(),
        ..State::default()
    }
}

/// A server, and a cache folder of its own.
struct Bench {
    server: Server,
    home: tempfile::TempDir,
    shards: Vec<String>,
}

impl Bench {
    fn new(state: State) -> Self {
        let shards = match state.files.get(INDEX) {
            None => Vec::new(),
            Some(index) => {
                let index: serde_json::Value = serde_json::from_slice(index).unwrap();
                let named = index["weight_map"].as_object().unwrap().values();
                let named: std::collections::BTreeSet<_> = named.map(|name| name.as_str().unwrap()).collect();
                named.into_iter().map(String::from).collect()
            }
        };
        Self {
            server: Server::start(state),
            home: tempfile::tempdir().unwrap(),
            shards,
        }
    }

    fn settings(&self, variables: &[(&str, &str)]) -> HubSettings {
        let home = self.home.path().to_str().unwrap();
        let own = [("HF_HOME", home), ("HF_ENDPOINT", &self.server.address)];
        let lookup = |name: &str| {
            let found = variables.iter().chain(&own).find(|(key, _)| *key == name);
            found.map(|(_, value)| value.to_string())
        };
        let mut settings = HubSettings::from_lookup(lookup).unwrap();
        settings.backoff = Duration::from_millis(1);
        settings
    }

    fn fetch(&self) -> Result<PathBuf> {
        self.fetch_as(REPO, &[])
    }

    fn fetch_as(&self, repo: &str, variables: &[(&str, &str)]) -> Result<PathBuf> {
        hub::fetch(&RepoId::parse(repo).unwrap(), &self.settings(variables), &mut ())
    }

    fn cached_repo(&self) -> PathBuf {
        self.home.path().join("hub/models--org--demo")
    }

    fn partial(&self, file: &str) -> PathBuf {
        let etag = etag(&self.server.state().files[file]);
        self.cached_repo().join(format!("blobs/{etag}.mmfp4.incomplete"))
    }

    /// How many requests since the last call.
    fn requests(&self) -> usize {
        std::mem::take(&mut self.server.state().requests).len()
    }

    /// Every file that the model needs is in `folder` with its content, and nothing else is.
    fn check(&self, folder: &Path) {
        let mut expected = vec!["config.json", "tokenizer.json", INDEX];
        expected.extend(OPTIONAL);
        expected.extend(self.shards.iter().map(String::as_str));
        let files = &self.server.state().files;
        expected.retain(|name| files.contains_key(*name));
        expected.sort_unstable();
        let mut found: Vec<String> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        found.sort_unstable();
        assert_eq!(found, expected);
        for name in expected {
            assert!(
                fs::read(folder.join(name)).unwrap() == files[name],
                "{name} differs"
            );
        }
        for entry in fs::read_dir(self.cached_repo().join("blobs")).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            assert!(!name.ends_with(".incomplete"), "{name} was left over");
        }
    }
}

/// The one line of a failure, which must name the repository and hold all of `parts`.
fn line<T: std::fmt::Debug>(outcome: Result<T>, parts: &[&str]) -> String {
    let error = outcome.unwrap_err();
    assert!(matches!(error, Error::Hub { .. }), "{error:?}");
    let line = error.to_string();
    println!("{line}");
    assert!(line.starts_with("org/"), "{line}");
    assert!(!line.contains('\n'), "{line}");
    for part in parts {
        assert!(line.contains(part), "`{part}` is not in: {line}");
    }
    line
}

#[derive(Default)]
struct Recorder {
    plan: Option<Plan>,
    files: Vec<(String, u64, u64)>,
    advanced: u64,
    notes: Vec<String>,
    done: bool,
}

impl Progress for Recorder {
    fn start(&mut self, plan: &Plan) -> Result<()> {
        assert!(self.files.is_empty());
        self.plan = Some(plan.clone());
        Ok(())
    }

    fn file(&mut self, name: &str, size: u64, present: u64) {
        assert!(self.plan.is_some());
        self.files.push((name.to_string(), size, present));
    }

    fn advance(&mut self, bytes: u64) {
        self.advanced += bytes;
    }

    fn note(&mut self, message: &str) {
        self.notes.push(message.to_string());
    }

    fn done(&mut self) {
        self.done = true;
    }
}

#[test]
fn download_then_no_request() {
    let bench = Bench::new(demo());
    let mut seen = Recorder::default();
    let folder = hub::fetch(&RepoId::parse(REPO).unwrap(), &bench.settings(&[]), &mut seen).unwrap();
    bench.check(&folder);

    let plan = seen.plan.unwrap();
    assert_eq!(plan.commit, COMMIT);
    assert_eq!(plan.snapshot, folder);
    assert_eq!(seen.advanced, plan.remaining());
    assert!(
        plan.remaining() < plan.total(),
        "config.json and the index were fetched for the plan"
    );
    let named: Vec<&str> = seen.files.iter().map(|(name, ..)| name.as_str()).collect();
    assert!(
        named.ends_with(&bench.shards.iter().map(String::as_str).collect::<Vec<_>>()),
        "{named:?}"
    );
    for (name, size, present) in &seen.files {
        assert_eq!(*size, bench.server.state().files[name].len() as u64);
        assert_eq!(*present, 0);
    }
    assert!(seen.done && seen.notes.is_empty());

    assert!(bench.requests() > 0);
    assert_eq!(bench.fetch().unwrap(), folder);
    assert_eq!(bench.requests(), 0);
}

#[test]
#[cfg(unix)]
fn the_layout_is_pythons() {
    let bench = Bench::new(demo());
    let folder = bench.fetch().unwrap();
    let repo = bench.cached_repo();
    assert_eq!(folder, repo.join("snapshots").join(COMMIT));
    assert_eq!(fs::read_to_string(repo.join("refs/main")).unwrap(), COMMIT);
    for name in ["config.json", &bench.shards[0]] {
        let etag = etag(&bench.server.state().files[name]);
        assert_eq!(
            fs::read_link(folder.join(name)).unwrap(),
            Path::new("../../blobs").join(&etag)
        );
        let lock = format!("hub/.locks/models--org--demo/{etag}.lock");
        assert!(bench.home.path().join(lock).is_file());
    }
}

#[test]
fn offline() {
    let bench = Bench::new(demo());
    let offline = [("HF_HUB_OFFLINE", "1")];
    line(
        bench.fetch_as(REPO, &offline),
        &["is not in the cache", "hub)", "unset HF_HUB_OFFLINE"],
    );
    let plan = hub::plan(&RepoId::parse(REPO).unwrap(), &bench.settings(&offline));
    line(plan, &["unset HF_HUB_OFFLINE"]);

    let folder = bench.fetch().unwrap();
    bench.requests();
    assert_eq!(bench.fetch_as(REPO, &offline).unwrap(), folder);
    assert_eq!(
        bench.fetch_as(REPO, &[("TRANSFORMERS_OFFLINE", "1")]).unwrap(),
        folder
    );
    line(
        bench.fetch_as("org/demo@v1.0", &offline),
        &["org/demo@v1.0: it is not in the cache"],
    );

    let shard = &bench.shards[1];
    fs::remove_file(folder.join(shard)).unwrap();
    line(
        bench.fetch_as(REPO, &offline),
        &[&format!("`{shard}` is not in the cache")],
    );
    assert_eq!(bench.requests(), 0);
}

#[test]
fn tokens() {
    let private = State {
        token: Some("hf_right".to_string()),
        ..demo()
    };
    let bench = Bench::new(private);
    let refused = line(
        bench.fetch_as(REPO, &[("HF_TOKEN", "hf_wrong")]),
        &["the hub refuses the token from HF_TOKEN", "settings/tokens"],
    );
    assert!(!refused.contains("hf_wrong"), "{refused}");
    assert_eq!(bench.requests(), 1, "a refusal is not tried again");
    line(
        bench.fetch(),
        &["no such repository, or it is private", "set HF_TOKEN"],
    );

    fs::write(bench.home.path().join("token"), "hf_right\n").unwrap();
    bench.requests();
    bench.check(&bench.fetch().unwrap());
    for seen in &bench.server.state().requests {
        let expected = (!seen.content).then_some("Bearer hf_right");
        assert_eq!(seen.authorization.as_deref(), expected, "{seen:?}");
    }
    assert!(bench.server.state().requests.iter().any(|seen| seen.content));
}

#[test]
fn a_wrong_token_for_a_public_repository() {
    let bench = Bench::new(demo());
    line(
        bench.fetch_as(REPO, &[("HF_TOKEN", "hf_wrong")]),
        &["refuses the token", "public repositories need none"],
    );
    let implicit = [("HF_TOKEN", "hf_wrong"), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")];
    bench.check(&bench.fetch_as(REPO, &implicit).unwrap());
}

#[test]
fn gated() {
    let gated = State {
        token: Some("hf_right".to_string()),
        gated: true,
        ..demo()
    };
    let bench = Bench::new(gated);
    let page = format!("accept its terms at {}/org/demo", bench.server.address);
    line(
        bench.fetch(),
        &["is gated, and no token was sent", &page, "HF_TOKEN"],
    );
    bench.check(&bench.fetch_as(REPO, &[("HF_TOKEN", "hf_right")]).unwrap());
}

#[test]
fn a_repository_or_revision_that_is_not_there() {
    let bench = Bench::new(demo());
    line(
        bench.fetch_as("org/dmeo", &[]),
        &["org/dmeo: there is no such repository", "check the spelling"],
    );
    line(
        bench.fetch_as("org/demo@v9", &[]),
        &[
            "org/demo@v9: the repository has no revision `v9`",
            "choose a branch, a tag or a commit",
        ],
    );
    assert_eq!(bench.requests(), 2);
    assert!(
        !bench.home.path().join("hub").exists(),
        "a failure leaves nothing in the cache"
    );
}

#[test]
fn optional_files_may_be_missing() {
    let mut state = demo();
    for name in OPTIONAL {
        state.files.remove(name);
    }
    let bench = Bench::new(state);
    let folder = bench.fetch().unwrap();
    bench.check(&folder);
    for name in OPTIONAL {
        assert!(
            bench
                .cached_repo()
                .join(".no_exist")
                .join(COMMIT)
                .join(name)
                .is_file()
        );
    }
    bench.requests();
    assert_eq!(bench.fetch().unwrap(), folder);
    assert_eq!(bench.requests(), 0);
}

#[test]
fn needed_files_may_not() {
    for name in [
        "config.json",
        "tokenizer.json",
        INDEX,
        "model-00002-of-00002.safetensors",
    ] {
        let mut state = demo();
        state.files.remove(name).unwrap();
        let shown = if name == INDEX { "model.safetensors" } else { name };
        let expected = format!("holds no `{shown}`, which the model needs");
        line(
            Bench::new(state).fetch(),
            &[&expected, "whole safetensors checkpoint"],
        );
    }
    let mut state = demo();
    state.files.remove("model-00002-of-00002.safetensors").unwrap();
    state.files.insert("model-Q4_K_M.gguf".to_string(), vec![0]);
    line(
        Bench::new(state).fetch(),
        &["holds GGUF files too", "`org/demo:QUANT` takes one"],
    );
}

/// A repository of nothing but these files, whose contents are their names.
fn of_files(names: &[&str]) -> State {
    let file = |name: &&str| (name.to_string(), name.as_bytes().to_vec());
    State {
        files: names.iter().map(file).collect(),
        ..demo()
    }
}

const GGUF: [&str; 7] = [
    "GLM-Q4_K_M.gguf",
    "GLM-Q8_0.gguf",
    "bf16/GLM-bf16-00001-of-00002.gguf",
    "bf16/GLM-bf16-00002-of-00002.gguf",
    "mmproj-F16.gguf",
    "config.json",
    "tokenizer.json",
];

#[test]
fn one_of_several_gguf_files_is_chosen_by_its_name() {
    let bench = Bench::new(of_files(&GGUF));
    line(
        bench.fetch(),
        &[
            "several models in GGUF",
            "name one as `org/demo:Q4_K_M`",
            "it has Q4_K_M, Q8_0, bf16",
        ],
    );
    line(
        bench.fetch_as("org/demo:Q5_K_M", &[]),
        &["is `Q5_K_M`", "Q4_K_M, Q8_0, bf16"],
    );
    let hub = bench.home.path().join("hub");
    assert!(!hub.exists(), "a failure leaves nothing in the cache");
    let snapshot = bench.cached_repo().join("snapshots").join(COMMIT);
    for (repo, files) in [
        ("org/demo:q8_0", &GGUF[1..2]),
        ("org/demo@v1.0:Q4_K_M", &GGUF[..1]),
        ("org/demo:bf16", &GGUF[2..4]),
    ] {
        let found = bench.fetch_as(repo, &[]).unwrap();
        assert_eq!(found, snapshot.join(files[0]));
        for name in files {
            assert_eq!(fs::read(snapshot.join(name)).unwrap(), name.as_bytes());
        }
        let asked = bench.requests();
        assert!(asked > 0);
        // Once it is here nobody is asked, on line or off.
        assert_eq!(bench.fetch_as(repo, &[]).unwrap(), found);
        assert_eq!(bench.fetch_as(repo, &[("HF_HUB_OFFLINE", "1")]).unwrap(), found);
        assert_eq!(bench.requests(), 0);
    }
    assert!(snapshot.join("tokenizer.json").is_file() && !snapshot.join("config.json").exists());
    // What others have fetched does not make the choice for those who make none.
    line(bench.fetch(), &["several models in GGUF"]);
    let offline = [("HF_HUB_OFFLINE", "1")];
    line(
        bench.fetch_as("org/demo:Q5_K_M", &offline),
        &["HF_HUB_OFFLINE forbids"],
    );
}

#[test]
fn the_only_gguf_file_needs_no_name() {
    let bench = Bench::new(of_files(&["GLM-Q4_K_M.gguf", "README.md"]));
    let found = bench.fetch().unwrap();
    assert!(
        found.ends_with(format!("snapshots/{COMMIT}/GLM-Q4_K_M.gguf")),
        "{found:?}"
    );
    assert_eq!(fs::read(&found).unwrap(), b"GLM-Q4_K_M.gguf");
    bench.requests();
    assert_eq!(bench.fetch().unwrap(), found);
    assert_eq!(bench.fetch_as("org/demo:Q4_K_M", &[]).unwrap(), found);
    assert_eq!(bench.requests(), 0);
    let settings = bench.settings(&[]);
    let plan = hub::plan(&RepoId::parse(REPO).unwrap(), &settings).unwrap();
    assert_eq!(
        (plan.weights(), plan.remaining()),
        ("GLM-Q4_K_M.gguf".len() as u64, 0)
    );
}

#[test]
fn safetensors_go_before_gguf_files_unless_one_is_named() {
    let mut state = demo();
    state
        .files
        .insert("GLM-Q8_0.gguf".to_string(), b"blocks".to_vec());
    let bench = Bench::new(state);
    let found = bench.fetch_as("org/demo:Q8_0", &[]).unwrap();
    assert_eq!(fs::read(&found).unwrap(), b"blocks");
    assert!(bench.server.downloads(&bench.shards[0]).is_empty());
    let folder = bench.fetch().unwrap();
    assert_eq!(folder, found.parent().unwrap());
    assert!(bench.shards.iter().all(|name| folder.join(name).is_file()));
    line(
        Bench::new(demo()).fetch_as("org/demo:Q8_0", &[]),
        &["no GGUF files", "leave out `:Q8_0`"],
    );
}

#[test]
fn gguf_parts_that_are_missing_and_names_that_lead_out_are_refused() {
    let bench = Bench::new(of_files(&["GLM-Q8_0-00001-of-00002.gguf"]));
    line(
        bench.fetch(),
        &["no `GLM-Q8_0-00002-of-00002.gguf`, a part of the model"],
    );
    for name in ["../GLM-Q8_0.gguf", "/GLM-Q8_0.gguf", "a\\..\\GLM-Q8_0.gguf"] {
        let bench = Bench::new(of_files(&[name]));
        line(bench.fetch(), &["outside of itself"]);
        let state = bench.server.state();
        assert!(
            state.requests.iter().all(|seen| !seen.path.contains("GLM")),
            "{:?}",
            state.requests
        );
    }
}

/// Three layers in a shard each; what the model has besides lies in the first.
fn sharded() -> State {
    let shards = ["one", "two", "three"].map(|name| format!("{name}.safetensors"));
    let mut state = of_files(&[
        "tokenizer.json",
        "one.safetensors",
        "two.safetensors",
        "three.safetensors",
    ]);
    let map = serde_json::json!({
        "model.norm.weight": shards[0],
        "model.layers.0.mlp.gate.weight": shards[0],
        "model.layers.1.mlp.gate.weight": shards[1],
        "model.layers.2.mlp.gate.weight": shards[2],
    });
    let index = serde_json::json!({ "weight_map": map });
    state
        .files
        .insert(INDEX.to_string(), index.to_string().into_bytes());
    state.files.insert(
        "config.json".to_string(),
        br#"{ "num_hidden_layers": 2 }"#.to_vec(),
    );
    state
}

#[test]
fn of_a_base_only_what_holds_the_tensors_is_fetched() {
    let bench = Bench::new(sharded());
    let fetch = |names: &[&str], variables: &[(&str, &str)]| {
        let names: Vec<_> = names.iter().map(|name| name.to_string()).collect();
        hub::fetch_tensors(
            &RepoId::parse(REPO).unwrap(),
            &bench.settings(variables),
            &names,
            &mut (),
        )
    };
    let offline = [("HF_HUB_OFFLINE", "1")];
    line(
        fetch(&["model.norm.weight"], &offline),
        &["HF_HUB_OFFLINE forbids"],
    );
    let folder = fetch(&["model.norm.weight", "model.layers.0.mlp.gate.weight"], &[]).unwrap();
    let mut found: Vec<_> = (fs::read_dir(&folder).unwrap())
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    found.sort();
    assert_eq!(found, [INDEX, "one.safetensors"]);
    bench.requests();
    assert_eq!(fetch(&["model.norm.weight"], &[]).unwrap(), folder);
    assert_eq!(fetch(&["model.norm.weight"], &offline).unwrap(), folder);
    assert_eq!(bench.requests(), 0);
    // More is fetched when more is asked for, and then the whole model is no less whole.
    line(
        fetch(&["model.layers.1.mlp.gate.weight"], &offline),
        &["`two.safetensors`"],
    );
    fetch(&["model.layers.1.mlp.gate.weight"], &[]).unwrap();
    assert!(folder.join("two.safetensors").is_file() && !folder.join("three.safetensors").exists());
    line(
        fetch(&["model.extra.weight"], &[]),
        &["lists no tensor `model.extra.weight`", "the original"],
    );
    assert_eq!(bench.fetch().unwrap(), folder);
    assert!(folder.join("three.safetensors").is_file() && folder.join("config.json").is_file());

    // One file needs no index.
    let bench = Bench::new(of_files(&["model.safetensors"]));
    let names = ["model.norm.weight".to_string()];
    let repo = RepoId::parse(REPO).unwrap();
    let folder = hub::fetch_tensors(&repo, &bench.settings(&[]), &names, &mut ()).unwrap();
    assert!(folder.join("model.safetensors").is_file());
    bench.requests();
    hub::fetch_tensors(&repo, &bench.settings(&[]), &names, &mut ()).unwrap();
    assert_eq!(bench.requests(), 0);
}

#[test]
fn shards_of_layers_that_the_model_does_not_have_may_be_missing() {
    // What is there is fetched, whatever it is for.
    let bench = Bench::new(sharded());
    assert!(bench.fetch().unwrap().join("three.safetensors").is_file());

    let mut state = sharded();
    state.files.remove("three.safetensors").unwrap();
    let bench = Bench::new(state);
    let folder = bench.fetch().unwrap();
    assert!(folder.join("two.safetensors").is_file());
    bench.requests();
    assert_eq!(bench.fetch().unwrap(), folder);
    assert_eq!(bench.requests(), 0);

    for (shard, config) in [("two", r#"{ "num_hidden_layers": 2 }"#), ("three", "{}")] {
        let mut state = sharded();
        state.files.remove(&format!("{shard}.safetensors")).unwrap();
        state.files.insert("config.json".to_string(), config.into());
        line(
            Bench::new(state).fetch(),
            &[&format!("holds no `{shard}.safetensors`")],
        );
    }
}

#[test]
fn one_file_needs_no_index() {
    let mut state = demo();
    let shard = state.files.remove("model-00001-of-00002.safetensors").unwrap();
    state.files.insert("model.safetensors".to_string(), shard.clone());
    state.files.remove(INDEX);
    let bench = Bench::new(state);
    let folder = bench.fetch().unwrap();
    assert!(fs::read(folder.join("model.safetensors")).unwrap() == shard);
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 3 + OPTIONAL.len());
    bench.requests();
    assert_eq!(bench.fetch().unwrap(), folder);
    assert_eq!(bench.requests(), 0);
}

#[test]
fn a_cut_connection_continues_in_the_same_run() {
    let bench = Bench::new(demo());
    let shard = &bench.shards[0];
    let size = bench.server.state().files[shard].len();
    bench
        .server
        .state()
        .cuts
        .insert(shard.clone(), [size / 2, 1000].into());
    let mut seen = Recorder::default();
    let folder = hub::fetch(&RepoId::parse(REPO).unwrap(), &bench.settings(&[]), &mut seen).unwrap();
    bench.check(&folder);

    let ranges: Vec<_> = bench
        .server
        .downloads(shard)
        .into_iter()
        .map(|seen| seen.range)
        .collect();
    let continued = |from: usize| Some(format!("bytes={from}-"));
    assert_eq!(ranges, [None, continued(size / 2), continued(size / 2 + 1000)]);
    assert_eq!(bench.server.state().sent[shard], size, "no byte came twice");
    assert_eq!(seen.advanced, seen.plan.unwrap().remaining());
    assert_eq!(seen.notes.len(), 2, "{:?}", seen.notes);
    assert!(
        seen.notes[0].contains(&format!("continuing at {} of {size}", size / 2)),
        "{:?}",
        seen.notes
    );
}

#[test]
fn a_cut_connection_continues_in_the_next_run() {
    let bench = Bench::new(demo());
    let shard = &bench.shards[0];
    let size = bench.server.state().files[shard].len();
    bench
        .server
        .state()
        .cuts
        .insert(shard.clone(), [size / 2, 0, 0, 0].into());
    line(
        bench.fetch(),
        &[
            &format!("`{shard}` broke off at {} of {size} bytes", size / 2),
            "run the same command again",
        ],
    );
    assert_eq!(
        bench.server.downloads(shard).len(),
        4,
        "one try that moved, and three that did not"
    );
    assert_eq!(fs::metadata(bench.partial(shard)).unwrap().len(), size as u64 / 2);
    assert!(!bench.cached_repo().join("refs/main").exists());

    let planned = hub::plan(&RepoId::parse(REPO).unwrap(), &bench.settings(&[])).unwrap();
    let file = planned.files.iter().find(|file| file.name == *shard).unwrap();
    assert_eq!((file.size, file.cached), (size as u64, size as u64 / 2));

    bench.requests();
    let mut seen = Recorder::default();
    let folder = hub::fetch(&RepoId::parse(REPO).unwrap(), &bench.settings(&[]), &mut seen).unwrap();
    bench.check(&folder);
    let ranges: Vec<_> = bench
        .server
        .downloads(shard)
        .into_iter()
        .map(|seen| seen.range)
        .collect();
    assert_eq!(ranges, [Some(format!("bytes={}-", size / 2))]);
    assert_eq!(bench.server.state().sent[shard], size, "no byte came twice");
    assert!(
        seen.files
            .contains(&(shard.clone(), size as u64, size as u64 / 2)),
        "{:?}",
        seen.files
    );
    assert_eq!(seen.advanced, planned.remaining());
}

#[test]
fn a_whole_partial_file_needs_no_request() {
    let bench = Bench::new(demo());
    let shard = &bench.shards[0];
    let partial = bench.partial(shard);
    fs::create_dir_all(partial.parent().unwrap()).unwrap();
    fs::write(&partial, &bench.server.state().files[shard]).unwrap();
    bench.check(&bench.fetch().unwrap());
    assert!(bench.server.downloads(shard).is_empty());
}

#[test]
fn a_partial_file_that_is_too_long_starts_over() {
    let bench = Bench::new(demo());
    let shard = &bench.shards[0];
    let partial = bench.partial(shard);
    fs::create_dir_all(partial.parent().unwrap()).unwrap();
    fs::write(&partial, vec![1; bench.server.state().files[shard].len() + 1]).unwrap();
    bench.check(&bench.fetch().unwrap());
}

#[test]
fn a_server_without_ranges_starts_over() {
    let bench = Bench::new(State {
        ignores_ranges: true,
        ..demo()
    });
    let shard = &bench.shards[0];
    let size = bench.server.state().files[shard].len();
    bench.server.state().cuts.insert(shard.clone(), [size / 2].into());
    let mut seen = Recorder::default();
    bench.check(&hub::fetch(&RepoId::parse(REPO).unwrap(), &bench.settings(&[]), &mut seen).unwrap());
    let begun = seen
        .files
        .iter()
        .filter(|(name, _, present)| name == shard && *present == 0);
    assert_eq!(begun.count(), 2);

    // Half way each time is no progress: it must end.
    let bench = Bench::new(State {
        ignores_ranges: true,
        ..demo()
    });
    bench
        .server
        .state()
        .cuts
        .insert(shard.clone(), [size / 2; 50].into());
    line(bench.fetch(), &["broke off"]);
    assert_eq!(bench.server.downloads(shard).len(), 4);
}

#[test]
fn what_others_left_is_left_alone() {
    let bench = Bench::new(demo());
    let shard = &bench.shards[0];
    let foreign = bench.cached_repo().join(format!(
        "blobs/{}.incomplete",
        etag(&bench.server.state().files[shard])
    ));
    fs::create_dir_all(foreign.parent().unwrap()).unwrap();
    fs::write(&foreign, vec![0; 1000]).unwrap();
    let folder = bench.fetch().unwrap();
    assert_eq!(fs::read(&foreign).unwrap(), vec![0; 1000]);
    fs::remove_file(foreign).unwrap();
    bench.check(&folder);
}

#[test]
fn a_wrong_size() {
    let bench = Bench::new(demo());
    let shard = &bench.shards[0];
    let size = bench.server.state().files[shard].len() as u64;
    for stated in [size + 1, size - 1] {
        bench.server.state().stated_sizes.insert(shard.clone(), stated);
        line(
            bench.fetch(),
            &[
                &format!("`{shard}` should have {stated} bytes, the server sends {size}"),
                "run the command again",
            ],
        );
        assert!(!bench.partial(shard).exists());
    }
    // A beginning that is longer than what the server has.
    let partial = bench.partial(shard);
    fs::write(&partial, vec![0; size as usize + 5]).unwrap();
    bench.server.state().stated_sizes.insert(shard.clone(), size + 10);
    line(bench.fetch(), &["should have", "fewer than were already here"]);
    assert!(!partial.exists());

    bench.server.state().stated_sizes.clear();
    bench.check(&bench.fetch().unwrap());
}

#[test]
fn a_damaged_blob_is_fetched_again() {
    let bench = Bench::new(demo());
    let shard = &bench.shards[0];
    let folder = bench.fetch().unwrap();
    let blob = fs::canonicalize(folder.join(shard)).unwrap();
    fs::write(&blob, b"short").unwrap();
    let mut settings = bench.settings(&[]);
    settings.refresh = true;
    bench.check(&hub::fetch(&RepoId::parse(REPO).unwrap(), &settings, &mut ()).unwrap());
    assert_eq!(bench.server.downloads(shard).len(), 2);
}

#[test]
fn not_enough_disk() {
    let bench = Bench::new(demo());
    let repo = RepoId::parse(REPO).unwrap();
    let planned = hub::plan(&repo, &bench.settings(&[])).unwrap();
    let mut settings = bench.settings(&[]);
    settings.free_space = Some(planned.remaining() - 1);
    let shown = line(
        hub::fetch(&repo, &settings, &mut ()),
        &[
            "the download needs",
            "more below",
            "free 1 bytes, or set HF_HOME to a folder on a larger disk",
        ],
    );
    assert!(shown.contains("hub, and the disk has"), "{shown}");
    for name in &bench.shards {
        assert!(
            bench.server.downloads(name).is_empty(),
            "checked before the download"
        );
    }
    settings.free_space = Some(planned.remaining());
    bench.check(&hub::fetch(&repo, &settings, &mut ()).unwrap());
}

#[test]
fn the_plan_says_what_is_to_come() {
    let bench = Bench::new(demo());
    let plan = hub::plan(&RepoId::parse(REPO).unwrap(), &bench.settings(&[])).unwrap();
    let files = &bench.server.state().files.clone();
    let size = |name: &str| files[name].len() as u64;
    let expected: u64 = plan.files.iter().map(|file| size(&file.name)).sum();
    assert_eq!(plan.total(), expected);
    assert_eq!(plan.remaining(), expected - size("config.json") - size(INDEX));
    assert!(plan.free.is_some_and(|free| free > 0) || cfg!(not(unix)));
    let weights: u64 = bench.shards.iter().map(|name| size(name)).sum();
    assert!(plan.advice(weights - 1).is_some());
    assert_eq!(plan.advice(weights), None);
    for name in &bench.shards {
        assert!(bench.server.downloads(name).is_empty());
    }
}

#[test]
fn whoever_watches_may_refuse() {
    struct Refuses;
    impl Progress for Refuses {
        fn start(&mut self, plan: &Plan) -> Result<()> {
            Err(Error::Tokenizer(plan.advice(1).unwrap()))
        }
    }
    let bench = Bench::new(demo());
    let error = hub::fetch(&RepoId::parse(REPO).unwrap(), &bench.settings(&[]), &mut Refuses).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("more than this machine's 1 bytes of memory"),
        "{error}"
    );
    assert!(bench.server.downloads(&bench.shards[0]).is_empty());
}

#[test]
fn an_index_that_leads_out_is_refused() {
    for name in [
        "../../../escape.safetensors",
        "/etc/escape.safetensors",
        "model.bin",
        "a\\..\\b.safetensors",
    ] {
        let mut state = demo();
        let index = serde_json::json!({ "weight_map": { "a": name } }).to_string();
        state.files.insert(INDEX.to_string(), index.into_bytes());
        state.files.insert(name.to_string(), vec![1; 10]);
        let bench = Bench::new(state);
        let error = bench.fetch().unwrap_err();
        assert!(matches!(error, Error::File { .. }), "{error:?}");
        assert!(
            error
                .to_string()
                .contains("not a .safetensors file inside the repository"),
            "{error}"
        );
        assert!(!error.to_string().contains('\n'));
        let asked = bench
            .server
            .state()
            .requests
            .iter()
            .any(|seen| seen.path.contains("escape"));
        assert!(!asked);
    }
}

#[test]
fn a_shard_in_a_folder() {
    let mut state = demo();
    let (name, bytes) = ("parts/one.safetensors", vec![5; 5000]);
    let index = serde_json::json!({ "weight_map": { "a": name } }).to_string();
    state.files.insert(INDEX.to_string(), index.into_bytes());
    state.files.insert(name.to_string(), bytes.clone());
    let folder = Bench::new(state);
    let snapshot = folder.fetch().unwrap();
    assert_eq!(fs::read(snapshot.join(name)).unwrap(), bytes);
}

#[test]
fn an_endpoint_out_of_reach() {
    let bench = Bench::new(demo());
    // Bound and dropped: a port where nobody listens.
    let nobody = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let nobody = format!("http://{nobody}");
    let elsewhere = [("HF_ENDPOINT", nobody.as_str())];
    line(
        bench.fetch_as(REPO, &elsewhere),
        &[
            &nobody,
            "cannot be had",
            "check the connection, the proxy and HF_ENDPOINT",
        ],
    );

    // What another program cached, without notes on which optional files do not exist, is enough for that.
    let folder = bench.fetch().unwrap();
    fs::remove_file(folder.join(OPTIONAL[0])).unwrap();
    assert_eq!(bench.fetch_as(REPO, &elsewhere).unwrap(), folder);
    assert_eq!(bench.fetch_as(REPO, &[("HF_HUB_OFFLINE", "1")]).unwrap(), folder);
    // Where the hub answers, the file comes back.
    bench.check(&bench.fetch().unwrap());
}

#[test]
fn a_busy_server_is_asked_again() {
    let bench = Bench::new(State {
        refusals: [503, 429, 500].into(),
        ..demo()
    });
    bench.check(&bench.fetch().unwrap());

    let bench = Bench::new(State {
        refusals: [503; 100].into(),
        ..demo()
    });
    line(
        bench.fetch(),
        &["the server answered 503", "run the command again"],
    );
    assert_eq!(bench.requests(), 4);
}

#[test]
fn a_silent_server_is_given_up() {
    let bench = Bench::new(State {
        stalls: true,
        ..demo()
    });
    let mut settings = bench.settings(&[]);
    settings.timeout = Duration::from_millis(100);
    settings.retries = 1;
    let started = std::time::Instant::now();
    line(
        hub::fetch(&RepoId::parse(REPO).unwrap(), &settings, &mut ()),
        &["`config.json` broke off at 0", "timeout"],
    );
    assert!(
        started.elapsed() < Duration::from_secs(2),
        "{:?}",
        started.elapsed()
    );
}

#[test]
fn branches_tags_and_commits() {
    let bench = Bench::new(demo());
    let refs = bench.cached_repo().join("refs");
    for revision in ["v1.0", "refs/pr/1", COMMIT] {
        let folder = bench.fetch_as(&format!("{REPO}@{revision}"), &[]).unwrap();
        assert_eq!(folder, bench.cached_repo().join("snapshots").join(COMMIT));
        bench.requests();
        assert_eq!(
            bench.fetch_as(&format!("{REPO}@{revision}"), &[]).unwrap(),
            folder
        );
        assert_eq!(bench.requests(), 0, "{revision}");
    }
    assert_eq!(fs::read_to_string(refs.join("v1.0")).unwrap(), COMMIT);
    assert_eq!(fs::read_to_string(refs.join("refs/pr/1")).unwrap(), COMMIT);
    assert!(!refs.join(COMMIT).exists() && !refs.join("main").exists());
    // Three names of one commit: the weights came once.
    let state = bench.server.state();
    assert_eq!(state.sent[&bench.shards[0]], state.files[&bench.shards[0]].len());
}

#[test]
fn a_branch_that_moved_is_followed_on_request() {
    let bench = Bench::new(demo());
    let before = bench.fetch().unwrap();
    let moved = COMMIT.replace('0', "f");
    {
        let mut state = bench.server.state();
        state.commit = moved.clone();
        state.files.insert("config.json".to_string(), b"{}".to_vec());
        state.sent.clear();
    }
    assert_eq!(bench.fetch().unwrap(), before);
    let mut settings = bench.settings(&[]);
    settings.refresh = true;
    let after = hub::fetch(&RepoId::parse(REPO).unwrap(), &settings, &mut ()).unwrap();
    assert_eq!(after, bench.cached_repo().join("snapshots").join(&moved));
    bench.check(&after);
    assert_eq!(
        bench.server.state().sent.keys().collect::<Vec<_>>(),
        ["config.json"]
    );
    assert_eq!(bench.fetch().unwrap(), after);
}

#[test]
fn two_at_once_download_once() {
    // Slow answers make the downloads overlap; quick ones make one thread read what the other puts in place.
    for delay in [300, 0, 0, 0, 0, 0, 0, 0, 0, 0] {
        let bench = Bench::new(State {
            delay: Duration::from_millis(delay),
            ..demo()
        });
        let folders = std::thread::scope(|scope| {
            let threads = [(); 2].map(|()| scope.spawn(|| bench.fetch().unwrap()));
            threads.map(|thread| thread.join().unwrap())
        });
        assert_eq!(folders[0], folders[1]);
        bench.check(&folders[0]);
        for name in &bench.shards {
            assert_eq!(bench.server.downloads(name).len(), 1, "{name}");
        }
    }
}

#[test]
fn the_longest_timeout_is_no_overflow() {
    let bench = Bench::new(demo());
    let seconds = u64::MAX.to_string();
    bench
        .fetch_as(REPO, &[("HF_HUB_DOWNLOAD_TIMEOUT", seconds.as_str())])
        .unwrap();
}

/// What the headers in a repository tell, without its weights in the cache.
fn inspected(bench: &Bench) -> candle_mmfp4::models::glm4_moe_lite::Inspection {
    let files = hub::headers(&RepoId::parse(REPO).unwrap(), &bench.settings(&[])).unwrap();
    let snapshot = bench.cached_repo().join("snapshots").join(COMMIT);
    let cached: Vec<_> = fs::read_dir(snapshot).into_iter().flatten().collect();
    for file in cached {
        let name = file.unwrap().file_name().into_string().unwrap();
        assert!(name.ends_with(".json"), "{name} was fetched");
    }
    Model::inspect(&files, &LoadOptions::default()).unwrap()
}

#[test]
fn headers_of_gguf_files_and_what_says_that_weights_are_rotated_are_looked_at() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/gguf/mxfp4.gguf");
    let mut state = of_files(&["README.md"]);
    state
        .files
        .insert("GLM-MXFP4.gguf".into(), fs::read(&file).unwrap());
    let found = inspected(&Bench::new(state));
    let here = Model::inspect(&ModelFiles::folder(file), &LoadOptions::default()).unwrap();
    assert!(found.load == here.load && found.load.is_some() && found.problems.is_empty());

    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/demo-model");
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut state = of_files(&[]);
    for path in entries {
        let name = path.file_name().unwrap().to_str().unwrap().to_string();
        state.files.insert(name, fs::read(path).unwrap());
    }
    let rotated = br#"{"use_hadamard": true, "hadamard_block_size": 64}"#;
    state
        .files
        .insert("quantization_config.json".into(), rotated.to_vec());
    let found = inspected(&Bench::new(state));
    assert!(found.problems[0].contains("use_hadamard"), "{:?}", found.problems);
}

#[test]
fn a_header_longer_than_its_file_is_refused() {
    let mut state = demo();
    for (name, bytes) in &mut state.files {
        if name.ends_with(".safetensors") {
            *bytes = u64::MAX.to_le_bytes().to_vec();
        }
    }
    let bench = Bench::new(state);
    let found = hub::headers(&RepoId::parse(REPO).unwrap(), &bench.settings(&[]));
    line(
        found,
        &["of 8 bytes, begins with a header of 18446744073709551615"],
    );
}

/// A GGUF file with one more array in its metadata, of `kind`, and `elements` of the array.
fn with_array(gguf: &[u8], kind: u32, count: u64, elements: &[u8]) -> Vec<u8> {
    let values = u64::from_le_bytes(gguf[16..24].try_into().unwrap()) + 1;
    // Tensors' data begin at a multiple of 32, and are moved by one.
    let len = 8 + 4 + 4 + 8 + elements.len();
    let key = "k".repeat(1 + (31 - len % 32));
    [
        &gguf[..16],
        &values.to_le_bytes(),
        &(key.len() as u64).to_le_bytes(),
        key.as_bytes(),
        &9u32.to_le_bytes(),
        &kind.to_le_bytes(),
        &count.to_le_bytes(),
        elements,
        &gguf[24..],
    ]
    .concat()
}

#[test]
fn of_a_gguf_file_as_much_is_fetched_as_its_header_takes() {
    const NAME: &str = "GLM-MXFP4.gguf";
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/gguf/mxfp4.gguf");
    let small = fs::read(&path).unwrap();
    let here = Model::inspect(&ModelFiles::folder(path), &LoadOptions::default()).unwrap();
    let of = |file: Vec<u8>, size: u64, cut: usize| {
        let mut state = of_files(&[]);
        state.files.insert(NAME.into(), file);
        state.stated_sizes.insert(NAME.into(), size);
        state.cuts.insert(NAME.into(), [cut].into());
        Bench::new(state)
    };
    // An array whose length is told, and one of texts, each of which has its own.
    let told = vec![7; 33 << 20];
    let texts = [&(1u64 << 16).to_le_bytes()[..], &[b'a'; 1 << 16]].concat();
    for file in [
        with_array(&small, 0, told.len() as u64, &told),
        with_array(&small, 8, 50, &texts.repeat(50)),
    ] {
        let header = file.len() - small.len();
        // Twice as much, and what the small file's header takes.
        let cut = 2 * (header + (1 << 16));
        let padded = [&file[..], &vec![0; cut.saturating_sub(file.len())]].concat();
        let found = inspected(&of(padded, 1 << 36, cut));
        assert!(
            found.load == here.load && found.problems.is_empty(),
            "{:?}",
            found.problems
        );
    }

    // More than there is any use for, and more than the file has.
    let huge = with_array(&small, 0, 1 << 30, &[7; 1 << 20]);
    let headers = |size: u64| {
        let bench = of(huge.clone(), size, usize::MAX);
        hub::headers(&RepoId::parse(REPO).unwrap(), &bench.settings(&[]))
    };
    line(
        headers(1 << 40),
        &[
            &format!("header of `{NAME}`"),
            "268435456",
            "mmfp4 generate -m org/demo",
        ],
    );
    let files = headers(huge.len() as u64).unwrap();
    let error = Model::inspect(&files, &LoadOptions::default())
        .err()
        .unwrap()
        .to_string();
    assert!(
        error.contains(NAME) && error.contains("cannot be read"),
        "{error}"
    );
}
