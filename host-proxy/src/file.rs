//! The configuration file. Every key is documented in `host-proxy.example.toml`, which a test reads.

use std::collections::BTreeSet;
use std::fs;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use transport::Endpoint;

use crate::config::{Config, Egress, Format, Forward, Kind, Receive, Service};
use crate::error::Error;
use crate::limits::{Limits, TunnelLimits};
use crate::policy::rule::Rule;
use crate::policy::{Entry, RuleSet};
use crate::resolve::CacheTimes;

/// Largest configuration file.
const MAX_FILE: u64 = 1 << 20;

/// Reads and validates a configuration file.
///
/// # Errors
/// [`Error::Read`], [`Error::Syntax`], and what is wrong with its values.
pub fn read(path: &Path) -> Result<Config, Error> {
    let failed = |source| Error::Read { path: path.to_owned(), source };
    let size = fs::metadata(path).map_err(failed)?.len();
    if size > MAX_FILE {
        return Err(Error::Syntax {
            path: path.to_owned(),
            message: format!("{size} bytes; expected at most {MAX_FILE}"),
        });
    }
    parse(&fs::read_to_string(path).map_err(failed)?, path)
}

/// Reads a configuration from text; `path` is for messages.
///
/// # Errors
/// As [`read`].
pub fn parse(text: &str, path: &Path) -> Result<Config, Error> {
    let file: File = toml::from_str(text)
        .map_err(|error| Error::Syntax { path: path.to_owned(), message: error.to_string() })?;
    file.validate()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    limits: FileLimits,
    #[serde(default)]
    dns: FileDns,
    #[serde(default)]
    admin: FileAdmin,
    #[serde(default = "default_mode")]
    unix_socket_mode: String,
    #[serde(default = "default_grace")]
    grace_seconds: u64,
    #[serde(default)]
    egress: Vec<FileEgress>,
    #[serde(default)]
    forward: Vec<FileForward>,
    #[serde(default)]
    receive: Vec<FileReceive>,
    #[serde(default)]
    heartbeat: Vec<FileHeartbeat>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileLimits {
    max_connections: Option<u32>,
    max_connections_per_cid: Option<u32>,
    // The keys of FileTunnel; serde cannot both flatten and refuse unknown keys.
    head_seconds: Option<u64>,
    max_head_bytes: Option<usize>,
    connect_seconds: Option<u64>,
    idle_seconds: Option<u64>,
    total_seconds: Option<u64>,
    bytes_per_second: Option<u64>,
    splice: Option<bool>,
}

impl FileLimits {
    fn split(self) -> (Limits, FileTunnel) {
        let Self {
            max_connections,
            max_connections_per_cid,
            head_seconds,
            max_head_bytes,
            connect_seconds,
            idle_seconds,
            total_seconds,
            bytes_per_second,
            splice,
        } = self;
        let defaults = Limits::default();
        let limits = Limits {
            max_connections: max_connections.unwrap_or(defaults.max_connections),
            max_connections_per_cid: max_connections_per_cid.unwrap_or(defaults.max_connections_per_cid),
        };
        let tunnel = FileTunnel {
            head_seconds,
            max_head_bytes,
            connect_seconds,
            idle_seconds,
            total_seconds,
            bytes_per_second,
            splice,
        };
        (limits, tunnel)
    }
}

/// Bounds of tunnels; what a service leaves out comes from `[limits]`.
#[derive(Clone, Copy, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileTunnel {
    head_seconds: Option<u64>,
    max_head_bytes: Option<usize>,
    connect_seconds: Option<u64>,
    idle_seconds: Option<u64>,
    total_seconds: Option<u64>,
    bytes_per_second: Option<u64>,
    splice: Option<bool>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileDns {
    min_ttl_seconds: Option<u64>,
    max_ttl_seconds: Option<u64>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileAdmin {
    listen: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileEgress {
    name: Option<String>,
    listen: Vec<String>,
    cids: Option<Vec<u32>>,
    #[serde(default)]
    allow: Vec<String>,
    #[serde(default)]
    check_sni: bool,
    #[serde(default)]
    plain_http: bool,
    #[serde(default)]
    rule: Vec<FileRule>,
    max_connections: Option<u32>,
    #[serde(default)]
    limits: FileTunnel,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileRule {
    name: Option<String>,
    allow: String,
    cids: Option<Vec<u32>>,
    check_sni: Option<bool>,
    max_connections: Option<u32>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileForward {
    name: Option<String>,
    listen: String,
    target: String,
    cids: Option<Vec<u32>>,
    #[serde(default)]
    allow: Vec<String>,
    #[serde(default)]
    proxy_protocol: bool,
    max_connections: Option<u32>,
    #[serde(default)]
    limits: FileTunnel,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileReceive {
    name: Option<String>,
    listen: String,
    path: PathBuf,
    cids: Option<Vec<u32>>,
    max_bytes: Option<u64>,
    #[serde(default)]
    format: FileFormat,
    max_connections: Option<u32>,
    #[serde(default)]
    limits: FileTunnel,
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum FileFormat {
    #[default]
    Framed,
    Unframed,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileHeartbeat {
    name: Option<String>,
    listen: String,
    cids: Option<Vec<u32>>,
    max_connections: Option<u32>,
}

fn default_mode() -> String {
    "0600".to_owned()
}

fn default_grace() -> u64 {
    30
}

/// Largest message of a receiver that names no other.
const DEFAULT_MESSAGE: u64 = 1 << 20;
/// Most that a receiver may be told to take: it is held in memory until it is whole.
const MAX_MESSAGE: u64 = 64 << 20;
/// Senders at once; there is one enclave to deliver, and perhaps an old connection of it.
const RECEIVE_CONNECTIONS: u32 = 4;

impl File {
    fn validate(self) -> Result<Config, Error> {
        let Self { limits, dns, admin, unix_socket_mode, grace_seconds, egress, forward, receive, heartbeat } =
            self;
        let (limits, tunnel) = limits.split();
        positive("limits", "max_connections", limits.max_connections.into())?;
        positive("limits", "max_connections_per_cid", limits.max_connections_per_cid.into())?;
        let tunnel = bounds("limits", tunnel, TunnelLimits::default())?;
        let mut services = Vec::new();
        for (at, egress) in egress.into_iter().enumerate() {
            egress_services(egress, at, &tunnel, &mut services)?;
        }
        for (at, forward) in forward.into_iter().enumerate() {
            services.push(forward_service(forward, at, &tunnel)?);
        }
        for (at, receive) in receive.into_iter().enumerate() {
            services.push(receive_service(receive, at, &tunnel)?);
        }
        for (at, FileHeartbeat { name, listen, cids, max_connections }) in heartbeat.into_iter().enumerate() {
            let name = named(name, "heartbeat", at);
            let listen = endpoint(&name, &listen)?;
            let tunnel = TunnelLimits { max_connections, ..tunnel };
            services.push(Service { name, listen, cids, tunnel, kind: Kind::Heartbeat });
        }
        let admin = admin.listen.map(|listen| endpoint("admin", &listen)).transpose()?;
        let config = Config {
            limits,
            cache: cache_times(&dns)?,
            admin,
            unix_mode: parse_mode(&unix_socket_mode)?,
            grace: Duration::from_secs(grace_seconds),
            services,
        };
        config.check()?;
        Ok(config)
    }
}

fn egress_services(
    file: FileEgress,
    at: usize,
    defaults: &TunnelLimits,
    services: &mut Vec<Service>,
) -> Result<(), Error> {
    let FileEgress { name, listen, cids, allow, check_sni, plain_http, rule, max_connections, limits } = file;
    let name = named(name, "egress", at);
    let mut entries = Vec::new();
    for text in allow {
        entries.push(Entry { check_sni, ..Entry::new(parse_rule(&name, &text)?) });
    }
    for FileRule { name: rule_name, allow, cids, check_sni: own, max_connections } in rule {
        let entry = Entry::new(parse_rule(&name, &allow)?);
        entries.push(Entry {
            name: rule_name.map_or(entry.name, Arc::from),
            rule: entry.rule,
            cids,
            check_sni: own.unwrap_or(check_sni),
            max_connections,
        });
    }
    unique_names(&name, &entries)?;
    if listen.is_empty() {
        return Err(wrong(&name, "listen is empty; expected addresses such as vsock:any:3128"));
    }
    let tunnel = TunnelLimits { max_connections, ..bounds(&name, limits, *defaults)? };
    let rules = Arc::new(RuleSet::new(entries));
    for text in listen {
        let kind = Kind::Egress(Egress { rules: Arc::clone(&rules), plain_http });
        let listen = endpoint(&name, &text)?;
        services.push(Service { name: Arc::clone(&name), listen, cids: cids.clone(), tunnel, kind });
    }
    Ok(())
}

fn forward_service(file: FileForward, at: usize, defaults: &TunnelLimits) -> Result<Service, Error> {
    let FileForward { name, listen, target, cids, allow, proxy_protocol, max_connections, limits } = file;
    let name = named(name, "forward", at);
    let entries = allow.iter().map(|text| Ok(Entry::new(parse_rule(&name, text)?)));
    let rules = Arc::new(RuleSet::new(entries.collect::<Result<_, Error>>()?));
    let target = endpoint(&name, &target)?;
    let tunnel = TunnelLimits { max_connections, ..bounds(&name, limits, *defaults)? };
    let listen = endpoint(&name, &listen)?;
    Ok(Service { name, listen, cids, tunnel, kind: Kind::Forward(Forward { target, rules, proxy_protocol }) })
}

fn receive_service(file: FileReceive, at: usize, defaults: &TunnelLimits) -> Result<Service, Error> {
    let FileReceive { name, listen, path, cids, max_bytes, format, max_connections, limits } = file;
    let name = named(name, "receive", at);
    let max_bytes = max_bytes.unwrap_or(DEFAULT_MESSAGE);
    if max_bytes == 0 || max_bytes > MAX_MESSAGE {
        return Err(wrong(&name, format!("max_bytes is {max_bytes}; expected 1 to {MAX_MESSAGE}")));
    }
    if path.file_name().is_none() {
        return Err(wrong(&name, format!("path {} is not a file", path.display())));
    }
    let max_connections = Some(max_connections.unwrap_or(RECEIVE_CONNECTIONS));
    let tunnel = TunnelLimits { max_connections, ..bounds(&name, limits, *defaults)? };
    let format = match format {
        FileFormat::Framed => Format::Framed,
        FileFormat::Unframed => Format::Unframed,
    };
    let listen = endpoint(&name, &listen)?;
    Ok(Service { name, listen, cids, tunnel, kind: Kind::Receive(Receive { path, max_bytes, format }) })
}

fn bounds(service: &str, file: FileTunnel, defaults: TunnelLimits) -> Result<TunnelLimits, Error> {
    let FileTunnel {
        head_seconds,
        max_head_bytes,
        connect_seconds,
        idle_seconds,
        total_seconds,
        bytes_per_second,
        splice,
    } = file;
    let seconds = |key: &str, value: Option<u64>, default: Duration| match value {
        Some(value) => positive(service, key, value).map(|()| Duration::from_secs(value)),
        None => Ok(default),
    };
    let max_head_bytes = max_head_bytes.unwrap_or(defaults.max_head_bytes);
    if !(256..=64 << 10).contains(&max_head_bytes) {
        return Err(wrong(service, format!("max_head_bytes is {max_head_bytes}; expected 256 to 65536")));
    }
    Ok(TunnelLimits {
        head: seconds("head_seconds", head_seconds, defaults.head)?,
        max_head_bytes,
        connect: seconds("connect_seconds", connect_seconds, defaults.connect)?,
        idle: seconds("idle_seconds", idle_seconds, defaults.idle)?,
        // Zero takes a bound of [limits] away again.
        total: total_seconds
            .map_or(defaults.total, |value| NonZeroU64::new(value).map(|v| Duration::from_secs(v.get()))),
        bytes_per_second: bytes_per_second.map_or(defaults.bytes_per_second, NonZeroU64::new),
        max_connections: defaults.max_connections,
        splice: splice.unwrap_or(defaults.splice),
    })
}

fn cache_times(file: &FileDns) -> Result<CacheTimes, Error> {
    let defaults = CacheTimes::default();
    let min = file.min_ttl_seconds.map_or(defaults.min, Duration::from_secs);
    let max = file.max_ttl_seconds.map_or(defaults.max, Duration::from_secs);
    if min > max {
        return Err(wrong(
            "dns",
            format!("min_ttl_seconds {} is above max_ttl_seconds {}", min.as_secs(), max.as_secs()),
        ));
    }
    Ok(CacheTimes { min, max })
}

fn parse_mode(text: &str) -> Result<u32, Error> {
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o777);
    mode.ok_or_else(|| {
        wrong("unix_socket_mode", format!("{text:?}; expected an octal mode such as \"0660\""))
    })
}

fn unique_names(service: &str, entries: &[Entry]) -> Result<(), Error> {
    let mut seen = BTreeSet::new();
    match entries.iter().find(|entry| entry.max_connections.is_some() && !seen.insert(&entry.name)) {
        Some(entry) => Err(wrong(service, format!("two limited rules are named {}", entry.name))),
        None => Ok(()),
    }
}

fn named(name: Option<String>, kind: &str, at: usize) -> Arc<str> {
    match (name, at) {
        (Some(name), _) => name.into(),
        (None, 0) => kind.into(),
        (None, at) => format!("{kind}-{}", at + 1).into(),
    }
}

fn parse_rule(service: &str, text: &str) -> Result<Rule, Error> {
    text.parse().map_err(|source| Error::Rule { service: service.to_owned(), source })
}

fn endpoint(service: &str, text: &str) -> Result<Endpoint, Error> {
    text.parse().map_err(|source| Error::Endpoint { service: service.to_owned(), source })
}

fn positive(service: &str, key: &str, value: u64) -> Result<(), Error> {
    if value == 0 { Err(wrong(service, format!("{key} is 0; expected at least 1"))) } else { Ok(()) }
}

fn wrong(service: &str, message: impl Into<String>) -> Error {
    Error::Value { service: service.to_owned(), message: message.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(text: &str) -> Result<Config, String> {
        parse(text, Path::new("test.toml")).map_err(|error| {
            let source = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            format!("{error}: {source}")
        })
    }

    #[test]
    fn the_example_is_valid_and_shows_the_defaults() {
        let config = read_text(include_str!("../host-proxy.example.toml")).unwrap();
        assert_eq!(config.limits, Limits::default());
        assert_eq!(config.cache, CacheTimes::default());
        let egress = &config.services[0];
        assert_eq!(
            egress.tunnel,
            TunnelLimits { max_connections: egress.tunnel.max_connections, ..TunnelLimits::default() }
        );
    }

    #[test]
    fn wrong_files_say_what_is_wrong() {
        let egress = |line: &str| format!("[[egress]]\nlisten = [\"vsock:any:3128\"]\n{line}\n");
        for (text, expected) in [
            (String::new(), "nothing to listen on"),
            ("[[egress]]\n".to_owned(), "missing field `listen`"),
            (egress("alow = []"), "unknown field `alow`"),
            (egress("allow = [\"*:443\"]"), "no allow-list"),
            (egress("limits = { idle_seconds = 0 }"), "idle_seconds is 0"),
            (egress("limits = { idle_second = 5 }"), "unknown field `idle_second`"),
            (egress("limits = { max_head_bytes = 5 }"), "expected 256 to 65536"),
            (format!("{}{}", egress(""), egress("")), "is listened on by egress and by egress-2"),
            ("[[egress]]\nlisten = [\"3128\"]\n".to_owned(), "is not vsock:CID:PORT"),
            (egress("[dns]\nmin_ttl_seconds = 400"), "is above max_ttl_seconds"),
            (format!("unix_socket_mode = \"rw\"\n{}", egress("")), "expected an octal mode"),
            ("[[receive]]\nlisten=\"vsock:any:9999\"\npath=\"/\"".to_owned(), "is not a file"),
            ("[[receive]]\nlisten=\"vsock:any:9999\"\npath=\"/a\"\nmax_bytes=0".to_owned(), "max_bytes is 0"),
        ] {
            let error = read_text(&text).map_or_else(|error| error, |_| "accepted".to_owned());
            assert!(error.contains(expected), "{text}\n{error}");
        }
    }
}
