//! What the KMS needs beside the VMM: Docker, a registry that has its image, an authoriser, a chain.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use reqwest::Url;
use serde_json::{Value, json};

use super::host::Host;
use super::net::{Certificates, Net, shown};
use super::{Finding, Intended};
use crate::project::{KeyProvider, Project};
use crate::registry::{self, ImageName};
use crate::vmm::{PortMapping, published};

const DOCKER: &str = "/var/run/docker.sock";

pub(super) async fn docker(host: &Host) -> Vec<Finding> {
    let socket: PathBuf = host.path(DOCKER);
    let client = reqwest::Client::builder().unix_socket(socket).timeout(Duration::from_secs(10)).build();
    let asked = match client {
        Ok(client) => client.get("http://docker/_ping").send().await,
        Err(error) => Err(error),
    };
    vec![match asked {
        Ok(answer) if answer.status().is_success() => Finding::pass("docker", "answers"),
        Ok(answer) => Finding::fail(
            "docker",
            format!("{DOCKER}: {}", answer.status()),
            "the daemon is there and not well",
            "journalctl -u docker",
        ),
        Err(error) => Finding::fail(
            "docker",
            format!("{DOCKER}: {}", command_line::chain(&error.without_url())),
            "the key provider and its AESM run in containers",
            "install Docker, start it, and add this user to the group docker",
        ),
    }]
}

/// Whether the registry has an image the compose names.
pub(super) async fn registry(image: &ImageName, net: &Net) -> Vec<Finding> {
    let name = image.to_string();
    vec![match registry::check(net.client(), image).await {
        Ok(()) if image.is_pinned() => Finding::pass("registry", format!("{name} is there")),
        Ok(()) => Finding::warn(
            "registry",
            format!("{name} is there, by a tag"),
            "a tag can be moved; only the compose's text is measured, so another program would pass for this one",
            "name the image by its digest, NAME@sha256:…",
        ),
        Err(error) => {
            let remedy = error.remedy();
            Finding::fail("registry", error.to_string(), "the guest pulls this image when it starts", remedy)
        }
    }]
}

/// Whether the project's compose suits a machine on this host.
pub(super) fn compose(intended: &Intended) -> Vec<Finding> {
    let Some(directory) = &intended.project else { return Vec::new() };
    let read = Project::open(directory).and_then(|project| {
        let app = project.app()?;
        let compose = project.compose(&app, None)?;
        let ports = published(&app)?;
        Ok((app, compose, ports))
    });
    let (app, compose, ports) = match read {
        Ok(read) => read,
        Err(error) => {
            let finding = error.to_string();
            let remedy = error.hint().unwrap_or_else(|| "mend the file that is named".to_owned());
            return vec![Finding::fail("compose", finding, "the project cannot be deployed", remedy)];
        }
    };
    let mut findings = Vec::new();
    let mut fail = |finding: &str, cause: &str, remedy: &str| {
        findings.push(Finding::fail("compose", finding, cause, remedy));
    };
    if app.secure_time {
        fail(
            "secure_time is true",
            "the boot can stop for ever at `Waiting for the system time to be synchronized`",
            "set secure_time to false in app.json",
        );
    }
    if app.key_provider != KeyProvider::Local {
        fail(
            &format!("key_provider is {}", app.key_provider.name()),
            "before any KMS exists only the host's key provider can give the KMS its sealing key",
            "set key_provider to local in app.json",
        );
    }
    let on_host = |port: &PortMapping| port.host_address.parse().is_ok_and(|it: IpAddr| it.is_loopback());
    if !ports.is_empty() && ports.iter().all(on_host) {
        fail(
            "every port is published on loopback alone",
            "the KMS answers on the host, and neither other guests nor clients reach it",
            "publish its port on 0.0.0.0 in vmm_config.ports of app.json: who gets keys is decided by evidence",
        );
    }
    let text = String::from_utf8_lossy(compose.as_bytes());
    if !text.contains("/var/run/dstack.sock") {
        fail(
            "no service mounts /var/run/dstack.sock",
            "without the guest agent's socket the KMS gets no quote: `\"quote\": null`, or a bootstrap that hangs",
            "add /var/run/dstack.sock:/var/run/dstack.sock to the volumes of the service kms",
        );
    }
    if findings.is_empty() {
        findings.push(Finding::pass("compose", format!("compose hash {}", hex::encode(compose.hash()))));
    }
    findings
}

/// Whether the authorisation service is ready.
pub(super) async fn authoriser(url: &Url, net: &Net) -> Vec<Finding> {
    let remedy =
        "set ETH_RPC_URL and KMS_CONTRACT_ADDR of the service, and PORT as the URL in kms.toml has it";
    vec![match net.get(url, Certificates::Verified).await {
        Err(problem) => Finding::fail(
            "auth",
            problem,
            "the KMS asks it before each key; auth-eth listens on 8000 unless PORT says otherwise",
            remedy,
        ),
        Ok((status, body)) => {
            let answer: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
            match answer["status"].as_str() {
                Some("ok") if status == 200 => Finding::pass("auth", format!("{} is ready", shown(url))),
                said => Finding::fail(
                    "auth",
                    format!(
                        "{}: status {status}, {}",
                        shown(url),
                        said.unwrap_or("without the field status")
                    ),
                    "it runs, but its chain does not answer or is not set: `missing field 'status'` in GetMeta",
                    remedy,
                ),
            }
        }
    }]
}

/// Whether the chain is the right one and has the contract.
pub(super) async fn chain(url: &Url, intended: &Intended, net: &Net) -> Vec<Finding> {
    let name = shown(url);
    let other = "use another endpoint: free ones limit calls, and a KMS waits for each";
    let id = match net.rpc(url, "eth_chainId", json!([])).await {
        Ok(id) => id.as_str().and_then(|it| u64::from_str_radix(it.trim_start_matches("0x"), 16).ok()),
        Err(problem) => {
            let cause = "GetMeta of the KMS hangs when its endpoint is dead or limits it";
            return vec![Finding::fail("chain", format!("{name}: eth_chainId: {problem}"), cause, other)];
        }
    };
    match (id, intended.chain_id) {
        (None, _) => {
            let finding = format!("{name}: eth_chainId is no number");
            return vec![Finding::fail("chain", finding, "this is no endpoint of a chain", other)];
        }
        (Some(id), Some(wanted)) if id != wanted => {
            let finding = format!("{name} is chain {id}, expected {wanted}");
            let cause = "the contract is on another chain, so every key would be refused";
            return vec![Finding::fail("chain", finding, cause, "name an endpoint of the right chain")];
        }
        _ => {}
    }
    let Some(contract) = &intended.contract else {
        return vec![Finding::pass("chain", format!("{name} answers"))];
    };
    vec![match net.rpc(url, "eth_getCode", json!([contract, "latest"])).await {
        Err(problem) => Finding::fail("chain", format!("{name}: eth_getCode: {problem}"), "see above", other),
        Ok(code) if code.as_str().is_some_and(|code| code.len() > 2) => {
            Finding::pass("chain", format!("{name} has the contract {contract}"))
        }
        Ok(_) => Finding::fail(
            "chain",
            format!("{name} has no code at {contract}"),
            "the address is wrong, or the contract is on another chain",
            "compare with `keyferry chain`, which deployed it",
        ),
    }]
}
