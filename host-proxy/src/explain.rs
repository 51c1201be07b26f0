//! `host-proxy explain`: the decision about a target without connecting anywhere.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use command_line::{Exit, Failure};
use serde::Serialize;

use crate::args::ExplainArgs;
use crate::config::Kind;
use crate::dial::is_own_address;
use crate::file;
use crate::output::{print_json, print_line};
use crate::policy::address::{canonical, classify_here};
use crate::policy::target::{HostName, Target};
use crate::policy::{Admission, Asker, Entry, Refusal, RuleSet};
use crate::resolve::{CacheTimes, FixedResolver, Resolve, SystemResolver};
use crate::service::within;

/// How long the system's resolver may take for one name.
const LOOK_UP: Duration = Duration::from_secs(3);

/// The verdict about one target.
#[derive(Debug, Serialize)]
pub struct Explanation {
    /// The text that was asked about.
    pub target: String,
    /// Whether a CONNECT to it would be let through.
    pub verdict: Verdict,
    /// The rule that decided.
    pub rule: Option<String>,
    /// The service the rule stands in, when a configuration was given.
    pub service: Option<String>,
    /// A stable word, as in the log.
    pub reason: &'static str,
    /// The same for people.
    pub message: String,
    /// What would have to be added, for a refusal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// The addresses that were judged.
    pub addresses: Vec<JudgedAddress>,
}

/// Yes or no.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It would be let through.
    Allowed,
    /// It would not.
    Refused,
}

/// One address and whether it may be dialled.
#[derive(Debug, Serialize)]
pub struct JudgedAddress {
    /// The address.
    pub address: IpAddr,
    /// Its class.
    pub class: &'static str,
    /// Whether it may be dialled.
    pub verdict: Verdict,
}

pub(crate) async fn run(args: ExplainArgs) -> Result<Exit, Failure> {
    let lists = match &args.config {
        Some(path) => read_lists(path)?,
        None => vec![(None, Arc::new(RuleSet::new(args.allow.iter().cloned().map(Entry::new).collect())))],
    };
    let mut fixed = FixedResolver::default();
    for (name, addresses) in &args.resolve {
        addresses.iter().for_each(|address| fixed.add(name.clone(), *address));
    }
    let asker = args.cid.map_or(Asker::Anybody, Asker::Cid);
    let mut explanations = Vec::new();
    for target in &args.targets {
        explanations.push(explain(target, &lists, asker, &fixed, args.resolve.is_empty()).await);
    }
    let refused = explanations.iter().any(|explanation| explanation.verdict == Verdict::Refused);
    if args.json {
        print_json(&serde_json::json!({ "version": 1, "targets": explanations }));
    } else {
        explanations.iter().for_each(print);
    }
    Ok(if refused { Exit::Refused } else { Exit::Done })
}

type Lists = Vec<(Option<Arc<str>>, Arc<RuleSet>)>;

fn read_lists(path: &std::path::Path) -> Result<Lists, Failure> {
    let config = file::read(path).map_err(|error| Failure::new(Exit::Usage, error))?;
    let lists: Lists = config
        .services
        .iter()
        .filter_map(|service| match &service.kind {
            Kind::Egress(egress) => Some((Some(Arc::clone(&service.name)), Arc::clone(&egress.rules))),
            _ => None,
        })
        .collect();
    if lists.is_empty() {
        return Err(Failure::new(Exit::Usage, format!("{}: no [[egress]] to explain", path.display())));
    }
    Ok(lists)
}

/// The verdict of one allow-list about `text`, exactly as it would stand in a CONNECT line, with these addresses for
/// names and no others.
pub async fn verdict(text: &str, rules: RuleSet, asker: Asker, addresses: &FixedResolver) -> Explanation {
    explain(text, &vec![(None, Arc::new(rules))], asker, addresses, false).await
}

/// The first list that lets the target through decides; otherwise the first list's refusal is told.
async fn explain(
    text: &str,
    lists: &Lists,
    asker: Asker,
    fixed: &FixedResolver,
    may_ask: bool,
) -> Explanation {
    let target: Target = match text.parse() {
        Ok(target) => target,
        Err(error) => {
            let error: crate::policy::target::TargetError = error;
            return Explanation {
                target: text.to_owned(),
                verdict: Verdict::Refused,
                rule: None,
                service: None,
                reason: error.name(),
                message: error.to_string(),
                hint: None,
                addresses: Vec::new(),
            };
        }
    };
    let mut first = None;
    for (service, rules) in lists {
        let explanation = decide(text, &target, service.as_ref(), rules, asker, fixed, may_ask).await;
        if explanation.verdict == Verdict::Allowed {
            return explanation;
        }
        first.get_or_insert(explanation);
    }
    first.unwrap_or_else(|| refused(text, &target, None, None, &Refusal::NoRule, Vec::new()))
}

async fn decide(
    text: &str,
    target: &Target,
    service: Option<&Arc<str>>,
    rules: &RuleSet,
    asker: Asker,
    fixed: &FixedResolver,
    may_ask: bool,
) -> Explanation {
    let admission = match rules.admit(target, asker, is_own_address) {
        Ok(admission) => admission,
        Err(refusal) => return refused(text, target, service, None, &refusal, Vec::new()),
    };
    let (Admission::Name { entry, .. } | Admission::Address { entry, .. }) = admission;
    let rule = Arc::clone(&rules.entries()[entry].name);
    let found = match admission {
        Admission::Address { address, .. } => {
            let judged = JudgedAddress { address, class: class_of(address), verdict: Verdict::Allowed };
            return allowed(text, service, rule, "the rule names the address", vec![judged]);
        }
        Admission::Name { name, .. } => look_up(name, fixed, may_ask).await,
    };
    let Some(found) = found else {
        let message = "the rule names the host; it was not resolved, each connection judges its addresses";
        return allowed(text, service, rule, message, Vec::new());
    };
    let mut last = Refusal::NoRule;
    let mut judge = |address: IpAddr| {
        let address = canonical(address);
        let verdict = match rules.judge_resolved(address, target.port, asker, is_own_address) {
            Ok(()) => Verdict::Allowed,
            Err(refusal) => {
                last = refusal;
                Verdict::Refused
            }
        };
        JudgedAddress { address, class: class_of(address), verdict }
    };
    let addresses: Vec<_> = found.into_iter().map(&mut judge).collect();
    if addresses.iter().any(|judged| judged.verdict == Verdict::Allowed) {
        allowed(
            text,
            service,
            rule,
            "the rule names the host, and it has an address that may be dialled",
            addresses,
        )
    } else {
        refused(text, target, service, Some(rule), &last, addresses)
    }
}

/// The addresses of a name: the ones given, else the system's. `localhost` is the loopback without asking (RFC 6761).
async fn look_up(name: &HostName, fixed: &FixedResolver, may_ask: bool) -> Option<Vec<IpAddr>> {
    if let Some(addresses) = fixed.get(name) {
        return Some(addresses.to_vec());
    }
    if name.as_str() == "localhost" || name.as_str().ends_with(".localhost") {
        return Some(vec![std::net::Ipv4Addr::LOCALHOST.into(), std::net::Ipv6Addr::LOCALHOST.into()]);
    }
    if !may_ask {
        return None;
    }
    let system = SystemResolver::new(CacheTimes::default()).ok()?;
    let found = within(LOOK_UP, system.resolve(name)).await?.ok()?;
    (!found.is_empty()).then_some(found)
}

fn class_of(address: IpAddr) -> &'static str {
    classify_here(address, is_own_address).name()
}

fn allowed(
    text: &str,
    service: Option<&Arc<str>>,
    rule: Arc<str>,
    message: &str,
    addresses: Vec<JudgedAddress>,
) -> Explanation {
    Explanation {
        target: text.to_owned(),
        verdict: Verdict::Allowed,
        rule: Some(rule.to_string()),
        service: service.map(ToString::to_string),
        reason: "allowed",
        message: message.to_owned(),
        hint: None,
        addresses,
    }
}

fn refused(
    text: &str,
    target: &Target,
    service: Option<&Arc<str>>,
    rule: Option<Arc<str>>,
    refusal: &Refusal,
    addresses: Vec<JudgedAddress>,
) -> Explanation {
    Explanation {
        target: text.to_owned(),
        verdict: Verdict::Refused,
        rule: rule.map(|rule| rule.to_string()),
        service: service.map(ToString::to_string),
        reason: refusal.name(),
        message: refusal.to_string(),
        hint: Some(refusal.hint(target)),
        addresses,
    }
}

fn print(explanation: &Explanation) {
    let Explanation { target, verdict, rule, service, reason, message, hint, addresses } = explanation;
    let verdict = match verdict {
        Verdict::Allowed => "allowed",
        Verdict::Refused => "refused",
    };
    // What stands in a target may be anything: shown escaped.
    print_line(&format!("{verdict} {}", target.escape_debug()));
    if let Some(rule) = rule {
        let place = service.as_ref().map(|service| format!(" of service {service}")).unwrap_or_default();
        print_line(&format!("  rule: {rule}{place}"));
    }
    print_line(&format!("  why: {message} ({reason})"));
    for JudgedAddress { address, class, verdict } in addresses {
        let verdict = if *verdict == Verdict::Allowed { "may be dialled" } else { "not dialled" };
        print_line(&format!("  address: {address}, {class}, {verdict}"));
    }
    if let Some(hint) = hint {
        print_line(&format!("  hint: {hint}"));
    }
}
