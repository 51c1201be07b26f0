//! Firewall rules of one machine, found by its network tag.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use super::firewall_tag;
use crate::gcp::{Client, Firewall, Permission};
use crate::patience::Deadline;
use crate::project::GcpConfig;
use crate::{Error, gcp};

const CALL: Duration = Duration::from_secs(2 * 60);
/// A rule that keeps out wins over one that lets in, whose priority is 1000.
const DENY_PRIORITY: u32 = 900;
/// Ports on a KMS machine that answer anyone who reaches them: the authorisation API and the light client.
const DEBUG_PORTS: [u16; 2] = [18000, 18545];

/// A port with its protocol, `12001`, `12001/tcp`, `53/udp`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Port {
    number: u16,
    protocol: &'static str,
}

impl Port {
    /// A TCP port.
    #[must_use]
    pub fn tcp(number: u16) -> Self {
        Self { number, protocol: "tcp" }
    }

    /// Its number.
    #[must_use]
    pub fn number(self) -> u16 {
        self.number
    }

    /// Whether a rule's list of protocols and ports covers it. Source: `allowed[]` of compute v1's Firewall.
    fn is_in(self, permissions: &[Permission]) -> bool {
        let number = |text: &str| text.parse::<u16>().ok();
        permissions.iter().any(|permission| {
            // A protocol may be given by its IANA number.
            let protocol = match permission.protocol.as_str() {
                "all" => self.protocol,
                "6" => "tcp",
                "17" => "udp",
                name => name,
            };
            let covers = |range: &String| match range.split_once('-') {
                Some((first, last)) => number(first)
                    .zip(number(last))
                    .is_some_and(|(first, last)| (first..=last).contains(&self.number)),
                None => number(range) == Some(self.number),
            };
            protocol == self.protocol && (permission.ports.is_empty() || permission.ports.iter().any(covers))
        })
    }
}

/// Why a text names no port.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} names no port: expected NUMBER, NUMBER/tcp or NUMBER/udp")]
pub struct PortError(String);

impl FromStr for Port {
    type Err = PortError;

    fn from_str(text: &str) -> Result<Self, PortError> {
        let (number, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        let protocol = match protocol {
            "tcp" => "tcp",
            "udp" => "udp",
            _ => return Err(PortError(text.to_owned())),
        };
        match number.parse() {
            Ok(number) if number != 0 && text.starts_with(|it: char| it.is_ascii_digit()) => {
                Ok(Self { number, protocol })
            }
            _ => Err(PortError(text.to_owned())),
        }
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.number, self.protocol)
    }
}

/// What a rule does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Lets in.
    Allow,
    /// Keeps out.
    Deny,
}

impl Action {
    fn name(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
        }
    }
}

/// What became of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was made.
    Made,
    /// It was there, with other sources or ports, and now has these.
    Changed,
    /// It was there as it is.
    Unchanged,
}

/// The rule for one port, as dstack-cloud names it, on the machine's own network.
#[must_use]
pub fn rule(config: &GcpConfig, action: Action, port: Port, sources: &[String]) -> Firewall {
    let instance = &config.instance_name;
    let permission = Permission { protocol: port.protocol.to_owned(), ports: vec![port.number.to_string()] };
    let verb = match action {
        Action::Allow => "Allow",
        Action::Deny => "Deny",
    };
    let (allowed, denied) = match action {
        Action::Allow => (vec![permission], Vec::new()),
        Action::Deny => (Vec::new(), vec![permission]),
    };
    Firewall {
        name: name(instance, action, port),
        description: format!("{verb} {} port {} for {instance}", port.protocol.to_uppercase(), port.number),
        direction: "INGRESS".to_owned(),
        network: format!("global/networks/{}", config.network),
        priority: (action == Action::Deny).then_some(DENY_PRIORITY),
        source_ranges: sources.to_vec(),
        target_tags: vec![firewall_tag(instance)],
        allowed,
        denied,
    }
}

fn name(instance: &str, action: Action, port: Port) -> String {
    format!("{instance}-{}-{}-{}", action.name(), port.protocol, port.number)
}

/// Refuses to open to everyone what answers everyone.
///
/// # Errors
///
/// [`Error::Setting`] for a port without authentication and a source of every address.
pub fn check_sources(port: Port, sources: &[String]) -> Result<(), Error> {
    let everyone = sources.iter().any(|source| source.ends_with("/0"));
    if everyone && port.protocol == "tcp" && DEBUG_PORTS.contains(&port.number) {
        let problem = format!(
            "port {} answers anyone without authentication; name the addresses that need it",
            port.number
        );
        return Err(Error::Setting { setting: "--source", problem });
    }
    Ok(())
}

/// Makes or changes the rule for a port, and sees to it that the machine has the tag the rule looks for.
///
/// # Errors
///
/// [`Error::Setting`] when the sources are too wide; when Google refuses or does not answer.
pub async fn set(
    client: &Client,
    config: &GcpConfig,
    action: Action,
    port: Port,
    sources: &[String],
) -> Result<Outcome, Error> {
    if action == Action::Allow {
        check_sources(port, sources)?;
    }
    let wanted = rule(config, action, port, sources);
    let deadline = Deadline::within(CALL);
    client
        .ensure_tag(&config.zone, &config.instance_name, &firewall_tag(&config.instance_name), deadline)
        .await?;
    match client.firewall(&wanted.name, deadline).await? {
        None => match client.create_firewall(&wanted, deadline).await {
            Ok(()) => Ok(Outcome::Made),
            // Made by a call whose answer was lost.
            Err(error) if error.is_already_exists() => Ok(Outcome::Made),
            Err(error) => Err(error.into()),
        },
        Some(found) if same(&found, &wanted) => Ok(Outcome::Unchanged),
        Some(found) => {
            check_network(&found, &wanted)?;
            client.change_firewall(&wanted, deadline).await?;
            Ok(Outcome::Changed)
        }
    }
}

/// Rules are named for machines, and a machine of the same name may be on another network.
fn check_network(found: &Firewall, wanted: &Firewall) -> Result<(), Error> {
    if found.network.ends_with(&wanted.network) {
        return Ok(());
    }
    let problem = format!("rule {} is on {}, the machine on {}", found.name, found.network, wanted.network);
    Err(Error::Setting { setting: "gcp_config.network", problem })
}

fn same(found: &Firewall, wanted: &Firewall) -> bool {
    found.allowed == wanted.allowed
        && found.denied == wanted.denied
        && found.source_ranges == wanted.source_ranges
        && found.target_tags == wanted.target_tags
        && found.network.ends_with(&wanted.network)
}

/// Deletes our rule that lets traffic to a port in, if it is there.
///
/// # Errors
///
/// When Google refuses or does not answer.
pub async fn close(client: &Client, config: &GcpConfig, port: Port) -> Result<(), gcp::Error> {
    let (name, deadline) = (name(&config.instance_name, Action::Allow, port), Deadline::within(CALL));
    match client.firewall(&name, deadline).await? {
        Some(_) => client.delete_firewall(&name, deadline).await,
        None => Ok(()),
    }
}

/// Refuses to go on while another rule for this machine lets traffic to the port in.
///
/// # Errors
///
/// [`Error::Setting`] names the rule; when Google refuses or does not answer.
pub async fn refuse_other_ways_in(client: &Client, config: &GcpConfig, port: Port) -> Result<(), Error> {
    let own = name(&config.instance_name, Action::Allow, port);
    for rule in list(client, config).await? {
        if rule.name != own && port.is_in(&rule.allowed) {
            let problem = format!(
                "rule {} lets {} in too, before the KMS has keys; remove it and open the port afterwards",
                rule.name,
                rule.source_ranges.join(", ")
            );
            return Err(Error::Setting { setting: "firewall", problem });
        }
    }
    Ok(())
}

/// Deletes the rules for a port, whichever way they act. Says which there were.
///
/// # Errors
///
/// When Google refuses or does not answer.
pub async fn remove(client: &Client, config: &GcpConfig, port: Port) -> Result<Vec<String>, gcp::Error> {
    let mut removed = Vec::new();
    for action in [Action::Allow, Action::Deny] {
        let name = name(&config.instance_name, action, port);
        let deadline = Deadline::within(CALL);
        if client.firewall(&name, deadline).await?.is_some() {
            client.delete_firewall(&name, deadline).await?;
            removed.push(name);
        }
    }
    Ok(removed)
}

/// Every rule that holds for the machine, those that keep out too.
///
/// # Errors
///
/// When Google refuses or does not answer.
pub async fn list(client: &Client, config: &GcpConfig) -> Result<Vec<Firewall>, gcp::Error> {
    client.firewalls_for(&firewall_tag(&config.instance_name), Deadline::within(CALL)).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read_strictly() {
        let read = |text: &str| text.parse::<Port>().map(|port| port.to_string());
        assert_eq!(read("12001").unwrap(), "12001/tcp");
        assert_eq!(read("53/udp").unwrap(), "53/udp");
        for text in ["", "0", "65536", "-1", "+80", "80/sctp", "80/", "/tcp", "80/TCP", " 80"] {
            assert!(read(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_port_is_found_in_the_ways_rules_name_ports() {
        let permission = |protocol: &str, ports: &[&str]| Permission {
            protocol: protocol.to_owned(),
            ports: ports.iter().map(|it| (*it).to_owned()).collect(),
        };
        let port = Port::tcp(12001);
        for (protocol, ports) in [
            ("tcp", &["12001"][..]),
            ("tcp", &["80", "12000-12010"]),
            ("tcp", &[]),
            ("6", &["12001-12001"]),
            ("all", &[]),
        ] {
            assert!(port.is_in(&[permission(protocol, ports)]), "{protocol} {ports:?}");
        }
        for (protocol, ports) in [
            ("udp", &["12001"][..]),
            ("tcp", &["1200", "12002-13000"]),
            ("17", &[]),
            ("icmp", &[]),
            ("tcp", &["x-y"]),
        ] {
            assert!(!port.is_in(&[permission(protocol, ports)]), "{protocol} {ports:?}");
        }
    }

    /// The bodies gcloud sends for dstack-cloud's `fw allow 12001` and `fw deny 12001`.
    #[test]
    fn rules_are_those_of_dstack_cloud() {
        let config = GcpConfig { instance_name: "dstack-kms".into(), ..GcpConfig::default() };
        let port = "12001".parse().unwrap();
        let body = |action| serde_json::to_value(rule(&config, action, port, &["0.0.0.0/0".into()])).unwrap();
        assert_eq!(
            body(Action::Allow),
            serde_json::json!({
                "name": "dstack-kms-allow-tcp-12001",
                "description": "Allow TCP port 12001 for dstack-kms",
                "direction": "INGRESS",
                "network": "global/networks/default",
                "sourceRanges": ["0.0.0.0/0"],
                "targetTags": ["fw-dstack-kms"],
                "allowed": [{"IPProtocol": "tcp", "ports": ["12001"]}],
            })
        );
        let deny = body(Action::Deny);
        assert_eq!((&deny["priority"], &deny["denied"][0]["ports"][0]), (&900.into(), &"12001".into()));
        assert_eq!(deny.get("allowed"), None);
    }

    #[test]
    fn a_rule_of_this_name_on_another_network_is_left_alone() {
        let config = GcpConfig { instance_name: "dstack-kms".into(), ..GcpConfig::default() };
        let wanted = rule(&config, Action::Allow, "12001".parse().unwrap(), &[]);
        let on = |network: &str| Firewall { network: network.into(), ..wanted.clone() };
        let here = on("https://www.googleapis.com/compute/v1/projects/p/global/networks/default");
        check_network(&here, &wanted).unwrap();
        let error = check_network(
            &on("https://www.googleapis.com/compute/v1/projects/p/global/networks/vpc"),
            &wanted,
        );
        let told = error.unwrap_err().to_string();
        assert!(
            told.contains("gcp_config.network") && told.contains("networks/vpc, the machine on"),
            "{told}"
        );
    }

    #[test]
    fn ports_without_authentication_are_not_opened_to_everyone() {
        let check = |port: &str, source: &str| check_sources(port.parse().unwrap(), &[source.to_owned()]);
        assert!(check("18000", "0.0.0.0/0").is_err());
        assert!(check("18545", "::/0").is_err());
        assert!(check("18000", "203.0.113.7/32").is_ok());
        assert!(check("12001", "0.0.0.0/0").is_ok());
    }
}
