//! The host's public SSH keys, as cloud-init prints them on the console at the first boot.
//!
//! Only the machine's own console and the EC2 API, which is asked with the operator's credentials over TLS, are between
//! the host and what is read here: nobody on the way to its SSH port is.

use crate::nitro_host::HostKey;

const BEGIN: &str = "-----BEGIN SSH HOST KEY KEYS-----";
const END: &str = "-----END SSH HOST KEY KEYS-----";

/// The keys of the last complete block, Ed25519 first; a machine that was started again prints another block. Lines have
/// a prefix of the system's log, and may end in a carriage return.
pub(super) fn host_keys(console: &str) -> Vec<HostKey> {
    let mut last = Vec::new();
    let mut block: Option<Vec<HostKey>> = None;
    for line in console.lines() {
        if line.contains(BEGIN) {
            block = Some(Vec::new());
        } else if line.contains(END) {
            match block.take() {
                Some(keys) if !keys.is_empty() => last = keys,
                _ => {}
            }
        } else if let Some(keys) = &mut block {
            keys.extend(key(line));
        }
    }
    last.sort_by_key(|key| key.algorithm() != "ssh-ed25519");
    last
}

/// The key in a line, wherever it begins. Types that are not accepted are passed over.
fn key(line: &str) -> Option<HostKey> {
    ["ssh-ed25519 ", "ecdsa-sha2-nistp"]
        .iter()
        .filter_map(|kind| line.find(kind))
        .find_map(|start| line[start..].parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIE0LPFeB9S10wKXfhVjxDmEqVvCSrBEZrwAUpbB7ixSu";
    const SECOND: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAILQoI/b+htX0C5CKPmYrO4v7CJjhU7KziNq6h5D3Ll32";
    const ECDSA: &str = "ecdsa-sha2-nistp256 AAAAE2VjZHNhLXNoYTItbmlzdHAyNTYAAAAIbmlzdHAyNTYAAABBBNQ5y7k8aGJGrRk9vX1Q7DoQm8K\
                         fC1m2cVPSWtL5Tn3fLrQ0jpgDDwHqgDzXv0LtrJgSYyTMWzTrdGiUD8DZQfg=";

    fn block(keys: &[&str]) -> String {
        let mut text = format!("<14>Nov 21 10:00:01 ec2: {BEGIN}\r\n");
        for key in keys {
            text += &format!("<14>Nov 21 10:00:01 ec2: {key} root@ip-172-31-0-1\r\n");
        }
        text + &format!("<14>Nov 21 10:00:01 ec2: {END}\r\n")
    }

    fn found(console: &str) -> Vec<String> {
        host_keys(console).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn keys_are_found_behind_the_prefix_of_the_log() {
        let console =
            format!("[    0.0] Linux\r\n{}login: ", block(&[ECDSA, "ssh-rsa AAAAB3NzaC1yc2E=", FIRST]));
        assert_eq!(found(&console), [FIRST, ECDSA]);
    }

    #[test]
    fn the_last_complete_block_counts() {
        let unfinished = format!("<14>ec2: {BEGIN}\n<14>ec2: {FIRST} root@h\n");
        assert_eq!(found(&(block(&[FIRST]) + &block(&[SECOND]) + &unfinished)), [SECOND]);
    }

    #[test]
    fn nothing_outside_a_block_is_taken() {
        assert_eq!(found(&format!("{FIRST} root@h\n{END}\n{FIRST}\n")), Vec::<String>::new());
        assert_eq!(found(&block(&[])), Vec::<String>::new());
        assert_eq!(found(&block(&["ssh-ed25519 AAAA"])), Vec::<String>::new());
    }

    #[test]
    fn a_console_that_is_cut_anywhere_gives_whole_keys_or_none() {
        let console = block(&[FIRST, ECDSA]);
        for length in 0..console.len() {
            let keys = found(&console[..length]);
            assert!(keys.is_empty() || keys == [FIRST, ECDSA], "{length}: {keys:?}");
        }
    }
}
