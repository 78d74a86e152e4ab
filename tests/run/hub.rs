//! Models and data sets of the hub, from a small server that answers as it does.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use dpo_lora::hub::{Hub, Settings, Token};
use dpo_lora::model::{Base, ModelConfig};
use dpo_lora::progress::Console;
use dpo_lora::quant::Quant;
use serde_json::json;

use super::{Place, pairs, quickstart, stderr, unwrapped};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const TOKEN: &str = "hf_ThisIsASecretThatNobodyMaySee";

#[derive(Debug, Clone)]
struct Request {
    method: String,
    path: String,
    range: Option<String>,
    authorization: Option<String>,
}

#[derive(Default)]
struct State {
    /// By `ORG/NAME/FILE`, data sets behind `datasets/`.
    files: BTreeMap<String, Vec<u8>>,
    seen: Vec<Request>,
    /// Requests that are answered with 429 before any other answer.
    busy: usize,
    /// Bodies of large files that end at the half.
    cut: usize,
    /// Connections stay open after the answer.
    held_open: bool,
    /// Parts that are asked for of large files are not there.
    gone: bool,
    wrong_hash: bool,
    /// Status and `X-Error-Code` for whoever has no token.
    closed: Option<(u16, &'static str)>,
    /// Where large files are; by default here.
    storage: Option<String>,
}

/// A hub on this machine.
#[derive(Clone)]
struct Server {
    address: String,
    state: Arc<Mutex<State>>,
}

impl Server {
    /// With the quickstart's model as `org/tiny` and some pairs as `org/pairs`.
    fn start() -> Self {
        let mut files = BTreeMap::new();
        for entry in fs::read_dir(quickstart().join("model")).expect("read") {
            let path = entry.expect("read").path();
            let name = path.file_name().expect("a name").to_string_lossy().into_owned();
            files.insert(format!("org/tiny/{name}"), fs::read(&path).expect("read"));
        }
        files.insert("org/tiny/training_args.bin".into(), vec![0; 10]);
        let train = fs::read(quickstart().join("train.parquet")).expect("read");
        files.insert("datasets/org/pairs/data/train_prefs-00000-of-00001.parquet".into(), train);
        files.insert("datasets/org/pairs/data/test_prefs.jsonl".into(), pairs(5).into_bytes());
        files.insert("datasets/org/pairs/README.md".into(), b"# pairs".to_vec());
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = format!("http://{}", listener.local_addr().expect("an address"));
        let server = Self { address, state: Arc::new(Mutex::new(State { files, ..State::default() })) };
        let answering = server.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let server = answering.clone();
                thread::spawn(move || server.answer(stream));
            }
        });
        server
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic")
    }

    /// Requests for a path that ends so, of which the log is emptied.
    fn seen(&self, end: &str) -> Vec<Request> {
        let seen = std::mem::take(&mut self.state().seen);
        seen.into_iter().filter(|request| request.path.split('?').next().unwrap_or("").ends_with(end)).collect()
    }

    fn answer(&self, mut stream: TcpStream) {
        let mut lines = BufReader::new(stream.try_clone().expect("a stream")).lines().map_while(Result::ok);
        let first = lines.next().unwrap_or_default();
        let mut words = first.split(' ').map(ToOwned::to_owned);
        let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let headers: BTreeMap<String, String> = lines
            .take_while(|line| !line.is_empty())
            .filter_map(|line| line.split_once(": ").map(|(name, value)| (name.to_lowercase(), value.to_owned())))
            .collect();
        let request = Request {
            range: headers.get("range").cloned(),
            authorization: headers.get("authorization").cloned(),
            method,
            path,
        };
        let mut state = self.state();
        state.seen.push(request.clone());
        let answer = reply(&mut state, &request, &self.address);
        let pause = if state.held_open { Duration::from_secs(20) } else { Duration::ZERO };
        drop(state);
        let _ = stream.write_all(&answer);
        thread::sleep(pause);
    }
}

/// Status line, headers and body.
fn message(status: u16, headers: &[(&str, &str)], body: &[u8], length: usize) -> Vec<u8> {
    let mut text = format!("HTTP/1.1 {status} Status\r\nconnection: close\r\ncontent-length: {length}\r\n");
    headers.iter().for_each(|(name, value)| text.push_str(&format!("{name}: {value}\r\n")));
    [text.as_bytes(), b"\r\n", body].concat()
}

fn refuse(status: u16, code: &str) -> Vec<u8> {
    message(status, &[("x-error-code", code), ("retry-after", "0")], b"", 0)
}

fn reply(state: &mut State, request: &Request, own: &str) -> Vec<u8> {
    if state.busy > 0 {
        state.busy -= 1;
        return refuse(429, "");
    }
    let path = request.path.split('?').next().unwrap_or_default().replace("%2F", "/");
    if let Some(name) = path.strip_prefix("/storage/") {
        return stored(state, request, name);
    }
    if let Some(repository) = path.strip_prefix("/api/") {
        let Some((id, revision)) = repository.split_once("/revision/") else { return refuse(404, "") };
        let prefix = format!("{}/", id.strip_prefix("models/").unwrap_or(id));
        let files: Vec<_> = state.files.keys().filter_map(|name| name.strip_prefix(&prefix)).collect();
        if files.is_empty() {
            return refuse(401, "RepoNotFound");
        }
        if ![COMMIT, "main"].contains(&revision) {
            return refuse(404, "RevisionNotFound");
        }
        let siblings: Vec<_> = files.into_iter().map(|name| json!({"rfilename": name})).collect();
        let body = json!({"id": id, "sha": COMMIT, "siblings": siblings}).to_string();
        return message(200, &[], body.as_bytes(), body.len());
    }
    if let (Some((status, code)), None) = (state.closed, &request.authorization) {
        return refuse(status, code);
    }
    let name = path.trim_start_matches('/').replace(&format!("resolve/{COMMIT}/"), "");
    let Some(bytes) = state.files.get(&name) else { return refuse(404, "EntryNotFound") };
    let length = bytes.len().to_string();
    if name.ends_with(".safetensors") || name.ends_with(".parquet") {
        let etag = format!("\"{}\"", if state.wrong_hash { "0".repeat(64) } else { sha256(bytes) });
        let place = format!("{}/storage/{name}?signature=secret", state.storage.as_deref().unwrap_or(own));
        let headers =
            [("location", &*place), ("x-linked-etag", &etag), ("x-linked-size", &length), ("etag", "\"x\"")];
        return message(302, &headers, b"", 0);
    }
    // git's own name of the bytes; any will do
    let etag = format!("\"{}\"", &sha256(bytes)[..40]);
    let body: &[u8] = if request.method == "HEAD" { b"" } else { bytes };
    message(200, &[("etag", &etag), ("x-repo-commit", COMMIT)], body, bytes.len())
}

/// A large file or the rest of one.
fn stored(state: &mut State, request: &Request, name: &str) -> Vec<u8> {
    let bytes = state.files[name].clone();
    let start = request.range.as_deref().and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-'));
    let start: usize = start.map_or(0, |start| start.parse().expect("a number"));
    if start > 0 && state.gone {
        return refuse(404, "");
    }
    let mut end = bytes.len();
    if state.cut > 0 {
        state.cut -= 1;
        end = start + (end - start) / 2;
    }
    let range = format!("bytes {start}-{}/{}", bytes.len() - 1, bytes.len());
    let status = if start > 0 { 206 } else { 200 };
    message(status, &[("content-range", &range)], &bytes[start..end], bytes.len() - start)
}

fn sha256(bytes: &[u8]) -> String {
    ring::digest::digest(&ring::digest::SHA256, bytes).as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The usual recipe on `org/tiny`, for one update.
fn place() -> Place {
    let place = Place::new();
    let local = format!("source = \"{}\"", quickstart().join("model").display());
    let recipe = place.read("recipe.toml").replace(&local, "source = \"org/tiny\"").replace("steps = 6", "steps = 1");
    place.write("recipe.toml", recipe);
    place
}

fn command(place: &Place, server: &Server, arguments: &[&str]) -> Command {
    let mut command = place.command(arguments);
    for name in
        ["HF_TOKEN", "HF_TOKEN_PATH", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy", "ALL_PROXY"]
    {
        command.env_remove(name);
    }
    command.env("HF_ENDPOINT", &server.address).env("HF_HOME", place.path("hf"));
    command
}

fn ask(place: &Place, server: &Server, arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    command(place, server, arguments).envs(variables.iter().copied()).output().expect("started")
}

fn run(place: &Place, server: &Server, out: &str, more: &[&str]) -> Output {
    ask(place, server, &[&["run", "recipe.toml", "--out", out], more].concat(), &[])
}

fn good(output: &Output) -> String {
    assert!(output.status.success(), "{}", stderr(output));
    stderr(output)
}

/// The message on one line, of a command that ended with `code`.
fn bad(output: &Output, code: i32) -> String {
    let text = stderr(output);
    assert_eq!(output.status.code(), Some(code), "{text}");
    unwrapped(output)
}

fn says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
}

/// All files below a folder.
fn below(folder: &Path) -> Vec<std::path::PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.flat_map(|path| if path.is_dir() { below(&path) } else { vec![path] }).collect()
}

const WEIGHTS: &str = "hf/hub/models--org--tiny/snapshots/0123456789abcdef0123456789abcdef01234567/model.safetensors";
const DATA: [&str; 2] = ["--set", "data.train=hf://datasets/org/pairs/train_prefs"];

#[test]
fn a_run_from_the_hub_is_the_run_from_a_folder_and_can_be_repeated_offline() {
    let (place, server) = (place(), Server::start());
    good(&run(&place, &server, "out", &DATA));
    let model = quickstart().join("model");
    place.train("local", &["--set", &format!("model.source=\"{}\"", model.display())]);
    assert_eq!(place.adapter("out"), place.adapter("local"));
    assert!(place.read("out/adapter/adapter_config.json").contains("\"org/tiny\""));
    assert!(place.read("out/recipe.resolved.toml").contains(&format!("revision = \"{COMMIT}\"")));
    assert!(place.read("out/recipe.resolved.toml").contains("# default: main when the run was begun"));
    // as Python keeps it
    assert_eq!(place.read("hf/hub/models--org--tiny/refs/main"), COMMIT);
    let bytes = fs::read(model.join("model.safetensors")).expect("read");
    assert_eq!(
        fs::read(place.path(&format!("hf/hub/models--org--tiny/blobs/{}", sha256(&bytes)))).expect("a blob"),
        bytes
    );
    #[cfg(unix)]
    assert!(place.path(WEIGHTS).is_symlink());
    assert!(server.seen("training_args.bin").is_empty());

    let offline = ["run", "recipe.toml", "--out", "again", DATA[0], DATA[1]];
    good(&ask(&place, &server, &offline, &[("HF_HUB_OFFLINE", "1")]));
    assert!(server.seen("").is_empty(), "it asked the hub");
    assert_eq!(place.adapter("again"), place.adapter("out"));
    let resumed = ["run", "--resume", "again"];
    good(&ask(&place, &server, &resumed, &[("HF_HUB_OFFLINE", "1")]));
    let text = good(&ask(&place, &server, &["plan", "recipe.toml"], &[("HF_ENDPOINT", "http://127.0.0.1:9")]));
    says(&text, &["not to be reached", "what the cache has of org/tiny is used"]);
    let glob = ["plan", "recipe.toml", "--set", "data.train=hf://datasets/org/pairs/**/train_*"];
    let text = good(&ask(&place, &server, &glob, &[("HF_HUB_OFFLINE", "1")]));
    says(&text, &["the cache has 1 of the files that are meant, and nothing tells whether the hub has more"]);
}

#[test]
fn a_plan_fetches_no_weights_and_offline_they_are_missed() {
    let (place, server) = (place(), Server::start());
    good(&ask(&place, &server, &["plan", "recipe.toml"], &[]));
    assert!(server.seen("model.safetensors").is_empty());
    let offline = [("HF_HUB_OFFLINE", "1")];
    let text = bad(&ask(&place, &server, &["run", "recipe.toml", "--out", "out"], &offline), 2);
    says(&text, &["org/tiny: files of it were never fetched: model.safetensors", "without HF_HUB_OFFLINE"]);
    assert!(!place.path("out").exists());
    good(&ask(&place, &server, &["plan", "recipe.toml"], &offline));
    let elsewhere = [offline[0], ("HF_HUB_CACHE", "elsewhere")];
    let text = bad(&ask(&place, &server, &["plan", "recipe.toml"], &elsewhere), 2);
    says(&text, &["org/tiny: is not in the cache elsewhere", "HF_HUB_OFFLINE is set", "hf download org/tiny"]);
}

#[test]
fn shards_are_those_of_the_index() {
    let (place, server) = (place(), Server::start());
    let shard = "model-00001-of-00001.safetensors";
    {
        let files = &mut server.state().files;
        let weights = files.remove("org/tiny/model.safetensors").expect("there");
        files.insert(format!("org/tiny/{shard}"), weights);
        let index = json!({"metadata": {}, "weight_map": {"lm_head.weight": shard}}).to_string();
        files.insert("org/tiny/model.safetensors.index.json".into(), index.into_bytes());
    }
    good(&ask(&place, &server, &["plan", "recipe.toml"], &[]));
    let offline = ask(&place, &server, &["run", "recipe.toml", "--out", "out"], &[("HF_HUB_OFFLINE", "1")]);
    says(&bad(&offline, 2), &["files of it were never fetched: model-00001"]);
    good(&run(&place, &server, "out", &[]));
    server.state().files.insert(
        "org/tiny/model.safetensors.index.json".into(),
        b"{\"weight_map\": {\"a\": \"../../../x.safetensors\"}}".to_vec(),
    );
    fs::remove_dir_all(place.path("hf")).expect("removed");
    says(&bad(&run(&place, &server, "hostile", &[]), 2), &["index.json", "not a file beside it"]);
}

/// What was asked for of the weights.
fn ranges(server: &Server) -> Vec<String> {
    let gets = server.seen("/storage/org/tiny/model.safetensors").into_iter();
    gets.map(|request| request.range.unwrap_or_default()).collect()
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_a_transfer_at_once_and_keeps_what_came() {
    let (place, server) = (place(), Server::start());
    good(&ask(&place, &server, &["plan", "recipe.toml"], &[]));
    (server.state().cut, server.state().held_open) = (1, true);
    let arguments = ["run", "recipe.toml", "--out", "out"];
    let mut child = command(&place, &server, &arguments).stderr(Stdio::null()).spawn().expect("started");
    let half = fs::metadata(quickstart().join("model/model.safetensors")).expect("there").len() / 2;
    let begun = Instant::now();
    let kept = || {
        let blobs = below(&place.path("hf/hub/models--org--tiny/blobs"));
        blobs.iter().any(|path| fs::metadata(path).is_ok_and(|blob| blob.len() == half))
    };
    while !kept() {
        assert!(begun.elapsed() < Duration::from_secs(60), "nothing came");
        thread::sleep(Duration::from_millis(20));
    }
    let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("sent");
    assert!(sent.success());
    assert_eq!(child.wait().expect("ended").code(), Some(130));
    server.state().held_open = false;
    server.seen("");
    good(&run(&place, &server, "out", &[]));
    assert_eq!(ranges(&server), [format!("bytes={half}-")]);
}

#[test]
fn a_transfer_that_breaks_off_goes_on_where_it_was() {
    let (place, server) = (place(), Server::start());
    let half = fs::metadata(quickstart().join("model/model.safetensors")).expect("there").len() / 2;
    // within a run
    server.state().cut = 1;
    let text = good(&run(&place, &server, "out", &[]));
    says(&text, &[&format!("model.safetensors: broke off after {half} of")]);
    assert_eq!(ranges(&server), ["".to_owned(), format!("bytes={half}-")]);
    // and from one to the next
    fs::remove_dir_all(place.path("hf")).expect("removed");
    (server.state().cut, server.state().gone) = (1, true);
    bad(&run(&place, &server, "stopped", &[]), 2);
    assert!(!place.path("stopped").exists());
    server.state().gone = false;
    server.seen("");
    good(&run(&place, &server, "stopped", &[]));
    assert_eq!(ranges(&server), [format!("bytes={half}-")]);
    assert_eq!(place.adapter("stopped"), place.adapter("out"));
}

#[test]
fn other_bytes_than_promised_are_refused_and_removed() {
    let (place, server) = (place(), Server::start());
    server.state().wrong_hash = true;
    let text = bad(&run(&place, &server, "out", &[]), 1);
    says(
        &text,
        &["model.safetensors: has the SHA-256", "and the hub promised 0000", "run again to fetch the file anew"],
    );
    assert!(!place.path(WEIGHTS).exists());
    let left = below(&place.path("hf/hub/models--org--tiny/blobs"));
    assert!(left.iter().all(|path| !path.to_string_lossy().contains("0000")), "{left:?}");
}

#[test]
fn a_busy_hub_is_asked_again() {
    let (place, server) = (place(), Server::start());
    server.state().busy = 2;
    says(&good(&ask(&place, &server, &["plan", "recipe.toml"], &[])), &["429", "tried again in"]);
    server.state().busy = usize::MAX;
    let text = good(&ask(&place, &server, &["plan", "recipe.toml"], &[]));
    says(&text, &["the hub asks for fewer requests (status 429); what the cache has of org/tiny is used"]);
    fs::remove_dir_all(place.path("hf")).expect("removed");
    let text = bad(&ask(&place, &server, &["plan", "recipe.toml"], &[]), 1);
    says(&text, &["the hub asks for fewer requests (status 429)", "wait some minutes"]);
}

#[test]
fn what_may_not_be_read_or_is_not_there_says_what_to_do() {
    let (place, server) = (place(), Server::start());
    let plan = |more: &[&str]| bad(&ask(&place, &server, &[&["plan", "recipe.toml"], more].concat(), &[]), 2);
    server.state().closed = Some((403, "GatedRepo"));
    let page = format!("accept them at {}/org/tiny", server.address);
    says(&plan(&[]), &["org/tiny: is gated", &page, "set HF_TOKEN", "recipe.toml:"]);
    server.state().closed = Some((401, "GatedRepo"));
    says(&plan(&[]), &["org/tiny: is gated", &page, "set HF_TOKEN"]);
    server.state().closed = Some((403, ""));
    says(&plan(&[]), &["org/tiny: may not be read (status 403)", "set HF_TOKEN"]);
    server.state().closed = None;
    let text = plan(&["--set", "model.source=org/tinny"]);
    says(&text, &["org/tinny: there is no such model on", "or it is private", "there is no local path org/tinny"]);
    says(&plan(&["--set", "model.revision=v2"]), &["org/tiny@v2: has no revision `v2`", "/org/tiny/tree/main lists"]);
    says(&plan(&["--set", "model.source=./org/tiny"]), &["there is no folder", "org/tiny", "ORG/NAME"]);
    let local = format!("model.source=\"{}\"", quickstart().join("model").display());
    says(
        &plan(&["--set", &local, "--set", "model.revision=v2"]),
        &["`model.revision` is given, and the source is a local"],
    );
    server.state().files.remove("org/tiny/model.safetensors");
    says(&plan(&[]), &["org/tiny: has no weights in safetensors", "`training_args.bin`"]);
    server.state().files.remove("org/tiny/config.json");
    says(&plan(&[]), &["org/tiny: is no model: it has no config.json"]);
    server.state().files.insert("org/tiny/tiny-Q8_0.gguf".into(), vec![]);
    says(&plan(&[]), &["[model] file names one of them: `tiny-Q8_0.gguf`"]);
}

#[test]
fn a_gguf_file_of_a_repository() {
    let (place, server) = (Place::new(), Server::start());
    server.state().files.insert("org/quantized/sub/tiny-Q8_0.gguf".into(), b"GGUF".to_vec());
    let hub = || {
        let (endpoint, cache) = (server.address.clone(), place.path("hub"));
        Ok(Hub::new(Settings { endpoint, cache, token: Token::new(TOKEN), offline: false }))
    };
    let locate = |file: &str| {
        let config = ModelConfig {
            source: "org/quantized".into(),
            quant: Quant::None,
            revision: None,
            file: Some(file.into()),
        };
        Base::locate(&config, hub, &Console::silent()).map_err(|error| error.to_string())
    };
    let base = locate("sub/tiny-Q8_0.gguf").expect("fetched");
    assert_eq!(fs::read(base.path()).expect("there"), b"GGUF");
    assert_eq!(base.commit(), Some(COMMIT));
    base.fetch_weights(&Console::silent()).expect("there is no more");
    assert_eq!(locate("tiny-Q4_0.gguf").expect_err("none"), "org/quantized: has no file `tiny-Q4_0.gguf`");
    assert_eq!(locate("../x").expect_err("none"), "org/quantized: `../x` is no GGUF file");
}

#[test]
fn data_sets_by_split_file_and_pattern() {
    let (place, server) = (place(), Server::start());
    let plan = |train: &str| {
        let set = format!("data.train=hf://datasets/{train}");
        ask(&place, &server, &["plan", "recipe.toml", "--set", &set], &[])
    };
    good(&plan("org/pairs/test_prefs"));
    good(&plan("org/pairs@main/data/*.parquet"));
    says(&bad(&plan("org/pairs"), 2), &["hf://datasets/org/pairs: has the splits `test_prefs`, `train_prefs`"]);
    says(&bad(&plan("org/pairs/train"), 2), &["has no split `train`, but `test_prefs`, `train_prefs`"]);
    says(&bad(&plan("org/nothing"), 2), &["there is no such data set on"]);
    says(&bad(&plan("pairs"), 2), &["is not the address of a data set", "hf://datasets/ORG/NAME"]);
    server.state().files.insert("datasets/org/broken/train.jsonl".into(), b"{\"prompt\": \"a\"\n".to_vec());
    says(&bad(&plan("org/broken"), 2), &["hf://datasets/org/broken/train.jsonl line 1: is no JSON"]);
    let mut rows = pairs(8);
    rows.push_str("{\"prompt\": \"a\", \"chosen\": \"\", \"rejected\": \"c\"}\n");
    server.state().files.insert("datasets/org/partly/train.jsonl".into(), rows.into_bytes());
    says(&good(&plan("org/partly")), &["the first is hf://datasets/org/partly/train.jsonl line 9"]);
}

#[test]
fn the_token_goes_to_the_hub_alone_and_is_never_shown() {
    let (place, server, storage) = (place(), Server::start(), Server::start());
    server.state().storage = Some(storage.address.clone());
    server.state().closed = Some((401, "GatedRepo"));
    let arguments = ["run", "recipe.toml", "--out", "out", DATA[0], DATA[1]];
    let output = ask(&place, &server, &arguments, &[("HF_TOKEN", TOKEN)]);
    let mut shown = good(&output);
    let bearer = Some(format!("Bearer {TOKEN}"));
    let hub = server.seen("");
    assert!(!hub.is_empty() && hub.iter().all(|request| request.authorization == bearer), "{hub:?}");
    let elsewhere = storage.seen("");
    assert_eq!(elsewhere.len(), 2);
    assert!(elsewhere.iter().all(|request| request.authorization.is_none()), "{elsewhere:?}");

    // from its file, and in errors
    storage.state().gone = true;
    storage.state().cut = 1;
    place.write("hf/token", format!("{TOKEN}\n"));
    fs::remove_dir_all(place.path("hf/hub")).expect("removed");
    let text = stderr(&run(&place, &server, "failed", &[]));
    says(&text, &["status 404"]);
    assert!(!text.contains("signature"), "{text}");
    shown.push_str(&text);
    fs::remove_file(place.path("hf/token")).expect("removed");
    let output = ask(&place, &server, &["plan", "recipe.toml"], &[("HF_TOKEN", &format!("{TOKEN} {TOKEN}"))]);
    let text = bad(&output, 2);
    says(&text, &["HF_TOKEN: holds characters that no token has"]);
    shown.push_str(&text);
    let endpoint = format!("https://me:{TOKEN}@127.0.0.1");
    let text = bad(&ask(&place, &server, &["plan", "recipe.toml"], &[("HF_ENDPOINT", &endpoint)]), 2);
    says(&text, &["HF_ENDPOINT: is not the address of a hub"]);
    shown.push_str(&text);
    assert!(!shown.contains(TOKEN), "{shown}");
    for file in below(&place.path("")) {
        let bytes = fs::read(&file).expect("read");
        assert!(!bytes.windows(TOKEN.len()).any(|window| window == TOKEN.as_bytes()), "{}", file.display());
    }
}
