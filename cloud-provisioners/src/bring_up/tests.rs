//! Bring-ups beside a scripted outside: cut at every call, lied to at every answer, late at every gate.

use std::time::Duration;

use kms_protocol::kms_file::KmsFile;

use super::outside::{Computer, Cut, DOMAIN, K256, Keys, Outside, World, hash};
use super::*;

#[derive(Default)]
struct Diary {
    reached: Vec<String>,
    milestones: Vec<Milestone>,
    to_register: Vec<Measured>,
}

impl Observer for Diary {
    fn reached(&mut self, what: &str) {
        self.reached.push(what.to_owned());
    }
    fn waiting(&mut self, _gate: Gate, _last: &str) {}
    fn milestone(&mut self, milestone: Milestone) {
        self.milestones.push(milestone);
    }
    fn to_register(&mut self, measured: &Measured) {
        self.to_register.push(measured.clone());
    }
}

/// An operator's directory.
struct Operator {
    directory: tempfile::TempDir,
    outside: Outside,
    replica: bool,
}

impl Operator {
    fn new(replica: bool) -> Self {
        Self { directory: tempfile::tempdir().unwrap(), outside: Outside::new(), replica }
    }

    fn expected() -> Expected {
        let text = |byte| hex::encode(hash(byte));
        Expected {
            tee_variant: "dstack-gcp-tdx".into(),
            os_image_hash: text(1),
            compose_hash: text(4),
            app_id: hex::encode([5; 20]),
            mr_aggregated: None,
            device_id: None,
            kms_contract: Some("0xab".into()),
        }
    }

    /// One run; `None` when it was killed.
    async fn run_with(
        &self,
        change: impl FnOnce(&mut Wanted<'_>),
    ) -> (Option<Result<Outcome, Error>>, Diary) {
        let kms_file = self.directory.path().join("kms.json");
        let mut wanted = Wanted {
            domain: DOMAIN.into(),
            source: self.replica.then(|| self.outside.source()),
            operators: vec!["198.51.100.7/32".parse().unwrap()],
            clients: vec!["0.0.0.0/0".parse().unwrap()],
            check_name: true,
            watch: Duration::ZERO,
            expected: Self::expected(),
            patience: Patience::default(),
            kms_file: &kms_file,
        };
        change(&mut wanted);
        let path = self.directory.path().join("bring-up.json");
        let mut record = Record::open(&path, wanted.role(), &wanted.domain).unwrap();
        let (mut machine, mut diary) = (Computer(self.outside.clone()), Diary::default());
        let (node, judges) =
            (&self.outside, (&self.outside as &dyn Verifier, &self.outside as &dyn Registrar));
        let work = bring_up(&mut machine, node, judges, &wanted, &mut record, &mut diary);
        let done = tokio::select! {
            done = work => Some(done),
            () = self.outside.stalled.notified() => None,
        };
        (done, diary)
    }

    async fn run(&self) -> Result<Outcome, Error> {
        self.run_with(|_| {}).await.0.expect("nobody kills this run")
    }

    fn check_served(&self) {
        let world = self.outside.world();
        assert!(world.serving && world.machines == 1);
        assert_eq!(world.visitors, Visitors::Clients(vec!["0.0.0.0/0".parse().unwrap()]));
        assert_eq!(world.keys, if self.replica { Keys::Source } else { Keys::Own });
        assert_eq!(world.bootstraps, u32::from(!self.replica), "keys were made once");
        let file = KmsFile::decode(&std::fs::read(self.directory.path().join("kms.json")).unwrap()).unwrap();
        assert_eq!(file.url, "https://kms.example.com:12001");
        assert_eq!((file.ca_pubkey, file.k256_pubkey), (hex::encode(&self.outside.root.0), K256.to_owned()));
        assert_eq!(file.replicas.len(), usize::from(self.replica));
        assert_eq!(file.node.mr_aggregated, hex::encode(hash(2)));
    }
}

#[tokio::test(start_paused = true)]
async fn a_kms_is_brought_up_once() {
    for replica in [false, true] {
        let operator = Operator::new(replica);
        let (done, diary) = operator.run_with(|_| {}).await;
        assert!(!done.unwrap().unwrap().as_before);
        operator.check_served();
        assert_eq!(diary.milestones, [Milestone::Kernel, Milestone::Containers]);
        assert_eq!(diary.to_register, []);
        operator.outside.world().calls.clear();
        assert!(operator.run().await.unwrap().as_before);
        assert_eq!(operator.outside.world().calls, ["deploy", "admit"], "nothing is set up twice");
        operator.check_served();
    }
}

#[tokio::test(start_paused = true)]
async fn a_kms_that_falls_silent_is_not_opened_to_clients() {
    let operator = Operator::new(false);
    let watched = |wanted: &mut Wanted<'_>| wanted.watch = Duration::from_secs(600);
    operator.outside.world().answers = Some(20);
    let silent = operator.run_with(watched).await.0.unwrap().unwrap_err();
    assert!(silent.is_late() && silent.hint().unwrap().contains("chain doctor"), "{silent}");
    let told = silent.to_string();
    assert!(told.ends_with(" s and then no more: GetMeta: no answer within 1 s"), "{told}");
    assert!(matches!(operator.outside.world().visitors, Visitors::Operators(_)));

    operator.outside.world().answers = None;
    let before = tokio::time::Instant::now();
    let (done, diary) = operator.run_with(watched).await;
    assert!(!done.unwrap().unwrap().as_before);
    assert!(before.elapsed() >= Duration::from_secs(600));
    assert!(diary.reached.contains(&"the KMS answered for 600 s".to_owned()), "{:?}", diary.reached);
    operator.check_served();
}

/// Whatever happens at whatever call, the next run ends in the same place.
#[tokio::test(start_paused = true)]
async fn a_run_that_was_cut_at_any_call_is_gone_on_with() {
    for (replica, restarts) in [(false, false), (true, false), (false, true)] {
        let new = || {
            let operator = Operator::new(replica);
            operator.outside.world().restarts = restarts;
            operator
        };
        let calls = {
            let operator = new();
            operator.run().await.unwrap();
            operator.outside.world().calls.len()
        };
        assert!(calls >= 14, "{calls}");
        for cut in [Cut::Before, Cut::After, Cut::Lost, Cut::AnswerLost] {
            for at in 0..calls {
                let operator = new();
                operator.outside.world().cut = Some((at, cut));
                let (first, _) = operator.run_with(|_| {}).await;
                let killed = matches!(cut, Cut::Before | Cut::After);
                assert_eq!(first.is_none(), killed, "{cut:?} at call {at}: {first:?}");
                if !matches!(first, Some(Ok(_))) {
                    let call = operator.outside.world().calls[at];
                    let second = operator.run().await;
                    assert!(
                        second.is_ok(),
                        "{cut:?} at call {at} ({call}): first {first:?}, then {second:?}"
                    );
                }
                operator.check_served();
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn every_wait_ends_and_says_where_to_look() {
    type Trouble = fn(&mut World);
    let cases: [(Gate, Trouble, &str, &str); 6] = [
        (Gate::Boot, |world| world.boot = u32::MAX, "containers are starting", "keyferry kms logs"),
        (
            Gate::Boot,
            |world| {
                world.boot = u32::MAX;
                world.console.push_str("dial tcp: i/o timeout\n");
            },
            "i/o timeout",
            "registry",
        ),
        (
            Gate::Authoriser,
            |world| world.authoriser = Some("chain: 500 missing revert data"),
            "missing revert data",
            "keyferry chain doctor",
        ),
        (
            Gate::Name,
            |world| world.name = "192.0.2.1",
            "kms.example.com leads to 192.0.2.1, expected 203.0.113.10",
            "A record",
        ),
        (
            Gate::Registration,
            |world| world.registrar = false,
            "Bootstrap: the KMS answered 400: boot denied: Aggregated MR not allowed",
            "run the same command again",
        ),
        (
            Gate::Registration,
            |world| {
                world.refusal = Some("http://auth-api:8000/bootAuth/kms: Connection refused (os error 111)")
            },
            "Connection refused",
            "run the same command again",
        ),
    ];
    for (gate, trouble, last, look) in cases {
        let operator = Operator::new(false);
        trouble(&mut operator.outside.world());
        let error = operator.run().await.unwrap_err();
        let Error::Late { gate: found, last: seen, .. } = &error else { panic!("{gate}: {error}") };
        assert_eq!(*found, gate);
        assert!(seen.contains(last), "{gate}: {seen}");
        let hint = error.hint().unwrap();
        assert!(hint.contains(look), "{gate}: {hint}");
        assert!(error.is_late());
    }
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_restarts_for_ever_is_not_waited_for() {
    let operator = Operator::new(false);
    {
        let mut world = operator.outside.world();
        world.boot = u32::MAX;
        world.console = "Linux version 6.9\napp-compose.json is too large, max size 262144\n".into();
    }
    let error = operator.run().await.unwrap_err();
    assert_eq!(error.to_string(), "the guest does not start: app-compose.json is too large, max size 262144");
    assert!(error.hint().unwrap().contains("make the file smaller"));
}

/// Nothing is believed that is not as expected, before keys exist and after.
#[tokio::test(start_paused = true)]
async fn lies_are_refused() {
    type Lie = fn(&mut World);
    let cases: [(&str, Lie, &str); 13] = [
        ("platform", |world| world.info.tee_variant = "dstack-tdx".into(), "tee_variant is dstack-tdx"),
        ("image", |world| world.info.os_image_hash = hash(7), "os_image_hash is 0707"),
        (
            "image not told",
            |world| world.claim = Some(|info| info.os_image_hash.clear()),
            "os_image_hash is empty",
        ),
        (
            "contract",
            |world| world.claim = Some(|info| info.kms_contract_address = "0xcd".into()),
            "the KMS's contract is 0xcd, expected 0xab",
        ),
        (
            "another measurement over HTTP than in the evidence",
            |world| {
                world.claim = Some(|info| info.device_id = hash(7));
            },
            "device_id is 0303",
        ),
        ("compose", |world| world.info.compose_hash = hash(7), "compose_hash is 0707"),
        ("app", |world| world.info.app_id = vec![7; 20], "app_id is 0707"),
        ("evidence", |world| world.evidence_is_good = false, "evidence of the bootstrap does not verify"),
        ("k256", |world| world.meta = Some(|meta| meta.k256_pubkey[5] ^= 1), "k256_pubkey is "),
        ("development", |world| world.meta = Some(|meta| meta.is_dev = true), "the KMS has no authoriser"),
        (
            "another CA",
            |world| world.meta = Some(|meta| meta.ca_cert = "none".into()),
            "ca_cert is for another key",
        ),
        (
            "somebody else's record",
            |world| {
                world.meta = Some(|meta| {
                    if let Some(made) = &mut meta.bootstrap_info {
                        made.ca_pubkey = vec![0];
                    }
                });
            },
            "the bootstrap record's ca_pubkey is 00",
        ),
        (
            "another certificate",
            |world| world.identity = Some("invalid peer certificate: UnknownIssuer"),
            "the certificate is invalid peer certificate",
        ),
    ];
    for (name, lie, expected) in cases {
        let operator = Operator::new(false);
        lie(&mut operator.outside.world());
        let error = operator.run().await.expect_err(name);
        assert!(error.to_string().starts_with(expected), "{name}: {error}");
        assert!(error.hint().is_some(), "{name}");
        assert!(!operator.directory.path().join("kms.json").exists(), "{name}");
        let operators = Visitors::Operators(vec!["198.51.100.7/32".parse().unwrap()]);
        assert_eq!(operator.outside.world().visitors, operators, "{name}: clients stay out");
    }
}

/// Whoever reaches the port first may have set the KMS up with keys of their own.
#[tokio::test(start_paused = true)]
async fn keys_that_were_not_made_here_are_refused() {
    let operator = Operator::new(false);
    {
        let mut world = operator.outside.world();
        (world.keys, world.registered) = (Keys::Source, true);
    }
    let error = operator.run().await.unwrap_err();
    assert!(matches!(error, Error::NotMadeHere), "{error}");
    assert!(error.hint().unwrap().contains("--operator"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_replica_must_have_the_source_s_keys() {
    let operator = Operator::new(true);
    operator.outside.world().meta = Some(|meta| meta.k256_pubkey[5] ^= 1);
    let error = operator.run().await.unwrap_err().to_string();
    assert!(error.starts_with("k256_pubkey is "), "{error}");

    let operator = Operator::new(true);
    operator.outside.world().refusal =
        Some("Failed to onboard: received corrupt message of type InvalidContentType");
    let error = operator.run().await.unwrap_err();
    assert!(error.hint().unwrap().contains("stale DNS"), "{error}");
}

/// What served before its machine was started anew is looked at again.
#[tokio::test(start_paused = true)]
async fn a_machine_that_starts_anew_for_its_clients_is_waited_for() {
    let operator = Operator::new(false);
    operator.outside.world().restarts = true;
    operator.run().await.unwrap();
    operator.check_served();
    let world = operator.outside.world();
    assert_eq!(world.calls[world.calls.len() - 2..], ["front", "meta"], "{:?}", world.calls);
    assert_eq!(world.boot, 0);
}

#[tokio::test(start_paused = true)]
async fn values_to_register_by_hand_are_told_and_waited_for() {
    let operator = Operator::new(false);
    operator.outside.world().registrar = false;
    let outside = operator.outside.clone();
    let by_hand = async {
        // Somebody registers while the KMS is asked again and again.
        loop {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let mut world = outside.world();
            if world.calls.iter().filter(|call| **call == "bootstrap").count() >= 3 {
                world.registered = true;
                return;
            }
        }
    };
    let ((done, diary), ()) = tokio::join!(operator.run_with(|_| {}), by_hand);
    done.unwrap().unwrap();
    let measured = &diary.to_register[0];
    let commands = measured.commands().join("\n");
    for (command, byte) in [("add-image", 1), ("add-kms", 2), ("add-device", 3)] {
        assert!(
            commands.contains(&format!("keyferry chain {command} 0x{}", hex::encode(hash(byte)))),
            "{commands}"
        );
    }
    operator.check_served();
}

#[tokio::test(start_paused = true)]
async fn another_machine_in_the_old_one_s_place_is_set_up_anew() {
    let operator = Operator::new(false);
    operator.run().await.unwrap();
    {
        let mut world = operator.outside.world();
        (world.machines, world.keys, world.serving) = (2, Keys::None, false);
        world.visitors = Visitors::Clients(Vec::new());
    }
    assert!(!operator.run().await.unwrap().as_before);
    assert_eq!(operator.outside.world().bootstraps, 2);
}

#[tokio::test(start_paused = true)]
async fn a_kms_that_was_begun_is_not_turned_into_another() {
    let operator = Operator::new(false);
    operator.run().await.unwrap();
    let (done, _) = operator.run_with(|wanted| wanted.domain = "other.example.com".into()).await;
    let error = done.unwrap().unwrap_err();
    assert!(matches!(error, Error::OtherRole { .. }), "{error}");
    assert!(error.hint().is_some());
}
