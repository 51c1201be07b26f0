//! What users saw go wrong on TDX hosts, by the line that shows it in a log: of a guest's console, `qgsd`, the key provider,
//! the VMM or the KMS.

use serde::Serialize;

/// A known way to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Symptom {
    /// The text that shows it.
    pub text: &'static str,
    /// Why it happens.
    pub cause: &'static str,
    /// What to do.
    pub remedy: &'static str,
}

const NOT_REGISTERED: &str =
    "the host's collateral service is wrong, or the platform is not registered with Intel";
const MEND_REGISTRATION: &str = "see the checks pccs-host and registration; then systemctl restart qgsd";
const NO_KEY: &str = "the guest has no sealing key: a link between its quote and the key provider is missing";

/// More telling ones first: a line is known by the first that it contains.
const SYMPTOMS: [Symptom; 26] = [
    Symptom {
        text: "x86/tme: not enabled by BIOS",
        cause: "memory encryption is off in the firmware",
        remedy: "switch TME-MT on; where it is greyed out, switch off \"Limit CPU physical address to 46 bits\"",
    },
    Symptom {
        text: "TDX_ATTEST_ERROR_UNEXPECTED",
        cause: "a link of the attestation chain is missing",
        remedy: "run the checks and mend the first that fails",
    },
    Symptom { text: "QGS error code: 0x12001", cause: NOT_REGISTERED, remedy: MEND_REGISTRATION },
    Symptom {
        text: "No certificate data for this platform",
        cause: NOT_REGISTERED,
        remedy: MEND_REGISTRATION,
    },
    Symptom { text: "Intel PCS server returns error(401)", cause: NOT_REGISTERED, remedy: MEND_REGISTRATION },
    Symptom {
        text: "Failed to get quote collateral",
        cause: "the guest cannot reach the collateral service",
        remedy: "see the checks pccs-guest and network",
    },
    Symptom {
        text: "Network is unreachable",
        cause: "early in its boot the guest has no route",
        remedy: "see the checks network and pccs-guest: mode user, and an address that guests reach",
    },
    Symptom {
        text: "DCAP error",
        cause: "the TDX module is below the TCB level that Intel asks for",
        remedy: "update the firmware with the vendor's; microcode alone does not help",
    },
    Symptom {
        text: "Failed to get sealing key",
        cause: NO_KEY,
        remedy: "see the checks key-provider, qgsd, pccs-host and registration, and the key provider's own log",
    },
    Symptom {
        text: "Waiting for the system time to be synchronized",
        cause: "secure_time is on, and no authenticated time is reached",
        remedy: "deploy again with secure_time false",
    },
    Symptom {
        text: "manifest for ",
        cause: "the registry has no image of that tag",
        remedy: "see the check registry; name a tag or digest that is there",
    },
    Symptom {
        text: "Failed to bind host API",
        cause: "the VMM has no vsock: it runs in a machine of a cloud, or the module is missing",
        remedy: "use a machine of your own; see the check vsock",
    },
    Symptom {
        text: "unable to set guest cid",
        cause: "another guest of this host has that context id",
        remedy: "see the check cid; change [cvm] cid_start",
    },
    Symptom {
        text: "\"quote\": null",
        cause: "the KMS has no guest agent to ask for a quote",
        remedy: "mount /var/run/dstack.sock into the KMS's container; see the checks sgx and registration",
    },
    Symptom {
        text: "missing field `status`",
        cause: "the authorisation service runs without a chain or a contract",
        remedy: "set ETH_RPC_URL and KMS_CONTRACT_ADDR; see the check auth",
    },
    Symptom {
        text: "missing field 'status'",
        cause: "the authorisation service runs without a chain or a contract",
        remedy: "set ETH_RPC_URL and KMS_CONTRACT_ADDR; see the check auth",
    },
    Symptom {
        text: "bootAuth/kms",
        cause: "the authorisation service cannot be asked: it is not up, or listens at another port",
        remedy: "wait for it; PORT of the service must be the port in kms.toml",
    },
    Symptom {
        text: ":9200/",
        cause: "the authorisation service is asked at port 9200 and listens at 8000, as it does unless it is told otherwise",
        remedy: "PORT of the service must be the port in kms.toml",
    },
    Symptom {
        text: "no space left on device",
        cause: "the guest's disk is full",
        remedy: "give it a larger one, vmm_config.disk_size or gcp_config.data_size in app.json, before there are keys on it",
    },
    Symptom {
        text: "port is already allocated",
        cause: "two containers publish the same port of the guest",
        remedy: "change one in the compose; 18000 and 18545 need not be published at all",
    },
    Symptom {
        text: "address already in use",
        cause: "something else in the guest has the port that a container publishes",
        remedy: "change it in the compose; 18000 and 18545 need not be published at all",
    },
    Symptom {
        text: "toomanyrequests",
        cause: "the registry limits how often this address may pull",
        remedy: "keep the images in a registry of your own, and name them by digest",
    },
    Symptom {
        text: "x509: certificate",
        cause: "the registry's certificate is not one the guest knows",
        remedy: "see the check registry; a guest has the public roots and no other",
    },
    Symptom {
        text: "is too large, max size",
        cause: "a file of the configuration is larger than the guest takes, and it starts again for ever",
        remedy: "make the compose or .user-config smaller",
    },
    Symptom {
        text: "i/o timeout",
        cause: "the guest cannot reach its registry",
        remedy: "see the check registry, and the network's way out",
    },
    Symptom {
        text: "failed to start containers",
        cause: "a container of the compose did not start",
        remedy: "look at the lines before it",
    },
];

/// The known failure that a line shows.
pub(crate) fn known(line: &str) -> Option<Symptom> {
    SYMPTOMS.iter().find(|symptom| line.contains(symptom.text)).copied()
}

/// The known failures that a log shows, in the order in which they first appear, each with its line.
#[must_use]
pub fn recognise(log: &str) -> Vec<(Symptom, &str)> {
    let mut found: Vec<(Symptom, &str)> = Vec::new();
    for line in log.lines() {
        if let Some(symptom) = known(line)
            && !found.iter().any(|(known, _)| known.text == symptom.text)
        {
            found.push((symptom, line.trim()));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_symptom_is_known_by_its_own_line() {
        for symptom in SYMPTOMS {
            let line = format!("[  12.3] service[1]: {} here", symptom.text);
            let log = format!("starting\n{line}\n{line}\n");
            let found = recognise(&log);
            assert_eq!(found.len(), 1, "{}", symptom.text);
            assert_eq!(found[0].0.text, symptom.text, "an earlier entry hides it");
            assert_eq!(found[0].1, line);
        }
    }

    #[test]
    fn a_guest_without_a_sealing_key_shows_the_chain_in_its_order() {
        let log = "qgsd: [QPL] No certificate data for this platform.\nguest: QGS error code: 0x12001\nguest: Failed to \
                   get sealing key\n";
        let texts: Vec<&str> = recognise(log).iter().map(|(symptom, _)| symptom.text).collect();
        let expected =
            ["No certificate data for this platform", "QGS error code: 0x12001", "Failed to get sealing key"];
        assert_eq!(texts, expected);
    }
}
