//! /init of the guest in the tests with real vsock. It does what the word `test=` on the kernel command line says, tells
//! each result in a line that begins with `guest:`, and restarts the machine when all went well; a failure is a panic,
//! which ends the machine too.

#![expect(clippy::unwrap_used, reason = "a failure in the guest ends the test")]
#![expect(clippy::print_stdout, reason = "the console is where a guest is heard")]

use std::fs;
use std::io;
use std::process::Stdio;
use std::time::Duration;

use rustix::mount::{MountFlags, mount};
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use rustix::system::{RebootCommand, reboot};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;
use transport::{ConnectTarget, Endpoint, Prefixed, Stream, connect_through};

/// Longest wait for anything that must happen; an emulated processor is slow.
const PATIENCE: Duration = Duration::from_secs(60);
/// Sent in each direction of a tunnel.
const BULK: usize = 8 << 20;
/// Messages of the flood, and their size: larger than what kernels merge, small enough that their number is the limit.
const FLOOD: usize = 3000;
const MESSAGE: usize = 200;

fn main() {
    for (kind, target) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("tmpfs", "/tmp")] {
        mount(kind, target, kind, MountFlags::empty(), None).unwrap();
    }
    raise_loopback().unwrap();
    let command_line = fs::read_to_string("/proc/cmdline").unwrap();
    let test = command_line.split_whitespace().find_map(|word| word.strip_prefix("test=")).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        match test {
            "agent" => agent().await,
            "proxy" => proxy().await,
            other => panic!("no test {other}"),
        }
    });
    reboot(RebootCommand::Restart).unwrap();
}

/// Runs the agent with the arguments that the test wrote down.
async fn agent() {
    let arguments = fs::read_to_string("/etc/agent-arguments").unwrap();
    let mut command = Command::new("/bin/enclave-agent");
    command.args(arguments.lines()).env("RUST_LOG", "info").stdin(Stdio::null());
    let output = soon("the agent", command.output()).await.unwrap();
    for line in String::from_utf8_lossy(&output.stderr).lines() {
        println!("guest: agent-log {line}");
    }
    let summary = String::from_utf8(output.stdout).unwrap();
    println!("guest: summary {}", summary.replace('\n', " "));
    println!("guest: code {:?}", output.status.code());
}

/// Runs the proxy here, on real vsock, and is its client, over the loopback of vsock, and its target.
async fn proxy() {
    let mut command = Command::new("/bin/host-proxy");
    command.args(["--config", "/etc/host-proxy.toml"]).stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut proxy = command.spawn().unwrap();
    let first = BufReader::new(proxy.stdout.take().unwrap()).lines().next_line().await.unwrap();
    println!("guest: proxy {}", first.unwrap());
    let log = tell_log(&mut proxy);

    let target = TcpListener::bind("127.0.0.1:7000").await.unwrap();
    bulk_and_half_close(&target).await;
    an_answer_after_the_end(&target).await;
    a_flood_to_a_slow_reader(&target).await;
    a_killed_target(&target).await;
    refusals().await;
    let kept = limits(&target).await;

    // From here on the test's own process is the client, through the machine's vsock device.
    println!("guest: waiting for the host");
    let (mut server, _) = soon("the host", target.accept()).await.unwrap();
    let mut line = [0; 20];
    soon("the host's words", server.read_exact(&mut line)).await.unwrap();
    println!("guest: host-said {}", String::from_utf8_lossy(&line));
    server.write_all(b"and hello from there").await.unwrap();
    // The device has no half-close: its close may be an end or a reset here.
    let _end_or_reset = soon("the host's end", server.read_to_end(&mut Vec::new())).await;
    // The proxy's stop waits for connections.
    drop((server, kept));

    let pid = rustix::process::Pid::from_raw(i32::try_from(proxy.id().unwrap()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let status = soon("the proxy's end", proxy.wait()).await.unwrap();
    // Its last lines may still be in the pipe.
    soon("the end of its log", log).await.unwrap();
    println!("guest: stopped {:?}", status.code());
}

/// Shows the proxy's log on the console as it comes.
fn tell_log(proxy: &mut Child) -> JoinHandle<()> {
    let mut log = BufReader::new(proxy.stderr.take().unwrap()).lines();
    tokio::spawn(async move {
        while let Ok(Some(line)) = log.next_line().await {
            println!("guest: log {line}");
        }
    })
}

async fn bulk_and_half_close(target: &TcpListener) {
    let (client, server) = tunnel(target).await;
    let (mut client_reads, mut client_writes) = tokio::io::split(client);
    let (mut server_reads, mut server_writes) = server.into_split();
    let (up, down) = (pattern(1), pattern(2));
    let (mut at_server, mut at_client) = (Vec::new(), Vec::new());
    // Each side ends its direction while the other still sends: both must arrive whole.
    let all = async {
        tokio::try_join!(
            async { client_writes.write_all(&up).await.and(client_writes.shutdown().await) },
            async { server_writes.write_all(&down).await.and(server_writes.shutdown().await) },
            async { server_reads.read_to_end(&mut at_server).await.map(drop) },
            async { client_reads.read_to_end(&mut at_client).await.map(drop) },
        )
    };
    soon("bulk both ways", all).await.unwrap();
    assert!(at_server == up && at_client == down, "{} up, {} down", at_server.len(), at_client.len());
    println!("guest: bulk {} bytes each way", BULK);
}

async fn an_answer_after_the_end(target: &TcpListener) {
    let (mut client, mut server) = tunnel(target).await;
    client.write_all(b"question").await.unwrap();
    client.shutdown().await.unwrap();
    let mut question = Vec::new();
    soon("the question", server.read_to_end(&mut question)).await.unwrap();
    let sent = pattern(3);
    let mut answer = Vec::new();
    let both = async {
        tokio::try_join!(
            // Dropped when written: the end of the answer.
            async { server.write_all(&sent).await.map(|()| drop(server)) },
            async { client.read_to_end(&mut answer).await.map(drop) },
        )
    };
    soon("the answer", both).await.unwrap();
    assert!(question == b"question" && answer == sent, "{} bytes of the answer", answer.len());
    println!("guest: half-close kept the answer");
}

/// New kernels reset a vsock connection whose reader is slow when too many small packets wait.
async fn a_flood_to_a_slow_reader(target: &TcpListener) {
    let (mut client, mut server) = tunnel(target).await;
    // Each message is a packet of its own where nobody collects them.
    let mut tick = tokio::time::interval(Duration::from_millis(1));
    let flood = async {
        for _ in 0..FLOOD {
            tick.tick().await;
            server.write_all(&[7; MESSAGE]).await.unwrap();
        }
    };
    soon("the flood", flood).await;
    drop(server);
    let mut got = Vec::new();
    soon("the flood's arrival", client.read_to_end(&mut got)).await.unwrap();
    assert!(got.len() == FLOOD * MESSAGE && got.iter().all(|byte| *byte == 7), "{} bytes", got.len());
    println!("guest: flood of {FLOOD} messages arrived");
}

/// A target that resets: the client must not take the cut for an end. Vsock has no reset for a connection that is open,
/// only an end; what tells them apart there is that the proxy closes both directions at once.
async fn a_killed_target(target: &TcpListener) {
    let (mut client, mut server) = tunnel(target).await;
    server.write_all(b"half").await.unwrap();
    soon("half", client.read_exact(&mut [0; 4])).await.unwrap();
    server.set_zero_linger().unwrap();
    drop(server);
    let seen = soon("the cut", async {
        loop {
            match client.write(&[0; 1024]).await {
                Ok(_) => tokio::task::yield_now().await,
                Err(error) => return error.kind(),
            }
        }
    });
    println!("guest: reset seen as {:?}", seen.await);
}

async fn refusals() {
    for (port, target, expected) in [
        (3128, "CONNECT 127.0.0.1:7001 HTTP/1.1", "403"),
        (3128, "CONNECT 169.254.169.254:80 HTTP/1.1", "403"),
        (3128, "GET http://127.0.0.1:7000/ HTTP/1.1", "405"),
        // For another enclave: the rule's context id, then the listener's.
        (3128, "CONNECT 127.0.0.1:7002 HTTP/1.1", "403"),
        (3129, "", "403"),
    ] {
        let mut stream = connect(port).await.unwrap();
        // The proxy may have closed already, where it refuses the peer and not the request.
        let _sent = stream.write_all(format!("{target}\r\n\r\n").as_bytes()).await;
        let mut answer = String::new();
        soon("a refusal", stream.read_to_string(&mut answer)).await.unwrap();
        assert_eq!(answer.split(' ').nth(1), Some(expected), "{target}: {answer}");
    }
    println!("guest: refusals as expected");
}

/// The configuration allows four connections of one context id. Gives the ones that are open.
async fn limits(target: &TcpListener) -> Vec<(Tunnel, TcpStream)> {
    let mut open = Vec::new();
    for _ in 0..4 {
        open.push(tunnel(target).await);
    }
    let mut fifth = connect(3128).await.unwrap();
    let mut answer = String::new();
    soon("the limit's answer", fifth.read_to_string(&mut answer)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("limit-cid"), "{answer}");
    // Those that are in are not disturbed, and a place that is free again is taken.
    let (client, server) = &mut open[3];
    client.write_all(b"x").await.unwrap();
    soon("a byte", server.read_exact(&mut [0])).await.unwrap();
    open.pop();
    let fourth = soon("a free place", async {
        loop {
            let stream = connect(3128).await.unwrap();
            if let Ok(client) = open_tunnel(stream).await {
                return client;
            }
        }
    })
    .await;
    let (server, _) = soon("the target's connection", target.accept()).await.unwrap();
    open.push((fourth, server));
    println!("guest: limit of one context id holds");
    open
}

type Tunnel = Prefixed<Stream>;

/// A tunnel through the proxy to `target`, both ends.
async fn tunnel(target: &TcpListener) -> (Tunnel, TcpStream) {
    let stream = connect(3128).await.unwrap();
    let client = open_tunnel(stream).await.unwrap();
    let (server, _) = soon("the target's connection", target.accept()).await.unwrap();
    (client, server)
}

async fn open_tunnel(stream: Stream) -> Result<Tunnel, transport::connect::Error> {
    let target = ConnectTarget::new("127.0.0.1".parse().unwrap(), 7000);
    connect_through(stream, &target, PATIENCE).await
}

/// Over the loopback of vsock: this machine is CID 1 to itself.
async fn connect(port: u32) -> Result<Stream, transport::Error> {
    let proxy: Endpoint = format!("vsock:1:{port}").parse().unwrap();
    proxy.connect(PATIENCE).await
}

fn pattern(seed: usize) -> Vec<u8> {
    (0..BULK).map(|at| u8::try_from((at * seed + at / 251) % 256).unwrap()).collect()
}

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    let waited = tokio::time::timeout(PATIENCE, future).await;
    waited.unwrap_or_else(|_| panic!("{what}: nothing happened in {PATIENCE:?}"))
}

/// `ip link set lo up`, as one netlink message (rtnetlink(7)).
fn raise_loopback() -> io::Result<()> {
    const NEW_LINK: u16 = 16;
    const REQUEST_AND_ACKNOWLEDGE: u16 = 1 | 4;
    const UP: u32 = 1;
    const LOOPBACK: u32 = 1;
    let mut message = Vec::new();
    message.extend(32u32.to_ne_bytes());
    message.extend(NEW_LINK.to_ne_bytes());
    message.extend(REQUEST_AND_ACKNOWLEDGE.to_ne_bytes());
    message.extend([0; 8]);
    message.extend([0; 4]);
    message.extend(LOOPBACK.to_ne_bytes());
    message.extend(UP.to_ne_bytes());
    message.extend(UP.to_ne_bytes());
    let socket =
        rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
    rustix::net::sendto(&socket, &message, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
    let mut answer = [0; 64];
    let (len, _) = rustix::net::recv(&socket, &mut answer, RecvFlags::empty())?;
    // struct nlmsgerr: the error stands behind the header of 16 bytes.
    match answer[..len].get(16..20) {
        Some([0, 0, 0, 0]) => Ok(()),
        other => Err(io::Error::other(format!("the loopback stays down: {other:?}"))),
    }
}
