//! A host on EC2, as moto imitates it: what a fault at any call does to it, and that nothing is left behind.

#![expect(clippy::unwrap_used, reason = "a test may stop at once")]

use std::path::Path;
use std::time::Duration;

use aws_config::retry::RetryConfig;
use aws_config::timeout::TimeoutConfig;
use aws_config::{BehaviorVersion, Region};
use aws_credential_types::Credentials;
use cloud_provisioners::Error;
use cloud_provisioners::ec2_nitro::{
    Access, AwsError, Client, Deployment, ImageChoice, Instance, KernelLine, Observer, Patience, Refusal,
    Step, Wanted, default_key_file,
};
use cloud_provisioners::nitro_host::{REACH_FILE, Reach};
use e2e::aws::{Aws, Fault};
use serde_json::Value;

const REGION: &str = "us-east-1";

/// Answers come at once here, so a test waits only for what it makes late itself.
const PATIENCE: Patience = Patience {
    call: Duration::from_secs(20),
    instance: Duration::from_secs(60),
    console: Duration::from_secs(60),
    lost_launch: Duration::from_millis(200),
    first_pause: Duration::from_millis(2),
};

struct Silent;

impl Observer for Silent {
    fn step(&mut self, _number: usize, _total: usize, _step: &Step) {}
    fn made(&mut self, _kind: &str, _id: &str) {}
    fn gone(&mut self, _kind: &str, _id: &str) {}
    fn waiting(&mut self, _what: &str) {}
}

/// A client that gives a call `answered_in` time. Each call is made twice at most.
async fn client_in(aws: &Aws, region: &str, answered_in: Duration) -> Result<Client, AwsError> {
    let retries = RetryConfig::standard().with_max_attempts(2).with_initial_backoff(Duration::from_millis(1));
    let timeouts = TimeoutConfig::builder().operation_timeout(answered_in).build();
    let config = aws_config::defaults(BehaviorVersion::latest())
        .endpoint_url(aws.endpoint())
        .region(Region::new(region.to_owned()))
        .credentials_provider(Credentials::new("test", "test", None, None, "test"))
        .retry_config(retries)
        .timeout_config(timeouts)
        .load()
        .await;
    Client::new(config, PATIENCE).await
}

async fn client(aws: &Aws) -> Client {
    client_in(aws, REGION, PATIENCE.call).await.unwrap()
}

fn wanted(directory: &Path) -> Wanted {
    Wanted {
        region: REGION.into(),
        name: "nitro-enclave-host".into(),
        instance_type: "c5.xlarge".into(),
        image: ImageChoice::AmazonLinux2023(KernelLine::V6_1),
        subnet: None,
        access: Access::Ssh("203.0.113.7/32".parse().unwrap()),
        key_name: None,
        key_file: default_key_file(directory),
        volume_gib: 20,
        spot: false,
        user: None,
        host_key: None,
        adopt: None,
        instance_connect: false,
        profile: None,
    }
}

async fn up(client: &Client, directory: &Path, wanted: &Wanted) -> Result<Instance, Error> {
    let mut deployment = Deployment::open(directory)?;
    let plan = deployment.plan(client, wanted).await?;
    deployment.apply(client, &plan, &mut Silent).await
}

async fn down(client: &Client, directory: &Path) -> Result<(), Error> {
    if !Deployment::exists(directory) {
        return Ok(());
    }
    let deployment = Deployment::open(directory)?;
    let removal = deployment.removal(client).await?;
    deployment.remove(client, &removal, &mut Silent).await
}

/// Kinds of what is there.
fn kinds(aws: &Aws) -> Vec<String> {
    let lines = aws.inventory(REGION);
    lines.iter().map(|line| line.split(' ').next().unwrap().to_owned()).collect()
}

const ONE_HOST: [&str; 4] = ["instance", "key-pair", "security-group", "volume"];

/// Files in the host's directory, its own ones in `.keyferry` too.
fn files(directory: &Path) -> Vec<String> {
    let mut names = Vec::new();
    for directory in [directory.to_owned(), directory.join(".keyferry")] {
        let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap());
        let files = entries.filter(|entry| entry.file_type().unwrap().is_file());
        names.extend(files.map(|entry| entry.file_name().into_string().unwrap()));
    }
    names.retain(|name| name != "ec2.lock");
    names.sort();
    names
}

#[tokio::test]
async fn a_host_is_made_once_and_leaves_nothing() {
    let Some(aws) = Aws::start() else { return };
    let client = client(&aws).await;
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let instance = up(&client, directory, &wanted(directory)).await.unwrap();
    assert_eq!((instance.state.as_str(), instance.enclaves), ("running", true));
    assert_eq!(kinds(&aws), ONE_HOST);

    let reach = Reach::load(&directory.join(REACH_FILE)).unwrap();
    assert_eq!((reach.user.as_str(), reach.port), ("ec2-user", 22));
    assert_eq!(reach.host_key.fingerprint(), "SHA256:E0CdEGNX/P59E5j0tmy5Mfjkh/i8CWvExiqrEyoyIek");
    assert!(reach.private_key.unwrap().is_file());
    let upstream: Value =
        serde_json::from_slice(&std::fs::read(directory.join("deployment.json")).unwrap()).unwrap();
    assert_eq!(upstream, serde_json::json!({"instance_id": instance.id, "public_ip": "203.0.113.10"}));

    aws.forget_calls();
    assert_eq!(up(&client, directory, &wanted(directory)).await.unwrap().id, instance.id);
    assert!(aws.calls().iter().all(e2e::aws::Call::reads), "a host that is there needs no change");

    down(&client, directory).await.unwrap();
    assert_eq!(aws.inventory(REGION), Vec::<String>::new());
    assert_eq!(files(directory), Vec::<String>::new());
    down(&client, directory).await.unwrap();
}

#[tokio::test]
async fn the_launch_asks_for_what_is_safe() {
    let Some(aws) = Aws::start() else { return };
    let client = client(&aws).await;
    let directory = tempfile::tempdir().unwrap();
    let spot = Wanted { spot: true, ..wanted(directory.path()) };
    up(&client, directory.path(), &spot).await.unwrap();
    let calls = aws.calls();
    let launch = calls.iter().find(|call| call.action == "RunInstances" && !call.reads()).unwrap();
    for (name, value) in [
        ("EnclaveOptions.Enabled", "true"),
        ("MetadataOptions.HttpTokens", "required"),
        ("MetadataOptions.HttpPutResponseHopLimit", "1"),
        ("BlockDeviceMapping.1.DeviceName", "/dev/xvda"),
        ("BlockDeviceMapping.1.Ebs.Encrypted", "true"),
        ("BlockDeviceMapping.1.Ebs.VolumeType", "gp3"),
        ("BlockDeviceMapping.1.Ebs.DeleteOnTermination", "true"),
        ("InstanceInitiatedShutdownBehavior", "terminate"),
        ("InstanceMarketOptions.MarketType", "spot"),
        ("InstanceMarketOptions.SpotOptions.InstanceInterruptionBehavior", "terminate"),
        ("MinCount", "1"),
        ("MaxCount", "1"),
    ] {
        assert_eq!(launch.parameter(name), Some(value), "{name}");
    }
    let token = launch.parameter("ClientToken").unwrap();
    assert!(token.starts_with("keyferry-") && token.len() <= 64, "{token}");
    for kind in ["instance", "volume", "network-interface"] {
        let tagged = (1..=3).any(|number| {
            launch.parameter(&format!("TagSpecification.{number}.ResourceType")) == Some(kind)
                && launch.parameter(&format!("TagSpecification.{number}.Tag.2.Key")) == Some("deployment-id")
        });
        assert!(tagged, "{kind}");
    }
    let rule = calls.iter().find(|call| call.action == "AuthorizeSecurityGroupIngress").unwrap();
    assert_eq!(rule.parameter("IpPermissions.1.IpRanges.1.CidrIp"), Some("203.0.113.7/32"));
    assert_eq!(rule.parameter("IpPermissions.1.ToPort"), Some("22"));
    let imported = calls.iter().find(|call| call.action == "ImportKeyPair").unwrap();
    assert!(!imported.parameters.iter().any(|(_, value)| value.contains("PRIVATE")));
}

/// Whatever goes wrong at whatever call of `up`, running it again ends in one host, and `down` in none.
async fn a_second_up_mends(fault: Fault) {
    let Some(aws) = Aws::start() else { return };
    let client = client(&aws).await;
    let clean = tempfile::tempdir().unwrap();
    up(&client, clean.path(), &wanted(clean.path())).await.unwrap();
    let calls = aws.calls();
    down(&client, clean.path()).await.unwrap();
    let changes = calls.iter().filter(|call| !call.reads()).count();
    assert_eq!(
        (calls.len(), changes),
        (18, 4),
        "{:?}",
        calls.iter().map(|it| &it.action).collect::<Vec<_>>()
    );

    let silent = matches!(fault, Fault::Unanswered | Fault::AnswerLost);
    // What only reads has no effect to lose.
    for (at, call) in calls.iter().enumerate().filter(|(_, call)| !silent || !call.reads()) {
        let directory = tempfile::tempdir().unwrap();
        let wanted = wanted(directory.path());
        aws.forget_calls();
        aws.fail(at, fault);
        let first = up(&client, directory.path(), &wanted).await;
        let fails_for_good = matches!(fault, Fault::Refused(400, ..));
        assert!(!fails_for_good || first.is_err(), "call {at}, {}: a refusal was overlooked", call.action);
        aws.forget_calls();
        let second = up(&client, directory.path(), &wanted).await;
        let shown = format!("call {at}, {}, {fault:?}: first {first:?}, then {second:?}", call.action);
        assert!(second.is_ok(), "{shown}");
        assert_eq!(kinds(&aws), ONE_HOST, "{shown}");
        down(&client, directory.path()).await.unwrap();
        assert_eq!(aws.inventory(REGION), Vec::<String>::new(), "{shown}");
        assert_eq!(files(directory.path()), Vec::<String>::new(), "{shown}");
    }
}

#[tokio::test]
async fn a_second_up_mends_a_refusal_at_any_call() {
    a_second_up_mends(Fault::Refused(400, "UnauthorizedOperation", "You are not authorized")).await;
}

#[tokio::test]
async fn a_second_up_mends_throttling_at_any_call() {
    a_second_up_mends(Fault::Refused(503, "RequestLimitExceeded", "Request limit exceeded.")).await;
}

#[tokio::test]
async fn a_second_up_mends_a_server_error_at_any_call() {
    a_second_up_mends(Fault::Refused(500, "InternalError", "An internal error has occurred")).await;
}

#[tokio::test]
async fn a_second_up_mends_a_connection_cut_before_any_call_is_carried_out() {
    a_second_up_mends(Fault::Unanswered).await;
}

#[tokio::test]
async fn a_second_up_mends_a_connection_cut_after_any_call_was_carried_out() {
    a_second_up_mends(Fault::AnswerLost).await;
}

/// A call that is repeated because its first answer was lost meets what it made itself.
#[tokio::test]
async fn a_repeated_call_makes_nothing_twice() {
    let Some(aws) = Aws::start() else { return };
    let client = client(&aws).await;
    for changed in ["ImportKeyPair", "CreateSecurityGroup", "AuthorizeSecurityGroupIngress", "RunInstances"] {
        let clean = tempfile::tempdir().unwrap();
        aws.forget_calls();
        up(&client, clean.path(), &wanted(clean.path())).await.unwrap();
        let at = aws.calls().iter().position(|call| call.action == changed && !call.reads()).unwrap();
        down(&client, clean.path()).await.unwrap();

        let directory = tempfile::tempdir().unwrap();
        aws.forget_calls();
        aws.fail(at, Fault::FirstAnswerLost);
        up(&client, directory.path(), &wanted(directory.path())).await.unwrap();
        assert_eq!(kinds(&aws), ONE_HOST, "{changed}");
        down(&client, directory.path()).await.unwrap();
        assert_eq!(aws.inventory(REGION), Vec::<String>::new(), "{changed}");
    }
}

/// Whatever goes wrong at whatever call of `down`, running it again leaves nothing.
async fn a_second_down_mends(fault: Fault) {
    let Some(aws) = Aws::start() else { return };
    let client = client(&aws).await;
    let make = async || {
        let directory = tempfile::tempdir().unwrap();
        up(&client, directory.path(), &wanted(directory.path())).await.unwrap();
        aws.forget_calls();
        directory
    };
    let clean = make().await;
    down(&client, clean.path()).await.unwrap();
    let calls = aws.calls();
    assert!(calls.iter().filter(|call| !call.reads()).count() >= 3, "{calls:?}");
    let silent = matches!(fault, Fault::Unanswered | Fault::AnswerLost);
    for (at, call) in calls.iter().enumerate().filter(|(_, call)| !silent || !call.reads()) {
        let directory = make().await;
        aws.fail(at, fault);
        let first = down(&client, directory.path()).await;
        aws.forget_calls();
        let second = down(&client, directory.path()).await;
        let shown = format!("call {at}, {}, {fault:?}: first {first:?}, then {second:?}", call.action);
        assert!(second.is_ok(), "{shown}");
        assert_eq!(aws.inventory(REGION), Vec::<String>::new(), "{shown}");
        assert_eq!(files(directory.path()), Vec::<String>::new(), "{shown}");
    }
}

#[tokio::test]
async fn a_second_down_mends_a_server_error_at_any_call() {
    a_second_down_mends(Fault::Refused(500, "InternalError", "An internal error has occurred")).await;
}

#[tokio::test]
async fn a_second_down_mends_a_connection_cut_after_any_call_was_carried_out() {
    a_second_down_mends(Fault::AnswerLost).await;
}

/// `up` was cut at each changing call, and nobody ran it again: `down` alone leaves nothing.
#[tokio::test]
async fn down_cleans_up_after_an_up_that_was_cut() {
    let Some(aws) = Aws::start() else { return };
    let client = client(&aws).await;
    let clean = tempfile::tempdir().unwrap();
    up(&client, clean.path(), &wanted(clean.path())).await.unwrap();
    let calls = aws.calls();
    down(&client, clean.path()).await.unwrap();
    for fault in [Fault::Unanswered, Fault::AnswerLost] {
        for (at, call) in calls.iter().enumerate().filter(|(_, call)| !call.reads()) {
            let directory = tempfile::tempdir().unwrap();
            aws.forget_calls();
            aws.fail(at, fault);
            let first = up(&client, directory.path(), &wanted(directory.path())).await;
            let shown = format!("call {at}, {}, {fault:?}: {first:?}", call.action);
            assert!(first.is_err(), "{shown}");
            aws.forget_calls();
            down(&client, directory.path()).await.unwrap();
            assert_eq!(aws.inventory(REGION), Vec::<String>::new(), "{shown}");
            assert_eq!(files(directory.path()), Vec::<String>::new(), "{shown}");
        }
    }
}

#[tokio::test]
async fn a_call_that_is_never_answered_ends_at_its_deadline() {
    let Some(aws) = Aws::start() else { return };
    let client = client_in(&aws, REGION, Duration::from_millis(300)).await.unwrap();
    let directory = tempfile::tempdir().unwrap();
    aws.fail(0, Fault::HeldBefore);
    let error = up(&client, directory.path(), &wanted(directory.path())).await.unwrap_err();
    assert!(matches!(error, Error::Aws(AwsError::NoAnswer { .. })), "{error}");
}

#[tokio::test]
async fn a_zone_without_room_is_followed_by_the_next() {
    let Some(aws) = Aws::start() else { return };
    let client = client(&aws).await;
    let directory = tempfile::tempdir().unwrap();
    let wanted = wanted(directory.path());
    let number = {
        let clean = tempfile::tempdir().unwrap();
        up(&client, clean.path(), &self::wanted(clean.path())).await.unwrap();
        let number = aws.calls().iter().position(|it| it.action == "RunInstances" && !it.reads()).unwrap();
        down(&client, clean.path()).await.unwrap();
        number
    };
    aws.forget_calls();
    let message =
        "We currently do not have sufficient c5.xlarge capacity in the Availability Zone you requested";
    aws.fail(number, Fault::Refused(500, "InsufficientInstanceCapacity", message));
    up(&client, directory.path(), &wanted).await.unwrap();
    let calls = aws.calls();
    let launches: Vec<_> = calls.iter().filter(|it| it.action == "RunInstances" && !it.reads()).collect();
    let of = |name: &str| launches.iter().map(|it| it.parameter(name).unwrap()).collect::<Vec<_>>();
    let (subnets, tokens) = (of("SubnetId"), of("ClientToken"));
    assert!(subnets.len() == 2 && subnets[0] != subnets[1] && tokens[0] != tokens[1], "{launches:?}");
    assert_eq!(kinds(&aws), ONE_HOST);
}

/// Somebody else's instance: its enclave option is switched on, and it is there after `down`.
#[tokio::test]
async fn an_instance_is_adopted_and_stays() {
    let Some(aws) = Aws::start() else { return };
    let client = client(&aws).await;
    let home = tempfile::tempdir().unwrap();
    up(&client, home.path(), &wanted(home.path())).await.unwrap();
    let images = aws.ask(REGION, "DescribeInstances", &[]);
    let image = images.split("<imageId>").nth(1).unwrap().split('<').next().unwrap();
    let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let made = aws.ask(
        REGION,
        "RunInstances",
        &[
            pair("ImageId", image),
            pair("InstanceType", "m5.xlarge"),
            pair("MinCount", "1"),
            pair("MaxCount", "1"),
        ],
    );
    let id = made.split("<instanceId>").nth(1).unwrap().split('<').next().unwrap().to_owned();

    let directory = tempfile::tempdir().unwrap();
    let adopt = Wanted {
        adopt: Some(id.clone()),
        key_file: default_key_file(home.path()),
        user: Some("ec2-user".into()),
        ..wanted(directory.path())
    };
    aws.forget_calls();
    let adopted = up(&client, directory.path(), &adopt).await.unwrap();
    assert_eq!(
        (adopted.id.as_str(), adopted.state.as_str(), adopted.enclaves),
        (id.as_str(), "running", true)
    );
    let calls = aws.calls();
    let changes: Vec<_> = calls.iter().filter(|it| !it.reads()).map(|it| it.action.as_str()).collect();
    assert_eq!(changes, ["StopInstances", "ModifyInstanceAttribute", "StartInstances"]);
    aws.forget_calls();
    up(&client, directory.path(), &adopt).await.unwrap();
    assert!(aws.calls().iter().all(e2e::aws::Call::reads));
    down(&client, directory.path()).await.unwrap();
    down(&client, home.path()).await.unwrap();
    assert!(aws.inventory(REGION).contains(&format!("instance {id}")));
}

/// With other credentials or in another region nothing of a host shows, which must not pass for its end.
#[tokio::test]
async fn a_host_is_not_forgotten_from_another_region() {
    let Some(aws) = Aws::start() else { return };
    let here = client(&aws).await;
    let directory = tempfile::tempdir().unwrap();
    up(&here, directory.path(), &wanted(directory.path())).await.unwrap();
    let elsewhere = client_in(&aws, "eu-west-1", PATIENCE.call).await.unwrap();
    let error = down(&elsewhere, directory.path()).await.unwrap_err();
    assert!(matches!(error, Error::Ec2(Refusal::Differs { what: "region", .. })), "{error}");
    assert_eq!(kinds(&aws), ONE_HOST);
    down(&here, directory.path()).await.unwrap();
}
