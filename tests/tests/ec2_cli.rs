//! `keyferry host` and the scripts named like upstream's, against EC2 as moto imitates it, as an operator types them.

#![expect(clippy::unwrap_used, reason = "a test may stop at once")]

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use e2e::aws::{Aws, Call, Fault};
use e2e::{Finished, answer, finish, program, shell_blocks};
use serde_json::Value;
use tempfile::TempDir;

const REGION: &str = "us-east-1";
const DEADLINE: Duration = Duration::from_secs(120);

/// A home directory, and EC2.
struct Operator {
    home: TempDir,
    aws: Aws,
}

impl Operator {
    fn new() -> Option<Self> {
        let aws = Aws::start()?;
        Some(Self { home: tempfile::tempdir().unwrap(), aws })
    }

    fn directory(&self, name: &str) -> PathBuf {
        let directory = self.home.path().join(name);
        std::fs::create_dir_all(&directory).unwrap();
        directory
    }

    fn surroundings(&self, command: &mut Command, directory: &Path) {
        command.current_dir(directory).env_clear().env("HOME", self.home.path());
        command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        command.envs(self.aws.environment()).env("AWS_REGION", REGION).env("AWS_MAX_ATTEMPTS", "1");
        command.env("KEYFERRY_ADDRESS_SERVICE", self.aws.endpoint()).stdin(Stdio::null());
    }

    fn command(&self, directory: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new(program("keyferry"));
        command.arg("host").args(arguments);
        self.surroundings(&mut command, directory);
        command
    }

    fn run(&self, directory: &Path, arguments: &[&str]) -> Finished {
        finish(self.command(directory, arguments), DEADLINE)
    }

    fn done(&self, directory: &Path, arguments: &[&str]) -> String {
        answer(self.command(directory, arguments), DEADLINE)
    }

    /// Runs a script of the project with these variables.
    fn script(&self, directory: &Path, name: &str, variables: &[(&str, &str)]) -> Finished {
        let mut command = Command::new("bash");
        command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts").join(name));
        self.surroundings(&mut command, directory);
        command.env_remove("AWS_REGION").env("KEYFERRY", self.without_ssh()).envs(variables.iter().copied());
        finish(command, DEADLINE)
    }

    /// `keyferry`, except that nothing is set up over SSH: there is no machine behind the address.
    fn without_ssh(&self) -> PathBuf {
        let path = self.home.path().join("keyferry");
        let real = program("keyferry");
        let text = format!(
            "#!/bin/sh\nif [ \"$1 $2\" = 'host setup' ]; then echo \"set up: $*\"; else exec {} \"$@\"; fi\n",
            real.display()
        );
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
        path
    }

    /// What an `up` asks, in order; its host is removed again.
    fn up_calls(&self) -> Vec<Call> {
        let directory = self.directory("calls");
        self.aws.forget_calls();
        self.done(&directory, &["up", "--yes"]);
        let calls = self.aws.calls();
        self.done(&directory, &["down", "--yes"]);
        self.aws.forget_calls();
        calls
    }

    fn left(&self) -> Vec<String> {
        self.aws.inventory(REGION)
    }
}

fn kinds(lines: &[String]) -> Vec<&str> {
    lines.iter().map(|line| line.split(' ').next().unwrap()).collect()
}

const ONE_HOST: [&str; 4] = ["instance", "key-pair", "security-group", "volume"];

#[test]
fn from_up_to_nothing_left() {
    let Some(operator) = Operator::new() else { return };
    let directory = operator.directory("host");
    let asked = operator.run(&directory, &["up"]);
    assert_eq!(asked.code, Some(2), "without a terminal nothing that costs is done: {}", asked.stderr);
    assert!(asked.stderr.contains("(costs money)") && asked.stderr.contains("--yes"), "{}", asked.stderr);
    assert_eq!(operator.left(), Vec::<String>::new());
    assert!(!directory.join(".keyferry/host_key").exists());

    let made = operator.done(&directory, &["up", "--yes"]);
    assert!(made.contains("public ip:   203.0.113.10\n") && made.contains("enclaves:    on\n"), "{made}");
    assert!(made.contains("host key:    SHA256:E0CdEGNX"), "{made}");
    let key = std::fs::metadata(directory.join(".keyferry/host_key")).unwrap();
    assert_eq!(key.permissions().mode() & 0o7777, 0o600);

    let status: Value = serde_json::from_str(&operator.done(&directory, &["status", "--json"])).unwrap();
    assert_eq!((&status["state"], &status["user"]), (&"running".into(), &"ec2-user".into()));
    let listed = operator.done(&operator.directory("elsewhere"), &["list"]);
    let id = status["instanceId"].as_str().unwrap();
    assert!(
        listed.starts_with(&format!("{id}  nitro-enclave-host  c5.xlarge  running  203.0.113.10  ")),
        "{listed}"
    );

    // What the surroundings say does not lead away from the host.
    let mut moved = operator.command(&directory, &["down", "--dry-run"]);
    moved.env("AWS_REGION", "eu-west-1");
    let dry = finish(moved, DEADLINE);
    assert!(dry.stdout.starts_with(&format!("TERMINATE the instance {id} (c5.xlarge)")), "{dry:?}");
    assert_eq!(kinds(&operator.left()), ONE_HOST);

    let asked = operator.run(&directory, &["down"]);
    assert_eq!(asked.code, Some(2), "{}", asked.stderr);
    assert!(asked.stderr.contains("delete the security group keyferry-"), "{}", asked.stderr);
    operator.done(&directory, &["down", "--yes"]);
    assert_eq!(operator.left(), Vec::<String>::new());
    assert_eq!(operator.done(&directory, &["list"]), "");
    assert_eq!(operator.done(&directory, &["down"]), "there is nothing to remove\n");
    let status = operator.run(&directory, &["status"]);
    assert_eq!((status.code, status.stdout.as_str()), (Some(3), ""));
    assert!(status.stderr.contains("hint: make one with `keyferry host up`"), "{}", status.stderr);
}

/// The program is killed at every call of `up`, before the call happens and after it did; the next run makes one host of
/// what is there.
#[test]
fn a_run_after_a_kill_at_any_call_ends_in_one_host() {
    let Some(operator) = Operator::new() else { return };
    for (at, call) in operator.up_calls().iter().enumerate() {
        // What only reads has no effect that could be lost.
        let faults =
            if call.reads() { vec![Fault::HeldBefore] } else { vec![Fault::HeldBefore, Fault::HeldAfter] };
        for fault in faults {
            let shown = format!("call {at}, {}, {fault:?}", call.action);
            let directory = operator.directory(&format!("{at}-{fault:?}"));
            operator.aws.forget_calls();
            operator.aws.fail(at, fault);
            let mut killed = operator.command(&directory, &["up", "--yes"]);
            let mut killed = killed.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            operator.aws.wait_until_held();
            killed.kill().unwrap();
            assert_eq!(killed.wait().unwrap().code(), None, "{shown}: it was killed");
            operator.aws.forget_calls();

            operator.done(&directory, &["up", "--yes"]);
            assert_eq!(kinds(&operator.left()), ONE_HOST, "{shown}");
            operator.done(&directory, &["down", "--yes"]);
            assert_eq!(operator.left(), Vec::<String>::new(), "{shown}");
        }
    }
}

/// The same for `down`, at each call that changes something.
#[test]
fn a_down_after_a_kill_leaves_nothing() {
    let Some(operator) = Operator::new() else { return };
    let make = |name: &str| {
        let directory = operator.directory(name);
        operator.done(&directory, &["up", "--yes"]);
        operator.aws.forget_calls();
        directory
    };
    operator.done(&make("clean"), &["down", "--yes"]);
    let calls = operator.aws.calls();
    for (at, call) in calls.iter().enumerate().filter(|(_, call)| !call.reads()) {
        for fault in [Fault::HeldBefore, Fault::HeldAfter] {
            let shown = format!("call {at}, {}, {fault:?}", call.action);
            let directory = make(&format!("{at}-{fault:?}"));
            operator.aws.fail(at, fault);
            let mut killed = operator.command(&directory, &["down", "--yes"]);
            let mut killed = killed.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            operator.aws.wait_until_held();
            killed.kill().unwrap();
            killed.wait().unwrap();
            operator.aws.forget_calls();
            operator.done(&directory, &["down", "--yes"]);
            assert_eq!(operator.left(), Vec::<String>::new(), "{shown}");
        }
    }
}

#[test]
fn what_cannot_work_is_said_in_one_line_with_a_next_step() {
    let Some(operator) = Operator::new() else { return };
    let directory = operator.directory("host");
    let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    // A key pair whose private half is gone, and a region without a default VPC.
    let _made = operator.aws.ask(REGION, "CreateKeyPair", &[pair("KeyName", "lost")]);
    let vpcs = operator.aws.ask("eu-west-1", "DescribeVpcs", &[]);
    let vpc = vpcs.split("<vpcId>").nth(1).unwrap().split('<').next().unwrap();
    let subnets = operator.aws.ask("eu-west-1", "DescribeSubnets", &[]);
    for subnet in subnets.split("<subnetId>").skip(1) {
        let id = subnet.split('<').next().unwrap();
        let _gone = operator.aws.ask("eu-west-1", "DeleteSubnet", &[pair("SubnetId", id)]);
    }
    let _gone = operator.aws.ask("eu-west-1", "DeleteVpc", &[pair("VpcId", vpc)]);

    let check = |finished: Finished, code: i32, error: &str, hint: &str| {
        assert_eq!(finished.code, Some(code), "{error}: {}", finished.stderr);
        assert_eq!(finished.stdout, "", "{error}");
        let lines: Vec<&str> = finished.stderr.lines().filter(|line| !line.contains(" INFO ")).collect();
        let line = lines.iter().find(|line| line.starts_with("error: ")).unwrap();
        assert!(line.contains(error), "{line}");
        assert!(
            lines.iter().any(|line| line.starts_with("hint: ") && line.contains(hint)),
            "{}",
            finished.stderr
        );
    };
    for (arguments, code, error, hint) in [
        (&["--region", "us-east-1a"][..], 2, "that is a zone; its region is us-east-1", ""),
        (
            &["--region", "mars-north-1"],
            3,
            "InvalidClientTokenId",
            "the region mars-north-1 is the right one and enabled",
        ),
        (
            &["--region", "eu-west-1"],
            3,
            "no default VPC in eu-west-1",
            "give --subnet, or make a default VPC",
        ),
        (
            &["--key-name", "lost"],
            3,
            "key pair lost exists in EC2, and its private key ",
            "choose another --key-name",
        ),
        (
            &["-t", "t3.xlarge"],
            3,
            "instance type t3.xlarge: AWS does not support enclaves on it",
            "c5.xlarge",
        ),
        (
            &["-t", "zz9.plural"],
            3,
            "instance type zz9.plural: there is none of this name in us-east-1",
            "c5.xlarge",
        ),
        (&["--image", "ami-00000000000000000"], 3, "InvalidAMIID.NotFound", "check --image"),
        (&["--subnet", "subnet-00000000000000000"], 3, "InvalidSubnetID.NotFound", "check --subnet"),
    ] {
        let finished = operator.run(&directory, &[&["up", "--yes"], arguments].concat());
        match code {
            2 => assert!(finished.stderr.contains(error) && finished.code == Some(2), "{}", finished.stderr),
            _ => check(finished, code, error, hint),
        }
    }
    let wrong = operator.run(&directory, &["up", "--yes", "--ssh-from", "0.0.0.0/0"]);
    assert!(wrong.stderr.contains("that is everybody"), "{}", wrong.stderr);

    let launch = |message: (&'static str, &'static str)| {
        let call =
            operator.up_calls().iter().position(|it| it.action == "RunInstances" && !it.reads()).unwrap();
        operator.aws.fail(call, Fault::Refused(400, message.0, message.1));
        let directory = operator.directory(message.0);
        let finished = operator.run(&directory, &["up", "--yes"]);
        operator.aws.forget_calls();
        operator.done(&directory, &["down", "--yes"]);
        operator.aws.forget_calls();
        finished
    };
    let quota = "You have requested more vCPU capacity than your current vCPU limit of 0 allows";
    check(
        launch(("VcpuLimitExceeded", quota)),
        3,
        "VcpuLimitExceeded: You have requested",
        "quota L-1216C47A",
    );
    let token = "The security token included in the request is expired";
    operator.aws.fail(0, Fault::Refused(400, "ExpiredToken", token));
    check(operator.run(&directory, &["up", "--yes"]), 3, "ExpiredToken", "sign in again");
    operator.aws.forget_calls();

    let mut nowhere = operator.command(&directory, &["list"]);
    nowhere.env("AWS_ENDPOINT_URL", "http://127.0.0.1:1").env("AWS_REGION", "mars-north-1");
    check(
        finish(nowhere, DEADLINE),
        4,
        "no answer from AWS in mars-north-1",
        "check that mars-north-1 is a region",
    );
    let mut nobody = operator.command(&directory, &["list"]);
    nobody.env_remove("AWS_ACCESS_KEY_ID").env_remove("AWS_SECRET_ACCESS_KEY");
    check(finish(nobody, DEADLINE), 3, "no AWS credentials: ", "aws sso login");
    let mut nowhere = operator.command(&directory, &["list"]);
    nowhere.env_remove("AWS_REGION");
    check(finish(nowhere, DEADLINE), 2, "no AWS region", "give --region");
    let left: Vec<_> = operator.left();
    assert_eq!(left, ["key-pair lost"]);
}

/// A profile that signs in by SSO, whose token has expired.
#[test]
fn an_expired_sign_in_is_said_before_anything_is_asked() {
    let Some(operator) = Operator::new() else { return };
    let directory = operator.directory("host");
    let config = operator.directory(".aws");
    let profile = "[profile work]\nsso_session = corp\nsso_account_id = 123456789012\nsso_role_name = admin\n\
                   region = us-east-1\n[sso-session corp]\nsso_region = us-east-1\n\
                   sso_start_url = https://corp.awsapps.com/start\n";
    std::fs::write(config.join("config"), profile).unwrap();
    let cache = operator.directory(".aws/sso/cache");
    // Named by the SHA-1 of the session's name.
    let token = r#"{"accessToken":"old","expiresAt":"2020-01-01T00:00:00Z","region":"us-east-1"}"#;
    std::fs::write(cache.join("ee0bfd2552fbd840c02cc48b6e823320543c450f.json"), token).unwrap();
    let mut command = operator.command(&directory, &["up", "--yes", "--profile", "work"]);
    command.env_remove("AWS_ACCESS_KEY_ID").env_remove("AWS_SECRET_ACCESS_KEY");
    let finished = finish(command, DEADLINE);
    assert_eq!(finished.code, Some(3), "{}", finished.stderr);
    let line = finished.stderr.lines().find(|line| line.starts_with("error: ")).unwrap();
    assert!(line.starts_with("error: no AWS credentials: "), "{line}");
    assert!(finished.stderr.contains("hint: sign in again with `aws sso login`"), "{}", finished.stderr);
    assert_eq!(operator.aws.calls(), Vec::<Call>::new());
}

/// The guides' own command lines.
#[test]
fn the_scripts_take_the_guides_variables() {
    let Some(operator) = Operator::new() else { return };
    let directory = operator.directory("host");
    let variables =
        [("REGION", REGION), ("INSTANCE_TYPE", "m5.xlarge"), ("KEY_NAME", "dstack-nitro-enclave-key")];
    let deployed = operator.script(&directory, "deploy_host.sh", &variables);
    assert_eq!(deployed.code, Some(0), "{}", deployed.stderr);
    assert!(deployed.stdout.contains("set up: host setup"), "{}", deployed.stdout);
    assert!(directory.join("nitro-enclave-key.pem").is_file());
    let file: Value =
        serde_json::from_slice(&std::fs::read(directory.join("deployment.json")).unwrap()).unwrap();
    assert_eq!(file["public_ip"], "203.0.113.10");
    assert!(operator.left().contains(&"key-pair dstack-nitro-enclave-key".to_owned()));

    let listed = operator.script(&directory, "list_ec2.sh", &[]);
    assert_eq!(listed.code, Some(0), "{}", listed.stderr);
    let id = file["instance_id"].as_str().unwrap();
    assert!(
        listed.stdout.starts_with(&format!("{id}  nitro-enclave-host  m5.xlarge  running  ")),
        "{listed:?}"
    );
    operator.done(&directory, &["down", "--yes"]);
    assert_eq!(operator.left(), Vec::<String>::new());
    assert!(!directory.join("nitro-enclave-key.pem").exists());
}

/// The lines of docs/ec2-host.md, with names that exist.
#[test]
fn the_documented_ways_to_a_host_work_as_printed() {
    const GUIDE: &str = include_str!("../../docs/ec2-host.md");
    let Some(operator) = Operator::new() else { return };
    let shell = |directory: &Path, line: &str| {
        let mut command = Command::new("sh");
        command.args(["-euc", line]);
        operator.surroundings(&mut command, directory);
        let programs = program("keyferry");
        command.env("PATH", format!("{}:/usr/bin:/bin", programs.parent().unwrap().display()));
        let finished = finish(command, DEADLINE);
        assert_eq!(finished.code, Some(0), "{line}: {}", finished.stderr);
        let record = std::fs::read(directory.join("keyferry-host.json")).unwrap();
        serde_json::from_slice::<Value>(&record).unwrap()
    };
    operator.aws.make_instance_profile("NAME");
    let closed = shell_blocks(GUIDE, "## No open port, or no key")[0];
    let [ssm, connect] = closed.lines().collect::<Vec<_>>()[..] else { panic!("{closed}") };
    let bare = |line: &'static str| line.split('#').next().unwrap().trim_end();
    let both = format!("{} {}", bare(ssm), bare(connect).strip_prefix("keyferry host up").unwrap());
    for (name, line, expected) in [
        ("ssm", bare(ssm), (true, false)),
        ("connect", bare(connect), (false, true)),
        ("both", &both, (true, true)),
    ] {
        let directory = operator.directory(name);
        let record = shell(&directory, &format!("{line} --yes"));
        let is = |name: &str| record["aws"][name].as_bool().unwrap();
        assert_eq!((is("session_manager"), is("instance_connect")), expected, "{line}");
        assert_eq!(record["private_key"].is_null(), expected.1, "{line}");
        assert_eq!(directory.join(".keyferry/host_key").exists(), !expected.1, "{line}");
        operator.done(&directory, &["down", "--yes"]);
    }
    let ports = operator.aws.calls().into_iter().filter(|it| it.action == "AuthorizeSecurityGroupIngress");
    assert_eq!(ports.count(), 1, "with Systems Manager no port is opened");

    // An instance of somebody else's, and the key that logs in there.
    let other = operator.directory("other");
    operator.done(&other, &["up", "--yes"]);
    std::fs::rename(other.join(".keyferry/host_key"), operator.directory(".ssh").join("id_ed25519")).unwrap();
    let images = operator.aws.ask(REGION, "DescribeInstances", &[]);
    let text = |xml: &str, name: &str| {
        xml.split(&format!("<{name}>")).nth(1).unwrap().split('<').next().unwrap().to_owned()
    };
    let launch = [("ImageId", text(&images, "imageId")), ("InstanceType", "m5.xlarge".into())];
    let launch = launch.into_iter().chain([("MinCount", "1".into()), ("MaxCount", "1".into())]);
    let launch: Vec<_> = launch.map(|(name, value)| (name.to_owned(), value)).collect();
    let instance = text(&operator.aws.ask(REGION, "RunInstances", &launch), "instanceId");
    let line = shell_blocks(GUIDE, "## An instance that is there")[0].trim_end();
    assert!(line.contains("i-0123456789abcdef0") && line.lines().count() == 1, "{line}");
    let record = shell(
        &operator.directory("adopted"),
        &format!("{} --yes", line.replace("i-0123456789abcdef0", &instance)),
    );
    assert_eq!(record["instance_id"], instance);
}

/// The key pair, and the RSA key, that EC2 made for upstream's script.
#[test]
fn a_key_pair_of_upstream_s_script_is_used_and_stays() {
    let Some(operator) = Operator::new() else { return };
    let directory = operator.directory("host");
    let name = ("KeyName".to_owned(), "nitro-enclave-key".to_owned());
    let made = operator.aws.ask(REGION, "CreateKeyPair", &[name]);
    let key = made.split("<keyMaterial>").nth(1).unwrap().split("</keyMaterial>").next().unwrap();
    assert!(key.starts_with("-----BEGIN RSA PRIVATE KEY-----"), "{key}");
    let path = directory.join("nitro-enclave-key.pem");
    std::fs::write(&path, key).unwrap();
    std::fs::set_permissions(&path, Permissions::from_mode(0o400)).unwrap();

    let deployed = operator.script(&directory, "deploy_host.sh", &[]);
    assert_eq!(deployed.code, Some(0), "{}", deployed.stderr);
    assert!(!operator.aws.calls().iter().any(|call| call.action == "ImportKeyPair"));
    let record = std::fs::read(directory.join("keyferry-host.json")).unwrap();
    let record: Value = serde_json::from_slice(&record).unwrap();
    assert_eq!(record["private_key"], "nitro-enclave-key.pem");
    operator.done(&directory, &["down", "--yes"]);
    assert_eq!(operator.left(), ["key-pair nitro-enclave-key"]);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), key);
}

/// The calls of upstream's script and ours, beside each other: equal, stricter, or different for a reason.
#[test]
fn the_requests_are_upstream_s_or_stricter() {
    let capture = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../shared/reference/captures/aws-deploy-host-awscli1.45.jsonl");
    let Ok(capture) = std::fs::read_to_string(&capture) else {
        println!("skipped: no capture of upstream's requests beside the project");
        return;
    };
    let Some(operator) = Operator::new() else { return };
    let directory = operator.directory("host");
    let deployed = operator.script(&directory, "deploy_host.sh", &[("KEY_NAME", "cap-key")]);
    assert_eq!(deployed.code, Some(0), "{}", deployed.stderr);
    let ours = operator.aws.calls();
    let find =
        |action: &str| ours.iter().find(|call| call.action == action && call.parameter("DryRun").is_none());

    for line in capture.lines() {
        let theirs: Value = serde_json::from_str(line).unwrap();
        let theirs = theirs.as_object().unwrap();
        let action = theirs["Action"].as_str().unwrap();
        let Some(call) = find(action) else {
            assert!(NOT_CALLED.iter().any(|(left_out, _)| *left_out == action), "{action} is not called");
            continue;
        };
        for (name, value) in theirs.iter().filter(|(name, _)| !["Action", "Version"].contains(&name.as_str()))
        {
            let reason = DIFFERENT.iter().find(|(of, parameter, _)| *of == action && parameter == name);
            let value = value.as_str().unwrap();
            match (call.parameter(name), reason) {
                (Some(same), None) => assert_eq!(same, value, "{action} {name}"),
                (None, None) => panic!("{action} lacks {name}={value}"),
                (Some(same), Some((_, _, why))) => {
                    assert_ne!(same, value, "{action} {name} is no longer different: {why}")
                }
                (None, Some(_)) => {}
            }
        }
    }
    for (action, _) in NOT_CALLED {
        assert!(find(action).is_none(), "{action} is called now");
    }
    // What upstream leaves open.
    let launch = find("RunInstances").unwrap();
    for (name, value) in [
        ("MetadataOptions.HttpTokens", "required"),
        ("BlockDeviceMapping.1.Ebs.Encrypted", "true"),
        ("BlockDeviceMapping.1.Ebs.DeleteOnTermination", "true"),
    ] {
        assert_eq!(launch.parameter(name), Some(value));
        assert!(!capture.contains(name));
    }
    let rules: Vec<_> = ours.iter().filter(|call| call.action == "AuthorizeSecurityGroupIngress").collect();
    assert_eq!(rules.len(), 1);
    operator.done(&directory, &["down", "--yes"]);
}

/// Calls of upstream's that ours does without, and why.
const NOT_CALLED: [(&str, &str); 3] = [
    ("CreateKeyPair", "the private key is made here and never travels: its public half is imported"),
    (
        "DescribeImages",
        "AWS's public parameter names the image; the newest by date is one of three kernels by chance",
    ),
    ("TerminateInstances", "the capture ends the instance by hand; here `host down` does"),
];

/// Parameters whose values differ, and why.
const DIFFERENT: [(&str, &str, &str); 12] = [
    ("DescribeSubnets", "Filter.1.Value.1", "the VPC of this run"),
    ("DescribeSecurityGroups", "Filter.1.Value.1", "the VPC of this run"),
    (
        "DescribeSecurityGroups",
        "Filter.2.Value.1",
        "a group of its own: what shares the default group could reach the host",
    ),
    ("DescribeKeyPairs", "KeyName.1", "asked by a filter, which answers nothing instead of an error"),
    ("AuthorizeSecurityGroupIngress", "GroupId", "a group of its own"),
    ("RunInstances", "ImageId", "AWS's public parameter, resolved in the launch"),
    ("RunInstances", "SecurityGroupId.1", "a group of its own"),
    ("RunInstances", "SubnetId", "one in a zone that has the instance type"),
    ("RunInstances", "TagSpecification.1.Tag.1.Key", "more tags, and the name is not the first"),
    ("RunInstances", "TagSpecification.1.Tag.1.Value", "more tags, and the name is not the first"),
    ("RunInstances", "ClientToken", "recorded before the call, so that a repetition gives the same instance"),
    ("DescribeInstances", "InstanceId.1", "the instance of this run, looked for by its tag first"),
];
