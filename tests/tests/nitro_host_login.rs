//! Every way to log in to a Nitro host, at a real OpenSSH server: the kinds of keys that users have, keys in the hands of an
//! SSH agent, keys that live for one login, and no open port.
//!
//! They need root, for namespaces, and OpenSSH's server, and say so where one is missing.

#![allow(clippy::unwrap_used, reason = "a set-up that fails is a failed test")]
#![expect(clippy::print_stdout, reason = "a test that is skipped says why")]

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use e2e::aws::{Aws, Call, Fault};
use e2e::{Finished, NitroHost, finish, program};

const REGION: &str = "us-east-1";
const DEADLINE: Duration = Duration::from_secs(120);

/// Nothing where something is missing; the test says so.
fn machine() -> Option<NitroHost> {
    NitroHost::start().map_err(|reason| println!("skipped: {reason}")).ok()
}

/// Runs `true` on the host with this key, and without an SSH agent.
fn log_in(host: &NitroHost, key: &Path) -> Finished {
    let mut command = Command::new(program("keyferry"));
    command.args(["host", "ssh", "--ssh-key"]).arg(key).args(["--", "true"]).current_dir(host.directory());
    command.env_remove("SSH_AUTH_SOCK");
    finish(command, DEADLINE)
}

fn ssh_keygen(arguments: &[&str]) {
    let status = Command::new("ssh-keygen").arg("-q").args(arguments).status().unwrap();
    assert!(status.success(), "ssh-keygen {arguments:?}: {status}");
}

/// A new key, which the host lets in.
fn admitted(host: &NitroHost, name: &str, arguments: &[&str]) -> String {
    let path = host.text(name);
    ssh_keygen(&[arguments, &["-N", "", "-f", &path]].concat());
    host.admit(&host.read(&format!("{name}.pub")));
    path
}

#[test]
fn each_kind_of_key_logs_in_in_each_form() {
    let Some(host) = machine() else { return };
    for (number, (arguments, begins)) in [
        (&["-t", "rsa", "-b", "2048", "-m", "PEM"][..], "-----BEGIN RSA PRIVATE KEY-----"),
        (&["-t", "rsa", "-b", "2048", "-m", "PKCS8"], "-----BEGIN PRIVATE KEY-----"),
        (&["-t", "rsa", "-b", "3072"], "-----BEGIN OPENSSH PRIVATE KEY-----"),
        (&["-t", "ecdsa", "-b", "384", "-m", "PKCS8"], "-----BEGIN PRIVATE KEY-----"),
        (&["-t", "ecdsa", "-b", "256"], "-----BEGIN OPENSSH PRIVATE KEY-----"),
        (&["-t", "ed25519"], "-----BEGIN OPENSSH PRIVATE KEY-----"),
    ]
    .into_iter()
    .enumerate()
    {
        let path = admitted(&host, &format!("key{number}"), arguments);
        assert!(fs::read_to_string(&path).unwrap().starts_with(begins), "{arguments:?}");
        let told = log_in(&host, Path::new(&path));
        assert_eq!(told.code, Some(0), "{arguments:?}: {told:?}");
        // Not whoever comes.
        host.admit(&host.read("other_key.pub"));
        let told = log_in(&host, Path::new(&path));
        assert_eq!(told.code, Some(3), "{arguments:?}: {told:?}");
        assert!(told.stderr.contains("login as ec2-user refused"), "{arguments:?}: {told:?}");
    }
}

#[test]
fn a_key_with_a_passphrase_logs_in_by_the_ssh_agent() {
    let Some(host) = machine() else { return };
    for (name, arguments) in [("rsa", &["-t", "rsa", "-b", "2048"][..]), ("ed25519", &["-t", "ed25519"])] {
        let path = admitted(&host, name, arguments);
        let public = format!("{path}.pub");
        // As `log_in`, with an agent that ends with the script. The agent gets the key before its file has a passphrase.
        let with_agent = |script: &str| {
            let mut command = Command::new("ssh-agent");
            command.args(["sh", "-euc", script]).current_dir(host.directory());
            command.env("KEYFERRY", program("keyferry")).env("KEY", &path);
            finish(command, DEADLINE)
        };
        let told = with_agent(
            "ssh-add -q $KEY; ssh-keygen -q -p -N passphrase -f $KEY >/dev/null
             for key in $KEY $KEY.pub; do $KEYFERRY host ssh --ssh-key $key -- echo in; done",
        );
        assert_eq!((told.code, told.stdout.as_str()), (Some(0), "in\nin\n"), "{told:?}");
        for key in [&path, &public] {
            let told = log_in(&host, Path::new(key));
            assert_eq!(told.code, Some(2), "{told:?}");
            assert!(told.stderr.contains("no SSH agent can be asked for it"), "{told:?}");
            let told = with_agent(&format!("$KEYFERRY host ssh --ssh-key {key} -- true"));
            assert_eq!(told.code, Some(2), "{told:?}");
            assert!(told.stderr.contains("the SSH agent does not have it"), "{told:?}");
        }
    }
}

/// An operator, and AWS.
struct Operator {
    directory: tempfile::TempDir,
    aws: Aws,
    variables: Vec<(&'static str, String)>,
}

impl Operator {
    fn new(aws: Aws) -> Self {
        let mut variables = aws.environment().to_vec();
        variables.push(("AWS_REGION", REGION.to_owned()));
        variables.push(("AWS_MAX_ATTEMPTS", "1".to_owned()));
        variables.push(("KEYFERRY_ADDRESS_SERVICE", aws.endpoint()));
        Self { directory: tempfile::tempdir().unwrap(), aws, variables }
    }

    fn set(&mut self, name: &'static str, value: impl Into<String>) {
        self.variables.retain(|(known, _)| *known != name);
        self.variables.push((name, value.into()));
    }

    fn ask(&self, arguments: &[&str]) -> Finished {
        let mut command = Command::new(program("keyferry"));
        command.arg("host").args(arguments).current_dir(self.directory.path()).env_clear();
        command.env("HOME", self.directory.path()).envs(self.variables.iter().map(|(name, it)| (name, it)));
        command.stdin(Stdio::null());
        finish(command, DEADLINE)
    }

    fn done(&self, arguments: &[&str]) -> Finished {
        let finished = self.ask(arguments);
        assert_eq!(finished.code, Some(0), "{arguments:?}: {finished:?}");
        finished
    }

    /// How often something was asked of AWS, and with what.
    fn calls(&self, action: &str) -> Vec<Call> {
        self.aws.calls().into_iter().filter(|call| call.action == action && !call.reads()).collect()
    }

    fn refused(&self, code: i32, error: &str, hint: &str) {
        let told = self.ask(&["ssh", "--", "true"]);
        assert_eq!(told.code, Some(code), "{told:?}");
        assert!(told.stderr.contains(error), "expected {error:?}: {told:?}");
        assert!(
            told.stderr.lines().any(|line| line.starts_with("hint: ") && line.contains(hint)),
            "{told:?}"
        );
    }
}

#[test]
fn a_host_without_an_open_port_is_reached_through_systems_manager() {
    let programs = program("session-manager-plugin");
    let programs = programs.parent().unwrap();
    let (Some(aws), Some(cli)) = (Aws::start(), Aws::cli(programs)) else { return };
    let Some(mut host) = machine() else { return };
    // The address that EC2 tells leads nowhere; only the plugin knows the way.
    aws.set_host_key(&host.host_key());
    aws.make_instance_profile("with-ssm");
    let mut operator = Operator::new(aws);
    let lock = host.text("session.lock");
    for (name, value) in cli
        .iter()
        .cloned()
        .chain([("SESSION_LEADS_TO", host.address().to_string()), ("SESSION_LOCK", lock.clone())])
    {
        operator.set(name, value);
    }

    operator.done(&["up", "--ssm", "--instance-profile", "with-ssm", "--yes"]);
    assert_eq!(operator.calls("AuthorizeSecurityGroupIngress"), Vec::<Call>::new());
    host.admit(&operator.aws.login_key());
    // Not connected yet at the first time.
    assert_eq!(operator.done(&["ssh", "--", "echo", "through"]).stdout, "through\n");
    assert_eq!(operator.calls("StartSession").len(), 2);
    let proxy = program("host-proxy").display().to_string();
    let ready = operator.done(&["setup", "--host-proxy", &proxy]).stdout;
    assert!(ready.starts_with("ready: Nitro CLI 1.4.2, 2 processors"), "{ready}");
    assert_eq!(operator.done(&["doctor"]).stdout, "nothing is wrong with this host\n");
    let log = operator.done(&["logs", "--allocator"]).stdout;
    assert!(log.contains("Successfully allocated"), "{log}");
    // OpenSSH's client goes the same way; its shell ends with its input.
    let steps = host.steps();
    operator.done(&["ssh"]);
    assert_eq!(host.steps(), steps + 1);

    let refusal = "not authorized to perform: ssm:StartSession";
    operator.aws.forget_calls();
    operator.aws.fail(0, Fault::Refused(400, "AccessDeniedException", refusal));
    operator.refused(3, refusal, "AWS-StartSSHSession");
    operator.aws.forget_calls();
    host.replace();
    operator.refused(3, "shows the host key SHA256:", "was not used");
    // Nothing of a session is left when its command has ended, or soon after.
    let mut wait = Command::new("flock");
    wait.args(["--timeout", "60", &lock, "true"]);
    assert!(wait.status().unwrap().success(), "a session is still there");

    operator.set("PATH", cli[0].1.replacen(&programs.display().to_string(), "/nowhere", 1));
    operator.refused(2, "the AWS CLI does not find session-manager-plugin", "install it: https://");
    operator.set("PATH", "/nowhere");
    operator.refused(2, "the AWS CLI, aws, cannot be started", "install the AWS CLI");
    operator.done(&["down", "--yes"]);
    assert_eq!(operator.aws.inventory(REGION), Vec::<String>::new());
}

#[test]
fn a_new_key_is_let_in_for_each_connection_and_none_is_kept() {
    let Some(aws) = Aws::start() else { return };
    let host = match NitroHost::launch() {
        Ok(host) => host,
        Err(reason) => return println!("skipped: {reason}"),
    };
    aws.set_host_key(&host.host_key());
    aws.set_public_ip(host.address().ip());
    aws.admit_to(host.path("authorized_keys"));
    let operator = Operator::new(aws);

    operator.done(&["up", "--instance-connect", "--yes"]);
    let there = operator.aws.inventory(REGION);
    assert!(!there.iter().any(|it| it.starts_with("key-pair")), "{there:?}");
    let launch = operator.calls("RunInstances").pop().unwrap();
    assert_eq!(launch.parameter("KeyName"), None);
    for _ in 0..2 {
        assert_eq!(operator.done(&["ssh", "--", "echo", "in"]).stdout, "in\n");
    }
    let sent = operator.calls("SendSSHPublicKey");
    let [first, second] = &sent[..] else { panic!("{sent:?}") };
    assert_eq!(first.parameter("InstanceOSUser"), Some("ec2-user"));
    assert!(first.parameter("SSHPublicKey").unwrap().starts_with("ssh-ed25519 AAAA"));
    assert_ne!(first.parameter("SSHPublicKey"), second.parameter("SSHPublicKey"));
    for folder in [operator.directory.path().to_owned(), operator.directory.path().join(".keyferry")] {
        for file in fs::read_dir(folder).unwrap().map(|it| it.unwrap().path()).filter(|it| it.is_file()) {
            assert!(!fs::read_to_string(&file).unwrap().contains("PRIVATE KEY"), "{}", file.display());
        }
    }

    let shell = operator.ask(&["ssh"]);
    assert_eq!(shell.code, Some(2), "{shell:?}");
    assert!(shell.stderr.contains("a shell needs a key in a file"), "{shell:?}");
    operator.aws.forget_calls();
    operator.aws.fail(0, Fault::Refused(400, "AccessDeniedException", "not authorized"));
    operator.refused(3, "EC2 Instance Connect did not take the key", "ec2-instance-connect:SendSSHPublicKey");
    operator.aws.forget_calls();
    host.admit(&host.read("id_ed25519.pub"));
    operator.done(&["ssh", "--ssh-key", &host.text("id_ed25519"), "--", "true"]);
    assert_eq!(operator.calls("SendSSHPublicKey"), Vec::<Call>::new());
    operator.done(&["down", "--yes"]);
    assert_eq!(operator.aws.inventory(REGION), Vec::<String>::new());
}
