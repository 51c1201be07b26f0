//! The run of an enclave on a host, from its image to what it delivers.

use std::time::Duration;

use serde_json::Value;
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

use super::error::Error;
use super::host::{Host, HostLog, Step, failure, not_json, parsed, quoted};
use super::nitro::{Description, Enclave};
use super::setup::{MARK, NAME, replace};
use super::ssh::Output;
use super::upload::{Upload, upload};
use crate::patience::{Deadline, Pauses};

/// The first context id that is ours to choose; smaller ones have a meaning.
const FIRST_CID: u32 = 16;
/// Where the proxy puts what an enclave delivers.
const RESULTS: &str = "/var/lib/host-proxy";
/// Keys, certificates and evidence are a few kilobytes.
const MAX_RESULT: usize = 1 << 20;
/// What nitro-cli says of an enclave that it started.
const MAX_STARTED: usize = 1 << 20;
/// A console shows at most this much.
const MAX_CONSOLE: usize = 4 << 20;
/// How long an enclave in debug mode is watched after the time it has for its boot.
const CONSOLE: Duration = Duration::from_secs(60);
/// Lines of the proxy's log that are kept.
const LOG_LINES: u32 = 1000;

/// An enclave that is to run.
#[derive(Clone, Debug)]
pub struct Launch {
    /// Its image.
    pub image: Upload,
    /// PCR0, PCR1 and PCR2 of the image as computed here, in hex.
    pub pcrs: [String; 3],
    /// Its name, see [`enclave_name`].
    pub name: String,
    /// Processors.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// What its proxy opens: `HOST:PORT`.
    pub opens: Vec<String>,
    /// In debug mode, where PCRs are zero, so that no KMS gives keys, and the parent can look inside.
    pub debug: bool,
}

/// The name of the enclaves of one app on one host: whoever has this name was started for it. `app` tells the projects of
/// a host apart.
#[must_use]
pub fn enclave_name(app: &str) -> String {
    format!("{NAME}{}", hex::encode(&Sha256::digest(app.as_bytes())[..8]))
}

/// What became of a run.
pub struct Ran {
    /// What the enclave delivered; nothing in debug mode.
    pub result: Option<Zeroizing<Vec<u8>>>,
    /// Its console; only in debug mode there is one.
    pub console: Option<String>,
}

/// What a run tells on its way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Told {
    /// The image is on the host, and measures there as it does here.
    Measured,
    /// An enclave of somebody else runs there.
    Other(String),
    /// The enclave booted: nitro-cli had its heartbeat.
    Booted(String),
    /// The result is here.
    Delivered(usize),
}

/// Runs an enclave: sends its image, compares what the host measures, starts it behind its proxy, and waits for what it
/// delivers. The enclave is ended and its result removed from the host whatever happens; a run that was cut is cleaned up
/// by the next [`setup`](super::setup).
///
/// # Errors
///
/// When a step fails, the host measures another image, or nothing is delivered in time.
pub async fn run(
    host: &mut Host,
    launch: &Launch,
    tell: &mut (dyn FnMut(&Told) + Send),
) -> Result<Ran, Error> {
    let image = upload(host, &launch.image).await?;
    measure(host, &image, launch).await?;
    tell(&Told::Measured);
    let others = host.enclaves().await?;
    for other in &others {
        tell(&Told::Other(other.enclave_id.clone()));
    }
    let cid = free_cid(&others);
    let result = format!("{RESULTS}/{}", launch.name);
    start_proxy(host, launch, cid, &result).await?;
    let (enclave, console) = start(host, launch, &image, cid).await?;
    tell(&Told::Booted(enclave.enclave_id.clone()));
    let ran = match console {
        Some(console) => Ok(Ran { result: None, console: Some(console) }),
        None => watch(host, launch, &enclave, &result, tell).await,
    };
    // What failed first is told; what is left is found by its name the next time.
    let ended = host.end_enclave(&enclave.enclave_id).await;
    let removed = host.run(host.step("remove the result", format!("rm -f {result}"))).await;
    let ran = ran?;
    ended?;
    removed?;
    Ok(ran)
}

/// Compares what the host measures with what was computed here.
async fn measure(host: &mut Host, image: &str, launch: &Launch) -> Result<(), Error> {
    let name = "measure the image on the host";
    let mut step = host.step(name, format!("nitro-cli describe-eif --eif-path {}", quoted(image)));
    step.deadline += Duration::from_secs(launch.image.len >> 22);
    let answer = host.run(step).await?;
    let described: Description = parsed(name, &answer)?;
    if described.check_crc == Some(false) {
        let problem = "the image's checksum is wrong".to_owned();
        return Err(Error::Answer { step: name.into(), problem });
    }
    compare(&described.measurements, launch)
}

fn compare(measurements: &Value, launch: &Launch) -> Result<(), Error> {
    for (register, expected) in ["PCR0", "PCR1", "PCR2"].into_iter().zip(&launch.pcrs) {
        let actual = measurements.get(register).and_then(Value::as_str).unwrap_or("absent");
        if !actual.eq_ignore_ascii_case(expected) {
            let (actual, expected) = (super::host::shown(actual), expected.clone());
            return Err(Error::Measurement { register, actual, expected });
        }
    }
    Ok(())
}

fn free_cid(others: &[Enclave]) -> u32 {
    let taken = |cid: &u32| others.iter().any(|it| it.enclave_cid == *cid);
    (FIRST_CID..u32::MAX).find(|cid| !taken(cid)).unwrap_or(FIRST_CID)
}

/// The configuration of a run: this enclave alone may connect, to these targets alone, and deliver one kind of thing.
fn proxy_config(launch: &Launch, cid: u32, result: &str) -> String {
    let quote = |text: &String| format!("{text:?}");
    let opens = launch.opens.iter().map(quote).collect::<Vec<_>>().join(", ");
    format!(
        "{MARK}\n[[egress]]\nlisten = [\"vsock:any:3128\"]\ncids = [{cid}]\nallow = [{opens}]\n\n\
         [[receive]]\nname = \"keys\"\nlisten = \"vsock:any:9999\"\npath = \"{result}\"\nmax_bytes = {MAX_RESULT}\n\
         cids = [{cid}]\n"
    )
}

async fn start_proxy(host: &mut Host, launch: &Launch, cid: u32, result: &str) -> Result<(), Error> {
    let config = replace("/etc/host-proxy.toml", &proxy_config(launch, cid, result));
    // The unit is ready when it listens. A result of an earlier run must not pass for one of this.
    let script = format!("{config}; rm -f {result}; systemctl restart host-proxy.service");
    host.run(host.step("start the proxy", script)).await.map(drop)
}

/// Starts it. In debug mode also watches its console, from the start on: one that ends at once takes its console along.
async fn start(
    host: &mut Host,
    launch: &Launch,
    image: &str,
    cid: u32,
) -> Result<(Enclave, Option<String>), Error> {
    let Launch { name: enclave_name, cpus, memory_mib, debug, .. } = launch;
    let mut script = format!(
        "nitro-cli run-enclave --cpu-count {cpus} --memory {memory_mib} --eif-path {} --enclave-cid {cid} \
         --enclave-name {enclave_name}",
        quoted(image)
    );
    let boot = host.patience().boot;
    let (mut deadline, mut limit) = (boot, MAX_STARTED);
    if *debug {
        // 124: the time is over.
        script = format!(
            "timeout {} {script} --debug-mode --attach-console || [ $? -eq 124 ]",
            (boot + CONSOLE).as_secs()
        );
        (deadline, limit) = (boot + CONSOLE + host.patience().step, MAX_STARTED + MAX_CONSOLE);
    }
    let name = "start the enclave";
    let output = host.attempt(Step { deadline, limit, ..host.step(name, script) }).await?;
    let (enclave, rest) = started(name, &output)?;
    Ok((enclave, debug.then(|| String::from_utf8_lossy(rest).into_owned())))
}

/// What nitro-cli says of an enclave that it started, and what followed on its console.
fn started<'a>(step: &str, output: &'a Output) -> Result<(Enclave, &'a [u8]), Error> {
    let mut answers = serde_json::Deserializer::from_slice(&output.stdout).into_iter::<Enclave>();
    // The end of a console is a failure for nitro-cli: the connection to it is gone.
    match answers.next() {
        Some(Ok(enclave)) => Ok((enclave, output.stdout.get(answers.byte_offset()..).unwrap_or_default())),
        _ if output.status != 0 => Err(failure(step, output)),
        Some(Err(error)) => Err(not_json(step, error)),
        None => Err(not_json(step, "it is empty")),
    }
}

async fn watch(
    host: &mut Host,
    launch: &Launch,
    enclave: &Enclave,
    result: &str,
    tell: &mut (dyn FnMut(&Told) + Send),
) -> Result<Ran, Error> {
    let id = &enclave.enclave_id;
    // One that has done its work may be gone by now.
    if let Some(listed) = host.enclaves().await?.iter().find(|it| it.enclave_id == *id) {
        check(listed, launch)?;
    }
    wait(host, id, result).await?;
    let step = Step { limit: MAX_RESULT, ..host.step("fetch the result", format!("cat {result}")) };
    let delivered = host.run(step).await?;
    tell(&Told::Delivered(delivered.len()));
    Ok(Ran { result: Some(delivered), console: None })
}

/// Whether an enclave runs as one does that is to get keys.
fn check(listed: &Enclave, launch: &Launch) -> Result<(), Error> {
    let expected = "NONE";
    match listed.flags.as_deref() {
        Some(actual) if actual == expected => {}
        actual => {
            let actual = super::host::shown(actual.unwrap_or("without flags"));
            return Err(Error::EnclaveState { actual, expected });
        }
    }
    match &listed.measurements {
        Some(measurements) => compare(measurements, launch),
        None => Ok(()),
    }
}

/// Waits until there is a result. An enclave that has ended gets one more look: its last word may be under way.
async fn wait(host: &mut Host, id: &str, result: &str) -> Result<(), Error> {
    let waited = host.patience().result;
    let deadline = Deadline::within(waited);
    let mut pauses = Pauses::new(Duration::from_millis(200), Duration::from_secs(2));
    let mut gone = false;
    loop {
        let script = format!("[ -s {result} ] && echo here || nitro-cli describe-enclaves");
        let name = "wait for the result";
        let answer = host.run(host.step(name, script)).await?;
        if answer.starts_with(b"here") {
            return Ok(());
        }
        if gone {
            return Err(Error::NoResult { log: proxy_log(host).await });
        }
        let running: Vec<Enclave> = parsed(name, &answer)?;
        gone = !running.iter().any(|it| it.enclave_id == id);
        if deadline.passed() {
            return Err(Error::NoResultInTime { waited, log: proxy_log(host).await });
        }
        pauses.pause(deadline).await;
    }
}

/// The proxy's log, for a message; a host that does not even give that has failed otherwise already.
async fn proxy_log(host: &mut Host) -> String {
    host.log(HostLog::Proxy, LOG_LINES).await.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch() -> Launch {
        Launch {
            image: Upload { path: "a.eif".into(), sha256: "00".into(), len: 1, what: "image" },
            pcrs: ["aa", "bb", "cc"].map(str::to_owned),
            name: enclave_name("app"),
            cpus: 2,
            memory_mib: 512,
            opens: vec!["kms.example.com:12001".into()],
            debug: false,
        }
    }

    fn enclave(id: &str, cid: u32, flags: &str, pcr0: &str) -> Enclave {
        let measurements = serde_json::json!({"PCR0": pcr0, "PCR1": "bb", "PCR2": "CC"});
        Enclave {
            enclave_name: None,
            enclave_id: id.into(),
            enclave_cid: cid,
            cpus: 2,
            memory_mib: 512,
            state: Some("RUNNING".into()),
            flags: Some(flags.into()),
            measurements: Some(measurements),
        }
    }

    #[test]
    fn only_this_enclave_reaches_only_the_kms() {
        let expected = "# Written by keyferry.\n[[egress]]\nlisten = [\"vsock:any:3128\"]\ncids = [17]\n\
                        allow = [\"kms.example.com:12001\"]\n\n[[receive]]\nname = \"keys\"\n\
                        listen = \"vsock:any:9999\"\npath = \"/var/lib/host-proxy/x\"\nmax_bytes = 1048576\n\
                        cids = [17]\n";
        assert_eq!(proxy_config(&launch(), 17, "/var/lib/host-proxy/x"), expected);
    }

    #[test]
    fn a_context_id_is_free() {
        let others = [enclave("a", 16, "NONE", "aa"), enclave("b", 18, "NONE", "aa")];
        assert_eq!([&others[..0], &others[..1], &others[1..], &others].map(free_cid), [16, 17, 16, 17]);
    }

    #[test]
    fn an_enclave_that_is_not_what_was_started_is_refused() {
        assert!(check(&enclave("a", 16, "NONE", "aa"), &launch()).is_ok());
        let debug = check(&enclave("a", 16, "DEBUG_MODE", "aa"), &launch()).unwrap_err();
        assert_eq!(debug.to_string(), "the enclave is DEBUG_MODE, expected NONE");
        let other = check(&enclave("a", 16, "NONE", "ab"), &launch()).unwrap_err();
        assert_eq!(other.to_string(), "PCR0 of the image is ab on the host, expected aa");
    }

    #[test]
    fn a_console_follows_what_nitro_cli_says() {
        let id =
            r#"{"EnclaveName":"x","EnclaveID":"i-1-enc1","EnclaveCID":16,"NumberOfCPUs":2,"MemoryMiB":512}"#;
        let output = |stdout: &str, status| Output {
            stdout: stdout.as_bytes().to_vec().into(),
            stderr: String::new(),
            status,
        };
        for console in ["", "\n[0.0] Linux {\n", "\n\u{fffd}"] {
            for status in [0, 39] {
                let output = output(&format!("{id}{console}"), status);
                let (enclave, rest) = started("start", &output).unwrap();
                assert_eq!((&*enclave.enclave_id, rest), ("i-1-enc1", console.as_bytes()));
            }
        }
        for (stdout, status, expected) in [
            ("", 0, "start: not the JSON that is expected: it is empty"),
            ("", 22, "start: exit code 22: "),
            (&id[..40], 39, "start: exit code 39: "),
        ] {
            let error = started("start", &output(stdout, status)).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
    }

    #[test]
    fn enclaves_of_two_apps_have_two_names() {
        assert_eq!(enclave_name("app"), enclave_name("app"));
        assert_ne!(enclave_name("app"), enclave_name("another app"));
    }
}
