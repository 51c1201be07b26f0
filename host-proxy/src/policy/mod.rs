//! The allow-list. Pure: names are resolved and this machine's addresses are known elsewhere.
//!
//! ```text
//! text ──parse──▶ Target ──RuleSet::admit──▶ Admission::Address (judged)      ──▶ dial
//!                                         └▶ Admission::Name ──resolve──▶ RuleSet::judge each address ──▶ dial
//! ```
//!
//! A name is looked up only after a rule opened it, so the look-up itself carries nothing out. What is dialled is
//! the very address that was judged.

pub mod address;
pub mod rule;
pub mod target;

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use address::{AddressClass, canonical, classify, classify_here};
use rule::Rule;
use target::{Host, HostName, Target};

/// Who asks: the context id of a vsock peer, or nobody in particular.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asker {
    /// An enclave, known by the context id that the hypervisor gives.
    Cid(u32),
    /// A peer on a Unix or TCP socket; only rules without context ids are for it.
    Anybody,
}

/// A rule and whom it is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name in logs and metrics.
    pub name: Arc<str>,
    /// What it opens.
    pub rule: Rule,
    /// The context ids it is for; `None` is everybody on the listener.
    pub cids: Option<Vec<u32>>,
    /// Whether the TLS ClientHello's server name must equal the target's name.
    pub check_sni: bool,
    /// Most tunnels at once through this rule; `None` leaves it to the other limits.
    pub max_connections: Option<u32>,
}

impl Entry {
    /// An entry for everybody, named like the rule.
    pub fn new(rule: Rule) -> Self {
        Self { name: rule.to_string().into(), rule, cids: None, check_sni: false, max_connections: None }
    }

    fn is_for(&self, asker: Asker) -> bool {
        match (&self.cids, asker) {
            (None, _) => true,
            (Some(cids), Asker::Cid(cid)) => cids.contains(&cid),
            (Some(_), Asker::Anybody) => false,
        }
    }
}

/// A list of rules. Deny by default: the empty list opens nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RuleSet(Vec<Entry>);

/// What a rule opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission<'a> {
    /// A name: look it up, and have each address judged.
    Name {
        /// The name to look up.
        name: &'a HostName,
        /// The rule that opened it.
        entry: usize,
    },
    /// An address, judged.
    Address {
        /// The address to connect to.
        address: IpAddr,
        /// The rule that opened it.
        entry: usize,
    },
}

impl RuleSet {
    /// The rules in the order in which they decide.
    pub fn new(entries: Vec<Entry>) -> Self {
        Self(entries)
    }

    /// The rules.
    pub fn entries(&self) -> &[Entry] {
        &self.0
    }

    /// Whether a rule opens `target` for `asker`. `is_own` says whether an address is one of this machine's.
    ///
    /// # Errors
    /// [`Refusal`] with the reason.
    pub fn admit<'a>(
        &self,
        target: &'a Target,
        asker: Asker,
        is_own: impl Fn(IpAddr) -> bool,
    ) -> Result<Admission<'a>, Refusal> {
        match &target.host {
            Host::Address(address) => {
                let entry = self.judge(*address, target.port, asker, is_own, Named::ByAddress)?;
                Ok(Admission::Address { address: *address, entry: entry.ok_or(Refusal::NoRule)? })
            }
            Host::Name(name) => {
                let covers = |entry: &Entry| entry.rule.covers_name(name);
                self.pick(target.port, asker, covers).map(|entry| Admission::Name { name, entry })
            }
        }
    }

    /// Whether an address that an admitted name resolved to may be dialled: public ones may, others when a rule
    /// names them with the port.
    ///
    /// # Errors
    /// [`Refusal::Address`].
    pub fn judge_resolved(
        &self,
        address: IpAddr,
        port: u16,
        asker: Asker,
        is_own: impl Fn(IpAddr) -> bool,
    ) -> Result<(), Refusal> {
        self.judge(address, port, asker, is_own, Named::ByName).map(drop)
    }

    fn judge(
        &self,
        address: IpAddr,
        port: u16,
        asker: Asker,
        is_own: impl Fn(IpAddr) -> bool,
        named: Named,
    ) -> Result<Option<usize>, Refusal> {
        let address = canonical(address);
        let class = classify_here(address, is_own);
        if class == AddressClass::Public && named == Named::ByName {
            return Ok(None);
        }
        let opens = |entry: &Entry| entry.rule.opens_address(address, class);
        self.pick(port, asker, opens).map(Some).map_err(|refusal| match refusal {
            Refusal::NoRule if class == AddressClass::Public => Refusal::NoRule,
            Refusal::NoRule if named == Named::ByAddress && !self.mentions(address, asker) => Refusal::NoRule,
            Refusal::NoRule => Refusal::Address { address, class },
            other if named == Named::ByAddress => other,
            _ => Refusal::Address { address, class },
        })
    }

    fn mentions(&self, address: IpAddr, asker: Asker) -> bool {
        self.0.iter().any(|entry| entry.is_for(asker) && entry.rule.contains_address(address))
    }

    /// The first entry for the asker that matches host and port; otherwise how close one came.
    fn pick(&self, port: u16, asker: Asker, matches: impl Fn(&Entry) -> bool) -> Result<usize, Refusal> {
        let mut refusal = Refusal::NoRule;
        for (at, entry) in self.0.iter().enumerate() {
            if !matches(entry) {
                continue;
            }
            match (entry.is_for(asker), entry.rule.ports.contains(port)) {
                (true, true) => return Ok(at),
                (true, false) => refusal = Refusal::Port { rule: entry.name.clone() },
                (false, true) if refusal == Refusal::NoRule => {
                    refusal = Refusal::Cid { rule: entry.name.clone() };
                }
                (false, _) => {}
            }
        }
        Err(refusal)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Named {
    ByAddress,
    ByName,
}

/// Why the allow-list says no.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No rule is about this host.
    #[error("no rule allows this host")]
    NoRule,
    /// A rule is about this host, for other ports.
    #[error("rule {rule} allows this host on other ports only")]
    Port {
        /// The rule's name.
        rule: Arc<str>,
    },
    /// A rule would allow it for other context ids.
    #[error("rule {rule} allows this for other context ids only")]
    Cid {
        /// The rule's name.
        rule: Arc<str>,
    },
    /// The address is special and no rule names it.
    #[error("{address} is {class} and no rule names it with this port")]
    Address {
        /// The address.
        address: IpAddr,
        /// Its class.
        class: AddressClass,
    },
}

impl Refusal {
    /// Stable name for logs, metrics and the body of a 403.
    pub fn name(&self) -> &'static str {
        match self {
            Self::NoRule => "no-rule",
            Self::Port { .. } => "port-not-allowed",
            Self::Cid { .. } => "cid-not-allowed",
            Self::Address { .. } => "address-not-allowed",
        }
    }

    /// What an operator who wants this target would add, as one sentence.
    pub fn hint(&self, target: &Target) -> String {
        let literal = match target.host {
            Host::Address(address) => Some(address),
            Host::Name(_) => None,
        };
        let asked = match self {
            Self::Address { address, .. } => Some(*address),
            _ => literal,
        };
        if asked.is_some_and(|address| classify(address) == AddressClass::Metadata) {
            return "this is a metadata service, which hands out the parent's credentials to whoever asks"
                .to_owned();
        }
        match self {
            Self::NoRule | Self::Port { .. } => format!("to allow it, add the rule {target}"),
            Self::Cid { .. } => "to allow it, add the context id to the rule's cids".to_owned(),
            Self::Address { address, .. } => {
                let host = Host::Address(*address);
                format!("to allow it, name the address as well: add the rule {host}:{}", target.port)
            }
        }
    }
}

impl fmt::Display for Asker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cid(cid) => write!(f, "cid {cid}"),
            Self::Anybody => f.write_str("anybody"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(texts: &[&str]) -> RuleSet {
        RuleSet::new(texts.iter().map(|text| Entry::new(text.parse().unwrap())).collect())
    }

    #[test]
    fn a_rule_for_one_enclave_is_not_for_another() {
        let mut entry = Entry::new("kms.example.com:443".parse().unwrap());
        entry.cids = Some(vec![16]);
        let rules = RuleSet::new(vec![entry]);
        let target: Target = "kms.example.com:443".parse().unwrap();
        let admit = |asker| rules.admit(&target, asker, |_| false).map(drop).map_err(|r| r.name());
        assert_eq!(admit(Asker::Cid(16)), Ok(()));
        assert_eq!(admit(Asker::Cid(17)), Err("cid-not-allowed"));
        assert_eq!(admit(Asker::Anybody), Err("cid-not-allowed"));
    }

    #[test]
    fn this_machines_own_address_needs_a_rule_of_its_own() {
        let own: IpAddr = "198.51.100.7".parse().unwrap();
        let target: Target = "198.51.100.7:443".parse().unwrap();
        let is_own = |address| address == own;
        let verdict = |texts: &[&str]| {
            rules(texts).admit(&target, Asker::Anybody, is_own).map(drop).map_err(|r| r.name())
        };
        assert_eq!(verdict(&["198.51.100.0/24:443"]), Err("address-not-allowed"));
        assert_eq!(verdict(&["198.51.100.7:443"]), Ok(()));
        let refused = rules(&["a.example:443"]).judge_resolved(own, 443, Asker::Anybody, is_own);
        assert_eq!(refused, Err(Refusal::Address { address: own, class: AddressClass::Own }));
    }

    #[test]
    fn the_empty_list_opens_nothing() {
        let target: Target = "kms.example.com:443".parse().unwrap();
        assert_eq!(rules(&[]).admit(&target, Asker::Anybody, |_| false), Err(Refusal::NoRule));
    }
}
