//! The HTTP side: what hf-hub 0.5 cannot do on its own.

mod beginning;

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::Duration;

use hf_hub::api::RepoInfo;
use ureq::http::header::{self, HeaderMap};
use ureq::http::{Method, Request, Response, StatusCode, Uri};
use ureq::{Agent, Body};

use super::{HubSettings, PlannedFile, Progress, RepoId};
use crate::{Error, Result};

const MAX_REDIRECTS: usize = 5;
/// No pause between two tries is longer, whatever the server asks for.
const LONGEST_PAUSE: Duration = Duration::from_secs(20);
const LONGEST_TIMEOUT: Duration = Duration::from_secs(365 * 24 * 3600);
/// The largest description of a repository that is read; the hub's longest are a few megabytes.
const INFO_LIMIT: u64 = 64 << 20;
const CHUNK: usize = 256 << 10;
/// Addresses that may see the token besides the endpoint itself: mirrors redirect to them.
const HUB_ORIGINS: [&str; 2] = ["https://huggingface.co", "https://hf.co"];

/// Why a request gave nothing to work with.
pub(super) enum Failure {
    /// It may pass: no answer, or an answer that says "later".
    Transient {
        cause: String,
        /// The pause that the server asks for.
        pause: Option<Duration>,
    },
    /// Asking again would not help.
    Final(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Final(error)
    }
}

pub(super) struct Client<'a> {
    repo: &'a RepoId,
    settings: &'a HubSettings,
    agent: Agent,
}

impl<'a> Client<'a> {
    pub(super) fn new(repo: &'a RepoId, settings: &'a HubSettings) -> Self {
        // Added to the present, a longer one than this could overflow.
        let timeout = settings.timeout.min(LONGEST_TIMEOUT);
        let agent = Agent::config_builder()
            .user_agent(concat!(
                env!("CARGO_PKG_NAME"),
                "/",
                env!("CARGO_PKG_VERSION"),
                "; rust/unknown"
            ))
            // A compressed answer would hide the size and could not be resumed.
            .accept_encoding("identity")
            .http_status_as_error(false)
            // Redirects are followed by `send`, which knows who may see the token.
            .max_redirects(0)
            .timeout_resolve(Some(timeout))
            .timeout_connect(Some(timeout))
            .timeout_per_read(Some(timeout))
            .build()
            .into();
        Self {
            repo,
            settings,
            agent,
        }
    }

    /// The commit that the revision stands for, and the names of its files.
    pub(super) fn info(&self) -> Result<RepoInfo, Failure> {
        let path = self.repo.at(self.repo.revision()).api_url();
        let url = format!("{}/api/{path}", self.settings.endpoint);
        self.patiently(|| {
            let response = self.send(Method::GET, &url, None)?;
            let response = self.accept(response, None)?;
            let reader = response.into_body().into_with_config().limit(INFO_LIMIT).reader();
            serde_json::from_reader(reader).map_err(|error| {
                if error.is_io() {
                    transient(error)
                } else {
                    let problem = format!("{url} does not describe a repository ({error})");
                    Failure::Final(self.repo.error(problem, "check HF_ENDPOINT"))
                }
            })
        })
    }

    /// The size of `file` and the name of its blob, without fetching it; what is cached is left at 0.
    pub(super) fn describe(&self, commit: &str, file: &str) -> Result<PlannedFile, Failure> {
        let url = self.url(commit, file);
        self.patiently(|| {
            let response = self.send(Method::HEAD, &url, None)?;
            let response = self.accept(response, Some(file))?;
            let headers = response.headers();
            let linked = |own: &str, standard| text(headers, own).or_else(|| text(headers, standard));
            let incomplete = |what: &str| {
                self.repo.error(
                    format!("the answer for `{file}` holds no usable {what}"),
                    "check HF_ENDPOINT and the proxy: something between here and the hub changes its answers",
                )
            };
            let etag = linked("x-linked-etag", "etag").and_then(file_name_of_etag);
            // Where the answer is a redirect, its Content-Length is that of the redirect.
            let standard = if response.status().is_redirection() {
                ""
            } else {
                "content-length"
            };
            let size = linked("x-linked-size", standard).and_then(|size| size.parse().ok());
            Ok(PlannedFile {
                name: file.to_string(),
                size: size.ok_or_else(|| incomplete("size"))?,
                etag: etag.ok_or_else(|| incomplete("ETag"))?,
                cached: 0,
            })
        })
    }

    /// Brings `file` to `partial`, from where an earlier attempt left off. On return it has its full size.
    ///
    /// Writes go to their own offsets and nothing is cut off: two processes that write the same file, on a
    /// file system without working locks, write the same bytes to the same places.
    pub(super) fn download(
        &self,
        commit: &str,
        file: &str,
        size: u64,
        partial: &Path,
        progress: &mut dyn Progress,
    ) -> Result<()> {
        let disk_error = |error| {
            Error::io(
                partial,
                error,
                "check the disk's free space and your permissions there",
            )
        };
        let mut target = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(partial)
            .map_err(disk_error)?;
        let mut held = target.metadata().map_err(disk_error)?.len();
        if held > size {
            target.set_len(0).map_err(disk_error)?;
            held = 0;
        }
        progress.file(file, size, held);

        let url = self.url(commit, file);
        let mut furthest = held;
        let mut failures = 0;
        while held < size {
            let transfer = Transfer { file, size, partial };
            let failure = match self.stream(&url, &transfer, &mut target, &mut held, progress) {
                Ok(()) => continue,
                Err(failure) => failure,
            };
            if held > furthest {
                furthest = held;
                failures = 0;
            }
            match failure {
                Failure::Transient { cause, pause } if failures < self.settings.retries => {
                    let pause = self.pause(failures, pause);
                    progress.note(&format!(
                        "{file}: {cause}; continuing at {held} of {} bytes in {:.1} s",
                        size,
                        pause.as_secs_f32()
                    ));
                    std::thread::sleep(pause);
                    failures += 1;
                }
                Failure::Transient { cause, .. } => {
                    return Err(self.repo.error(
                        format!("`{file}` broke off at {held} of {} bytes: {cause}", size),
                        "run the same command again: it continues where this one stopped",
                    ));
                }
                Failure::Final(error) => return Err(error),
            }
        }
        target.sync_all().map_err(disk_error)
    }

    /// One request's worth of a download: from `held` to the end, or to where the connection breaks.
    fn stream(
        &self,
        url: &str,
        transfer: &Transfer,
        target: &mut File,
        held: &mut u64,
        progress: &mut dyn Progress,
    ) -> Result<(), Failure> {
        let response = self.send(Method::GET, url, (*held > 0).then_some(*held))?;
        if response.status() == StatusCode::RANGE_NOT_SATISFIABLE {
            return Err(self.wrong_size(transfer, "fewer than were already here"));
        }
        let response = self.accept(response, Some(transfer.file))?;
        let headers = response.headers();
        let offered = if response.status() == StatusCode::PARTIAL_CONTENT {
            let (start, total) = text(headers, "content-range")
                .and_then(content_range)
                .ok_or_else(|| transient("an answer without a usable Content-Range"))?;
            if start != *held {
                return Err(transient(format!("asked to continue at {held}, got {start}")));
            }
            total
        } else {
            if *held > 0 {
                // The server knows no ranges: from the beginning, then.
                *held = 0;
                progress.file(transfer.file, transfer.size, 0);
            }
            let plain = headers.get(header::CONTENT_ENCODING).is_none();
            text(headers, "content-length")
                .filter(|_| plain)
                .and_then(|length| length.parse().ok())
        };
        if let Some(offered) = offered.filter(|&offered| offered != transfer.size) {
            return Err(self.wrong_size(transfer, &offered.to_string()));
        }

        let disk_error = |error| {
            let remedy = "check the disk's free space and your permissions there";
            Failure::Final(Error::io(transfer.partial, error, remedy))
        };
        target.seek(SeekFrom::Start(*held)).map_err(disk_error)?;
        let mut body = response.into_body().into_reader();
        let mut chunk = vec![0; CHUNK];
        loop {
            let count = match body.read(&mut chunk) {
                Ok(0) if *held < transfer.size => return Err(transient("the connection was closed early")),
                Ok(0) => return Ok(()),
                Ok(count) => count,
                Err(error) => return Err(transient(error)),
            };
            if *held + count as u64 > transfer.size {
                return Err(self.wrong_size(transfer, "more"));
            }
            target.write_all(&chunk[..count]).map_err(disk_error)?;
            *held += count as u64;
            progress.advance(count as u64);
        }
    }

    /// Follows redirects itself, for two reasons: the token goes to the hub only, and a HEAD stops at the
    /// redirect that describes the file, before the content network that knows less of it.
    fn send(&self, method: Method, url: &str, from: Option<u64>) -> Result<Response<Body>, Failure> {
        let mut url = url.to_string();
        for _ in 0..=MAX_REDIRECTS {
            let mut request = Request::builder().method(method.clone()).uri(&url);
            if let Some(from) = from {
                request = request.header(header::RANGE, format!("bytes={from}-"));
            }
            if let Some(token) = self.settings.token().filter(|_| self.may_see_token(&url)) {
                request = request.header(header::AUTHORIZATION, token.header());
            }
            let unusable = |problem: String| self.repo.error(problem, "check HF_ENDPOINT and the proxy");
            let request = request
                .body(())
                .map_err(|error| unusable(format!("{url} is not an address ({error})")))?;
            let response = self.agent.run(request).map_err(|error| self.unreachable(error))?;
            let location = match text(response.headers(), "location") {
                Some(location) if response.status().is_redirection() => location,
                _ => return Ok(response),
            };
            let next = resolve(&url, location)
                .ok_or_else(|| unusable(format!("{url} redirects to `{location}`, which is no address")))?;
            let described = response.headers().contains_key("x-linked-etag");
            if method == Method::HEAD && (described || !self.may_see_token(&next)) {
                return Ok(response);
            }
            url = next;
        }
        Err(Failure::Final(self.repo.error(
            format!("more than {MAX_REDIRECTS} redirects, the last to {url}"),
            "check HF_ENDPOINT and the proxy",
        )))
    }

    /// Whether an address belongs to the hub itself: scheme, host and port, all three.
    fn may_see_token(&self, url: &str) -> bool {
        let asked = origin(url);
        asked.is_some()
            && std::iter::once(self.settings.endpoint.as_str())
                .chain(HUB_ORIGINS)
                .any(|known| origin(known) == asked)
    }

    fn url(&self, commit: &str, file: &str) -> String {
        let repo = self.repo.at(commit);
        format!(
            "{}/{}/resolve/{}/{}",
            self.settings.endpoint,
            repo.url(),
            repo.url_revision(),
            quoted(file)
        )
    }

    fn patiently<T>(&self, request: impl Fn() -> Result<T, Failure>) -> Result<T, Failure> {
        let mut failures = 0;
        loop {
            match request() {
                Err(Failure::Transient { pause, .. }) if failures < self.settings.retries => {
                    std::thread::sleep(self.pause(failures, pause));
                    failures += 1;
                }
                outcome => return outcome,
            }
        }
    }

    fn pause(&self, failures: u32, asked: Option<Duration>) -> Duration {
        let own = self.settings.backoff.saturating_mul(1 << failures.min(16));
        asked.unwrap_or(own).max(own).min(LONGEST_PAUSE)
    }

    /// The error for a failure that did not pass.
    pub(super) fn give_up(&self, failure: Failure) -> Error {
        match failure {
            Failure::Final(error) => error,
            Failure::Transient { cause, .. } => self.repo.error(
                format!("cannot be had from {}: {cause}", self.settings.endpoint),
                "check the connection, the proxy and HF_ENDPOINT, then run the command again",
            ),
        }
    }

    fn unreachable(&self, error: ureq::Error) -> Failure {
        match error {
            ureq::Error::Io(error) => transient(error),
            error @ (ureq::Error::Timeout(_)
            | ureq::Error::HostNotFound
            | ureq::Error::ConnectionFailed
            | ureq::Error::Protocol(_)) => transient(error),
            error => Failure::Final(self.repo.error(
                format!("no usable answer from {} ({error})", self.settings.endpoint),
                "check HF_ENDPOINT, the proxy and this machine's certificates and clock",
            )),
        }
    }

    /// The response if it is one of success (or the redirect at which a HEAD stops), else what it means.
    fn accept(&self, response: Response<Body>, file: Option<&str>) -> Result<Response<Body>, Failure> {
        let status = response.status();
        if status.is_success() || status.is_redirection() {
            return Ok(response);
        }
        let headers = response.headers();
        if matches!(status.as_u16(), 408 | 429 | 500..) {
            return Err(Failure::Transient {
                cause: format!("the server answered {status}"),
                pause: text(headers, "retry-after")
                    .and_then(|seconds| seconds.parse().ok())
                    .map(Duration::from_secs),
            });
        }
        let repo = self.repo;
        let page = format!("{}/{}", self.settings.endpoint, repo.name());
        let token = self.settings.token().map(|token| token.origin());
        let code = text(headers, "x-error-code").unwrap_or_default();
        let message = text(headers, "x-error-message").unwrap_or_default();
        let (problem, remedy) = match (code, status.as_u16(), token) {
            ("EntryNotFound", ..) => (
                format!("the repository holds no `{}`", file.unwrap_or("such file")),
                format!("look at {page} for a revision or a repository that does"),
            ),
            ("RevisionNotFound", ..) => (
                format!("the repository has no revision `{}`", repo.revision()),
                format!("choose a branch, a tag or a commit from {page}/commits"),
            ),
            ("GatedRepo", _, None) => (
                "the repository is gated, and no token was sent".to_string(),
                format!("accept its terms at {page}, then set HF_TOKEN to a token of that account"),
            ),
            ("GatedRepo", _, Some(origin)) => (
                format!("the repository is gated, and the account of the token from {origin} has no access"),
                format!("accept its terms at {page} with that account, or set HF_TOKEN to another's token"),
            ),
            (_, 401, Some(origin)) if code != "RepoNotFound" => (
                format!("the hub refuses the token from {origin}"),
                "set HF_TOKEN to a valid one from https://huggingface.co/settings/tokens, or remove it: public \
                 repositories need none"
                    .to_string(),
            ),
            (_, 403, Some(origin)) => (
                format!("the token from {origin} may not read this repository"),
                "give it the permission at https://huggingface.co/settings/tokens, or set HF_TOKEN to another"
                    .to_string(),
            ),
            (_, 401 | 403 | 404, None) => (
                "there is no such repository, or it is private".to_string(),
                format!("check the spelling at {page}; for a private repository set HF_TOKEN"),
            ),
            ("RepoNotFound", _, Some(origin)) | (_, 404, Some(origin)) => (
                format!("there is no such repository, or the token from {origin} may not see it"),
                format!("check the spelling at {page}, and that the token belongs to an account with access"),
            ),
            _ => (
                format!("the hub answered {status} {}", printable(message)).trim_end().to_string(),
                format!("look at {page}, and check HF_ENDPOINT"),
            ),
        };
        Err(Failure::Final(repo.error(problem, remedy)))
    }

    fn wrong_size(&self, transfer: &Transfer, found: &str) -> Failure {
        // What is there belongs to neither size; a later run must not build on it.
        if let Err(error) = std::fs::remove_file(transfer.partial) {
            let remedy = "remove the file by hand: it is not a usable part of the download";
            return Failure::Final(Error::io(transfer.partial, error, remedy));
        }
        Failure::Final(self.repo.error(
            format!(
                "`{}` should have {} bytes, the server sends {found}",
                transfer.file, transfer.size
            ),
            "nothing of it was kept; run the command again, and check the proxy and HF_ENDPOINT if it recurs",
        ))
    }
}

struct Transfer<'a> {
    file: &'a str,
    size: u64,
    partial: &'a Path,
}

fn transient(cause: impl ToString) -> Failure {
    Failure::Transient {
        cause: cause.to_string(),
        pause: None,
    }
}

fn text<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name)?.to_str().ok()
}

/// One line of what a server said, of bounded length.
fn printable(message: &str) -> String {
    message.chars().filter(|c| !c.is_control()).take(200).collect()
}

/// Scheme, host and port.
fn origin(url: &str) -> Option<(String, String, u16)> {
    let uri: Uri = url.parse().ok()?;
    let scheme = uri.scheme_str()?.to_ascii_lowercase();
    let standard = match scheme.as_str() {
        "https" => 443,
        "http" => 80,
        _ => return None,
    };
    let port = uri.port_u16().unwrap_or(standard);
    Some((scheme, uri.host()?.to_ascii_lowercase(), port))
}

/// A `Location` as an absolute address.
fn resolve(base: &str, location: &str) -> Option<String> {
    let base: Uri = base.parse().ok()?;
    let (scheme, authority) = (base.scheme_str()?, base.authority()?);
    let has_scheme = location
        .split(['/', '?', '#'])
        .next()
        .is_some_and(|head| head.contains(':'));
    let absolute = if has_scheme {
        location.to_string()
    } else if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else {
        let folder = base.path().rsplit_once('/').map_or("", |(folder, _)| folder);
        format!("{scheme}://{authority}{folder}/{location}")
    };
    origin(&absolute).is_some().then_some(absolute)
}

/// `bytes 5-9/10` as the first offset and the whole size, which may be unknown (`*`).
fn content_range(value: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = value.trim().strip_prefix("bytes ")?.split_once('/')?;
    let start = range.split_once('-')?.0.trim().parse().ok()?;
    match total.trim() {
        "*" => Some((start, None)),
        total => Some((start, Some(total.parse().ok()?))),
    }
}

/// The name of a blob: an ETag without its quotes and its mark of weakness. None if it cannot be a file name.
fn file_name_of_etag(etag: &str) -> Option<String> {
    let name = etag.trim().trim_start_matches("W/").trim_matches('"');
    let usable = !name.is_empty()
        && name.len() <= 128
        && !name.starts_with('.')
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
    usable.then(|| name.to_string())
}

/// Percent-encoding of a path, slashes kept.
fn quoted(path: &str) -> String {
    let mut quoted = String::with_capacity(path.len());
    for byte in path.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'~' | b'/') {
            quoted.push(char::from(byte));
        } else {
            quoted.push_str(&format!("%{byte:02X}"));
        }
    }
    quoted
}

#[cfg(test)]
mod tests;
