//! A local chain, a proxy in front of it that follows a script, and the command to be tested.

#![allow(dead_code, reason = "every test binary uses its part of it")]
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test stops where something is wrong, and says what it skips"
)]

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;

use chain::local::{DEVELOPMENT_KEY, LocalChain, Seeded, find_anvil, in_node_modules, owner, seed};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A moment after every local block: the local chain's age is not judged.
pub(crate) fn clock() -> u64 {
    4_000_000_000
}

/// anvil, as `npm install --ignore-scripts` in `chain/contracts` installs it, or wherever the command finds it.
pub(crate) fn anvil() -> Option<PathBuf> {
    let installed = Path::new(env!("CARGO_MANIFEST_DIR")).join("contracts/node_modules");
    let installed = in_node_modules(&installed).into_iter().find(|it| it.is_file());
    let found = installed.or_else(|| find_anvil(|name| std::env::var_os(name)));
    if found.is_none() {
        eprintln!("skipped: no anvil; run `npm install --ignore-scripts` in chain/contracts");
    }
    found
}

/// A chain with the stand-ins and an app.
pub(crate) struct Chain {
    pub(crate) url: String,
    pub(crate) seeded: Seeded,
    pub(crate) folder: TempDir,
    _anvil: LocalChain,
    _runtime: tokio::runtime::Runtime,
}

impl Chain {
    pub(crate) fn start() -> Option<Self> {
        let anvil = anvil()?;
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let (anvil, seeded) = runtime.block_on(async {
            let chain = LocalChain::start(&anvil, 0, &[]).await.unwrap();
            let mut owner = owner(chain.url(), folder.path(), clock).await.unwrap();
            let seeded = seed(&mut owner, None).await.unwrap();
            (chain, seeded)
        });
        Some(Self { url: anvil.url().to_owned(), seeded, folder, _anvil: anvil, _runtime: runtime })
    }

    pub(crate) fn kms(&self) -> String {
        self.seeded.contracts.kms.to_string()
    }

    pub(crate) fn app(&self) -> String {
        self.seeded.app.to_string()
    }

    /// The command, signing with the development key and keeping its journal with the chain.
    pub(crate) fn command(&self, url: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_keyferry-chain"));
        command
            .args(arguments)
            .env_clear()
            .env("RPC_URL", url)
            .env("KMS_CONTRACT_ADDR", self.kms())
            .env("PRIVATE_KEY", DEVELOPMENT_KEY)
            .env("XDG_STATE_HOME", self.folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Ran {
        self.run_at(&self.url, arguments)
    }

    pub(crate) fn run_at(&self, url: &str, arguments: &[&str]) -> Ran {
        Ran::from(self.command(url, arguments).output().unwrap())
    }

    /// How many transactions the account has sent.
    pub(crate) fn nonce(&self) -> u64 {
        let nonce = self.ask("eth_getTransactionCount", json!([self.seeded.owner, "latest"]));
        u64::from_str_radix(nonce.as_str().unwrap().trim_start_matches("0x"), 16).unwrap()
    }

    pub(crate) fn ask(&self, method: &str, params: Value) -> Value {
        ask(&self.url, method, params)
    }
}

/// Asks an endpoint.
pub(crate) fn ask(url: &str, method: &str, params: Value) -> Value {
    let body = json!({ "jsonrpc": "2.0", "id": 1, "method": method, "params": params }).to_string();
    let answer: Value = serde_json::from_slice(&post(url, body.as_bytes())).unwrap();
    answer["result"].clone()
}

/// What a command did.
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

impl Ran {
    #[track_caller]
    pub(crate) fn expect(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "stdout: {}\nstderr: {}", self.out, self.err);
        self
    }

    #[track_caller]
    pub(crate) fn says(self, text: &str) -> Self {
        assert!(
            self.err.contains(text) || self.out.contains(text),
            "no {text:?} in: {}\n{}",
            self.out,
            self.err
        );
        self
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {}\n{}", self.out, self.err))
    }
}

/// What the proxy does with one request.
pub(crate) enum Act {
    /// Passes it on.
    Forward,
    /// Answers with a result of its own.
    Result(Value),
    /// Answers with a JSON-RPC error.
    Error(Value),
    /// Answers with an HTTP status and this body.
    Http(u16, Vec<u8>),
    /// Keeps the connection open and says nothing.
    Hang,
    /// Kills the command before the request is passed on.
    KillBefore,
    /// Passes it on, and kills the command instead of answering it.
    KillAfter,
}

type Script = Box<dyn FnMut(usize, &str, &Value) -> Act + Send>;

/// A JSON-RPC proxy that follows a script. It lives until the test ends.
pub(crate) struct Proxy {
    pub(crate) url: String,
    pub(crate) seen: Arc<Mutex<Vec<String>>>,
    pub(crate) victim: Arc<Mutex<Option<Child>>>,
}

impl Proxy {
    /// `script` is given the number of the request (from 0), its method and its parameters.
    pub(crate) fn start(
        upstream: &str,
        script: impl FnMut(usize, &str, &Value) -> Act + Send + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let proxy = Self {
            url: format!("http://{}", listener.local_addr().unwrap()),
            seen: Arc::default(),
            victim: Arc::default(),
        };
        let (upstream, seen, victim) = (upstream.to_owned(), proxy.seen.clone(), proxy.victim.clone());
        let script: Arc<Mutex<Script>> = Arc::new(Mutex::new(Box::new(script)));
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (upstream, seen, victim, script) =
                    (upstream.clone(), seen.clone(), victim.clone(), script.clone());
                thread::spawn(move || serve(stream, &upstream, &seen, &victim, &script));
            }
        });
        proxy
    }
}

/// One request per connection.
fn serve(
    mut stream: TcpStream,
    upstream: &str,
    seen: &Mutex<Vec<String>>,
    victim: &Mutex<Option<Child>>,
    script: &Mutex<Script>,
) -> Option<()> {
    let body = read_message(&stream)?.body;
    let request: Value = serde_json::from_slice(&body).ok()?;
    let method = request["method"].as_str()?.to_owned();
    let act = {
        let mut script = script.lock().unwrap();
        let mut seen = seen.lock().unwrap();
        seen.push(method.clone());
        script(seen.len() - 1, &method, &request["params"])
    };
    let kill = || {
        if let Some(mut child) = victim.lock().unwrap().take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    };
    let wrapped =
        |key: &str, value: Value| json!({ "jsonrpc": "2.0", "id": request["id"], key: value }).to_string();
    let (status, answer) = match act {
        Act::Forward => (200, post(upstream, &body)),
        Act::Result(value) => (200, wrapped("result", value).into_bytes()),
        Act::Error(value) => (200, wrapped("error", value).into_bytes()),
        Act::Http(status, body) => (status, body),
        Act::Hang => {
            let mut rest = Vec::new();
            stream.read_to_end(&mut rest).ok()?;
            return None;
        }
        Act::KillBefore => {
            kill();
            return None;
        }
        Act::KillAfter => {
            post(upstream, &body);
            kill();
            return None;
        }
    };
    reply(&mut stream, status, &answer)
}

/// A request or an answer: its first line, its headers with names in lower case, its body.
pub(crate) struct Message {
    pub(crate) first_line: String,
    pub(crate) headers: HashMap<String, String>,
    pub(crate) body: Vec<u8>,
}

fn read_message(stream: &TcpStream) -> Option<Message> {
    let mut reader = BufReader::new(stream);
    let mut first_line = String::new();
    reader.read_line(&mut first_line).ok()?;
    let mut headers = HashMap::new();
    let mut line = String::new();
    while reader.read_line(&mut line).ok()? > 2 {
        if let Some((name, value)) = line.split_once(':') {
            headers.insert(name.to_lowercase(), value.trim().to_owned());
        }
        line.clear();
    }
    let mut body = vec![0; headers.get("content-length").map_or(Ok(0), |it| it.parse()).ok()?];
    reader.read_exact(&mut body).ok()?;
    Some(Message { first_line: first_line.trim_end().to_owned(), headers, body })
}

/// An HTTP service that answers with a status and a JSON body; `None` is silence. It lives until the test ends.
pub(crate) fn service(answer: impl Fn(&Message) -> Option<(u16, Value)> + Send + Sync + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let answer = Arc::new(answer);
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let answer = Arc::clone(&answer);
            thread::spawn(move || {
                let asked = read_message(&stream)?;
                match answer(&asked) {
                    Some((status, body)) => reply(&mut stream, status, body.to_string().as_bytes()),
                    None => stream.read_to_end(&mut Vec::new()).map(drop).ok(),
                }
            });
        }
    });
    url
}

/// A peer that went away is what some tests are about, so its errors end it quietly.
fn reply(stream: &mut TcpStream, status: u16, body: &[u8]) -> Option<()> {
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body)).ok()
}

/// Posts to `http://HOST:PORT` and gives the body of the answer.
fn post(url: &str, body: &[u8]) -> Vec<u8> {
    send(url, &[("content-type", "application/json")], body)
}

/// Posts with headers of one's own.
pub(crate) fn send(url: &str, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let host = url.trim_start_matches("http://");
    let mut stream = TcpStream::connect(host).unwrap();
    let mut head = format!("POST / HTTP/1.1\r\nhost: {host}\r\ncontent-length: {}\r\n", body.len());
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("connection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(body).unwrap();
    read_message(&stream).unwrap().body
}
