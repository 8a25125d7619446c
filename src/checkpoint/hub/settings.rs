//! The environment of a download: the variables that Python's huggingface_hub knows, read as it reads them.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::{Error, Result};

/// Where files come from, where they go, and how patiently.
///
/// [`from_env`](Self::from_env) reads the environment. Of these variables hf-hub 0.5 itself knows only
/// `HF_HOME` and `HF_ENDPOINT`; the others are mapped here.
///
/// | variable | meaning |
/// |---|---|
/// | `HF_ENDPOINT` | the hub's address, `https://huggingface.co` by default |
/// | `HF_HUB_CACHE`, `HUGGINGFACE_HUB_CACHE` | the cache, `$HF_HOME/hub` by default |
/// | `HF_HOME` | `$XDG_CACHE_HOME/huggingface` by default, or else `~/.cache/huggingface` |
/// | `HF_TOKEN`, `HUGGING_FACE_HUB_TOKEN` | the access token; else the file `HF_TOKEN_PATH`, by default `$HF_HOME/token` |
/// | `HF_HUB_DISABLE_IMPLICIT_TOKEN` | send no token |
/// | `HF_HUB_OFFLINE`, `TRANSFORMERS_OFFLINE` | use the cache only |
/// | `HF_HUB_DISABLE_PROGRESS_BARS` | for whoever shows progress: do not |
/// | `HF_HUB_DOWNLOAD_TIMEOUT` | seconds without an answer before a try counts as failed, 10 by default |
///
/// Switches are on for `1`, `ON`, `YES` and `TRUE` in any case. Paths may hold `~`, `$NAME` and `${NAME}`.
/// An empty variable counts as unset. Proxies come from `HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY`, `NO_PROXY`.
#[derive(Debug, Clone)]
pub struct HubSettings {
    /// The hub's address, without a slash at the end.
    pub endpoint: String,
    /// The cache folder that holds `models--org--name`.
    pub cache: PathBuf,
    /// Make no request; use what the cache holds.
    pub offline: bool,
    /// Ask the hub whether the revision has moved, even if the cache holds a complete snapshot of it.
    pub refresh: bool,
    /// Whether progress bars are wanted.
    pub progress_bars: bool,
    /// How long the server may stay silent.
    pub timeout: Duration,
    /// How often a request is repeated after a failure that may pass. A transfer that has moved forward starts
    /// counting afresh.
    pub retries: u32,
    /// The pause before the first repetition; it doubles from one to the next.
    pub backoff: Duration,
    /// The free space of the cache's disk in bytes, where it is not to be asked of the system: a quota, or a test.
    pub free_space: Option<u64>,
    token: Option<Token>,
}

impl HubSettings {
    /// The settings that the process environment asks for.
    ///
    /// # Errors
    /// [`Error::Argument`] for a variable that cannot be used, and where no home folder is known;
    /// [`Error::Io`] for a token file that cannot be read.
    pub fn from_env() -> Result<Self> {
        Self::from_lookup(|name| std::env::var(name).ok())
    }

    /// As [`from_env`](Self::from_env), with the variables from `lookup`.
    ///
    /// # Errors
    /// As for [`from_env`](Self::from_env).
    pub fn from_lookup(lookup: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let variable = |name: &str| lookup(name).filter(|value| !value.trim().is_empty());
        let switch = |name: &str| variable(name).is_some_and(|value| is_true(&value));
        let path = |name: &str| variable(name).map(|value| expand(&value, &variable));

        let home = || -> Result<PathBuf> {
            if let Some(home) = path("HF_HOME") {
                return Ok(home);
            }
            let caches = path("XDG_CACHE_HOME").or_else(|| {
                let user = variable("HOME").or_else(|| variable("USERPROFILE"))?;
                Some(Path::new(&user).join(".cache"))
            });
            caches.map(|caches| caches.join("huggingface")).ok_or_else(|| {
                Error::argument(
                    "hub",
                    "HF_HOME",
                    "a folder for the cache",
                    "neither HF_HOME, HF_HUB_CACHE nor HOME; set HF_HOME",
                )
            })
        };
        let cache = match path("HF_HUB_CACHE").or_else(|| path("HUGGINGFACE_HUB_CACHE")) {
            Some(cache) => cache,
            None => home()?.join("hub"),
        };

        let token = if switch("HF_HUB_DISABLE_IMPLICIT_TOKEN") {
            None
        } else {
            let from_variable = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"]
                .iter()
                .find_map(|name| variable(name).map(|value| (name.to_string(), value)));
            match from_variable {
                Some((name, value)) => Token::new(value, name)?,
                None => match path("HF_TOKEN_PATH").or_else(|| Some(home().ok()?.join("token"))) {
                    Some(file) => Token::read(&file)?,
                    None => None,
                },
            }
        };

        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_string());
        let endpoint = endpoint.trim().trim_end_matches('/').to_string();
        let usable = endpoint
            .parse::<ureq::http::Uri>()
            .is_ok_and(|uri| matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some());
        if !usable {
            return Err(Error::argument(
                "hub",
                "HF_ENDPOINT",
                "an address such as https://huggingface.co",
                format!("`{endpoint}`"),
            ));
        }

        let timeout = match variable("HF_HUB_DOWNLOAD_TIMEOUT") {
            None => Duration::from_secs(10),
            Some(value) => match value.trim().parse() {
                Ok(seconds) if seconds > 0 => Duration::from_secs(seconds),
                _ => {
                    return Err(Error::argument(
                        "hub",
                        "HF_HUB_DOWNLOAD_TIMEOUT",
                        "a whole number of seconds, at least 1",
                        format!("`{value}`"),
                    ));
                }
            },
        };

        Ok(Self {
            endpoint,
            cache,
            offline: variable("HF_HUB_OFFLINE")
                .or_else(|| variable("TRANSFORMERS_OFFLINE"))
                .is_some_and(|value| is_true(&value)),
            refresh: false,
            progress_bars: !switch("HF_HUB_DISABLE_PROGRESS_BARS"),
            timeout,
            retries: 3,
            backoff: Duration::from_millis(500),
            free_space: None,
            token,
        })
    }

    pub(super) fn token(&self) -> Option<&Token> {
        self.token.as_ref()
    }
}

/// An access token, and where it came from; neither shows the token itself.
#[derive(Clone)]
pub(super) struct Token {
    secret: String,
    origin: String,
}

impl Token {
    fn new(text: String, origin: String) -> Result<Option<Self>> {
        let secret = text.trim().to_string();
        if !secret.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(Error::argument(
                "hub",
                "HF_TOKEN",
                "one word of printable characters",
                format!("something else in {origin}"),
            ));
        }
        Ok((!secret.is_empty()).then_some(Self { secret, origin }))
    }

    fn read(file: &Path) -> Result<Option<Self>> {
        match std::fs::read_to_string(file) {
            Ok(text) => Self::new(text, file.display().to_string()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io(
                file,
                error,
                "mend the token file, or name the token in HF_TOKEN",
            )),
        }
    }

    pub(super) fn header(&self) -> String {
        format!("Bearer {}", self.secret)
    }

    /// The variable or the file that held it.
    pub(super) fn origin(&self) -> &str {
        &self.origin
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token(from {})", self.origin)
    }
}

fn is_true(value: &str) -> bool {
    matches!(
        value.trim().to_ascii_uppercase().as_str(),
        "1" | "ON" | "YES" | "TRUE"
    )
}

/// `~`, `$NAME` and `${NAME}` at their values, as Python's `expandvars(expanduser(path))`: what is unset stays.
fn expand(path: &str, variable: &impl Fn(&str) -> Option<String>) -> PathBuf {
    let mut rest = path;
    let mut expanded = String::new();
    if let Some(tail) = path.strip_prefix('~')
        && (tail.is_empty() || tail.starts_with('/'))
        && let Some(home) = variable("HOME")
    {
        expanded.push_str(home.trim_end_matches('/'));
        rest = tail;
    }
    while let Some((before, after)) = rest.split_once('$') {
        expanded.push_str(before);
        let (name, tail) = match after.strip_prefix('{').and_then(|braced| braced.split_once('}')) {
            Some(braced) => braced,
            None => after.split_at(
                after
                    .find(|c: char| !c.is_ascii_alphanumeric() && c != '_')
                    .unwrap_or(after.len()),
            ),
        };
        match variable(name) {
            Some(value) => expanded.push_str(&value),
            None => expanded.push_str(&rest[before.len()..rest.len() - tail.len()]),
        }
        rest = tail;
    }
    expanded.push_str(rest);
    PathBuf::from(expanded)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(variables: &[(&str, &str)]) -> Result<HubSettings> {
        HubSettings::from_lookup(|name| {
            variables
                .iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| value.to_string())
        })
    }

    #[test]
    fn the_cache_is_where_python_has_it() {
        for (variables, cache) in [
            (&[("HOME", "/u")][..], "/u/.cache/huggingface/hub"),
            (&[("HOME", "/u"), ("XDG_CACHE_HOME", "/x")], "/x/huggingface/hub"),
            (
                &[("HOME", "/u"), ("XDG_CACHE_HOME", "/x"), ("HF_HOME", "/h")],
                "/h/hub",
            ),
            (
                &[
                    ("HOME", "/u"),
                    ("HF_HOME", "/h"),
                    ("HUGGINGFACE_HUB_CACHE", "/old"),
                ],
                "/old",
            ),
            (
                &[("HUGGINGFACE_HUB_CACHE", "/old"), ("HF_HUB_CACHE", "/new")],
                "/new",
            ),
            (&[("HOME", "/u"), ("HF_HOME", "~/models")], "/u/models/hub"),
            (&[("HOME", "/u"), ("HF_HOME", "")], "/u/.cache/huggingface/hub"),
            (
                &[("D", "/disk"), ("HF_HUB_CACHE", "$D/a/${D}b/$NONE/${E}")],
                "/disk/a//diskb/$NONE/${E}",
            ),
        ] {
            assert_eq!(
                settings(variables).unwrap().cache,
                Path::new(cache),
                "{variables:?}"
            );
        }
        let error = settings(&[]).unwrap_err().to_string();
        assert!(error.contains("set HF_HOME"), "{error}");
    }

    #[test]
    fn tokens() {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path().to_str().unwrap();
        let header = |variables: &[(&str, &str)]| {
            settings(variables)
                .unwrap()
                .token()
                .map(|token| (token.header(), token.origin().to_string()))
        };
        assert_eq!(header(&[("HF_HOME", home)]), None);

        let file = folder.path().join("token");
        std::fs::write(&file, "hf_file\n").unwrap();
        let from_file = Some(("Bearer hf_file".to_string(), file.display().to_string()));
        assert_eq!(header(&[("HF_HOME", home)]), from_file);
        assert_eq!(
            header(&[("HF_HOME", "/none"), ("HF_TOKEN_PATH", file.to_str().unwrap())]),
            from_file
        );
        assert_eq!(header(&[("HF_HOME", home), ("HF_TOKEN", " ")]), from_file);
        assert_eq!(
            header(&[("HF_HOME", home), ("HF_TOKEN", " hf_variable\n")]),
            Some(("Bearer hf_variable".to_string(), "HF_TOKEN".to_string()))
        );
        assert_eq!(
            header(&[
                ("HF_HOME", home),
                ("HF_TOKEN", "hf"),
                ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
            ]),
            None
        );
        let error = settings(&[("HF_HOME", home), ("HF_TOKEN", "hf\nX-Evil: 1")]).unwrap_err();
        assert!(error.to_string().contains("one word"), "{error}");
        assert!(!error.to_string().contains("Evil"), "{error}");
        let shown = format!(
            "{:?}",
            settings(&[("HF_HOME", home), ("HF_TOKEN", "hf_secret")]).unwrap()
        );
        assert!(!shown.contains("hf_secret"), "{shown}");
    }

    #[test]
    fn switches_and_numbers() {
        let with = |name, value| settings(&[("HOME", "/u"), (name, value)]).unwrap();
        for value in ["1", "on", "Yes", "TRUE"] {
            assert!(with("HF_HUB_OFFLINE", value).offline, "{value}");
        }
        for value in ["0", "off", "", "2"] {
            assert!(!with("HF_HUB_OFFLINE", value).offline, "{value}");
        }
        assert!(with("TRANSFORMERS_OFFLINE", "1").offline);
        let both = [
            ("HOME", "/u"),
            ("HF_HUB_OFFLINE", "0"),
            ("TRANSFORMERS_OFFLINE", "1"),
        ];
        assert!(!settings(&both).unwrap().offline);
        assert!(with("NOTHING", "").progress_bars);
        assert!(!with("HF_HUB_DISABLE_PROGRESS_BARS", "1").progress_bars);
        assert_eq!(
            with("HF_ENDPOINT", "https://mirror/hf/").endpoint,
            "https://mirror/hf"
        );
        assert_eq!(with("NOTHING", "").endpoint, "https://huggingface.co");
        assert_eq!(
            with("HF_HUB_DOWNLOAD_TIMEOUT", "7").timeout,
            Duration::from_secs(7)
        );
        for (name, value) in [
            ("HF_ENDPOINT", "huggingface.co"),
            ("HF_ENDPOINT", "ftp://x"),
            ("HF_HUB_DOWNLOAD_TIMEOUT", "soon"),
            ("HF_HUB_DOWNLOAD_TIMEOUT", "0"),
        ] {
            let error = settings(&[("HOME", "/u"), (name, value)])
                .unwrap_err()
                .to_string();
            assert!(error.contains(name), "{error}");
        }
    }
}
