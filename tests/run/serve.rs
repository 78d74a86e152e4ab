//! `dpo-lora serve`, asked over plain sockets.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::Place;

/// A server that ends with its owner.
struct Server {
    child: Child,
    address: String,
    log: PathBuf,
}

struct Reply {
    status: u16,
    head: String,
    body: String,
}

impl Server {
    fn start(place: &Place, arguments: &[&str]) -> Self {
        let log = place.path("serve.log");
        let mut child = place
            .command(&[&["serve", "--port", "0"], arguments].concat())
            .env("SECRET", "correct horse")
            .stdout(Stdio::piped())
            .stderr(File::create(&log).expect("made"))
            .spawn()
            .expect("started");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("read");
        let address = line.trim().strip_prefix("http://").unwrap_or_else(|| {
            panic!("{line:?} {}", std::fs::read_to_string(&log).unwrap_or_default());
        });
        Self { address: address.to_owned(), child, log }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).expect("connected");
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("set");
        stream
    }

    /// Sends a request and leaves the answer to be read.
    fn send(&self, method: &str, path: &str, headers: &str, body: &str) -> TcpStream {
        let mut stream = self.connect();
        let (host, length) = (&self.address, body.len());
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {length}\r\nConnection: close\r\n{headers}\r\n"
        );
        stream.write_all(format!("{head}{body}").as_bytes()).expect("sent");
        stream
    }

    fn ask(&self, method: &str, path: &str, headers: &str, body: &str) -> Reply {
        read(self.send(method, path, headers, body))
    }

    fn get(&self, path: &str) -> Value {
        let reply = self.ask("GET", path, "", "");
        assert_eq!(reply.status, 200, "{path}: {}", reply.body);
        serde_json::from_str(&reply.body).expect("JSON")
    }

    fn post(&self, path: &str, body: &Value) -> Reply {
        self.ask("POST", path, JSON, &body.to_string())
    }

    /// What is answered to something that is right.
    fn answer(&self, path: &str, body: &Value) -> Value {
        let reply = self.post(path, body);
        assert_eq!(reply.status, 200, "{body}: {}", reply.body);
        serde_json::from_str(&reply.body).expect("JSON")
    }

    fn signal(&self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("sent");
    }

    fn wait(&mut self) -> ExitStatus {
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(60) {
            if let Some(status) = self.child.try_wait().expect("waited") {
                return status;
            }
            thread::sleep(Duration::from_millis(10));
        }
        panic!("the server does not end");
    }

    fn logged(&self) -> String {
        std::fs::read_to_string(&self.log).expect("the log")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const JSON: &str = "Content-Type: application/json\r\n";
const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

/// All of a reply, out of its chunks.
fn read(mut stream: TcpStream) -> Reply {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).expect("read");
    let text = String::from_utf8(bytes).expect("UTF-8");
    let (head, rest) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no reply: {text:?}"));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
    let mut body = rest.to_owned();
    if head.to_ascii_lowercase().contains("transfer-encoding: chunked") {
        body.clear();
        let mut rest = rest;
        while let Some((size, after)) = rest.split_once("\r\n") {
            let size = usize::from_str_radix(size, 16).expect("a size");
            body.push_str(&after[..size]);
            rest = after[size..].trim_start_matches("\r\n");
        }
    }
    Reply { status, head: head.to_owned(), body }
}

/// The objects of a stream, which has to end as streams do.
fn events(reply: &Reply) -> Vec<Value> {
    assert_eq!(reply.status, 200, "{}", reply.body);
    assert!(reply.head.contains("text/event-stream"));
    let events: Vec<&str> = reply.body.split_terminator("\n\n").collect();
    let data = events.iter().map(|event| event.strip_prefix("data: ").expect("an event of data"));
    let mut data: Vec<&str> = data.collect();
    assert_eq!(data.pop(), Some("[DONE]"));
    data.into_iter().map(|text| serde_json::from_str(text).expect("JSON")).collect()
}

fn error(reply: &Reply) -> (u16, String) {
    let body: Value = serde_json::from_str(&reply.body).unwrap_or_else(|_| panic!("no JSON: {}", reply.body));
    let error = &body["error"];
    assert!(error["message"].is_string() && error["type"].is_string(), "{body}");
    (reply.status, format!("{} {} {}", error["code"], error["param"], error["message"]))
}

fn text(answer: &Value) -> &str {
    let choice = &answer["choices"][0];
    choice["text"].as_str().or(choice["message"]["content"].as_str()).expect("a text")
}

fn trained() -> Place {
    let place = Place::new();
    place.train("my", &["--set", "train.learning_rate=2e-2"]);
    place
}

fn generated(place: &Place, arguments: &[&str]) -> Value {
    let output = place.run(&[&["generate", "my", "--side", "both", "--json"], arguments].concat());
    assert!(output.status.success(), "{}", super::stderr(&output));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

#[test]
fn base_and_policy_answer_as_they_do_without_a_server() {
    let place = trained();
    let server = Server::start(&place, &["my", "--base-name", "base"]);
    let models = server.get("/v1/models");
    assert_eq!([&models["data"][0]["id"], &models["data"][1]["id"]], ["base", "my"]);
    assert_eq!(server.get("/v1/models/my")["parent"], "base");

    let question = "What is hail?";
    let greedy = generated(&place, &["--prompt", question, "--max-new-tokens", "24"]);
    let sampled = ["--prompt", question, "--max-new-tokens", "24", "--temperature", "0.9", "--seed", "5"];
    let sampled = generated(&place, &sampled);
    assert_ne!(greedy["base"]["text"], greedy["policy"]["text"], "the adapter changes something");
    let ask = |model: &str, temperature: f64| {
        json!({"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": 24,
            "temperature": temperature, "seed": 5})
    };
    // all at once, and each as if alone
    thread::scope(|scope| {
        for (model, side) in [("base", "base"), ("my", "policy")].repeat(4) {
            let (server, greedy, sampled) = (&server, &greedy, &sampled);
            scope.spawn(move || {
                for (temperature, expected) in [(0.0, greedy), (0.9, sampled)] {
                    let answer = server.answer(CHAT, &ask(model, temperature));
                    assert_eq!(text(&answer), expected[side]["text"], "{model} at {temperature}");
                    assert_eq!(answer["usage"]["completion_tokens"], expected[side]["tokens"]);
                }
            });
        }
    });

    // a stream is the same text, in parts that are whole characters
    let mut streamed = ask("my", 0.0);
    streamed["stream"] = true.into();
    streamed["stream_options"] = json!({"include_usage": true});
    let events = events(&server.post(CHAT, &streamed));
    let parts = || events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str());
    assert_eq!(parts().collect::<String>(), greedy["policy"]["text"].as_str().expect("a text"));
    assert!(parts().count() > 5);
    assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
    assert_eq!(events[events.len() - 2]["choices"][0]["finish_reason"], "length");
    assert_eq!(events[events.len() - 1]["usage"], server.answer(CHAT, &ask("my", 0.0))["usage"]);

    stops_and_several(&server);
    scores(&server);
    wrong_requests(&server);
    #[cfg(target_os = "linux")]
    no_descriptors(&server);

    let log = server.logged();
    assert!(log.contains("200  POST /v1/chat/completions  my  "), "{log}");
    assert!(!log.contains("hail"), "what was asked is nobody's business: {log}");
}

fn stops_and_several(server: &Server) {
    let body = json!({"model": "base", "prompt": "Hail is", "max_tokens": 30, "temperature": 0});
    let whole = server.answer(COMPLETIONS, &body);
    // a text over the border of two tokens ends the answer before it, and none of it is streamed
    let at = text(&whole).len() / 2;
    let at =
        (at..).find(|&at| text(&whole).is_char_boundary(at) && text(&whole).is_char_boundary(at + 7)).expect("one");
    let stop = &text(&whole)[at..at + 7];
    let before = &text(&whole)[..text(&whole).find(stop).expect("it is there")];
    let mut stopped = body.clone();
    stopped["stop"] = json!(["never seen", stop]);
    let answer = server.answer(COMPLETIONS, &stopped);
    assert_eq!((text(&answer), &answer["choices"][0]["finish_reason"]), (before, &json!("stop")));
    let mut told = stopped.clone();
    told["logprobs"] = 0.into();
    let told = server.answer(COMPLETIONS, &told);
    let tokens = told["choices"][0]["logprobs"]["tokens"].as_array().expect("a list").clone();
    let tokens: String = tokens.iter().filter_map(Value::as_str).collect();
    assert!(tokens.starts_with(before) && !tokens.ends_with(stop), "{tokens:?} {before:?}");
    stopped["stream"] = true.into();
    let streamed = events(&server.post(COMPLETIONS, &stopped));
    let streamed: String =
        streamed.iter().map(|event| event["choices"][0]["text"].as_str().expect("a text")).collect();
    assert_eq!(streamed, before);

    // several of several, in order, and a prompt as ids is the same prompt
    let ids = |text: &str| server.answer("/tokenize", &json!({"prompt": text}))["tokens"].clone();
    assert_eq!(server.answer("/detokenize", &json!({"tokens": ids("Hail is")}))["prompt"], "Hail is");
    let prompts = ["Hail is", "What is", "Scissors are"];
    let several = |prompt: Value, n: u32| {
        let body = json!({"model": "my", "prompt": prompt, "n": n, "max_tokens": 6, "temperature": 1, "seed": 3});
        let answer = server.answer(COMPLETIONS, &body);
        let choices = answer["choices"].as_array().expect("a list").clone();
        assert!(choices.iter().enumerate().all(|(i, choice)| choice["index"] == i));
        choices.iter().map(|choice| choice["text"].as_str().expect("a text").to_owned()).collect::<Vec<_>>()
    };
    let together = several(json!(prompts), 2);
    assert_eq!(together, several(prompts.iter().map(|prompt| ids(prompt)).collect(), 2));
    let alone: Vec<String> = prompts.iter().flat_map(|prompt| several(json!(prompt), 2)).collect();
    assert_eq!(together, alone);
    assert_eq!(several(ids("What is"), 1), together[2..3]);
    assert!(together[0] != together[1] || together[2] != together[3], "two answers are two draws");
}

fn scores(server: &Server) {
    let ask = |prompt: Value, logprobs: u32, max_tokens: u32| {
        let body = json!({"model": "my", "prompt": prompt, "echo": true, "logprobs": logprobs, "temperature": 0,
            "max_tokens": max_tokens});
        server.answer(COMPLETIONS, &body)["choices"].as_array().expect("a list").clone()
    };
    let prompts = ["What is hail? It is ice", "What is hail? It is water", "Scissors cut paper"];
    let scored = ask(json!(prompts), 1, 1);
    let list = |choice: &Value, name: &str| choice["logprobs"][name].as_array().expect(name).clone();
    for (prompt, choice) in prompts.iter().zip(&scored) {
        let (tokens, logps) = (list(choice, "tokens"), list(choice, "token_logprobs"));
        let (tops, offsets) = (list(choice, "top_logprobs"), list(choice, "text_offset"));
        assert!(logps.len() == tokens.len() && tops.len() == tokens.len() && offsets.len() == tokens.len());
        assert!(choice["text"].as_str().expect("a text").starts_with(prompt));
        assert_eq!((&logps[0], &tops[0]), (&Value::Null, &Value::Null));
        for i in 1..tokens.len() {
            let top: Vec<f64> = tops[i].as_object().expect("a map").values().filter_map(Value::as_f64).collect();
            let best = top.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let logp = logps[i].as_f64().expect("a number");
            // the same number where it is the most probable token, and otherwise both
            assert!(logp == best && top.len() == 1 || logp < best && top.len() == 2, "{choice}");
        }
        // what is generated after it is its most probable token
        assert_eq!(
            list(choice, "top_logprobs").pop().and_then(|top| top.as_object().map(serde_json::Map::len)),
            Some(1)
        );
    }
    // alone, with more beside each token, without the one that comes next, and generated as well as scored: the same
    assert_eq!(scored.len(), prompts.len());
    let numbers =
        |choice: &Value| -> Vec<f64> { list(choice, "token_logprobs").iter().filter_map(Value::as_f64).collect() };
    for (i, prompt) in prompts.iter().enumerate() {
        let expected = numbers(&scored[i]);
        for (logprobs, max_tokens) in [(1, 1), (5, 1), (1, 0), (0, 3)] {
            let found = numbers(&ask(json!(prompt), logprobs, max_tokens)[0]);
            // of all tokens but the first, and of those that come after
            let scored = expected.len() - 1;
            assert!(scored >= 3 && found.len() == scored + max_tokens as usize, "{prompt}: {found:?}");
            // sums of f32 in another order
            let same = expected.iter().zip(&found).all(|(a, b)| (a - b).abs() < 2e-5);
            assert!(same, "{logprobs} {max_tokens} {expected:?} {found:?}");
        }
    }
}

fn wrong_requests(server: &Server) {
    let ok = json!({"model": "my", "prompt": "a", "max_tokens": 1});
    let with = |name: &str, value: Value| {
        let mut body = ok.clone();
        body[name] = value;
        error(&server.post(COMPLETIONS, &body))
    };
    let expect = |(status, text): (u16, String), wanted: u16, part: &str| {
        assert!(status == wanted && text.contains(part), "{status} {text}: not {wanted} {part}");
    };
    expect(with("model", json!("gpt-4")), 404, "(policy)");
    expect(with("temprature", json!(1)), 400, "did you mean temperature?");
    expect(with("presence_penalty", json!(1)), 400, "presence_penalty");
    expect(with("prompt", json!([[]])), 400, "no tokens");
    expect(with("prompt", json!([99999])), 400, "outside the model's vocabulary of 3072");
    expect(with("max_tokens", json!(600)), 400, "max_tokens");
    let (status, message) = with("prompt", json!(vec![5; 512]));
    assert!(status == 400 && message.contains("context_length_exceeded") && message.contains("513"), "{message}");
    let broken = server.ask("POST", COMPLETIONS, JSON, "{\"model\": \"my\",,}");
    expect(error(&broken), 400, "line 1 column 16");
    expect(error(&server.ask("POST", COMPLETIONS, JSON, &"[".repeat(100_000))), 400, "recursion limit");
    expect(
        error(&server.ask("POST", COMPLETIONS, "Content-Type: text/plain\r\n", &ok.to_string())),
        415,
        "application/json",
    );
    expect(error(&server.ask("GET", COMPLETIONS, "", "")), 405, "GET");
    expect(error(&server.ask("GET", "/v2/x", "", "")), 404, "/v1/models");
    expect(error(&server.ask("GET", "/v1/models/nobody", "", "")), 404, "nobody");
    // a page whose name was made to mean this machine
    let mut stream = server.connect();
    stream.write_all(b"GET /v1/models HTTP/1.1\r\nHost: evil.example:80\r\nConnection: close\r\n\r\n").expect("sent");
    expect(error(&read(stream)), 403, "wrong_host");
}

/// A connection that cannot be taken waits, and that is said once.
#[cfg(target_os = "linux")]
fn no_descriptors(server: &Server) {
    use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
    let limit = |new: Rlimit| prlimit(Some(Pid::from_child(&server.child)), Resource::Nofile, new).expect("set");
    let before = limit(Rlimit { current: Some(0), maximum: getrlimit(Resource::Nofile).maximum });
    let waits = server.send("GET", "/health", "", "");
    let begun = Instant::now();
    let warnings = || server.logged().matches("connections cannot be taken").count();
    while warnings() == 0 && begun.elapsed() < Duration::from_secs(10) {
        thread::sleep(Duration::from_millis(10));
    }
    // some more tries
    thread::sleep(Duration::from_millis(200));
    limit(before);
    assert_eq!(read(waits).status, 200);
    assert_eq!(warnings(), 1, "{}", server.logged());
}

/// More than a second's work, as one request.
fn long() -> Value {
    json!({"model": "my", "prompt": "Hail is", "n": 256, "max_tokens": 450, "temperature": 2, "seed": 1})
}

#[test]
fn nobody_holds_up_the_others() {
    let place = trained();
    let limits = ["--key-env", "SECRET", "--queue", "1", "--max-body", "4KiB", "--timeout", "1"];
    let mut server = Server::start(&place, &[&["my"], &limits[..]].concat());
    let ask = |key: &str, path: &str, body: &str| {
        server.ask("POST", path, &format!("{JSON}Authorization: {key}\r\n"), body)
    };
    const KEY: &str = "Bearer correct horse";
    let small = json!({"model": "my", "prompt": "a", "max_tokens": 1}).to_string();
    assert_eq!(error(&server.post(COMPLETIONS, &json!({}))).0, 401);
    assert_eq!(error(&ask("Bearer correct horsf", COMPLETIONS, &small)).0, 401);
    assert_eq!(error(&ask("Basic correct horse", COMPLETIONS, &small)).0, 401);
    assert_eq!(ask(KEY, COMPLETIONS, &small).status, 200);
    assert_eq!(server.get("/health")["status"], "ok");
    let (status, message) = error(&ask(KEY, COMPLETIONS, &"x".repeat(5000)));
    assert!(status == 413 && message.contains("4096"), "{message}");

    // those who begin a request and do not go on, with its head or its body, end by themselves and hold up nobody
    let slow: Vec<TcpStream> = (0..20)
        .map(|i| {
            let mut stream = server.connect();
            let head = format!("POST {COMPLETIONS} HTTP/1.1\r\nHost: {}\r\n{JSON}", server.address);
            stream.write_all(head.as_bytes()).expect("sent");
            if i % 2 == 0 {
                let more = format!("Authorization: {KEY}\r\nContent-Length: 100\r\n\r\n{{");
                stream.write_all(more.as_bytes()).expect("sent");
            }
            stream
        })
        .collect();
    assert_eq!(ask(KEY, COMPLETIONS, &small).status, 200);
    for (i, mut stream) in slow.into_iter().enumerate() {
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("closed by the server");
        assert!(i % 2 == 1 || text.starts_with("HTTP/1.1 408"), "{text}");
    }

    // one request is answered; the next is told to come again, until the first one's client is gone
    let busy = server.send("POST", COMPLETIONS, &format!("{JSON}Authorization: {KEY}\r\n"), &long().to_string());
    let begun = Instant::now();
    let refused = loop {
        let reply = ask(KEY, COMPLETIONS, &small);
        if reply.status != 200 || begun.elapsed() > Duration::from_secs(10) {
            break reply;
        }
    };
    assert!(error(&refused).1.contains("queue_full") && refused.status == 429, "{}", refused.body);
    assert!(refused.head.to_ascii_lowercase().contains("retry-after: 1"));
    drop(busy);
    let begun = Instant::now();
    while ask(KEY, COMPLETIONS, &small).status != 200 {
        assert!(begun.elapsed() < Duration::from_secs(10), "a client who is gone keeps its place");
    }
    let log = server.logged();
    assert!(log.contains("gone  POST /v1/completions"), "{log}");
    assert!(!log.contains("correct horse"), "the key is nobody's business");

    // nobody is waited for
    server.signal();
    assert_eq!(server.wait().code(), Some(0));
}

#[test]
fn a_stop_lets_answers_end_or_says_that_they_did_not() {
    let place = trained();
    // a minute is far more than it takes, and on a busy machine enough
    for (grace, answers) in [("60", 16), ("0", 256)] {
        let mut server = Server::start(&place, &["my", "--grace", grace]);
        let mut body = long();
        body["stream"] = true.into();
        body["n"] = answers.into();
        body["max_tokens"] = 100.into();
        let mut stream = server.send("POST", COMPLETIONS, JSON, &body.to_string());
        // it has begun
        let mut begin = [0; 512];
        stream.read_exact(&mut begin).expect("read");
        server.signal();
        let mut rest = String::new();
        stream.read_to_string(&mut rest).expect("read");
        assert_eq!(rest.contains("[DONE]"), grace == "60", "{grace}");
        assert_eq!(rest.contains("server_stopping"), grace == "0", "{grace}");
        assert_eq!(server.wait().code(), Some(0));
        assert!(server.logged().contains("stopping: 1 requests"), "{}", server.logged());
    }
}

#[test]
fn an_address_that_others_reach_needs_a_key() {
    let place = Place::new();
    for (arguments, problem) in
        [(&["--host", "0.0.0.0"][..], "no key is asked for"), (&["--key-env", "NOT_SET"][..], "NOT_SET is not set")]
    {
        let output = place.run(&[&["serve", "my"], arguments].concat());
        assert_eq!(output.status.code(), Some(2));
        let message = super::stderr(&output);
        assert!(message.replace("\n", " ").contains(problem), "{message}");
    }
}

#[test]
fn scores_are_those_of_transformers_and_peft() {
    let Some(real) = std::env::var_os("DPO_LORA_REAL").map(PathBuf::from) else {
        eprintln!("skipped: DPO_LORA_REAL is not set");
        return;
    };
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/serve/stories260k.json");
    let golden: Value = serde_json::from_str(&std::fs::read_to_string(golden).expect("the fixture")).expect("JSON");
    let place = Place::new();
    let adapter = real.join("adapters/trl-dpo-stories260K/sigmoid/final").display().to_string();
    let base = real.join("stories260K").display().to_string();
    let names = ["--name", "policy", "--base-name", "base"];
    let server = Server::start(&place, &[&[&adapter[..], "--base", &base], &names[..]].concat());
    for side in ["base", "policy"] {
        for (prompts, logprobs) in [(&golden["texts"], 1), (&golden["ids"], 3)] {
            let body = json!({"model": side, "prompt": prompts, "echo": true, "logprobs": logprobs, "temperature": 0,
                "max_tokens": 1});
            let answer = server.answer(COMPLETIONS, &body);
            let (choices, golden) = (answer["choices"].as_array(), golden[side].as_array());
            let (choices, golden) = (choices.expect("a list"), golden.expect("a list"));
            assert!(!golden.is_empty() && choices.len() == golden.len());
            for (choice, expected) in choices.iter().zip(golden) {
                let logps = choice["logprobs"]["token_logprobs"].as_array().expect("a list");
                let tops = choice["logprobs"]["top_logprobs"].as_array().expect("a list");
                let theirs = expected["logps"].as_array().expect("a list");
                let theirs_top = expected["top"].as_array().expect("a list");
                // the most probable tokens after the last one of the prompt too
                assert!(!theirs.is_empty() && theirs_top.len() == theirs.len() + 1);
                assert_eq!((logps.len(), tops.len()), (theirs.len() + 2, theirs.len() + 2));
                for (ours, theirs) in logps[1..].iter().zip(theirs) {
                    let (ours, theirs) = (ours.as_f64().expect("a number"), theirs.as_f64().expect("a number"));
                    // both compute in f32; the policy's logits are some tens
                    assert!((ours - theirs).abs() < 1e-4, "{side}: {ours} {theirs}");
                }
                for (ours, theirs) in tops[1..].iter().zip(theirs_top) {
                    let mut ours: Vec<f64> =
                        ours.as_object().expect("a map").values().filter_map(Value::as_f64).collect();
                    ours.sort_by(|a, b| b.total_cmp(a));
                    let theirs = theirs.as_array().expect("a list");
                    assert!(ours.len() >= logprobs && theirs.len() >= logprobs);
                    for (ours, theirs) in ours.iter().zip(theirs).take(logprobs) {
                        assert!(
                            (ours - theirs[1].as_f64().expect("a number")).abs() < 1e-4,
                            "{side}: {ours} {theirs}"
                        );
                    }
                }
            }
        }
    }
}
