//! What AWS does and moto does not.

use std::collections::HashMap;
use std::fmt::Write as _;

use base64::Engine as _;
use regex::{Captures, Regex};

use super::front::{self, Answer, Parameters};
use super::{Call, Shared};

/// Early text of a console, before the SSH keys.
const EARLY: &str = "[    0.0] Linux version 6.1\r\n";

/// A launch: its parameters, and what it was answered.
type Launch = (Vec<(String, String)>, Answer);

/// What is kept beside moto.
#[derive(Debug, Default)]
pub(super) struct Gaps {
    /// Launches by region and token.
    launches: HashMap<(String, String), Launch>,
    instances: HashMap<String, Extra>,
    /// Regions that exist, and those that do not, by what moto said.
    regions: HashMap<String, bool>,
}

/// What moto does not know of an instance.
#[derive(Debug, Default)]
struct Extra {
    enclaves: bool,
    /// Looks that do not find it yet.
    unseen: u8,
    /// Looks that find it pending.
    pending: u8,
    /// Looks that find it ending.
    ending: u8,
    /// Looks at its console that find no keys.
    silent: u8,
    /// Sessions that are asked for before Systems Manager knows it.
    unconnected: u8,
}

/// A refusal as the service words it.
pub(super) fn refusal(service: &str, status: u16, code: &str, message: &str) -> Answer {
    let error = format!("<Error><Code>{code}</Code><Message>{message}</Message></Error>");
    let body = match service {
        "ssm" | "ec2-instance-connect" => format!("{{\"__type\": \"{code}\", \"message\": \"{message}\"}}"),
        "sts" => format!("<ErrorResponse>{error}<RequestId>front</RequestId></ErrorResponse>"),
        _ => format!("<Response><Errors>{error}</Errors><RequestID>front</RequestID></Response>"),
    };
    (status, body)
}

/// The texts of the elements of this name.
pub(super) fn elements(xml: &str, name: &str) -> Vec<String> {
    let (open, close) = (format!("<{name}>"), format!("</{name}>"));
    let starts = xml.split(&open).skip(1);
    starts.filter_map(|rest| rest.split_once(&close)).map(|(text, _)| text.to_owned()).collect()
}

pub(super) async fn carry_out(shared: &Shared, service: &str, call: &Call) -> Answer {
    if !region_exists(shared, &call.region).await {
        let (status, code, message) = match service {
            "sts" => (403, "InvalidClientTokenId", "The security token included in the request is invalid"),
            _ => (401, "AuthFailure", "AWS was not able to validate the provided access credentials"),
        };
        return refusal(service, status, code, message);
    }
    if let Some((target, body)) = &call.json {
        let pass_on = front::ask_json(shared, &call.region, service, target, body.clone());
        return match call.action.as_str() {
            "StartSession" => start_session(shared, call).await,
            "TerminateSession" => (200, "{\"SessionId\": \"keyferry-0123456789abcdef0\"}".to_owned()),
            "SendSSHPublicKey" => send_key(shared, call, pass_on.await),
            _ => pass_on.await,
        };
    }
    let pass_on = async || front::ask(shared, &call.region, service, &call.action, &call.parameters).await;
    match call.action.as_str() {
        "RunInstances" => run_instances(shared, call).await,
        "DescribeInstances" => describe_instances(shared, call, pass_on().await),
        "TerminateInstances" => {
            for id in numbered(&call.parameters, "InstanceId") {
                let mut inner = shared.inner();
                let extra = inner.gaps.instances.entry(id).or_default();
                // Whoever ends it has seen it.
                (extra.unseen, extra.ending) = (0, 1);
            }
            pass_on().await
        }
        "ModifyInstanceAttribute" => modify_instance(shared, call).await,
        "DeleteSecurityGroup" => match group_is_used(shared, call).await {
            true => refusal("ec2", 400, "DependencyViolation", "resource has a dependent object"),
            false => pass_on().await,
        },
        "GetConsoleOutput" => console(shared, call),
        _ => pass_on().await,
    }
}

/// moto breaks on a region it does not know; AWS has no such host name, or does not know the account there.
async fn region_exists(shared: &Shared, region: &str) -> bool {
    let known = shared.inner().gaps.regions.get(region).copied();
    if let Some(known) = known {
        return known;
    }
    let everywhere = front::ask(shared, "us-east-1", "ec2", "DescribeRegions", &[]).await;
    let exists = elements(&everywhere.1, "regionName").iter().any(|it| it == region);
    shared.inner().gaps.regions.insert(region.to_owned(), exists);
    exists
}

async fn run_instances(shared: &Shared, call: &Call) -> Answer {
    let mut parameters = call.parameters.clone();
    let value = |name: &str| call.parameter(name).unwrap_or_default().to_owned();
    let (token, image, kind) = (value("ClientToken"), value("ImageId"), value("InstanceType"));
    let key = (call.region.clone(), token.clone());
    let dry = call.parameter("DryRun") == Some("true");
    let before = shared.inner().gaps.launches.get(&key).filter(|_| !token.is_empty() && !dry).cloned();
    if let Some((asked, answer)) = before {
        return match asked == call.parameters {
            true => answer,
            false => {
                refusal("ec2", 400, "IdempotentParameterMismatch", "the token was used with other parameters")
            }
        };
    }
    let image = match image.strip_prefix("resolve:ssm:") {
        Some(name) => front::parameter(shared, &call.region, name).await.unwrap_or_default(),
        None => image,
    };
    parameters.iter_mut().filter(|(name, _)| name == "ImageId").for_each(|(_, it)| it.clone_from(&image));
    for (action, name, value) in
        [("DescribeImages", "ImageId.1", image), ("DescribeInstanceTypes", "InstanceType.1", kind)]
    {
        let known = front::ask(shared, &call.region, "ec2", action, &[(name.to_owned(), value)]).await;
        if known.0 != 200 {
            return known;
        }
    }
    let (status, body) = front::ask(shared, &call.region, "ec2", "RunInstances", &parameters).await;
    if status != 200 {
        return (status, body);
    }
    let enclaves = call.parameter("EnclaveOptions.Enabled") == Some("true");
    let mut guard = shared.inner();
    let inner = &mut *guard;
    for id in elements(&body, "instanceId") {
        let extra = Extra { enclaves, unseen: 1, pending: 1, ending: 0, silent: 1, unconnected: 1 };
        inner.gaps.instances.insert(id, extra);
    }
    let public = inner.public_ip.to_string();
    let answer = (status, patch(&mut inner.gaps.instances, &body, public, false));
    inner.gaps.launches.insert(key, (call.parameters.clone(), answer.clone()));
    answer
}

fn describe_instances(shared: &Shared, call: &Call, (status, body): Answer) -> Answer {
    let mut guard = shared.inner();
    let inner = &mut *guard;
    let named = numbered(&call.parameters, "InstanceId");
    for id in &named {
        if let Some(extra) = inner.gaps.instances.get_mut(id).filter(|it| it.unseen > 0) {
            extra.unseen -= 1;
            let message = format!("The instance ID '{id}' does not exist");
            return refusal("ec2", 400, "InvalidInstanceID.NotFound", &message);
        }
    }
    let public = inner.public_ip.to_string();
    (status, patch(&mut inner.gaps.instances, &body, public, !named.is_empty()))
}

/// Puts into a description of instances what moto does not know. A look at a named instance is one moment later.
fn patch(instances: &mut HashMap<String, Extra>, body: &str, public: String, later: bool) -> String {
    let address = Regex::new("<(ipAddress|publicIp)>[^<]*</").expect("the pattern is right");
    let between = Regex::new(r">\s+<").expect("the pattern is right");
    let body = address.replace_all(body, |found: &Captures<'_>| format!("<{}>{public}</", &found[1]));
    let mut parts = body.split("<instanceId>");
    let mut patched = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (id, rest) = part.split_once("</instanceId>").unwrap_or((part, ""));
        let extra = instances.entry(id.to_owned()).or_default();
        let mut rest = rest.to_owned();
        for (left, real, shown) in [
            (&mut extra.pending, "<code>16</code><name>running</name>", "<code>0</code><name>pending</name>"),
            (
                &mut extra.ending,
                "<code>48</code><name>terminated</name>",
                "<code>32</code><name>shutting-down</name>",
            ),
        ] {
            let compact = between.replace_all(&rest, "><").into_owned();
            if *left > 0 && compact.contains(real) {
                rest = compact.replacen(real, shown, 1);
                *left -= u8::from(later);
            }
        }
        let _written = write!(
            patched,
            "<instanceId>{id}</instanceId><enclaveOptions><enabled>{}</enabled></enclaveOptions>{rest}",
            extra.enclaves
        );
    }
    patched
}

async fn modify_instance(shared: &Shared, call: &Call) -> Answer {
    let id = call.parameter("InstanceId").unwrap_or_default().to_owned();
    let Some(enabled) = call.parameter("EnclaveOptions.Enabled") else {
        return front::ask(shared, &call.region, "ec2", &call.action, &call.parameters).await;
    };
    let named = [("InstanceId.1".to_owned(), id.clone())];
    let (status, body) = front::ask(shared, &call.region, "ec2", "DescribeInstances", &named).await;
    if status != 200 {
        return (status, body);
    }
    if !body.contains("<name>stopped</name>") {
        let message = format!("The instance '{id}' is not in the 'stopped' state.");
        return refusal("ec2", 400, "IncorrectInstanceState", &message);
    }
    shared.inner().gaps.instances.entry(id).or_default().enclaves = enabled == "true";
    let body = "<ModifyInstanceAttributeResponse xmlns=\"http://ec2.amazonaws.com/doc/2016-11-15/\"><return>true</return>\
                </ModifyInstanceAttributeResponse>";
    (200, body.to_owned())
}

/// Whether an instance that has not ended is in the group. One that ends, as far as anybody saw, is in it still.
async fn group_is_used(shared: &Shared, call: &Call) -> bool {
    let group = call.parameter("GroupId").unwrap_or_default().to_owned();
    let filter = [
        ("Filter.1.Name".to_owned(), "instance.group-id".to_owned()),
        ("Filter.1.Value.1".to_owned(), group),
    ];
    let (_, body) = front::ask(shared, &call.region, "ec2", "DescribeInstances", &filter).await;
    let inner = shared.inner();
    let mut parts = body.split("<instanceId>").skip(1);
    parts.any(|part| {
        let id = part.split('<').next().unwrap_or_default();
        let ended = part.contains("<name>terminated</name>");
        !ended || inner.gaps.instances.get(id).is_some_and(|extra| extra.ending > 0)
    })
}

fn console(shared: &Shared, call: &Call) -> Answer {
    let id = call.parameter("InstanceId").unwrap_or_default();
    let mut inner = shared.inner();
    let shown = match inner.gaps.instances.get_mut(id) {
        Some(extra) if extra.silent > 0 => {
            extra.silent -= 1;
            EARLY.to_owned()
        }
        _ => format!("{EARLY}{}", inner.console),
    };
    let encoded = base64::engine::general_purpose::STANDARD.encode(shown);
    let body = format!(
        "<GetConsoleOutputResponse xmlns=\"http://ec2.amazonaws.com/doc/2016-11-15/\"><instanceId>{id}</instanceId>\
         <timestamp>2026-11-21T10:00:00.000Z</timestamp><output>{encoded}</output></GetConsoleOutputResponse>"
    );
    (200, body)
}

/// A session that carries SSH, to an instance that runs, has a role and has told Systems Manager of itself.
async fn start_session(shared: &Shared, call: &Call) -> Answer {
    let refuse = |code: &str, message: &str| refusal("ssm", 400, code, message);
    let target = call.parameter("Target").unwrap_or_default().to_owned();
    if call.parameter("DocumentName") != Some("AWS-StartSSHSession") {
        return refuse("InvalidDocument", "expected AWS-StartSSHSession");
    }
    if call.parameter("Parameters") != Some(r#"{"portNumber":["22"]}"#) {
        return refuse("ValidationException", "expected the port of SSH");
    }
    let named = [("InstanceId.1".to_owned(), target.clone())];
    let (status, body) = front::ask(shared, &call.region, "ec2", "DescribeInstances", &named).await;
    let mut inner = shared.inner();
    let known = inner.gaps.instances.get_mut(&target).is_some_and(|extra| {
        let known = extra.unconnected == 0;
        extra.unconnected = 0;
        known
    });
    if status != 200 || !known || !body.contains(">running<") || !body.contains("<iamInstanceProfile>") {
        return refuse("TargetNotConnected", &format!("{target} is not connected."));
    }
    let session = serde_json::json!({
        "SessionId": "keyferry-0123456789abcdef0",
        "TokenValue": format!("token of {target}"),
        "StreamUrl": format!("wss://ssmmessages.{}.amazonaws.com/v1/data-channel/keyferry", call.region),
    });
    (200, session.to_string())
}

/// A key that counts for the next logins, in place of the one before it.
fn send_key(shared: &Shared, call: &Call, answer: Answer) -> Answer {
    if let (Some(path), Some(key)) = (&shared.inner().admits, call.parameter("SSHPublicKey")) {
        std::fs::write(path, format!("{key}\n")).expect("a file of the test");
    }
    answer
}

/// `NAME.1`, `NAME.2`, …
fn numbered(parameters: &Parameters, name: &str) -> Vec<String> {
    let belongs = |key: &str| key.strip_prefix(name).is_some_and(|rest| rest.starts_with('.'));
    parameters.iter().filter(|(key, _)| belongs(key)).map(|(_, value)| value.clone()).collect()
}
