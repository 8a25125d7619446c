//! What a download will take, known before its first byte of weights.

use std::path::PathBuf;

use serde_json::Value;

use super::{HubSettings, RepoId};
use crate::Result;
use crate::checkpoint::files::GGUF;

/// A download to come: its files and their sizes, as the hub states them.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The repository.
    pub repo: RepoId,
    /// The commit that the revision stands for.
    pub commit: String,
    /// The folder that will hold the files.
    pub snapshot: PathBuf,
    /// All files that the model needs, those that are in the cache already included; weights last.
    pub files: Vec<PlannedFile>,
    /// The free bytes of the cache's disk; None where the system does not say.
    pub free: Option<u64>,
    /// config.json, for what it says about the weights; null of a GGUF model, which says it itself, and of single tensors.
    pub(super) config: Value,
    /// Files that models may have and this commit has not.
    pub(super) absent: Vec<String>,
}

/// A file of a [`Plan`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedFile {
    /// Its path in the repository.
    pub name: String,
    /// Its size in bytes.
    pub size: u64,
    /// The name of its blob in the cache.
    pub etag: String,
    /// The bytes that are in the cache already: all of them, or the beginning that an interrupted run left.
    pub cached: u64,
}

impl Plan {
    /// The bytes of all files.
    pub fn total(&self) -> u64 {
        sum(self.files.iter().map(|file| file.size))
    }

    /// The bytes that are still to be fetched.
    pub fn remaining(&self) -> u64 {
        sum(self
            .files
            .iter()
            .map(|file| file.size.saturating_sub(file.cached)))
    }

    /// The bytes of the weights' files.
    pub fn weights(&self) -> u64 {
        sum(self.shards().map(|file| file.size))
    }

    /// What the download gives: the snapshot or, of a GGUF model, its first file there.
    pub(super) fn target(&self) -> PathBuf {
        match self.files.iter().find(|file| file.name.ends_with(GGUF)) {
            Some(file) => self.snapshot.join(&file.name),
            None => self.snapshot.clone(),
        }
    }

    /// The model's config.json; null of a GGUF model, which has none.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// What the user should know although it does not stand in the way; one line each.
    pub fn warnings(&self) -> Vec<String> {
        let unknown = self.free.is_none() && self.remaining() > 0;
        unknown
            .then(|| {
                format!(
                    "{}: the free disk space is not known; {} will be written below {}",
                    self.repo,
                    gib(self.remaining()),
                    self.snapshot.display()
                )
            })
            .into_iter()
            .collect()
    }

    /// What to do if the weights are larger than the memory of the machine, `memory` in bytes (see
    /// [`machine_memory`]); None if they fit. One line, meant to be said before the download.
    ///
    /// The estimate: MMFP4 with groups of 128 takes 4 + 16/128 bits a weight; the embeddings and the output head keep
    /// their type; one shard is mapped at a time while it is being quantised.
    pub fn advice(&self, memory: u64) -> Option<String> {
        let weights = self.weights();
        let largest = self.shards().map(|file| file.size).max().unwrap_or(0);
        if weights <= memory {
            return None;
        }
        let opening = |kind: &str| {
            format!(
                "{}: {} of {kind}weights are more than this machine's {} of memory",
                self.repo,
                gib(weights),
                gib(memory)
            )
        };
        let smaller = "choose a smaller model, or a machine with more memory";
        let bits = match self.config_text(&["dtype", "torch_dtype"]) {
            Some("float32") => 32,
            _ => 16,
        };
        let is_gguf = self.shards().any(|file| file.name.ends_with(GGUF));
        if is_gguf || self.config_has(&["quantization_config", "quantization", "compression_config"]) {
            return Some(format!(
                "{}, and they are quantised already; {smaller}",
                opening("")
            ));
        }
        let kept = self.embedding_weights().saturating_mul(bits / 8).min(weights);
        let quantised = kept + ((weights - kept) as f64 * 4.125 / bits as f64) as u64;
        let peak = quantised.saturating_add(largest);
        let opening = opening(if bits == 32 { "F32 " } else { "BF16 " });
        if peak > memory {
            return Some(format!(
                "{opening}, and with `--quantize mmfp4` it would still take about {} ({} of 4-bit weights and one \
                 shard of {}); {smaller}",
                gib(peak),
                gib(quantised),
                gib(largest)
            ));
        }
        Some(format!(
            "{opening}; quantise while loading with `--quantize mmfp4` (at most about {} of memory: {} of 4-bit weights \
             and one shard of {}), or choose a checkpoint that is 4-bit already (MMFP4 or NVFP4), which is also the \
             smaller download",
            gib(peak),
            gib(quantised),
            gib(largest)
        ))
    }

    /// Refuses a download that the disk cannot hold.
    pub(super) fn check_space(&self, settings: &HubSettings) -> Result<()> {
        let needed = self.remaining();
        match self.free {
            Some(free) if free < needed => Err(self.repo.error(
                format!(
                    "the download needs {} more below {}, and the disk has {} free",
                    gib(needed),
                    settings.cache.display(),
                    gib(free)
                ),
                format!(
                    "free {}, or set HF_HOME to a folder on a larger disk",
                    gib(needed - free)
                ),
            )),
            _ => Ok(()),
        }
    }

    fn shards(&self) -> impl Iterator<Item = &PlannedFile> {
        self.files.iter().filter(|file| {
            [".safetensors", GGUF]
                .iter()
                .any(|ending| file.name.ends_with(ending))
        })
    }

    /// How many weights stay as they are: the embeddings, and the output head where it is one of its own.
    fn embedding_weights(&self) -> u64 {
        let number = |name: &str| self.config.get(name).and_then(Value::as_u64).unwrap_or(0);
        let tied = self.config.get("tie_word_embeddings").and_then(Value::as_bool);
        let tables = if tied == Some(true) { 1 } else { 2 };
        number("vocab_size")
            .saturating_mul(number("hidden_size"))
            .saturating_mul(tables)
    }

    fn config_text(&self, names: &[&str]) -> Option<&str> {
        names.iter().find_map(|name| self.config.get(name)?.as_str())
    }

    fn config_has(&self, names: &[&str]) -> bool {
        names
            .iter()
            .any(|name| self.config.get(name).is_some_and(|value| !value.is_null()))
    }
}

/// A sum of sizes that a server states: one that overflows must not look small.
fn sum(sizes: impl Iterator<Item = u64>) -> u64 {
    sizes.fold(0, u64::saturating_add)
}

/// The memory of this machine in bytes: `MemTotal` of /proc/meminfo on Linux, `hw.memsize` on macOS; None elsewhere.
pub fn machine_memory() -> Option<u64> {
    if cfg!(target_os = "macos") {
        let asked = std::process::Command::new("/usr/sbin/sysctl")
            .args(["-n", "hw.memsize"])
            .output()
            .ok()?;
        String::from_utf8(asked.stdout).ok()?.trim().parse().ok()
    } else {
        meminfo_total(&std::fs::read_to_string("/proc/meminfo").ok()?)
    }
}

fn meminfo_total(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1024)
}

/// A size as people say it.
fn gib(bytes: u64) -> String {
    match bytes {
        0..0x10_0000 => format!("{bytes} bytes"),
        0x10_0000..0x4000_0000 => format!("{:.1} MiB", bytes as f64 / 1_048_576.0),
        _ => format!("{:.1} GiB", bytes as f64 / 1_073_741_824.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A plan of `count` shards of `size` bytes.
    fn plan(config: Value, count: usize, size: u64) -> Plan {
        let shard = |index: usize| PlannedFile {
            name: format!("model-{index}.safetensors"),
            size,
            etag: index.to_string(),
            cached: 0,
        };
        let mut files: Vec<PlannedFile> = (0..count).map(shard).collect();
        files.push(PlannedFile {
            name: "tokenizer.json".to_string(),
            size: 1 << 40,
            etag: "t".to_string(),
            cached: 0,
        });
        Plan {
            repo: RepoId::parse("zai-org/GLM-4.7-Flash").unwrap(),
            commit: "c".to_string(),
            snapshot: PathBuf::from("/cache/s"),
            files,
            free: Some(1 << 40),
            config,
            absent: Vec::new(),
        }
    }

    const GIB: u64 = 1 << 30;

    #[test]
    fn sizes_that_overflow_fit_no_disk() {
        let absurd = plan(Value::Null, 2, u64::MAX);
        assert_eq!((absurd.total(), absurd.remaining()), (u64::MAX, u64::MAX));
        let settings = HubSettings::from_lookup(|name| (name == "HOME").then(|| "/h".into())).unwrap();
        let error = absurd.check_space(&settings).unwrap_err().to_string();
        assert!(error.contains("the disk has"), "{error}");
        assert!(absurd.advice(24 * GIB).is_some());
    }

    #[test]
    fn an_original_on_a_small_machine() {
        let config = serde_json::json!({ "dtype": "bfloat16", "vocab_size": 154_880, "hidden_size": 2048 });
        let original = plan(config, 48, 1_300_000_000);
        let advice = original.advice(24 * GIB).unwrap();
        // 62.4 GB are 58.1 GiB. Kept: 2 · 154,880 · 2,048 · 2 bytes = 1.27 GB; the rest · 4.125/16 = 15.76 GB; together
        // 15.9 GiB, and a shard of 1.3 GB = 1.2 GiB.
        assert!(advice.contains("58.1 GiB of BF16 weights"), "{advice}");
        assert!(advice.contains("24.0 GiB of memory"), "{advice}");
        assert!(
            advice.contains("`--quantize mmfp4` (at most about 17.1 GiB"),
            "{advice}"
        );
        assert!(
            advice.contains("15.9 GiB of 4-bit weights and one shard of 1.2 GiB"),
            "{advice}"
        );
        assert!(advice.contains("MMFP4 or NVFP4"), "{advice}");
        assert!(!advice.contains('\n'));

        assert_eq!(original.advice(64 * GIB), None);
        let advice = original.advice(16 * GIB).unwrap();
        assert!(advice.contains("would still take about 17.1 GiB"), "{advice}");
    }

    #[test]
    fn f32_halves_twice() {
        // No embeddings known: 64 GiB of F32 are 16 Gi weights, at 4.125 bits 8.25 GiB; one shard of 4 GiB.
        let advice = plan(serde_json::json!({ "torch_dtype": "float32" }), 16, 4 * GIB)
            .advice(24 * GIB)
            .unwrap();
        assert!(advice.contains("64.0 GiB of F32 weights"), "{advice}");
        assert!(advice.contains("about 12.2 GiB"), "{advice}");
    }

    #[test]
    fn quantised_already() {
        let config =
            serde_json::json!({ "dtype": "bfloat16", "quantization_config": { "quant_method": "x" } });
        let advice = plan(config, 4, 4 * GIB).advice(8 * GIB).unwrap();
        assert!(advice.contains("quantised already"), "{advice}");
        assert!(!advice.contains("--quantize"), "{advice}");
    }

    #[test]
    fn of_gguf_the_file_is_the_model() {
        let mut plan = plan(Value::Null, 1, GIB);
        assert_eq!(plan.target(), plan.snapshot);
        plan.files[0].name = "b/m-00001-of-00002.gguf".to_string();
        assert_eq!(plan.target(), plan.snapshot.join("b/m-00001-of-00002.gguf"));
        assert_eq!(plan.weights(), GIB);
        let advice = plan.advice(1).unwrap();
        assert!(advice.contains("quantised already"), "{advice}");
    }

    #[test]
    fn an_unknown_disk_is_a_warning() {
        let mut plan = plan(Value::Null, 1, GIB);
        assert_eq!(plan.warnings(), Vec::<String>::new());
        plan.free = None;
        assert!(plan.warnings()[0].contains("not known"), "{:?}", plan.warnings());
    }

    #[test]
    fn memory_is_read() {
        assert_eq!(
            meminfo_total("MemTotal:       65804528 kB\nMemFree: 1 kB\n"),
            Some(65_804_528 * 1024)
        );
        assert_eq!(meminfo_total("MemFree: 1 kB\n"), None);
        #[cfg(target_os = "linux")]
        assert!(machine_memory().unwrap() > 1 << 28);
    }
}
