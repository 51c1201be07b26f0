use super::*;
use crate::ec2_nitro::found::{Group, KeyPair};
use crate::ec2_nitro::state::tests::wanted;

const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIE0LPFeB9S10wKXfhVjxDmEqVvCSrBEZrwAUpbB7ixSu";
const ID: &str = "0123456789abcdef";

fn subnet(id: &str, zone: &str) -> Subnet {
    Subnet { id: id.into(), zone: zone.into(), vpc: "vpc-1".into() }
}

/// An account with a default VPC and nothing of ours.
fn empty() -> Found {
    Found {
        account: "123456789012".into(),
        machine: Some(Machine { enclaves: true, architectures: vec!["x86_64".into()], vcpus: 4, spot: true }),
        zones: vec!["us-east-1b".into(), "us-east-1c".into()],
        subnets: vec![
            subnet("subnet-a", "us-east-1a"),
            subnet("subnet-b", "us-east-1b"),
            subnet("subnet-c", "us-east-1c"),
        ],
        ..Found::default()
    }
}

fn instance(state: &str) -> Instance {
    Instance {
        id: "i-1".into(),
        state: state.into(),
        instance_type: "c5.xlarge".into(),
        enclaves: true,
        can_stop: true,
        client_token: "token".into(),
        public_ip: "203.0.113.10".parse().ok(),
        image: "ami-1".into(),
        ..Instance::default()
    }
}

/// An account in which everything was made.
fn made() -> Found {
    Found {
        local_key: Some(KEY.into()),
        key_pair: Some(KeyPair {
            name: format!("keyferry-{ID}"),
            deployment: Some(ID.into()),
            public_key: Some(KEY.into()),
        }),
        group: Some(Group {
            id: "sg-1".into(),
            name: format!("keyferry-{ID}"),
            deployment: Some(ID.into()),
            ssh_from: vec!["203.0.113.7/32".parse().unwrap()],
        }),
        instances: vec![instance("running")],
        ..empty()
    }
}

fn reach() -> Reach {
    Reach {
        address: "203.0.113.10".parse().unwrap(),
        port: 22,
        user: "ec2-user".into(),
        private_key: Some(wanted().key_file),
        aws: None,
        host_key: KEY.parse().unwrap(),
        instance_id: Some("i-1".into()),
    }
}

fn fresh() -> Recorded<'static> {
    Recorded { deployment: ID, state: None, began: false, reach: None }
}

fn state() -> State {
    State::new("123456789012".into(), wanted())
}

fn steps(wanted: &Wanted, recorded: Recorded<'_>, found: &Found) -> Vec<Step> {
    plan(wanted, recorded, found).unwrap().steps
}

fn places() -> Vec<(String, String)> {
    vec![("subnet-b".into(), "us-east-1b".into()), ("subnet-c".into(), "us-east-1c".into())]
}

#[test]
fn a_first_run_makes_everything_and_costs_last() {
    let plan = plan(&wanted(), fresh(), &empty()).unwrap();
    assert_eq!(
        plan.steps,
        [
            Step::MakeKey,
            Step::ImportKeyPair,
            Step::CreateGroup { vpc: "vpc-1".into() },
            Step::AllowSsh("203.0.113.7/32".parse().unwrap()),
            Step::Launch { resume: None, places: places() },
            Step::Record { host_key: None },
        ]
    );
    let parameter = "resolve:ssm:/aws/service/ami-amazon-linux-latest/al2023-ami-kernel-6.1-x86_64";
    assert_eq!((plan.image.as_str(), plan.user.as_str()), (parameter, "ec2-user"));
    let shown = plan.to_string();
    assert!(
        shown.starts_with("in account 123456789012, region us-east-1:\n  1. make the private key "),
        "{shown}"
    );
    assert!(
        shown.contains("c5.xlarge with enclaves in us-east-1b or us-east-1c")
            && shown.contains("costs money")
    );
}

#[test]
fn a_host_that_is_there_needs_nothing() {
    let (state, reach) = (state(), reach());
    let recorded = Recorded { deployment: ID, state: Some(&state), began: true, reach: Some(&reach) };
    assert_eq!(steps(&wanted(), recorded, &made()), []);
}

#[test]
fn a_run_that_was_cut_goes_on_where_it_stopped() {
    let state = state();
    let recorded = Recorded { deployment: ID, state: Some(&state), began: true, reach: None };
    let launch = Step::Launch { resume: None, places: places() };
    let record = Step::Record { host_key: None };
    let key_only = Found { local_key: Some(KEY.into()), ..empty() };
    assert_eq!(steps(&wanted(), recorded, &key_only)[0], Step::ImportKeyPair);
    let without_instance = Found { instances: Vec::new(), ..made() };
    assert_eq!(steps(&wanted(), recorded, &without_instance), [launch, record.clone()]);
    assert_eq!(steps(&wanted(), recorded, &made()), [record]);
}

#[test]
fn a_launch_without_an_answer_is_asked_for_again_under_its_token() {
    let mut state = state();
    let launch = Launch { token: "token".into(), subnet: "subnet-b".into(), zone: "us-east-1b".into() };
    state.launch = Some(launch.clone());
    let recorded = Recorded { deployment: ID, state: Some(&state), began: true, reach: None };
    let unseen = Found { instances: Vec::new(), ..made() };
    let resumed = Step::Launch { resume: Some(launch), places: places() };
    assert_eq!(steps(&wanted(), recorded, &unseen)[0], resumed);

    // The instance of that token has ended; the token would only give it again.
    let ended = Found { instances: vec![instance("terminated")], ..made() };
    assert_eq!(steps(&wanted(), recorded, &ended)[0], Step::Launch { resume: None, places: places() });
}

#[test]
fn ssh_follows_its_operator_and_lets_nobody_else_in() {
    let (state, reach) = (state(), reach());
    let recorded = Recorded { deployment: ID, state: Some(&state), began: true, reach: Some(&reach) };
    let moved = Wanted { access: Access::Ssh("198.51.100.9/32".parse().unwrap()), ..wanted() };
    assert_eq!(
        steps(&moved, recorded, &made()),
        [
            Step::AllowSsh("198.51.100.9/32".parse().unwrap()),
            Step::RevokeSsh("203.0.113.7/32".parse().unwrap()),
        ]
    );
    let closed = Wanted { access: Access::Ssm { instance_profile: "p".into() }, ..wanted() };
    assert!(!steps(&closed, fresh(), &empty()).iter().any(|step| matches!(step, Step::AllowSsh(_))));
}

#[test]
fn a_new_key_each_time_takes_no_key_pair() {
    let ephemeral = Wanted { instance_connect: true, ..wanted() };
    let planned = steps(&ephemeral, fresh(), &Found { local_key: None, ..empty() });
    assert!(!planned.iter().any(|step| matches!(step, Step::MakeKey | Step::ImportKeyPair)), "{planned:?}");
    let state = state();
    let recorded = Recorded { deployment: ID, state: Some(&state), began: true, reach: None };
    let differs = plan(&ephemeral, recorded, &made()).unwrap_err();
    assert!(matches!(differs, Refusal::Differs { what: "login", .. }), "{differs}");
}

#[test]
fn another_way_to_the_host_is_recorded() {
    let closed = Wanted { access: Access::Ssm { instance_profile: "p".into() }, ..wanted() };
    let mut state = state();
    state.wanted.clone_from(&closed);
    let reach = Reach { aws: closed.aws(), ..reach() };
    let recorded = Recorded { deployment: ID, state: Some(&state), began: true, reach: Some(&reach) };
    let found = made();
    let records = |wanted: &Wanted| {
        steps(wanted, recorded, &found).iter().any(|step| matches!(step, Step::Record { .. }))
    };
    assert!(!records(&closed));
    assert!(records(&Wanted { profile: Some("work".into()), ..closed.clone() }));
}

#[test]
fn a_machine_that_moved_keeps_the_key_it_is_known_by() {
    let (state, reach) = (state(), reach());
    let recorded = Recorded { deployment: ID, state: Some(&state), began: true, reach: Some(&reach) };
    let elsewhere = Instance { public_ip: "203.0.113.99".parse().ok(), ..instance("stopped") };
    let found = Found { instances: vec![elsewhere], ..made() };
    let host_key = Some(KEY.parse().unwrap());
    assert_eq!(steps(&wanted(), recorded, &found), [Step::Start("i-1".into()), Step::Record { host_key }]);
}

#[test]
fn an_adopted_instance_is_stopped_only_to_switch_enclaves_on() {
    let adopt = Wanted { adopt: Some("i-1".into()), user: Some("admin".into()), ..wanted() };
    let found = |instance: Instance| Found { instances: vec![instance], subnets: Vec::new(), ..made() };
    let record = Step::Record { host_key: None };
    assert_eq!(steps(&adopt, fresh(), &found(instance("running"))), std::slice::from_ref(&record));
    let off = |state| found(Instance { enclaves: false, ..instance(state) });
    let (stop, on, start) =
        (Step::Stop("i-1".into()), Step::EnableEnclaves("i-1".into()), Step::Start("i-1".into()));
    assert_eq!(steps(&adopt, fresh(), &off("running")), [stop, on.clone(), start.clone(), record.clone()]);
    assert_eq!(steps(&adopt, fresh(), &off("stopped")), [on, start, record]);
}

#[test]
fn what_cannot_work_is_refused_with_a_next_step() {
    let machine = |change: fn(&mut Machine)| {
        let mut found = empty();
        found.machine.iter_mut().for_each(change);
        found
    };
    let adopt = Wanted { adopt: Some("i-1".into()), ..wanted() };
    let adopted = |instance: Instance| Found { instances: vec![instance], ..made() };
    let pair = |public: &str| Some(KeyPair { public_key: Some(public.into()), ..KeyPair::default() });
    let named = Wanted { key_name: Some("mine".into()), ..wanted() };
    let image = |owner: &str, architecture: &str| {
        let (id, owner, architecture) = ("ami-1".into(), owner.into(), architecture.into());
        Found { image: Some(Image { id, owner, architecture, ..Image::default() }), ..empty() }
    };
    let imaged = Wanted { image: ImageChoice::Id("ami-1".into()), ..wanted() };
    let foreign = Group { name: "keyferry-x".into(), deployment: None, ..Group::default() };
    for (wanted, found, shown) in [
        (
            wanted(),
            Found { machine: None, ..empty() },
            "instance type c5.xlarge: there is none of this name in us-east-1",
        ),
        (
            wanted(),
            machine(|it| it.enclaves = false),
            "instance type c5.xlarge: AWS does not support enclaves on it",
        ),
        (wanted(), machine(|it| it.vcpus = 2), "instance type c5.xlarge: has 2 vCPUs, expected at least 4"),
        (wanted(), Found { subnets: Vec::new(), ..empty() }, "no default VPC in us-east-1"),
        (
            wanted(),
            Found {
                zones: vec!["us-east-1e".into()],
                subnets: vec![subnet("subnet-a", "us-east-1a")],
                ..empty()
            },
            "instance type c5.xlarge: in none of the zones of subnet-a (us-east-1a)",
        ),
        (
            named.clone(),
            Found { key_pair: pair(KEY), ..empty() },
            "key pair mine exists in EC2, and its private key /home/me/host/.keyferry/host_key is not here",
        ),
        (
            named,
            Found { key_pair: pair("ssh-rsa AAAA"), local_key: Some(KEY.into()), ..empty() },
            "key pair mine in EC2 is another key than /home/me/host/.keyferry/host_key",
        ),
        (imaged.clone(), empty(), "image ami-1: is not there"),
        (imaged.clone(), image("1", "arm64"), "image ami-1: is for arm64, c5.xlarge is x86_64"),
        (imaged, image("1", "x86_64"), "image ami-1: it is not known who logs in to it"),
        (
            wanted(),
            Found { group: Some(foreign), ..empty() },
            "security group keyferry-x exists and is not of this deployment",
        ),
        (
            wanted(),
            Found { instances: vec![instance("running"), instance("pending")], ..made() },
            "instances i-1, i-1 all carry the id of this deployment",
        ),
        (adopt.clone(), Found { instances: Vec::new(), ..made() }, "instance i-1: is not there"),
        (adopt.clone(), adopted(instance("terminated")), "instance i-1: is terminated"),
        (
            Wanted { user: Some("admin".into()), ..adopt.clone() },
            adopted(Instance { hibernates: true, enclaves: false, ..instance("running") }),
            "instance i-1: is set up to hibernate, which excludes enclaves",
        ),
        (
            Wanted { user: Some("admin".into()), ..adopt.clone() },
            adopted(Instance { spot: true, enclaves: false, ..instance("running") }),
            "instance i-1: cannot be stopped, which switching its enclave option on takes",
        ),
        (adopt, adopted(instance("running")), "image ami-1: it is not known who logs in to it"),
    ] {
        let refusal = plan(&wanted, fresh(), &found).unwrap_err();
        assert_eq!(refusal.to_string(), shown);
        assert!(!refusal.hint().is_empty());
    }
}

#[test]
fn a_host_is_not_taken_for_one_that_was_asked_for_differently() {
    let state = state();
    let recorded = Recorded { deployment: ID, state: Some(&state), began: true, reach: None };
    let refused = |wanted: Wanted, found: Found| plan(&wanted, recorded, &found).unwrap_err().to_string();
    assert_eq!(
        refused(Wanted { instance_type: "m5.xlarge".into(), ..wanted() }, made()),
        "a host with another instance type was begun here: c5.xlarge, now m5.xlarge"
    );
    assert_eq!(
        refused(Wanted { region: "eu-west-1".into(), ..wanted() }, made()),
        "a host with another region was begun here: us-east-1, now eu-west-1"
    );
    assert_eq!(
        refused(wanted(), Found { account: "210987654321".into(), ..made() }),
        "the host here is in account 123456789012, these credentials are of account 210987654321"
    );
}

#[test]
fn the_user_is_the_one_of_the_image_s_publisher() {
    for (owner, user) in [("137112412989", "ec2-user"), ("099720109477", "ubuntu"), ("136693071363", "admin")]
    {
        let wanted = Wanted { image: ImageChoice::Id("ami-1".into()), ..wanted() };
        let image = Image {
            id: "ami-1".into(),
            owner: owner.into(),
            architecture: "x86_64".into(),
            root_device: "/dev/sda1".into(),
            ..Image::default()
        };
        let plan = plan(&wanted, fresh(), &Found { image: Some(image), ..empty() }).unwrap();
        assert_eq!((plan.user.as_str(), plan.root_device.as_str()), (user, "/dev/sda1"));
    }
}
