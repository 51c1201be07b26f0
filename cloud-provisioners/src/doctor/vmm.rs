//! The VMM: its configuration, its API, its guest image, its ports.

use std::net::SocketAddr;
use std::path::Path;

use super::host::{Host, Process};
use super::settings::VmmSettings;
use super::{Finding, Intended, is_loopback};
use crate::project::check_guest_image;
use crate::vmm::Client;

/// Whether its API answers.
pub(super) async fn answers(client: &Client) -> Vec<Finding> {
    vec![match client.version().await {
        Ok(version) => Finding::pass("vmm", format!("{} answers, version {version}", client.address())),
        Err(error) => {
            let remedy = error.hint().unwrap_or_else(|| "systemctl status dstack-vmm".to_owned());
            Finding::fail("vmm", error.to_string(), "machines are made through this API", remedy)
        }
    }]
}

/// What the configuration says.
pub(super) fn configuration(host: &Host, settings: &VmmSettings) -> Vec<Finding> {
    vec![authentication(settings), networking(settings), mappings(settings), contexts(host, settings)]
}

fn authentication(settings: &VmmSettings) -> Finding {
    match settings.listens_at() {
        Some(address) if !is_loopback(address) && !settings.auth.enabled => Finding::fail(
            "vmm-auth",
            format!("listens at {address} without authentication"),
            "whoever reaches it makes, stops and deletes machines",
            "set [auth] enabled = true with a token, or bind it to 127.0.0.1",
        ),
        Some(address) => Finding::pass("vmm-auth", format!("listens at {address}")),
        None => Finding::pass("vmm-auth", "listens at a socket of the file system"),
    }
}

fn networking(settings: &VmmSettings) -> Finding {
    match settings.cvm.networking.mode.as_str() {
        "user" => Finding::pass("network", "mode user"),
        mode => Finding::warn(
            "network",
            format!("mode {mode}"),
            "early in its boot a guest on a bridge has no route to the PCCS: `Network is unreachable`, and it starts again",
            "set [cvm.networking] mode = \"user\"",
        ),
    }
}

fn mappings(settings: &VmmSettings) -> Finding {
    match settings.cvm.port_mapping.enabled {
        true => Finding::pass("port-mapping", "allowed"),
        false => Finding::fail(
            "port-mapping",
            "[cvm.port_mapping] enabled is false",
            "the VMM refuses a machine whose ports are published",
            "set it to true with a range that has the KMS's port",
        ),
    }
}

/// Context ids: each guest needs one of its own on the whole host.
fn contexts(host: &Host, settings: &VmmSettings) -> Finding {
    let pool = settings.cids();
    let processes = host.processes();
    let clash = |finding: String| {
        Finding::fail(
            "cid",
            finding,
            "a guest gets an id that another one has: `vhost-vsock: unable to set guest cid: Address already in use`",
            "give each VMM of the host a range of its own: [cvm] cid_start and cid_pool_size",
        )
    };
    let run_path = settings.run_path.as_deref().and_then(Path::to_str).filter(|it| !it.is_empty());
    for process in processes.iter().filter(|it| it.name.starts_with("qemu")) {
        let Some(cid) = process.arguments.iter().find_map(|argument| guest_cid(argument)) else { continue };
        let ours =
            run_path.is_some_and(|path| process.arguments.iter().any(|argument| argument.contains(path)));
        if pool.contains(&cid) && !ours {
            return clash(format!(
                "a guest of somebody else has {cid}, within {} to {}",
                pool.start,
                pool.end - 1
            ));
        }
    }
    let others = processes.iter().filter(|it| it.name == "dstack-vmm").filter_map(configuration_of);
    let others =
        others.filter_map(|path| VmmSettings::read(host, Path::new(&path)).ok().map(|it| (path, it)));
    for (path, other) in others.filter(|(_, other)| other.run_path != settings.run_path) {
        let range = other.cids();
        if range.start < pool.end && pool.start < range.end {
            return clash(format!("the VMM of {path} hands out {} to {} too", range.start, range.end - 1));
        }
    }
    Finding::pass("cid", format!("{} to {} are free of others", pool.start, pool.end.saturating_sub(1)))
}

fn guest_cid(argument: &str) -> Option<u32> {
    argument.split(',').find_map(|part| part.strip_prefix("guest-cid=")).and_then(|cid| cid.parse().ok())
}

fn configuration_of(process: &Process) -> Option<String> {
    let mut arguments = process.arguments.iter();
    arguments.find(|it| *it == "-c" || *it == "--config")?;
    arguments.next().cloned()
}

/// Whether the ports the KMS is published at are free.
pub(super) fn ports(host: &Host, intended: &Intended) -> Vec<Finding> {
    let listeners = host.listeners();
    let taken = |port: &u16| listeners.iter().find(|(_, taken)| taken == port);
    intended
        .ports
        .iter()
        .map(|port| match taken(port) {
            None => Finding::pass("port", format!("{port} is free")),
            Some((address, _)) => Finding::fail(
                "port",
                format!("{port} is taken at {}", SocketAddr::new(*address, *port)),
                "the machine is made, and nothing of it can be reached",
                format!("ss -ltnp 'sport = :{port}' says by whom; or choose another port of the host"),
            ),
        })
        .collect()
}

/// Whether the guest image is whole and the one that was released.
pub(super) async fn guest_image(host: &Host, settings: &VmmSettings, intended: &Intended) -> Finding {
    let Some(name) = intended.guest_image.clone() else {
        return Finding::skipped("guest-image", "no image was named, --image does");
    };
    let Some(directory) = settings.images() else {
        return Finding::skipped("guest-image", "the VMM's configuration does not say where images are");
    };
    let directory = host.path(directory).join(&name);
    let wanted = intended.guest_digest.clone();
    let hashed = tokio::task::spawn_blocking(move || check_image(&directory, &name, wanted.as_deref())).await;
    hashed.unwrap_or_else(|error| Finding::skipped("guest-image", error.to_string()))
}

fn check_image(directory: &Path, name: &str, wanted: Option<&str>) -> Finding {
    let fail = |finding: String, cause: &str| {
        let remedy = format!("fetch it again with `keyferry kms pull {name} --bare-metal --into DIR`");
        Finding::fail("guest-image", finding, cause, remedy)
    };
    match check_guest_image(directory, name) {
        Err(error) => fail(
            error.to_string(),
            "the VMM cannot start a guest from it, or the guest measures something that was not released",
        ),
        Ok(digest) => match wanted.map(|it| it.trim_start_matches("0x").to_lowercase()) {
            Some(wanted) if wanted != digest => fail(
                format!("digest of {name} is {digest}, expected {wanted}"),
                "this is not the image that was registered, so the KMS would be refused",
            ),
            _ => Finding::pass("guest-image", format!("{name}, digest {digest}")),
        },
    }
}
