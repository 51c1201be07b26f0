//! What makes and checks quotes: the quoting service, collateral for host and guests, the platform's registration, the
//! sealing key's provider.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use reqwest::Url;
use serde_json::Value;
use tokio::time::timeout;

use super::host::Host;
use super::net::{Certificates, Net};
use super::settings::VmmSettings;
use super::{Finding, is_loopback};

const QCNL: &str = "/etc/sgx_default_qcnl.conf";
const QGS: &str = "/etc/qgs.conf";
const REGISTRATION: &str = "/var/log/mpa_registration.log";
const CONNECT: Duration = Duration::from_secs(5);
/// Below the address of a PCCS: the list that names revoked roots. It needs no key and is small.
const PROBE: &str = "rootcacrl";

/// What needs no network.
pub(super) fn examine(host: &Host, settings: Option<&VmmSettings>) -> Vec<Finding> {
    vec![quoting_service(host, settings), aesm(host), registration(host)]
}

fn runs(host: &Host, name: &str) -> bool {
    host.processes().iter().any(|process| process.name == name)
}

fn quoting_service(host: &Host, settings: Option<&VmmSettings>) -> Finding {
    if !runs(host, "qgs") {
        return Finding::fail(
            "qgsd",
            "the quote generation service does not run",
            "a guest's quote is made on the host; without it every attestation ends with TDX_ATTEST_ERROR_UNEXPECTED",
            "systemctl enable --now qgsd, and look at journalctl -u qgsd",
        );
    }
    let text = host.text(QGS).unwrap_or_default();
    let own = text.lines().find_map(|line| line.trim().strip_prefix("port")?.trim().strip_prefix('='));
    let own: Option<u32> = own.and_then(|port| port.trim().parse().ok());
    match (own, settings.and_then(|it| it.cvm.qgs_port)) {
        (Some(own), Some(wanted)) if own != wanted => Finding::fail(
            "qgsd",
            format!("{QGS} has port {own}, the VMM tells guests {wanted}"),
            "guests ask for quotes at a vsock port where nobody listens",
            format!("set [cvm] qgs_port = {own} in the VMM's configuration and start the VMM again"),
        ),
        _ => Finding::pass("qgsd", "runs"),
    }
}

fn aesm(host: &Host) -> Finding {
    match runs(host, "aesm_service") || host.exists("/var/run/aesmd/aesm.socket") {
        true => Finding::pass("aesm", "runs"),
        false => Finding::fail(
            "aesm",
            "no process aesm_service and no /var/run/aesmd/aesm.socket",
            "the key provider's own quote comes from the SGX services that AESM runs",
            "start the container aesmd of the key provider, or systemctl enable --now aesmd",
        ),
    }
}

fn registration(host: &Host) -> Finding {
    let unknown = |why: String| {
        Finding::warn(
            "registration",
            why,
            "Intel must know the platform before its certificates can be fetched; until then quotes fail with QGS error \
             0x12001",
            "switch Auto MP Registration on in the firmware, install sgx-ra-service, start the machine again and look at \
             /var/log/mpa_registration.log",
        )
    };
    let log = match host.text(REGISTRATION) {
        Ok(log) => log,
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            return Finding::skipped("registration", format!("only root can read {REGISTRATION}"));
        }
        Err(error) => return unknown(format!("{REGISTRATION}: {error}")),
    };
    let last = log.lines().rev().find(|line| {
        let line = line.to_ascii_lowercase();
        line.contains("success") || line.contains("error") || line.contains("fail")
    });
    match last {
        Some(line) if line.to_ascii_lowercase().contains("success") => {
            Finding::pass("registration", line.trim())
        }
        Some(line) => Finding::fail(
            "registration",
            line.trim(),
            "the platform is not registered with Intel, so no certificate for it exists",
            "reset Auto MP Registration in the firmware and start the machine again with a way out to Intel's service",
        ),
        None => unknown(format!("{REGISTRATION} does not say how the registration ended")),
    }
}

/// The collateral service the host makes quotes with.
pub(super) async fn host_collateral(host: &Host, net: &Net) -> Vec<Finding> {
    let remedy =
        "set pccs_url in /etc/sgx_default_qcnl.conf to a PCCS that answers, then systemctl restart qgsd";
    let cause = "the host cannot fetch its certificate: QGS error 0x12001, no sealing key, a guest that ends after 13 s";
    let text = match host.text(QCNL) {
        Ok(text) => text,
        Err(error) => return vec![Finding::fail("pccs-host", format!("{QCNL}: {error}"), cause, remedy)],
    };
    let Some((url, verified)) = collateral_url(&text) else {
        let finding = Finding::fail("pccs-host", format!("{QCNL} has no pccs_url"), cause, remedy);
        return vec![finding];
    };
    // The file says whether the host itself looks at the certificate.
    let certificates = if verified { Certificates::Verified } else { Certificates::DangerAny };
    vec![probe(net, "pccs-host", &url, certificates, cause, remedy).await]
}

/// Address and `use_secure_cert` of the file, JSON with comments or the older lines `PCCS_URL=…`.
fn collateral_url(text: &str) -> Option<(Url, bool)> {
    let lines = text.lines().map(str::trim).filter(|line| !line.starts_with("//") && !line.starts_with('#'));
    let bare: Vec<&str> = lines.collect();
    // A comment behind a value begins after white space; an address has none before its slashes.
    let json: Vec<&str> = bare.iter().map(|line| line.split(" //").next().unwrap_or(line)).collect();
    if let Ok(json) = serde_json::from_str::<Value>(&json.join("\n")) {
        let truth = &json["use_secure_cert"];
        let verified = !(truth == &Value::Bool(false) || truth == "false");
        return json["pccs_url"].as_str()?.parse().ok().map(|url| (url, verified));
    }
    let value = |name: &str| {
        bare.iter().find_map(|line| {
            line.split_once('=').filter(|(key, _)| key.trim() == name).map(|(_, it)| it.trim())
        })
    };
    let verified = !value("USE_SECURE_CERT").is_some_and(|it| it.eq_ignore_ascii_case("false"));
    value("PCCS_URL")?.parse().ok().map(|url| (url, verified))
}

/// The collateral service guests check quotes with.
pub(super) async fn guest_collateral(settings: &VmmSettings, net: &Net) -> Vec<Finding> {
    let cause = "a guest checks the key provider's quote with it before anything else: without it the guest starts again \
                 every 15 to 20 s with `Failed to get quote collateral`";
    let remedy = "set [cvm] pccs_url in the VMM's configuration to an address that guests reach, not one of the host's \
                  loopback";
    if settings.cvm.pccs_url.is_empty() {
        let finding = "[cvm] pccs_url is empty: guests ask the service they were built with";
        return vec![Finding::warn(
            "pccs-guest",
            finding,
            "that service must be reachable from this network",
            remedy,
        )];
    }
    match Url::parse(&settings.cvm.pccs_url) {
        Err(error) => {
            let finding = format!("[cvm] pccs_url {:?}: {error}", settings.cvm.pccs_url);
            vec![Finding::fail("pccs-guest", finding, cause, remedy)]
        }
        // Reached from the host: the nearest to a guest behind its user-mode network that there is from here.
        Ok(url) => vec![probe(net, "pccs-guest", &url, Certificates::DangerAny, cause, remedy).await],
    }
}

async fn probe(
    net: &Net,
    check: &'static str,
    url: &Url,
    certificates: Certificates,
    cause: &str,
    remedy: &str,
) -> Finding {
    let base = url.as_str().trim_end_matches('/');
    // Guests are told the address of the server, the host that of its interface.
    let base = if base.contains("/sgx/") { base.to_owned() } else { format!("{base}/sgx/certification/v4") };
    match format!("{base}/{PROBE}").parse::<Url>() {
        Err(error) => Finding::fail(check, format!("{url}: {error}"), cause, remedy),
        Ok(address) => match net.get(&address, certificates).await {
            Ok((200, _)) => Finding::pass(check, format!("{url} answers")),
            Ok((status, _)) => Finding::fail(check, format!("{address}: status {status}"), cause, remedy),
            Err(problem) => Finding::fail(check, problem, cause, remedy),
        },
    }
}

/// The provider of the first machine's sealing key.
pub(super) async fn key_provider(host: &Host, settings: &VmmSettings) -> Vec<Finding> {
    let provider = &settings.key_provider;
    if !provider.enabled {
        return vec![Finding::fail(
            "key-provider",
            "[key_provider] enabled is false",
            "the first KMS has nobody else to get its sealing key from",
            "set it to true, and start the key provider",
        )];
    }
    let address = SocketAddr::new(provider.address, provider.port);
    let open = host.listeners().into_iter().find(|(ip, port)| *port == provider.port && !is_loopback(*ip));
    if let Some((ip, port)) = open {
        return vec![Finding::fail(
            "key-provider",
            format!("listens at {}, not only on loopback", SocketAddr::new(ip, port)),
            "whoever reaches it can have quotes of other machines answered",
            "publish its port as 127.0.0.1:3443 in the compose of the key provider",
        )];
    }
    // It speaks JSON behind a length and no HTTP: connecting is all that can be done without a quote.
    #[expect(
        clippy::disallowed_methods,
        reason = "bounded here; only whether somebody listens is of interest"
    )]
    let connected = timeout(CONNECT, tokio::net::TcpStream::connect(address)).await;
    let finding = match connected {
        Ok(Ok(_)) => Finding::pass("key-provider", format!("{address} accepts connections")),
        Ok(Err(error)) => Finding::fail(
            "key-provider",
            format!("{address}: {error}"),
            "the sealing key of the first KMS comes from there: without it the guest loops at `Failed to get sealing key`",
            "start local-key-provider and aesmd with docker compose, and look at their logs: `DCAP error` alone means that \
             the firmware's TDX module is below Intel's TCB level",
        ),
        Err(_) => Finding::fail(
            "key-provider",
            format!("{address}: no connection after {} s", CONNECT.as_secs()),
            "the container is there and hangs, or a firewall drops the packets",
            "docker compose restart local-key-provider, and look at its log",
        ),
    };
    vec![finding]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_is_found_in_either_form_of_the_file() {
        let json = "// PCCS\n{\n  // address\n  \"pccs_url\": \"https://localhost:8081/sgx/certification/v4/\",\n  \
                    \"use_secure_cert\": false // self-signed\n}\n";
        let (url, verified) = collateral_url(json).unwrap();
        assert_eq!((url.as_str(), verified), ("https://localhost:8081/sgx/certification/v4/", false));
        let lines = "#c\nPCCS_URL=https://p/sgx/certification/v3/\nUSE_SECURE_CERT=TRUE\n";
        let (url, verified) = collateral_url(lines).unwrap();
        assert_eq!((url.as_str(), verified), ("https://p/sgx/certification/v3/", true));
        assert!(collateral_url("{}").is_none());
        assert!(collateral_url("").is_none());
    }
}
