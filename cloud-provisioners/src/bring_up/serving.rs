//! The end of the way: a KMS that serves, watched, and told of in `kms.json`.

use std::time::Duration;

use kms_protocol::kms_file::{self, KmsFile};
use ratls::client::PinnedRoot;
use tokio::time::timeout;

use super::error::Error;
use super::gate::Gate;
use super::http::origin;
use super::machine::Machine;
use super::node::{Node, NodeError, Place, Served};
use super::record::{Keys, Measured, State};
use super::run::{FIRST_PAUSE, LONGEST_PAUSE, Run, Wait, same};
use crate::durable;
use crate::patience::{Deadline, Pauses};

/// A KMS that is well answers within this, its handshake included.
const PROMPT: Duration = Duration::from_secs(1);
/// Answers missed in a row that are no accident of the network.
const MISSES: u32 = 3;

impl<M: Machine, N: Node> Run<'_, M, N> {
    /// Waits until the KMS serves under the root that was verified, and checks what it says.
    pub(super) async fn serving(&mut self, place: &Place) -> Result<Served, Error> {
        let mut wait = self.wait(Gate::Serving);
        if let Some(source) = &self.wanted.source {
            let keys = Keys { ca_pubkey: source.ca_pubkey.clone(), k256_pubkey: source.k256_pubkey.clone() };
            self.record.note(|state| state.keys = Some(keys))?;
        } else if self.record.state.keys.is_none() {
            // The answer to Bootstrap was lost, or never ours: the KMS's own record must prove the keys.
            let served = self.meta(place, None, &mut wait).await?;
            let made = served.meta.bootstrap_info.ok_or(Error::NotMadeHere)?;
            self.verify_keys(&made).await?;
        }
        let Some(keys) = self.record.state.keys.clone() else { return Err(Error::NotMadeHere) };
        let root = pinned(&keys)?;
        let served = self.meta(place, Some(&root), &mut wait).await?;
        self.check_meta(&served, &keys, &root)?;
        self.check_certificate(&served).await?;
        self.observer.reached("the KMS serves under its root");
        Ok(served)
    }

    /// Asks on: a KMS that waits for its authoriser without an end answers well at first, and falls silent minutes later.
    pub(super) async fn watch(&mut self, place: &Place) -> Result<(), Error> {
        let (State { keys: Some(keys), .. }, false) = (&self.record.state, self.wanted.watch.is_zero())
        else {
            return Ok(());
        };
        let root = pinned(keys)?;
        let end = Deadline::within(self.wanted.watch);
        let mut pauses = Pauses::new(FIRST_PAUSE, LONGEST_PAUSE);
        let (mut answered, mut missed) = (Duration::ZERO, 0);
        while !end.passed() {
            let last = match timeout(PROMPT, self.node.meta(place, Some(&root))).await {
                Ok(Ok(_)) => {
                    (answered, missed) = (end.allowed() - end.left(), 0);
                    None
                }
                Ok(Err(error)) => Some(format!("GetMeta: the KMS {error}")),
                Err(_late) => Some(format!("GetMeta: no answer within {} s", PROMPT.as_secs())),
            };
            if let Some(last) = last {
                missed += 1;
                if missed == MISSES {
                    let look = Gate::Serving.look(&self.machine.console_command());
                    return Err(Error::FellSilent { after: answered, last, look });
                }
            }
            pauses.pause(end).await;
        }
        self.observer.reached(&format!("the KMS answered for {} s", end.allowed().as_secs()));
        Ok(())
    }

    async fn meta(
        &mut self,
        place: &Place,
        root: Option<&PinnedRoot>,
        wait: &mut Wait,
    ) -> Result<Served, Error> {
        loop {
            match self.node.meta(place, root).await {
                Ok(served) => return Ok(served),
                Err(NodeError::Identity(actual)) => {
                    let expected = format!("issued by the KMS's root for {}", place.domain);
                    return Err(Error::Unexpected { what: "the certificate", actual, expected });
                }
                Err(error) => self.not_yet(wait, &format!("GetMeta: the KMS {error}")).await?,
            }
        }
    }

    fn check_meta(&self, served: &Served, keys: &Keys, root: &PinnedRoot) -> Result<(), Error> {
        let meta = &served.meta;
        if meta.is_dev {
            return Err(Error::Development);
        }
        same("k256_pubkey", &hex::encode(&meta.k256_pubkey), &keys.k256_pubkey)?;
        if !root.is_key_of(&meta.ca_cert).unwrap_or(false) {
            let actual = "for another key".to_owned();
            let expected = format!("for the key {}", keys.ca_pubkey);
            return Err(Error::Unexpected { what: "ca_cert", actual, expected });
        }
        if let (None, Some(made)) = (&self.wanted.source, &meta.bootstrap_info) {
            same("the bootstrap record's ca_pubkey", &hex::encode(&made.ca_pubkey), &keys.ca_pubkey)?;
            same("the bootstrap record's k256_pubkey", &hex::encode(&made.k256_pubkey), &keys.k256_pubkey)?;
        }
        Ok(())
    }

    /// The evidence in the certificate, where there is some; of a replica it is the only one we see.
    async fn check_certificate(&mut self, served: &Served) -> Result<(), Error> {
        let of = "the certificate";
        let found = self.verifier.certificate(&served.certificate).await;
        match found.map_err(|source| Error::Evidence { of, source })? {
            Some(info) => {
                self.judge(&info)?;
                self.record.note(|state| state.measured = Some(Measured::of(&info)))?;
            }
            None => tracing::warn!("the KMS's certificate carries no evidence (core.attest_rpc_cert)"),
        }
        Ok(())
    }

    pub(super) fn write(&mut self, place: &Place, served: &Served) -> Result<KmsFile, Error> {
        let State { keys: Some(keys), measured: Some(measured), .. } = self.record.state.clone() else {
            return Err(Error::NotMadeHere);
        };
        let mut replicas = Vec::new();
        if let Some(source) = &self.wanted.source {
            replicas.push(source.url.clone());
            replicas.extend(source.replicas.iter().cloned());
        }
        let url = origin(&place.domain, place.address);
        replicas.retain(|replica| *replica != url);
        let file = KmsFile {
            version: kms_file::VERSION,
            url,
            replicas,
            ca_pubkey: keys.ca_pubkey,
            ca_cert: served.meta.ca_cert.clone(),
            k256_pubkey: keys.k256_pubkey,
            node: kms_file::Node {
                tee_variant: measured.tee_variant,
                os_image_hash: measured.os_image_hash,
                mr_aggregated: measured.mr_aggregated,
                device_id: measured.device_id,
                compose_hash: self.wanted.expected.compose_hash.clone(),
            },
        };
        durable::replace(self.wanted.kms_file, &file.encode()?, 0o644)?;
        Ok(file)
    }
}

fn pinned(keys: &Keys) -> Result<PinnedRoot, Error> {
    let expected = "a public key, DER in hex";
    let wrong = || kms_file::Error::Value { name: "ca_pubkey", expected };
    let spki = hex::decode(&keys.ca_pubkey).map_err(|_| wrong())?;
    PinnedRoot::from_spki_der(&spki).map_err(|_| Error::File(wrong()))
}
