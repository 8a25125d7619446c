//! A server that speaks the hub's URL scheme, and misbehaves on request.
//!
//! As on the hub, small files are redirected (307, relative) to `/api/resolve-cache`, large ones (302, absolute) to a
//! content network: a second port, which checks that no token reaches it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

/// Everything that the server knows, and everything that it has seen.
#[derive(Default)]
pub struct State {
    pub repo: String,
    pub commit: String,
    /// Branches and tags; all stand for `commit`.
    pub revisions: BTreeSet<String>,
    pub files: BTreeMap<String, Vec<u8>>,
    /// The only token that is accepted; without one the repository is public.
    pub token: Option<String>,
    pub gated: bool,
    /// Bodies that break off: for each GET of the file, after how many bytes.
    pub cuts: BTreeMap<String, VecDeque<usize>>,
    /// Sizes that HEAD states instead of the true ones.
    pub stated_sizes: BTreeMap<String, u64>,
    /// How many requests are answered with this status before one is served.
    pub refusals: VecDeque<u16>,
    pub ignores_ranges: bool,
    /// Never answers a GET of a file.
    pub stalls: bool,
    /// How long the content network takes to answer.
    pub delay: Duration,
    pub requests: Vec<Seen>,
    /// Bytes of bodies sent for each file.
    pub sent: BTreeMap<String, usize>,
    /// The address of the content network; the server sets it.
    pub content: String,
}

/// One request.
#[derive(Debug, Clone)]
pub struct Seen {
    pub method: String,
    pub path: String,
    pub range: Option<String>,
    pub authorization: Option<String>,
    /// Whether it reached the content network.
    pub content: bool,
}

pub struct Server {
    pub address: String,
    state: Arc<Mutex<State>>,
    stop: Arc<AtomicBool>,
    ports: Vec<std::net::SocketAddr>,
}

impl Server {
    pub fn start(mut state: State) -> Self {
        let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let ports: Vec<_> = listeners
            .iter()
            .map(|listener| listener.local_addr().unwrap())
            .collect();
        state.content = format!("http://{}", ports[1]);
        let state = Arc::new(Mutex::new(state));
        let stop = Arc::new(AtomicBool::new(false));
        for (listener, content) in listeners.into_iter().zip([false, true]) {
            let (state, stop) = (state.clone(), stop.clone());
            std::thread::spawn(move || {
                for stream in listener.incoming() {
                    if stop.load(Ordering::SeqCst) {
                        break;
                    }
                    let state = state.clone();
                    std::thread::spawn(move || serve(stream.unwrap(), content, &state));
                }
            });
        }
        Self {
            address: format!("http://{}", ports[0]),
            state,
            stop,
            ports,
        }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// The GETs of a file's body.
    pub fn downloads(&self, file: &str) -> Vec<Seen> {
        let state = self.state();
        let etag = etag(&state.files[file]);
        let small = format!("/{file}");
        state
            .requests
            .iter()
            .filter(|seen| seen.method == "GET")
            .filter(|seen| {
                (seen.content && seen.path.contains(&etag))
                    || (seen.path.starts_with("/api/resolve-cache/") && seen.path.ends_with(&small))
            })
            .cloned()
            .collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        for port in &self.ports {
            drop(TcpStream::connect(port));
        }
    }
}

/// The name of a blob: no cryptography, but another one for each content.
pub fn etag(bytes: &[u8]) -> String {
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    format!(
        "{:016x}{:x}",
        bytes.iter().fold(0xcbf2_9ce4_8422_2325, step),
        bytes.len()
    )
}

struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    /// Bytes of the body after which the connection breaks.
    cut: Option<usize>,
}

impl Answer {
    fn new(status: u16) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: Vec::new(),
            cut: None,
        }
    }

    fn with(mut self, name: &'static str, value: impl ToString) -> Self {
        self.headers.push((name, value.to_string()));
        self
    }

    fn error(status: u16, code: &str) -> Self {
        Self::new(status)
            .with("X-Error-Code", code)
            .with("X-Error-Message", "no")
    }
}

fn serve(stream: TcpStream, content: bool, state: &Mutex<State>) {
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut writer = stream.try_clone().unwrap();
    let mut reader = BufReader::new(stream);
    while let Some(seen) = read_request(&mut reader, content) {
        let stalls = {
            let state = state.lock().unwrap();
            state.stalls && seen.method == "GET" && !seen.path.starts_with("/api/models/")
        };
        if stalls {
            state.lock().unwrap().requests.push(seen);
            std::thread::sleep(Duration::from_secs(2));
            return;
        }
        if content {
            let delay = state.lock().unwrap().delay;
            std::thread::sleep(delay);
        }
        let answer = {
            let mut state = state.lock().unwrap();
            state.requests.push(seen.clone());
            respond(&seen, &mut state)
        };
        let mut head = format!(
            "HTTP/1.1 {} x\r\nContent-Length: {}\r\n",
            answer.status,
            answer.body.len()
        );
        for (name, value) in &answer.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        let body = if seen.method == "HEAD" {
            &[]
        } else {
            &answer.body[..]
        };
        let body = &body[..answer.cut.unwrap_or(body.len()).min(body.len())];
        if writer
            .write_all(head.as_bytes())
            .and_then(|()| writer.write_all(body))
            .is_err()
            || answer.cut.is_some()
        {
            return;
        }
    }
}

fn read_request(reader: &mut BufReader<TcpStream>, content: bool) -> Option<Seen> {
    let mut line = String::new();
    reader.read_line(&mut line).ok().filter(|&count| count > 0)?;
    let mut words = line.split_whitespace();
    let (method, path) = (words.next()?.to_string(), words.next()?.to_string());
    let mut seen = Seen {
        method,
        path,
        range: None,
        authorization: None,
        content,
    };
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim().split_once(':') else {
            return Some(seen);
        };
        let value = Some(value.trim().to_string());
        match name.to_ascii_lowercase().as_str() {
            "range" => seen.range = value,
            "authorization" => seen.authorization = value,
            _ => {}
        }
    }
}

fn respond(seen: &Seen, state: &mut State) -> Answer {
    if let Some(status) = state.refusals.pop_front() {
        return Answer::new(status).with("Retry-After", 0);
    }
    if seen.content {
        let found = state
            .files
            .iter()
            .find(|(_, bytes)| seen.path == format!("/blob/{}?sig=1", etag(bytes)));
        let Some((name, bytes)) = found.map(|(name, bytes)| (name.clone(), bytes.clone())) else {
            return Answer::new(404);
        };
        return body(seen, &name, bytes, state);
    }
    if let Some(sent) = &seen.authorization
        && state
            .token
            .as_ref()
            .is_none_or(|token| *sent != format!("Bearer {token}"))
    {
        return Answer::new(401).with("X-Error-Message", "Invalid credentials in Authorization header");
    }
    let (api, pages) = (
        format!("/api/models/{}/revision/", state.repo),
        format!("/{}/resolve/", state.repo),
    );
    let cache = format!("/api/resolve-cache/models/{}/{}/", state.repo, state.commit);
    let known = [&api, &pages, &cache]
        .into_iter()
        .any(|prefix| seen.path.starts_with(prefix.as_str()));
    let hidden = state.token.is_some() && seen.authorization.is_none() && !state.gated;
    if !known || hidden {
        return Answer::error(
            if seen.authorization.is_some() { 404 } else { 401 },
            "RepoNotFound",
        );
    }
    let is_known = |revision: &str| {
        let revision = revision.replace("%2F", "/");
        revision == state.commit || state.revisions.contains(&revision)
    };
    if let Some(revision) = seen.path.strip_prefix(&api) {
        if !is_known(revision) {
            return Answer::error(404, "RevisionNotFound");
        }
        let siblings: Vec<_> = state
            .files
            .keys()
            .map(|name| serde_json::json!({ "rfilename": name }))
            .collect();
        let mut answer = Answer::new(200);
        answer.body = serde_json::json!({ "sha": state.commit, "siblings": siblings })
            .to_string()
            .into_bytes();
        return answer;
    }
    if state.gated && seen.authorization.is_none() {
        return Answer::error(401, "GatedRepo");
    }
    if let Some(name) = seen.path.strip_prefix(&cache) {
        let (name, bytes) = (name.to_string(), state.files[name].clone());
        let size = state
            .stated_sizes
            .get(&name)
            .filter(|_| seen.method == "HEAD")
            .copied();
        let described = body(seen, &name, bytes, state).with("X-Repo-Commit", &state.commit);
        return match size {
            Some(size) => described.with("X-Linked-Size", size),
            None => described,
        };
    }
    let Some((revision, name)) = seen
        .path
        .strip_prefix(&pages)
        .and_then(|rest| rest.split_once('/'))
    else {
        return Answer::new(400);
    };
    if !is_known(revision) {
        return Answer::error(404, "RevisionNotFound");
    }
    let Some(bytes) = state.files.get(name) else {
        return Answer::error(404, "EntryNotFound").with("X-Repo-Commit", &state.commit);
    };
    if !name.ends_with(".safetensors") {
        return Answer::new(307).with("Location", format!("{cache}{name}"));
    }
    let size = state
        .stated_sizes
        .get(name)
        .copied()
        .unwrap_or(bytes.len() as u64);
    Answer::new(302)
        .with(
            "Location",
            format!("{}/blob/{}?sig=1", state.content, etag(bytes)),
        )
        .with("X-Repo-Commit", &state.commit)
        .with("X-Linked-Etag", format!("\"{}\"", etag(bytes)))
        .with("X-Linked-Size", size)
}

fn body(seen: &Seen, name: &str, bytes: Vec<u8>, state: &mut State) -> Answer {
    let range = seen.range.as_ref().filter(|_| !state.ignores_ranges);
    let start = range.map(|range| {
        range
            .strip_prefix("bytes=")
            .unwrap()
            .trim_end_matches('-')
            .parse()
            .unwrap()
    });
    let mut answer = match start {
        Some(start) if start >= bytes.len() => {
            return Answer::new(416).with("Content-Range", format!("bytes */{}", bytes.len()));
        }
        Some(start) => Answer::new(206).with(
            "Content-Range",
            format!("bytes {start}-{}/{}", bytes.len() - 1, bytes.len()),
        ),
        None => Answer::new(200),
    };
    answer = answer.with("ETag", format!("\"{}\"", etag(&bytes)));
    answer.body = bytes[start.unwrap_or(0)..].to_vec();
    if seen.method == "GET" {
        answer.cut = state.cuts.get_mut(name).and_then(VecDeque::pop_front);
        let sent = answer.cut.unwrap_or(answer.body.len()).min(answer.body.len());
        *state.sent.entry(name.to_string()).or_default() += sent;
    }
    answer
}
