//! Which of a repository's GGUF files is the model.

use super::RepoId;
use crate::Result;
use crate::checkpoint::files::{GGUF, Part};
use std::collections::{BTreeMap, BTreeSet};

/// A model in GGUF: one file, or the parts of one.
struct Model<'a> {
    /// The path without parts' numbers and ending.
    stem: &'a str,
    files: Vec<String>,
}

impl Model<'_> {
    /// The name without its folder.
    fn name(&self) -> &str {
        self.stem.rsplit('/').next().unwrap_or(self.stem)
    }

    /// What follows the last `-` or `.` of the name: by convention the quantisation.
    fn label(&self) -> &str {
        self.name().rsplit(['-', '.']).next().unwrap_or(self.stem)
    }

    /// Whether the name is, or ends in, `quant`, in capitals or not.
    fn is(&self, quant: &str) -> bool {
        let (name, quant) = (self.name().to_ascii_lowercase(), quant.to_ascii_lowercase());
        let before = name.strip_suffix(&quant);
        before.is_some_and(|before| before.is_empty() || before.ends_with(['-', '.']))
    }
}

/// Whether a repository's files are a GGUF model, and no safetensors checkpoint is meant.
pub(super) fn is_meant(repo: &RepoId, has_safetensors: bool, files: &BTreeSet<String>) -> bool {
    repo.quant().is_some() || !has_safetensors && !models(files).is_empty()
}

/// The files of the one model in GGUF that `repo` names, among `files`, in their order.
///
/// # Errors
/// [`Error::Hub`](crate::Error::Hub) where there is none, or several: it lists what may follow the repository's name. And
/// where one part of several is missing.
pub(super) fn choose(repo: &RepoId, files: &BTreeSet<String>) -> Result<Vec<String>> {
    let models = models(files);
    let meant: Vec<_> = match repo.quant() {
        None => models.iter().collect(),
        Some(quant) => models.iter().filter(|model| model.is(quant)).collect(),
    };
    let [model] = meant[..] else {
        let problem = match (repo.quant(), models.len(), meant.len()) {
            (Some(_), 0, _) => "the repository holds no GGUF files".to_string(),
            (Some(quant), _, 0) => format!("no GGUF file of the repository is `{quant}`"),
            (Some(quant), ..) => format!("several GGUF files of the repository are `{quant}`"),
            (None, ..) => "the repository holds several models in GGUF".to_string(),
        };
        return Err(repo.error(problem, advice(repo, &models)));
    };
    match model.files.iter().find(|name| !files.contains(*name)) {
        None => Ok(model.files.clone()),
        Some(missing) => {
            let problem = format!("the repository holds no `{missing}`, a part of the model");
            Err(repo.error(problem, "choose another revision"))
        }
    }
}

fn advice(repo: &RepoId, models: &[Model<'_>]) -> String {
    if models.is_empty() {
        return format!("leave out `:{}`", repo.quant().unwrap_or_default());
    }
    let labels: BTreeSet<_> = models.iter().map(Model::label).collect();
    // Labels that two share tell nothing.
    let names = models.iter().map(|model| match labels.len() == models.len() {
        true => model.label(),
        false => model.name(),
    });
    let names: Vec<_> = names.collect();
    format!(
        "name one as `{}:{}`; it has {}",
        repo.name(),
        names[0],
        names.join(", ")
    )
}

/// The models among a repository's files; encoders of images and quantisers' statistics are none.
fn models(files: &BTreeSet<String>) -> Vec<Model<'_>> {
    let mut models: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for file in files.iter().filter(|file| file.ends_with(GGUF)) {
        let (stem, names) = match Part::of(file) {
            Some(part) => (part.stem, (1..=part.of).map(|number| part.name(number)).collect()),
            None => (file.strip_suffix(GGUF).unwrap_or(file), vec![file.clone()]),
        };
        models.entry(stem).or_insert(names);
    }
    let models = models.into_iter().map(|(stem, files)| Model { stem, files });
    let is_other = |model: &Model<'_>| model.name().contains("mmproj") || model.name().contains("imatrix");
    models.filter(|model| !is_other(model)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(repo: &str, files: &[&str]) -> Result<Vec<String>, String> {
        let files = files.iter().map(|file| file.to_string()).collect();
        choose(&RepoId::parse(repo).unwrap(), &files).map_err(|error| error.to_string())
    }

    const SEVERAL: [&str; 8] = [
        "GLM-4.7-Flash-Q4_K_M.gguf",
        "GLM-4.7-Flash-UD-Q4_K_XL.gguf",
        "GLM-4.7-Flash.Q8_0.gguf",
        "bf16/GLM-4.7-Flash-bf16-00001-of-00002.gguf",
        "bf16/GLM-4.7-Flash-bf16-00002-of-00002.gguf",
        "mmproj-F16.gguf",
        "GLM-4.7-Flash-imatrix.gguf",
        "config.json",
    ];

    #[test]
    fn a_quantisation_is_the_end_of_a_name() {
        for (quant, expected) in [
            ("Q4_K_M", &SEVERAL[..1]),
            ("q4_k_m", &SEVERAL[..1]),
            ("UD-Q4_K_XL", &SEVERAL[1..2]),
            ("Q4_K_XL", &SEVERAL[1..2]),
            ("Q8_0", &SEVERAL[2..3]),
            ("GLM-4.7-Flash.Q8_0", &SEVERAL[2..3]),
            ("BF16", &SEVERAL[3..5]),
        ] {
            assert_eq!(
                chosen(&format!("o/n:{quant}"), &SEVERAL).unwrap(),
                expected,
                "{quant}"
            );
        }
        for none in ["Q4_K", "K_M", "Q5_0", "F16", "imatrix"] {
            let error = chosen(&format!("o/n:{none}"), &SEVERAL).unwrap_err();
            assert!(error.contains(&format!("is `{none}`")), "{error}");
            assert!(error.contains("it has Q4_K_M, Q4_K_XL, Q8_0, bf16"), "{error}");
        }
    }

    #[test]
    fn of_several_one_has_to_be_named() {
        let error = chosen("o/n", &SEVERAL).unwrap_err();
        assert!(
            error.contains("several models in GGUF; name one as `o/n:Q4_K_M`"),
            "{error}"
        );
        assert_eq!(chosen("o/n", &["a.gguf", "mmproj-a.gguf"]).unwrap(), ["a.gguf"]);
        let twice = ["a/m-Q8_0.gguf", "b/x-Q8_0.gguf"];
        let error = chosen("o/n:Q8_0", &twice).unwrap_err();
        assert!(
            error.contains("several GGUF files") && error.contains("m-Q8_0, x-Q8_0"),
            "{error}"
        );
        assert_eq!(chosen("o/n:x-Q8_0", &twice).unwrap(), twice[1..]);
        let error = chosen("o/n:Q8_0", &["a.safetensors"]).unwrap_err();
        assert!(error.contains("no GGUF files; leave out `:Q8_0`"), "{error}");
        let error = chosen("o/n", &["m-00002-of-00002.gguf"]).unwrap_err();
        assert!(error.contains("no `m-00001-of-00002.gguf`"), "{error}");
    }
}
