//! Every way to log in to a Nitro host, at a real OpenSSH server: the kinds of keys that users have, and keys in the hands of
//! an SSH agent.
//!
//! They need root, for namespaces, and OpenSSH's server, and say so where one is missing.

#![allow(clippy::unwrap_used, reason = "a set-up that fails is a failed test")]
#![expect(clippy::print_stdout, reason = "a test that is skipped says why")]

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use e2e::{Finished, NitroHost, finish, program};

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
