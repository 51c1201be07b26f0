//! What nitro-cli says: JSON on standard output, `[ E22 ] words` on standard error.

use std::fmt::{self, Display, Formatter};

use serde::Deserialize;
use serde_json::Value;

/// An error code of nitro-cli, `E22`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Code(pub u8);

impl Display for Code {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "E{:02}", self.0)
    }
}

/// An enclave that nitro-cli lists.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Enclave {
    /// The name it was started with.
    #[serde(default)]
    pub enclave_name: Option<String>,
    /// Its id, `i-…-enc…`.
    #[serde(rename = "EnclaveID")]
    pub enclave_id: String,
    /// Its context id.
    #[serde(rename = "EnclaveCID")]
    pub enclave_cid: u32,
    /// Processors it holds.
    #[serde(rename = "NumberOfCPUs")]
    pub cpus: u32,
    /// Memory it holds, in MiB.
    #[serde(rename = "MemoryMiB")]
    pub memory_mib: u64,
    /// `RUNNING`, `TERMINATING` or `EMPTY`; absent in the answer to a start.
    #[serde(default)]
    pub state: Option<String>,
    /// `NONE` or `DEBUG_MODE`; absent in the answer to a start.
    #[serde(default)]
    pub flags: Option<String>,
    /// What its image measures to, where nitro-cli tells.
    #[serde(default)]
    pub measurements: Option<Value>,
}

/// What an image measures to, as `describe-eif` says.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Description {
    pub(super) measurements: Value,
    #[serde(rename = "CheckCRC", default)]
    pub(super) check_crc: Option<bool>,
}

/// The first error code in nitro-cli's words, and the sentence behind it. It tells the cause first and consequences
/// after it.
pub(super) fn error(stderr: &str) -> Option<(Code, String)> {
    let (_, rest) = stderr.split_once("[ E")?;
    let (digits, words) = rest.split_once(" ]")?;
    let code = digits.parse().ok().map(Code)?;
    let line = words.trim_start().lines().next().unwrap_or_default();
    Some((code, super::host::shown(line)))
}

/// What helps against an error code, in the order in which to try it.
pub fn hint_for(code: Code) -> Option<&'static str> {
    Some(match code.0 {
        18 => "nitro-cli cannot write its log: run it as root, or log in anew after joining the group ne",
        19 => {
            "a file is missing: the image, or the kernel module's /dev/nitro_enclaves; was the instance launched with \
             enclaves enabled? `keyferry host doctor` tells them apart"
        }
        20 | 21 | 23 | 24 => "the CPU ids do not fit the pool: leave the choice to cpu_count",
        22 => {
            "too few CPUs in the pool: look for a leftover enclave, then restart the allocator, then raise cpu_count; \
             `keyferry host setup` does all three in this order"
        }
        26 => "the enclave needs at least four times its image: raise [run] memory_mib",
        27 => "too few hugepages: `keyferry host setup` raises memory_mib and restarts the allocator",
        28..=33 => {
            "the driver refused: a context id that is in use, or see the newest file in /var/log/nitro_enclaves \
             (`keyferry host logs --nitro`)"
        }
        35 => "the image cannot be read: remove ~/.keyferry on the host and run this again",
        36 => {
            "the image did not boot: its init ended at once, its kernel panicked, or it is for another architecture; \
             `keyferry enclave run` shows its console on this machine"
        }
        39 => "a consequence of the error before it: see `keyferry host logs --nitro`",
        44 => "only an enclave in debug mode has a console",
        48..=52 => "images are built here, not on the host: `eif-builder build`",
        58..=60 => "the image's name or signature: `eif-builder verify` says what is wrong with it",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cause_is_told_not_its_consequence() {
        let stderr = "Start allocating memory...\n[ E22 ] Insufficient CPUs available. Such error appears when the \
                      user requests more CPUs than available.\n\nFor more details, please visit \
                      https://docs.aws.amazon.com/enclaves/latest/user/cli-errors.html#E22\n[ E39 ] Enclave process \
                      connection failure.\n";
        let (code, words) = error(stderr).unwrap();
        assert_eq!((code, code.to_string().as_str()), (Code(22), "E22"));
        assert!(words.starts_with("Insufficient CPUs available."), "{words}");
        assert!(hint_for(code).unwrap().contains("leftover"));
        assert_eq!(error("sh: nitro-cli: not found"), None);
        assert_eq!(error("[ E ] "), None);
    }

    #[test]
    fn the_answers_of_nitro_cli_are_read() {
        let listed = r#"[{"EnclaveName":"keyferry-1","EnclaveID":"i-0-enc1","ProcessID":7077,"EnclaveCID":16,
            "NumberOfCPUs":2,"CPUIDs":[1,3],"MemoryMiB":512,"State":"RUNNING","Flags":"NONE",
            "Measurements":{"HashAlgorithm":"Sha384 { ... }","PCR0":"00"}}]"#;
        let listed: Vec<Enclave> = serde_json::from_str(listed).unwrap();
        assert_eq!(listed[0].enclave_cid, 16);
        assert_eq!(listed[0].flags.as_deref(), Some("NONE"));
        let started = r#"{"EnclaveName":"a","EnclaveID":"i-0-enc1","ProcessID":1,"EnclaveCID":16,"NumberOfCPUs":2,
            "CPUIDs":[1,3],"MemoryMiB":512}"#;
        let started: Enclave = serde_json::from_str(started).unwrap();
        assert_eq!((started.cpus, started.memory_mib, started.state), (2, 512, None));
    }
}
