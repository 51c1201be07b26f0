//! The outside of a bring-up, scripted: a cloud, a KMS, a judge and a registrar that can be cut at every call and can lie.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use kms_protocol::kms_file::KmsFile;
use kms_protocol::report_data;
use kms_protocol::wire::webhook::BootInfo;
use kms_protocol::wire::{AttestationInfoResponse, BootstrapResponse, GetMetaResponse, OnboardResponse};
use ratls::client::PinnedRoot;
use ratls::issue::{self, KeyPair};
use tokio::sync::Notify;

use super::*;

pub(super) const K256: &str = "0324653eac434488002cc06bbfb7f10fe18991e35f9fe4302dbea6d2353dc0ab1c";
pub(super) const DOMAIN: &str = "kms.example.com";
pub(super) const ADDRESS: &str = "203.0.113.10:12001";

pub(super) fn hash(byte: u8) -> Vec<u8> {
    vec![byte; 32]
}

/// What a call meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cut {
    /// The program is killed before the call arrives.
    Before,
    /// The call takes effect, and the program is killed before it hears of it.
    After,
    /// The call does not arrive, and says so.
    Lost,
    /// The call takes effect, and its answer is lost.
    AnswerLost,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Keys {
    None,
    Own,
    Source,
}

/// The outside: a cloud and a KMS.
pub(super) struct World {
    pub(super) calls: Vec<&'static str>,
    pub(super) cut: Option<(usize, Cut)>,
    pub(super) machines: u32,
    pub(super) visitors: Visitors,
    /// Looks until the KMS answers.
    pub(super) boot: u32,
    /// Whether the guest starts anew when the port is opened to others.
    pub(super) restarts: bool,
    pub(super) keys: Keys,
    pub(super) bootstraps: u32,
    pub(super) serving: bool,
    pub(super) registered: bool,
    pub(super) registrar: bool,
    pub(super) console: String,
    /// What evidence says.
    pub(super) info: BootInfo,
    /// What the KMS claims over HTTP.
    pub(super) claim: Option<fn(&mut AttestationInfoResponse)>,
    pub(super) meta: Option<fn(&mut GetMetaResponse)>,
    pub(super) refusal: Option<&'static str>,
    pub(super) authoriser: Option<&'static str>,
    pub(super) name: &'static str,
    pub(super) certificate_evidence: bool,
    pub(super) identity: Option<&'static str>,
    /// Answers of a KMS that serves, before it hangs.
    pub(super) answers: Option<u32>,
    pub(super) evidence_is_good: bool,
}

#[derive(Clone)]
pub(super) struct Outside {
    pub(super) world: Arc<Mutex<World>>,
    pub(super) stalled: Arc<Notify>,
    pub(super) root: Arc<(Vec<u8>, String)>,
}

impl Outside {
    pub(super) fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let now = ratls::UnixTime::since_unix_epoch(Duration::from_secs(1_700_000_000));
        let root = issue::root_ca(&key, now).unwrap();
        let info = BootInfo {
            tee_variant: "dstack-gcp-tdx".into(),
            mr_aggregated: hash(2),
            os_image_hash: hash(1),
            mr_system: hash(9),
            app_id: vec![5; 20],
            compose_hash: hash(4),
            instance_id: vec![6; 20],
            device_id: hash(3),
            key_provider_info: Vec::new(),
            tcb_status: "UpToDate".into(),
            advisory_ids: Vec::new(),
        };
        let world = World {
            calls: Vec::new(),
            cut: None,
            machines: 0,
            visitors: Visitors::Clients(Vec::new()),
            boot: 2,
            restarts: false,
            keys: Keys::None,
            bootstraps: 0,
            serving: false,
            registered: false,
            registrar: true,
            console: "Linux version 6.9\nStarting containers\n".into(),
            info,
            claim: None,
            meta: None,
            refusal: None,
            authoriser: None,
            name: "203.0.113.10",
            certificate_evidence: true,
            identity: None,
            answers: None,
            evidence_is_good: true,
        };
        Self {
            world: Arc::new(Mutex::new(world)),
            stalled: Arc::default(),
            root: Arc::new((key.spki_der(), root.pem())),
        }
    }

    pub(super) fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap()
    }

    /// Counts a call; says whether it arrives and whether its answer does.
    async fn call<T>(&self, name: &'static str, effect: impl FnOnce(&mut World) -> T) -> Option<T> {
        let (outcome, stall) = {
            let mut world = self.world();
            let number = world.calls.len();
            world.calls.push(name);
            match world.cut.filter(|(at, _)| *at == number).map(|(_, cut)| cut) {
                None => (Some(effect(&mut world)), false),
                Some(Cut::Before) => (None, true),
                Some(Cut::After) => {
                    effect(&mut world);
                    (None, true)
                }
                Some(Cut::Lost) => (None, false),
                Some(Cut::AnswerLost) => {
                    effect(&mut world);
                    (None, false)
                }
            }
        };
        if stall {
            self.stalled.notify_one();
            std::future::pending::<()>().await;
        }
        outcome
    }

    fn made(&self) -> BootstrapResponse {
        let k256 = hex::decode(K256).unwrap();
        let binding = report_data::bootstrap(&self.root.0, &k256.clone().try_into().unwrap());
        BootstrapResponse { ca_pubkey: self.root.0.clone(), k256_pubkey: k256, attestation: binding.to_vec() }
    }

    pub(super) fn source(&self) -> KmsFile {
        let text = |byte| hex::encode(hash(byte));
        KmsFile {
            version: 1,
            url: "https://first.example.com:12001".into(),
            replicas: Vec::new(),
            ca_pubkey: hex::encode(&self.root.0),
            ca_cert: self.root.1.clone(),
            k256_pubkey: K256.into(),
            node: kms_protocol::kms_file::Node {
                tee_variant: "dstack-gcp-tdx".into(),
                os_image_hash: text(1),
                mr_aggregated: text(2),
                device_id: text(8),
                compose_hash: text(4),
            },
        }
    }
}

pub(super) fn gone(what: &'static str) -> crate::Error {
    crate::Error::Setting { setting: what, problem: "did not arrive".into() }
}

pub(super) struct Computer(pub(super) Outside);

impl Machine for Computer {
    async fn deploy(&mut self) -> Result<String, crate::Error> {
        let made = self.0.call("deploy", |world| world.machines = world.machines.max(1)).await;
        made.map(|()| format!("machine-{}", self.0.world().machines)).ok_or_else(|| gone("deploy"))
    }

    async fn address(&mut self) -> Result<Option<SocketAddr>, crate::Error> {
        let told = self.0.call("address", |_| ()).await;
        told.map(|()| Some(ADDRESS.parse().unwrap())).ok_or_else(|| gone("address"))
    }

    async fn console(&mut self, from: u64) -> Result<ConsoleText, crate::Error> {
        let told = self.0.call("console", |world| world.console.clone()).await;
        let text = told.ok_or_else(|| gone("console"))?;
        let next = text.len() as u64;
        Ok(ConsoleText { text: text[usize::try_from(from).unwrap()..].to_owned(), next, lost: 0 })
    }

    async fn admit(&mut self, visitors: &Visitors) -> Result<Guest, crate::Error> {
        let wanted = visitors.clone();
        let set = |world: &mut World| {
            let clients = matches!(&wanted, Visitors::Clients(networks) if !networks.is_empty());
            assert!(!clients || world.serving, "clients reach a KMS that is being set up");
            if !world.restarts || world.visitors == wanted {
                world.visitors = wanted;
                return Guest::RunsOn;
            }
            (world.visitors, world.boot) = (wanted, 2);
            Guest::StartsAnew
        };
        self.0.call("admit", set).await.ok_or_else(|| gone("admit"))
    }

    fn console_command(&self) -> String {
        "keyferry kms logs".into()
    }
}

pub(super) fn lost<T>(answer: Option<T>) -> Result<T, NodeError> {
    answer.ok_or_else(|| NodeError::Unreachable("connection reset".into()))
}

pub(super) fn refuse(text: &str) -> NodeError {
    NodeError::Refused { status: 400, text: text.to_owned() }
}

impl World {
    fn reachable(&self) -> Result<(), NodeError> {
        match &self.visitors {
            Visitors::Clients(networks) if networks.is_empty() => {
                Err(NodeError::Unreachable("the port is closed".into()))
            }
            _ => Ok(()),
        }
    }

    fn onboarding(&self) -> Result<(), NodeError> {
        self.reachable()?;
        if self.serving { Err(NodeError::Unreachable("TLS".into())) } else { Ok(()) }
    }

    fn may_have_keys(&self) -> Result<(), NodeError> {
        self.onboarding()?;
        if let Some(text) = self.refusal {
            return Err(refuse(text));
        }
        if self.keys != Keys::None {
            return Err(refuse("KMS has already been bootstrapped"));
        }
        if !self.registered {
            return Err(refuse("boot denied: Aggregated MR not allowed"));
        }
        Ok(())
    }
}

impl Node for Outside {
    async fn resolve(&self, _domain: &str) -> Result<Vec<IpAddr>, String> {
        let name = self.call("resolve", |world| world.name).await.ok_or("no answer")?;
        Ok(vec![name.parse().unwrap()])
    }

    async fn front(&self, _place: &Place) -> Front {
        let look = |world: &mut World| {
            if world.boot > 0 {
                world.boot -= 1;
                return Front::Nothing("connection refused".into());
            }
            match world.reachable() {
                Err(error) => Front::Nothing(error.to_string()),
                Ok(()) if world.serving => Front::Serving,
                Ok(()) => Front::Onboarding,
            }
        };
        self.call("front", look).await.unwrap_or_else(|| Front::Nothing("connection reset".into()))
    }

    async fn authoriser(&self, _place: &Place) -> Authoriser {
        match self.call("authoriser", |world| world.authoriser).await {
            None => Authoriser::NotYet("connection reset".into()),
            Some(Some(why)) => Authoriser::NotYet(why.into()),
            Some(None) => Authoriser::Ready,
        }
    }

    async fn attestation_info(&self, _place: &Place) -> Result<AttestationInfoResponse, NodeError> {
        let tell = |world: &mut World| {
            let mut info = AttestationInfoResponse {
                device_id: world.info.device_id.clone(),
                mr_aggregated: world.info.mr_aggregated.clone(),
                os_image_hash: world.info.os_image_hash.clone(),
                tee_variant: world.info.tee_variant.clone(),
                kms_contract_address: "0xAB".into(),
                ..AttestationInfoResponse::default()
            };
            if let Some(change) = world.claim {
                change(&mut info);
            }
            world.onboarding().map(|()| info)
        };
        lost(self.call("attestation_info", tell).await)?
    }

    async fn bootstrap(&self, _place: &Place) -> Result<BootstrapResponse, NodeError> {
        let make = |world: &mut World| {
            world.may_have_keys()?;
            world.keys = Keys::Own;
            world.bootstraps += 1;
            Ok(())
        };
        lost(self.call("bootstrap", make).await)?.map(|()| self.made())
    }

    async fn onboard(&self, _place: &Place, source: &str) -> Result<OnboardResponse, NodeError> {
        assert_eq!(source, "https://first.example.com:12001");
        let take = |world: &mut World| {
            world.may_have_keys()?;
            world.keys = Keys::Source;
            Ok(OnboardResponse::default())
        };
        lost(self.call("onboard", take).await)?
    }

    async fn finish(&self, _place: &Place) -> Result<(), NodeError> {
        let end = |world: &mut World| {
            world.onboarding()?;
            if world.keys == Keys::None {
                return Err(refuse("there are no keys yet"));
            }
            world.serving = true;
            Ok(())
        };
        lost(self.call("finish", end).await)?
    }

    async fn meta(&self, _place: &Place, root: Option<&PinnedRoot>) -> Result<Served, NodeError> {
        if let Some(root) = root {
            assert_eq!(root.spki_der(), self.root.0);
        }
        let hangs = match &mut self.world().answers {
            Some(0) => true,
            Some(left) => {
                *left -= 1;
                false
            }
            None => false,
        };
        if hangs {
            std::future::pending::<()>().await;
        }
        let tell = |world: &mut World| {
            world.reachable()?;
            if let Some(text) = world.identity {
                return Err(NodeError::Identity(text.into()));
            }
            if !world.serving {
                return Err(NodeError::Unreachable("no TLS".into()));
            }
            let mut meta = GetMetaResponse {
                ca_cert: self.root.1.clone(),
                k256_pubkey: hex::decode(K256).unwrap(),
                bootstrap_info: (world.keys == Keys::Own).then(|| self.made()),
                ..GetMetaResponse::default()
            };
            if let Some(change) = world.meta {
                change(&mut meta);
            }
            Ok(Served { meta, certificate: vec![1] })
        };
        lost(self.call("meta", tell).await)?
    }
}

impl Verifier for Outside {
    fn evidence<'a>(&'a self, encoded: &'a [u8], binding: [u8; 64]) -> Pending<'a, Result<BootInfo, Cause>> {
        let world = self.world();
        let good = encoded == binding && world.evidence_is_good;
        let info = world.info.clone();
        Box::pin(async move { if good { Ok(info) } else { Err("report data mismatch".into()) } })
    }

    fn certificate<'a>(&'a self, _der: &'a [u8]) -> Pending<'a, Result<Option<BootInfo>, Cause>> {
        let world = self.world();
        let info = world.certificate_evidence.then(|| world.info.clone());
        Box::pin(async move { Ok(info) })
    }
}

impl Registrar for Outside {
    fn register<'a>(&'a self, measured: &'a Measured) -> Pending<'a, Result<bool, Cause>> {
        Box::pin(async move {
            assert_eq!(measured.mr_aggregated, hex::encode(hash(2)));
            let register = |world: &mut World| {
                world.registered |= world.registrar;
                world.registrar
            };
            self.call("register", register).await.ok_or_else(|| "nonce too low".into())
        })
    }
}
