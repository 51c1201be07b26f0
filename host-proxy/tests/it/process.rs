//! The program: signals, sudden death, running out of descriptors, and its commands.

use std::fs;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{ExitStatus, Stdio};

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStderr, Command};
use transport::delivery::Header;

use crate::support::{connect, dial, listen, read_head, soon, status};

const PROGRAM: &str = env!("CARGO_BIN_EXE_host-proxy");

/// A running `host-proxy`, killed when dropped.
struct Running {
    child: Child,
    address: SocketAddr,
    log: Lines<BufReader<ChildStderr>>,
}

impl Running {
    async fn start(mut command: Command) -> Self {
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true).env("RUST_LOG", "info");
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let line = soon("the first line", lines.next_line()).await.unwrap().unwrap();
        let address = line.strip_prefix("listening on tcp:").unwrap().parse().unwrap();
        let log = BufReader::new(child.stderr.take().unwrap()).lines();
        Self { child, address, log }
    }

    async fn with_flags(flags: &[&str]) -> Self {
        let mut command = Command::new(PROGRAM);
        command.args(["--listen", "tcp:127.0.0.1:0"]).args(flags);
        Self::start(command).await
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = i32::try_from(self.child.id().unwrap()).unwrap();
        rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), signal).unwrap();
    }

    /// Reads the log up to a line with this text.
    async fn logged(&mut self, text: &str) -> String {
        soon(text, async {
            loop {
                let line = self
                    .log
                    .next_line()
                    .await
                    .unwrap()
                    .unwrap_or_else(|| panic!("the log ends before {text}"));
                if line.contains(text) {
                    return line;
                }
            }
        })
        .await
    }

    async fn ended(&mut self) -> ExitStatus {
        soon("the end of the process", self.child.wait()).await.unwrap()
    }
}

#[tokio::test]
async fn killed_during_a_transfer_both_sides_see_an_error() {
    let (listener, address) = listen().await;
    let mut proxy = Running::with_flags(&["--allow", &address.to_string()]).await;
    let mut client = dial(proxy.address).await;
    assert_eq!(connect(&mut client, &address.to_string()).await, 200);
    let (mut server, _) = soon("the target's connection", listener.accept()).await.unwrap();
    server.write_all(b"first half").await.unwrap();
    soon("the first half", client.read_exact(&mut [0; 10])).await.unwrap();
    proxy.signal(rustix::process::Signal::KILL);
    proxy.ended().await;
    for side in [&mut client, &mut server] {
        let seen = soon("the cut", side.read(&mut [0])).await;
        assert_eq!(seen.unwrap_err().kind(), ErrorKind::ConnectionReset, "a cut must not look like an end");
    }
}

#[tokio::test]
async fn a_killed_peer_is_an_error_on_the_other_side() {
    let (listener, address) = listen().await;
    let mut proxy = Running::with_flags(&["--allow", &address.to_string()]).await;
    // A client that has unread bytes when it is killed, so that its kernel resets the connection: it takes the first
    // line of the proxy's answer and leaves the rest.
    let script = format!(
        "exec 3<>/dev/tcp/{}/{}; printf 'CONNECT {address} HTTP/1.1\\r\\n\\r\\n' >&3; read -r status <&3; echo answered; read -r never",
        proxy.address.ip(),
        proxy.address.port()
    );
    let mut client = Command::new("bash")
        .args(["-c", &script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let (mut server, _) = soon("the target's connection", listener.accept()).await.unwrap();
    soon("the client", client.stdout.as_mut().unwrap().read_u8()).await.unwrap();
    server.write_all(b"an answer that is never read").await.unwrap();
    soon("the kill", client.kill()).await.unwrap();
    let seen = soon("the cut", async {
        loop {
            match server.read(&mut [0; 16]).await {
                Err(error) => return error.kind(),
                Ok(0) => panic!("a killed client looks like an end"),
                Ok(_) => {}
            }
        }
    })
    .await;
    assert_eq!(seen, ErrorKind::ConnectionReset);
    let line = proxy.logged("client-reset").await;
    assert!(line.contains(&address.to_string()), "{line}");
}

/// The target is a process of its own, a receiver in the middle of a message.
#[tokio::test]
async fn a_killed_target_is_an_error_to_the_sender_and_leaves_no_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("message");
    let mut command = Command::new(PROGRAM);
    command.args(["--receive", &format!("tcp:127.0.0.1:0={}", file.display())]);
    let mut target = Running::start(command).await;
    let address = target.address.to_string();
    let mut proxy = Running::with_flags(&["--allow", &address]).await;
    let mut sender = dial(proxy.address).await;
    assert_eq!(connect(&mut sender, &address).await, 200);
    let message = vec![7; 1 << 20];
    sender.write_all(&Header::of(&message).encode()).await.unwrap();
    sender.write_all(&message[..message.len() / 2]).await.unwrap();
    target.signal(rustix::process::Signal::KILL);
    target.ended().await;
    let seen = soon("the cut", async {
        loop {
            if let Err(error) = sender.write_all(&message[..1024]).await {
                return error.kind();
            }
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert!(matches!(seen, ErrorKind::ConnectionReset | ErrorKind::BrokenPipe), "{seen:?}");
    proxy.logged("end=\"target-reset\"").await;
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "half a message was kept");
}

#[tokio::test]
async fn out_of_descriptors_is_survived_and_told() {
    let (listener, address) = listen().await;
    let mut command = Command::new("bash");
    let flags = format!("--listen tcp:127.0.0.1:0 --allow {address}");
    // Soft and hard limit, so that it cannot be raised. The proxy counts on fewer connections then; what it cannot
    // know is what else takes descriptors: here, heads that never end.
    command.args(["-c", &format!("ulimit -n 140; exec {PROGRAM} {flags}")]);
    let mut proxy = Running::start(command).await;
    let mut open = Vec::new();
    let mut told = 0;
    for _ in 0..300 {
        let mut client = dial(proxy.address).await;
        client.write_all(b"CONNECT ").await.unwrap();
        open.push(client);
    }
    // Those over the limit hear about it, the others are waited for.
    for client in &mut open {
        let mut answer = [0; 12];
        let read =
            tokio::time::timeout(std::time::Duration::from_millis(20), client.read_exact(&mut answer)).await;
        if let Ok(Ok(_)) = read {
            assert_eq!(&answer, b"HTTP/1.1 503");
            told += 1;
        }
    }
    assert!(told > 0, "nobody was told");
    drop(open);
    // And then it serves again.
    let mut served = false;
    for _ in 0..200 {
        let mut client = dial(proxy.address).await;
        let head = format!("CONNECT {address} HTTP/1.1\r\n\r\n");
        if client.write_all(head.as_bytes()).await.is_ok() && answer_status(&mut client).await == Some(200) {
            served = true;
            break;
        }
    }
    assert!(served);
    soon("the target's connection", listener.accept()).await.unwrap();
    assert!(proxy.child.try_wait().unwrap().is_none(), "the process is alive");
    proxy.signal(rustix::process::Signal::TERM);
    assert_eq!(proxy.ended().await.code(), Some(0));
}

async fn answer_status(client: &mut tokio::net::TcpStream) -> Option<u16> {
    let mut answer = [0; 12];
    soon("an answer", client.read_exact(&mut answer)).await.ok()?;
    std::str::from_utf8(&answer[9..]).ok()?.parse().ok()
}

#[tokio::test]
async fn hangup_takes_the_new_file_and_keeps_connections() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("host-proxy.toml");
    let (listener, address) = listen().await;
    let write = |path: &Path, allow: &str| {
        fs::write(path, format!("[[egress]]\nlisten = [\"tcp:127.0.0.1:0\"]\nallow = [{allow}]\n")).unwrap();
    };
    write(&file, &format!("\"{address}\""));
    let mut command = Command::new(PROGRAM);
    command.arg("--config").arg(&file).args(["--log-format", "json"]);
    let mut proxy = Running::start(command).await;
    let mut client = dial(proxy.address).await;
    assert_eq!(connect(&mut client, &address.to_string()).await, 200);
    let (mut server, _) = soon("the target's connection", listener.accept()).await.unwrap();
    // A file that is wrong changes nothing.
    write(&file, "\"*:443\"");
    proxy.signal(rustix::process::Signal::HUP);
    proxy.logged("the old one stays in force").await;
    let mut again = dial(proxy.address).await;
    assert_eq!(connect(&mut again, &address.to_string()).await, 200);
    write(&file, "");
    proxy.signal(rustix::process::Signal::HUP);
    proxy.logged("configuration taken").await;
    let mut refused = dial(proxy.address).await;
    assert_eq!(connect(&mut refused, &address.to_string()).await, 403);
    client.write_all(b"still here").await.unwrap();
    soon("bytes", server.read_exact(&mut [0; 10])).await.unwrap();
    drop((client, server));
    let line = proxy.logged("\"end\":\"finished\"").await;
    let line: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(
        (line["fields"]["up"].as_u64(), line["fields"]["rule"].as_str()),
        (Some(10), Some(&*address.to_string()))
    );
}

#[tokio::test]
async fn metrics_and_health_are_on_a_socket_of_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let admin = format!("unix:{}", folder.path().join("admin.sock").display());
    let proxy = Running::with_flags(&["--allow", "a.example:443", "--admin", &admin]).await;
    let mut client = dial(proxy.address).await;
    assert_eq!(connect(&mut client, "b.example:443").await, 403);
    let endpoint: transport::Endpoint = admin.parse().unwrap();
    for (path, expected) in [
        ("/healthz", "\"status\":\"ok\""),
        ("/metrics", "host_proxy_connections_total{service=\"egress\",rule=\"-\",end=\"no-rule\"} "),
        ("/other", "HTTP/1.1 404"),
    ] {
        // The refused connection is counted when it is over, which may be a moment later.
        let found = soon(path, async {
            loop {
                let mut stream = endpoint.connect(crate::support::PATIENCE).await.unwrap();
                stream
                    .write_all(format!("GET {path} HTTP/1.1\r\nHost: admin\r\n\r\n").as_bytes())
                    .await
                    .unwrap();
                let mut answer = String::new();
                stream.read_to_string(&mut answer).await.unwrap();
                if answer.contains(expected) {
                    return true;
                }
                drop(client.shutdown().await);
            }
        })
        .await;
        assert!(found);
    }
    // The proxy's own port answers no such thing.
    let mut stream = dial(proxy.address).await;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: admin\r\n\r\n").await.unwrap();
    assert_eq!(status(&read_head(&mut stream).await), 400);
}

async fn run(args: &[&str]) -> (Option<i32>, String, String) {
    let output = soon("the command", Command::new(PROGRAM).args(args).output()).await.unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[tokio::test]
async fn explain_says_which_rule_decides() {
    let list = ["--allow", "kms.example.com:12001", "--resolve", "kms.example.com=203.0.113.10"];
    let (code, out, _) = run(&[&["explain"][..], &list, &["KMS.example.com:12001"]].concat()).await;
    assert_eq!(code, Some(0));
    assert!(out.starts_with("allowed KMS.example.com:12001\n  rule: kms.example.com:12001\n"), "{out}");
    let (code, out, _) =
        run(&[&["explain", "--json"][..], &list, &["kms.example.com:12001", "evil:1"]].concat()).await;
    assert_eq!(code, Some(3), "one refusal is a refusal");
    let told: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(told["version"], 1);
    // Flags may stand behind the targets, and a target may be any text.
    let (code, out, _) = run(&[&["explain"][..], &list, &["kms.example.com:12001", "--json"]].concat()).await;
    assert_eq!((code, serde_json::from_str::<serde_json::Value>(&out).is_ok()), (Some(0), true));
    let (code, out, _) =
        run(&["explain", "--allow", "a.example:443", "--", "-a.example:443", "", "a\tb:1"]).await;
    assert_eq!((code, out.lines().filter(|line| line.starts_with("refused ")).count()), (Some(3), 3));
    assert_eq!(
        (&told["targets"][0]["verdict"], &told["targets"][1]["reason"]),
        (&"allowed".into(), &"no-rule".into())
    );
    let bound =
        ["explain", "--allow", "a.example:443", "--resolve", "a.example=169.254.169.254", "a.example:443"];
    let (code, out, _) = run(&bound).await;
    assert_eq!(code, Some(3));
    assert!(out.contains("169.254.169.254 is metadata") && out.contains("parent's credentials"), "{out}");
}

#[tokio::test]
async fn wrong_use_is_told_with_a_hint() {
    for (args, code, expected) in [
        (&[][..], 2, "hint: for example: host-proxy --listen"),
        (&["--listen", "3128"][..], 2, "is not vsock:CID:PORT"),
        (&["--listen", "tcp:127.0.0.1:0", "--allow", "*:443"][..], 2, "no allow-list"),
        (&["check", "/nonexistent.toml"][..], 2, "cannot read the configuration"),
        (&["explain", "--allow", "a.example:443"][..], 2, "TARGET"),
        (
            &["wait-for-boot", "--listen", "tcp:127.0.0.1:0", "--timeout", "0"][..],
            4,
            "hint: is the enclave running?",
        ),
    ] {
        let (got, _, err) = run(args).await;
        assert_eq!(got, Some(code), "{args:?}: {err}");
        assert!(err.contains(expected), "{args:?}: {err}");
    }
}

#[tokio::test]
async fn check_reads_the_example() {
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/host-proxy.example.toml");
    let (code, out, _) = run(&["check", example]).await;
    assert_eq!(code, Some(0));
    assert!(out.contains("vsock:any:3128") && out.contains("forward to vsock:16:8443"), "{out}");
    let (code, out, _) = run(&["check", "--json", example]).await;
    assert_eq!(
        (code, serde_json::from_str::<serde_json::Value>(&out).unwrap()["valid"].as_bool()),
        (Some(0), Some(true))
    );
}
