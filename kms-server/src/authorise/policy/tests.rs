use attestation::{Pcr, PcrIndex};
use kms_protocol::wire::webhook::BootInfo;

use super::*;
use crate::authorise::{Purpose, Question, Refusal};

const APP: &str = "1111111111111111111111111111111111111111";
const NITRO: &str = "dstack-nitro-enclave";
const TDX: &str = "dstack-tdx";

fn hash(byte: u8) -> String {
    hex::encode([byte; 32])
}

fn pcr(byte: u8) -> Pcr {
    Pcr::new([byte; 48])
}

/// An enclave with that image.
fn enclave(image: u8) -> Question {
    let boot_info = BootInfo {
        tee_variant: NITRO.into(),
        app_id: hex::decode(APP).unwrap(),
        os_image_hash: vec![image; 32],
        compose_hash: vec![image; 32],
        mr_aggregated: vec![image; 32],
        device_id: vec![0xdd; 32],
        ..BootInfo::default()
    };
    Question { purpose: Purpose::App, boot_info, registers: Vec::new(), evidence: None }
}

/// A virtual machine with that image, running that.
fn machine(image: u8, compose: u8) -> Question {
    let mut question = enclave(image);
    question.boot_info.tee_variant = TDX.into();
    question.boot_info.compose_hash = vec![compose; 32];
    question.boot_info.tcb_status = "UpToDate".into();
    question
}

fn decide(policy: &str, question: &Question) -> Result<(), Refusal> {
    Policy::from_toml(policy).unwrap().decide(question).map(|_| ())
}

fn refused(reason: &str) -> Result<(), Refusal> {
    Err(Refusal::denied(reason))
}

fn app(rest: &str) -> String {
    format!("[apps.{APP}]\nimages = [\"{}\"]\n{rest}", hash(1))
}

#[test]
fn only_listed_images_of_listed_apps_are_allowed() {
    let policy = format!("[apps.{APP}]\nimages = [\"{}\", \"0x{}\"]", hash(1), hash(2));
    assert_eq!(decide(&policy, &enclave(1)), Ok(()));
    assert_eq!(decide(&policy, &enclave(2)), Ok(()));
    assert_eq!(decide(&policy, &enclave(3)), refused("compose hash not allowed"));
    let other = policy.replace(APP, &"2".repeat(40));
    assert_eq!(decide(&other, &enclave(1)), refused("app not registered"));
}

#[test]
fn the_kms_own_list_counts_too() {
    let policy = format!("images = [\"{}\"]\n{}", hash(9), app(""));
    assert_eq!(decide(&policy, &enclave(1)), refused("OS image is not allowed"));
}

#[test]
fn registers_that_name_the_owner_are_required() {
    let policy = app(&format!("pcr3 = [\"{}\"]", pcr(3)));
    let with_role = |role: Option<Pcr>| Question {
        registers: role.into_iter().map(|role| (PcrIndex::ROLE, role)).collect(),
        ..enclave(1)
    };
    assert_eq!(decide(&policy, &with_role(Some(pcr(3)))), Ok(()));
    for (role, reason) in [
        (Some(pcr(4)), format!("PCR3 is not allowed: PCR3 is {}", pcr(4))),
        (Some(Pcr::ZERO), format!("PCR3 is not allowed: PCR3 is {}", Pcr::ZERO)),
        (None, "PCR3 is not allowed: PCR3 is not known".into()),
    ] {
        assert_eq!(decide(&policy, &with_role(role)), refused(&reason));
    }
}

#[test]
fn the_reason_names_the_register_that_differs() {
    let entry = |zero, one, two| {
        format!("{{ pcr0 = \"{}\", pcr1 = \"{}\", pcr2 = \"{}\" }}", pcr(zero), pcr(one), pcr(two))
    };
    let policy = format!("[apps.{APP}]\nimages = [{}, {}]", entry(7, 8, 9), entry(1, 2, 3));
    let measured = |zero, one, two| {
        let registers = [pcr(zero), pcr(one), pcr(two)];
        let hash = attestation::os_image_hash(&registers[0], &registers[1], &registers[2]);
        let mut question = enclave(0);
        question.boot_info.os_image_hash = hash.as_bytes().to_vec();
        question.boot_info.compose_hash = hash.as_bytes().to_vec();
        let indices = [PcrIndex::IMAGE, PcrIndex::KERNEL, PcrIndex::APPLICATION];
        question.registers = indices.into_iter().zip(registers).collect();
        question
    };
    assert_eq!(decide(&policy, &measured(1, 2, 3)), Ok(()));
    assert_eq!(decide(&policy, &measured(7, 8, 9)), Ok(()));
    let differs =
        |index: u8, actual, expected| format!("PCR{index} is {}, expected {}", pcr(actual), pcr(expected));
    let told = |text: String| refused(&format!("compose hash not allowed: {text}"));
    assert_eq!(decide(&policy, &measured(4, 2, 3)), told(differs(0, 4, 1)));
    assert_eq!(decide(&policy, &measured(1, 4, 3)), told(differs(1, 4, 2)));
    assert_eq!(decide(&policy, &measured(7, 8, 4)), told(differs(2, 4, 9)));
    let two = format!("{}; {}", differs(0, 4, 1), differs(2, 4, 3));
    assert_eq!(decide(&policy, &measured(4, 2, 4)), told(two));
    // Without registers there is nothing to compare.
    let unknown = Question { registers: Vec::new(), ..measured(4, 2, 3) };
    assert_eq!(decide(&policy, &unknown), refused("compose hash not allowed"));
}

#[test]
fn an_image_alone_does_not_say_what_a_machine_runs() {
    assert_eq!(decide(&app(""), &machine(1, 5)), refused("compose hash not allowed"));
    // Even if it claims to run its image.
    assert_eq!(decide(&app(""), &machine(1, 1)), refused("compose hash not allowed"));
    let policy = app(&format!("compose_hashes = [\"{}\"]", hash(5)));
    assert_eq!(decide(&policy, &machine(1, 5)), Ok(()));
    assert_eq!(decide(&policy, &machine(1, 6)), refused("compose hash not allowed"));
    assert_eq!(decide(&policy, &machine(2, 5)), refused("compose hash not allowed"));
}

#[test]
fn the_state_of_a_platform_counts_where_there_is_one() {
    let policy = app(&format!("compose_hashes = [\"{}\"]", hash(5)));
    let with = |status: &str, advisories: &[&str]| {
        let mut question = machine(1, 5);
        question.boot_info.tcb_status = status.into();
        question.boot_info.advisory_ids = advisories.iter().map(|&id| id.to_owned()).collect();
        question
    };
    assert_eq!(decide(&policy, &with("UpToDate", &[])), Ok(()));
    for status in ["", "OutOfDate", "uptodate"] {
        assert_eq!(decide(&policy, &with(status, &[])), refused("TCB status is not allowed"), "{status:?}");
    }
    assert_eq!(decide(&policy, &with("UpToDate", &["INTEL-SA-1"])), refused("advisory ID is not allowed"));
    let lenient = "tcb_statuses = [\"UpToDate\", \"SWHardeningNeeded\"]\nadvisory_ids = [\"INTEL-SA-1\"]\n";
    let lenient = lenient.to_owned() + &policy;
    assert_eq!(decide(&lenient, &with("SWHardeningNeeded", &["INTEL-SA-1"])), Ok(()));
}

#[test]
fn devices_are_compared_where_they_are_listed() {
    for (device, decision) in [(0xdd, Ok(())), (0xde, refused("app is not allowed to boot on this device"))] {
        assert_eq!(decide(&app(&format!("devices = [\"{}\"]", hash(device))), &enclave(1)), decision);
    }
}

#[test]
fn who_may_be_a_kms_has_rules_of_its_own() {
    let kms = |question: Question| Question { purpose: Purpose::Kms, ..question };
    // Being allowed an app's keys is not being allowed all of them.
    assert_eq!(decide(&app(""), &kms(enclave(1))), refused("the policy has no rules for a KMS"));
    let rules = |devices: &str| {
        format!("[kms]\nimages = [\"{}\"]\nmr_aggregated = [\"{}\"]\n{devices}", hash(1), hash(1))
    };
    let any = rules("allow_any_device = true");
    assert_eq!(decide(&any, &kms(machine(1, 5))), Ok(()));
    assert_eq!(decide(&any, &kms(machine(2, 5))), refused("OS image is not allowed"));
    let mut other = machine(1, 5);
    other.boot_info.mr_aggregated = vec![2; 32];
    assert_eq!(decide(&any, &kms(other)), refused("aggregated MR not allowed"));
    let listed = rules(&format!("devices = [\"{}\"]", hash(2)));
    assert_eq!(decide(&listed, &kms(machine(1, 5))), refused("KMS is not allowed to boot on this device"));
    assert_eq!(decide(&any, &machine(1, 5)), refused("app not registered"));
}

#[test]
fn the_explanation_ends_with_the_rule_that_decides() {
    let policy = Policy::from_toml(&format!("images = [\"{}\"]\n{}", hash(2), app(""))).unwrap();
    let explanation = policy.explain(&enclave(1));
    assert!(!explanation.allowed);
    let rules: Vec<_> = explanation.steps.iter().map(|step| (step.rule.as_str(), step.passed)).collect();
    assert_eq!(rules, [(format!("apps.{APP}").as_str(), true), ("images", false)]);
    assert_eq!(
        explanation.to_string(),
        format!(
            "yes apps.{APP}: the app is there\nno  images: {} is not in the list\n\
             refused: OS image is not allowed",
            hash(1)
        )
    );
    let allowed = Policy::from_toml(&app("")).unwrap().explain(&enclave(1));
    assert!(allowed.allowed && allowed.steps.iter().all(|step| step.passed));
}

#[test]
fn json_says_the_same() {
    let json = format!(r#"{{"apps": {{"0x{APP}": {{"images": ["{}"]}}}}}}"#, hash(1));
    let toml = format!("[apps.0x{APP}]\nimages = [\"{}\"]", hash(1));
    assert_eq!(Policy::from_json(&json).unwrap(), Policy::from_toml(&toml).unwrap());
}

#[test]
fn empty_never_means_any_and_nothing_is_ignored() {
    let kms = |rest: &str| format!("[kms]\nimages = [\"{}\"]\n{rest}", hash(1));
    let mr = format!("mr_aggregated = [\"{}\"]\n", hash(1));
    let registers = |rest: &str| format!("[apps.{APP}]\nimages = [{{ pcr0 = \"{}\"{rest} }}]", pcr(1));
    for (name, text) in [
        ("nothing", String::new()),
        ("no app", "[apps]".into()),
        ("no images", format!("[apps.{APP}]")),
        ("an empty list of images", format!("[apps.{APP}]\nimages = []")),
        ("an empty list for the KMS", format!("images = []\n{}", app(""))),
        ("an empty list of roles", app("pcr3 = []")),
        ("an empty list of compose hashes", app("compose_hashes = []")),
        ("an empty list of devices", app("devices = []")),
        ("a role that was never set", app(&format!("pcr3 = [\"{}\"]", Pcr::ZERO))),
        ("a register nobody asks for", app(&format!("pcr5 = [\"{}\"]", pcr(1)))),
        ("a misspelt key", app("image = []")),
        ("a misspelt table", format!("{}\n[app]", app(""))),
        ("a short hash", format!("[apps.{APP}]\nimages = [\"00\"]")),
        ("a short app id", format!("[apps.11]\nimages = [\"{}\"]", hash(1))),
        ("an app twice", format!("{}\n[apps.0x{APP}]\nimages = [\"{}\"]", app(""), hash(2))),
        ("registers that are not complete", registers("")),
        (
            "the registers of a debug enclave",
            registers(&format!(", pcr1 = \"{0}\", pcr2 = \"{0}\"", Pcr::ZERO)),
        ),
        (
            "a misspelt register",
            registers(&format!(", pcr1 = \"{0}\", pcr2 = \"{0}\", pcr3 = \"{0}\"", pcr(1))),
        ),
        ("no TCB status", format!("tcb_statuses = []\n{}", app(""))),
        ("a TCB status that is none", format!("tcb_statuses = [\"\"]\n{}", app(""))),
        ("a KMS on no device in particular", kms(&mr)),
        ("a KMS on no device", kms(&format!("{mr}devices = []"))),
        (
            "a KMS on some devices and on all",
            kms(&format!("{mr}devices = [\"{}\"]\nallow_any_device = true", hash(1))),
        ),
        ("a KMS without measurements", kms("allow_any_device = true")),
        ("a KMS with no measurement", kms("mr_aggregated = []\nallow_any_device = true")),
    ] {
        assert!(Policy::from_toml(&text).is_err(), "{name}");
    }
}
