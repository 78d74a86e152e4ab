//! Requests to the hub: retries, redirects, and what its refusals mean.

use std::fmt;
use std::io;
use std::thread;
use std::time::Duration;

use ureq::http::StatusCode;
use ureq::{Agent, Body, http};

use super::{Cause, HubError, Kind, MAIN, Repo};
use crate::progress::Console;

/// How often a request is made before it is given up.
pub(super) const TRIES: usize = 4;
/// Before the second try; doubled before each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// The most that a server may ask to wait.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// A server that is silent for so long is taken to be gone.
const SILENCE: Duration = Duration::from_secs(30);
const MAX_REDIRECTS: usize = 8;
/// An answer that lists a repository.
const MAX_TEXT: u64 = 256 << 20;

/// An access token. It is sent to the hub alone and shown to nobody.
#[derive(Clone)]
pub struct Token(String);

impl Token {
    /// A token as it is stored; `None` where it cannot be one.
    #[must_use]
    pub fn new(text: &str) -> Option<Self> {
        let text = text.trim();
        (!text.is_empty() && text.chars().all(|c| c.is_ascii_graphic())).then(|| Self(text.to_owned()))
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token")
    }
}

/// One end of the connections to a hub.
#[derive(Debug, Clone)]
pub(super) struct Client {
    agent: Agent,
    endpoint: String,
    token: Option<Token>,
}

/// What a `HEAD` tells about a file.
#[derive(Debug)]
pub(super) struct Remote {
    pub(super) url: String,
    /// Its name among the blobs.
    pub(super) etag: String,
    pub(super) size: u64,
}

impl Remote {
    /// The SHA-256 that its bytes must have, where the hub gives it: for files in LFS, which large ones are.
    pub(super) fn sha256(&self) -> Option<&str> {
        let is_hash = self.etag.len() == 64 && self.etag.chars().all(|c| c.is_ascii_hexdigit());
        is_hash.then_some(self.etag.as_str())
    }
}

impl Client {
    pub(super) fn new(endpoint: String, token: Option<Token>) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            // followed here, where it is known which host may see the token
            .max_redirects(0)
            .user_agent(concat!("dpo-lora/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(SILENCE))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE));
        Self { agent: config.build().new_agent(), endpoint, token }
    }

    pub(super) fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// The text at an address of the hub's interface.
    pub(super) fn text(&self, url: &str, repo: &Repo, console: &Console) -> Result<String, HubError> {
        let response = self.send(false, url, None, console)?;
        if !response.status().is_success() {
            return Err(self.refusal(&response, repo, None, url));
        }
        let text = response.into_body().into_with_config().limit(MAX_TEXT).read_to_string();
        text.map_err(|error| disconnected(url, &error))
    }

    /// Name, size and place of a file.
    pub(super) fn head(&self, repo: &Repo, commit: &str, file: &str, console: &Console) -> Result<Remote, HubError> {
        let url = format!("{}/{}/resolve/{commit}/{}", self.endpoint, repo.path(), escaped(file, true));
        let response = self.send(true, &url, None, console)?;
        if !(response.status().is_success() || response.status().is_redirection()) {
            return Err(self.refusal(&response, repo, Some(file), &url));
        }
        let header = |name: &str| response.headers().get(name)?.to_str().ok();
        let etag = header("x-linked-etag").or_else(|| header("etag"));
        let etag = etag.map(|etag| etag.trim_start_matches("W/").trim_matches('"'));
        // it becomes a file's name
        let etag = etag.filter(|etag| super::cache::is_plain(etag)).map(ToOwned::to_owned);
        let size = header("x-linked-size").or_else(|| header("content-length")).and_then(|size| size.parse().ok());
        match (etag, size) {
            (Some(etag), Some(size)) => Ok(Remote { url, etag, size }),
            _ => {
                let help =
                    "HF_ENDPOINT names a server that answers as huggingface.co does; a proxy may change answers";
                let problem = "comes without its length or hash";
                Err(HubError::new(Cause::Failure, url, problem, help))
            }
        }
    }

    /// The bytes of a file from `start` on, or all of them where the server has no part to give.
    pub(super) fn get(
        &self,
        remote: &Remote,
        start: u64,
        repo: &Repo,
        file: &str,
        console: &Console,
    ) -> Result<http::Response<Body>, HubError> {
        let response = self.send(false, &remote.url, (start > 0).then_some(start), console)?;
        match response.status() {
            StatusCode::OK | StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE => Ok(response),
            _ => Err(self.refusal(&response, repo, Some(file), &remote.url)),
        }
    }

    /// A request, made again while the server is busy or not there.
    fn send(
        &self,
        head: bool,
        url: &str,
        start: Option<u64>,
        console: &Console,
    ) -> Result<http::Response<Body>, HubError> {
        let mut pause = FIRST_PAUSE;
        for tries in 1.. {
            let (problem, asked) = match self.follow(head, url, start) {
                Ok(response) if !is_busy(response.status()) || tries == TRIES => return Ok(response),
                Ok(response) => (format!("the server answers {}", response.status()), retry_after(&response)),
                Err(error) if tries == TRIES => return Err(disconnected(url, &error)),
                Err(error) => (told(&error), None),
            };
            let wait = asked.unwrap_or(pause).min(LONGEST_PAUSE);
            console.warning(format_args!("{url}: {problem}; tried again in {:.1} s", wait.as_secs_f64()));
            thread::sleep(wait);
            pause *= 2;
        }
        unreachable!("the last try returns")
    }

    /// A request with its redirects. One for a header ends where the hub has told all about a file.
    fn follow(&self, head: bool, url: &str, start: Option<u64>) -> Result<http::Response<Body>, ureq::Error> {
        let mut url = url.to_owned();
        for _ in 0..=MAX_REDIRECTS {
            let mut request = if head { self.agent.head(&url) } else { self.agent.get(&url) };
            // lengths and ranges count the file's own bytes
            request = request.header("accept-encoding", "identity");
            if let Some(Token(token)) = &self.token
                && origin(&url).eq_ignore_ascii_case(origin(&self.endpoint))
            {
                request = request.header("authorization", format!("Bearer {token}"));
            }
            if let Some(start) = start {
                request = request.header("range", format!("bytes={start}-"));
            }
            let response = request.call()?;
            let all_told =
                ["x-linked-etag", "x-linked-size"].iter().all(|name| response.headers().contains_key(*name));
            if !response.status().is_redirection() || (head && all_told) {
                return Ok(response);
            }
            let target = response.headers().get("location").and_then(|target| target.to_str().ok());
            let next = target.and_then(|target| joined(&url, target));
            url = next.ok_or_else(|| io::Error::other("the server redirects to nowhere"))?;
        }
        Err(io::Error::other("the server redirects in a circle").into())
    }

    /// What an answer other than a success means.
    fn refusal(&self, response: &http::Response<Body>, repo: &Repo, file: Option<&str>, url: &str) -> HubError {
        let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or("");
        let (code, status, shown) = (header("x-error-code"), response.status(), repo.shown());
        let page = format!("{}/{}", self.endpoint, repo.path());
        let tokens = format!("{}/settings/tokens", self.endpoint);
        let refused = |problem: String, help: String| HubError::request(&shown, problem, help);
        let token = match self.token {
            Some(_) => "the token that was sent has to be of an account that may read it".to_owned(),
            None => format!("log in with `hf auth login`, or set HF_TOKEN to a token from {tokens}"),
        };
        match (code, status.as_u16()) {
            ("GatedRepo", _) => refused(
                format!("is gated: its owners let in who has accepted its terms (status {status})"),
                format!("accept them at {page}; {token}"),
            ),
            ("RevisionNotFound", _) => refused(
                format!("has no revision `{}`", repo.revision),
                format!("{page}/tree/{MAIN} lists its branches and tags"),
            ),
            ("EntryNotFound", _) => refused(
                format!("has no file {}", file.unwrap_or("of that name")),
                format!("{page}/tree/{} lists its files", repo.revision),
            ),
            (_, 401) if header("x-error-message").contains("Invalid credentials") => refused(
                "the hub does not accept the token (status 401)".into(),
                format!("it may have expired: make another at {tokens}, or unset HF_TOKEN for what is public"),
            ),
            ("RepoNotFound", _) | (_, 401 | 404) if file.is_none() || code == "RepoNotFound" || status == 401 => {
                let kind = match repo.kind {
                    Kind::Model => "model",
                    Kind::Dataset => "data set",
                };
                let problem = format!("there is no such {kind} on {}, or it is private", self.endpoint);
                refused(problem, format!("if it is private, {token}"))
            }
            (_, 403) => refused("may not be read (status 403)".into(), token),
            (_, 404) => refused(format!("{url} is not there (status 404)"), format!("look at {page}")),
            (_, 429) => {
                let help = "wait some minutes; with a token (HF_TOKEN) it answers more requests";
                HubError::new(Cause::Failure, url, "the hub asks for fewer requests (status 429)", help)
            }
            _ => {
                let message: String = header("x-error-message").chars().take(200).collect();
                let message = if message.is_empty() { message } else { format!(": {message}") };
                let help = "https://status.huggingface.co tells of outages; what was fetched is kept";
                HubError::new(Cause::Failure, url, format!("the server answers {status}{message}"), help)
            }
        }
    }
}

fn is_busy(status: StatusCode) -> bool {
    matches!(status.as_u16(), 408 | 429 | 500 | 502 | 503 | 504)
}

/// What the server asks to wait, in whole seconds.
fn retry_after(response: &http::Response<Body>) -> Option<Duration> {
    let seconds = response.headers().get("retry-after")?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds))
}

/// An error of the connection, without the address that a redirect led to: it may be signed.
fn told(error: &ureq::Error) -> String {
    match error {
        ureq::Error::BadUri(_) => "the server redirects to what is no address".into(),
        ureq::Error::Io(error) => error.to_string(),
        other => other.to_string(),
    }
}

pub(super) fn disconnected(url: &str, error: &ureq::Error) -> HubError {
    let problem = told(error);
    let help = if problem.contains("certificate") {
        "the authorities known here are the public ones; from a mirror with another, `hf download` fetches, and \
         HF_HUB_OFFLINE=1 uses that"
    } else {
        "check the network (HTTPS_PROXY is honoured) and HF_ENDPOINT; HF_HUB_OFFLINE=1 uses what was fetched before"
    };
    HubError::new(Cause::Connection, url, format!("the hub is not to be reached: {problem}"), help)
}

/// Scheme, host and port.
fn origin(url: &str) -> &str {
    let host = url.find("://").map_or(0, |at| at + 3);
    let end = url[host..].find(['/', '?', '#']).map_or(url.len(), |at| host + at);
    &url[..end]
}

/// Where a redirect leads; never from an encrypted address to another.
fn joined(url: &str, target: &str) -> Option<String> {
    let next = if target.starts_with("//") {
        format!("{}:{target}", url.split(':').next()?)
    } else if target.starts_with('/') {
        format!("{}{target}", origin(url))
    } else {
        target.to_owned()
    };
    let encrypted = next.starts_with("https://");
    (encrypted || (next.starts_with("http://") && !url.starts_with("https://"))).then_some(next)
}

/// A path as part of an address.
pub(super) fn escaped(path: &str, keep_slash: bool) -> String {
    let mut text = String::new();
    for byte in path.bytes() {
        match byte {
            b'/' if keep_slash => text.push('/'),
            b'-' | b'_' | b'.' | b'~' => text.push(byte.into()),
            _ if byte.is_ascii_alphanumeric() => text.push(byte.into()),
            _ => text.push_str(&format!("%{byte:02X}")),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_shown_to_nobody() {
        let token = Token::new(" hf_secret\n").expect("a token");
        assert!(!format!("{:?}", Client::new("https://a".into(), Some(token))).contains("secret"));
        assert!(Token::new("two words").is_none());
    }

    #[test]
    fn only_the_same_scheme_host_and_port_is_the_same_server() {
        let hub = "https://hub.example/sub";
        assert_eq!(origin("https://hub.example/x?y"), origin(hub));
        for other in
            ["http://hub.example/", "https://hub.example:8/", "https://hub.example.evil/", "https://hub.example@e/"]
        {
            assert_ne!(origin(other), origin(hub), "{other}");
        }
    }

    #[test]
    fn redirects_lead_on_but_not_out_of_encryption() {
        assert_eq!(joined("https://a/b", "/c").as_deref(), Some("https://a/c"));
        assert_eq!(joined("https://a/b", "//d/c").as_deref(), Some("https://d/c"));
        assert_eq!(joined("https://a/b", "http://d/c"), None);
        assert_eq!(joined("https://a/b", "file:///c"), None);
        assert_eq!(joined("http://a/b", "https://d/c").as_deref(), Some("https://d/c"));
    }

    #[test]
    fn a_path_in_an_address() {
        assert_eq!(escaped("data/a b#?.parquet", true), "data/a%20b%23%3F.parquet");
        assert_eq!(escaped("refs/pr/1", false), "refs%2Fpr%2F1");
    }
}
