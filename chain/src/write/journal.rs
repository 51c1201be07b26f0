use std::fs::{File, OpenOptions, TryLockError, create_dir_all};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use alloy::primitives::{Address, B256, Bytes};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// A journal longer than this is not read: some 50,000 transactions.
const MAX_JOURNAL: u64 = 64 << 20;

/// What one account has sent on one chain, in one append-only file of JSON lines.
///
/// Every record is on disk (`fdatasync`) before the step after it is taken. A crash can tear only the last line, and
/// then that step was not taken; such a rest is cut off when the journal is opened. The file is locked while open, so
/// two commands cannot choose the same nonce.
pub struct Journal {
    path: PathBuf,
    file: File,
    sent: Vec<Sent>,
}

/// A transaction that was signed, and what is known to have become of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sent {
    pub(crate) operation: B256,
    pub(crate) what: String,
    pub(crate) nonce: u64,
    pub(crate) hash: B256,
    pub(crate) raw: Bytes,
    pub(crate) end: Option<End>,
}

/// How a transaction ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "end")]
pub(crate) enum End {
    /// Mined and successful. `created` is the contract or application that came of it.
    Succeeded { block: u64, created: Option<Address> },
    /// Mined and reverted.
    Reverted { block: u64 },
    /// Another transaction took the nonce.
    Replaced,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "record")]
enum Record {
    Signed {
        version: u8,
        operation: B256,
        what: String,
        nonce: u64,
        hash: B256,
        raw: Bytes,
    },
    Ended {
        hash: B256,
        #[serde(flatten)]
        end: End,
    },
}

/// Version of the records written here.
const VERSION: u8 = 1;

/// `$XDG_STATE_HOME/keyferry/chain`, or below `~/.local/state`.
pub fn default_folder(var: impl Fn(&str) -> Option<std::ffi::OsString>) -> Option<PathBuf> {
    let base = var("XDG_STATE_HOME").map(PathBuf::from).filter(|it| it.is_absolute());
    let base = base.or_else(|| var("HOME").map(|home| PathBuf::from(home).join(".local/state")))?;
    Some(base.join("keyferry/chain"))
}

impl Journal {
    /// Opens the journal of `account` on the chain that began with block `genesis`; a development chain that was
    /// started anew is another chain although its id is the same.
    ///
    /// # Errors
    /// [`Error::JournalBusy`], [`Error::Journal`], [`Error::JournalRecord`].
    pub fn open(folder: &Path, chain_id: u64, genesis: B256, account: Address) -> Result<Self> {
        let name = format!("{chain_id}-{}-{account:#x}.jsonl", hex::encode(&genesis[..4]));
        let path = folder.join(name);
        let failed = |source: io::Error| Error::Journal { path: path.clone(), source };
        create_dir_all(folder).map_err(failed)?;
        let mut options = OpenOptions::new();
        let mut file =
            options.read(true).append(true).create(true).mode(0o600).open(&path).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(Error::JournalBusy { path }),
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
        File::open(folder).and_then(|it| it.sync_all()).map_err(failed)?;
        let mut text = String::new();
        (&mut file).take(MAX_JOURNAL + 1).read_to_string(&mut text).map_err(failed)?;
        if text.len() as u64 > MAX_JOURNAL {
            return Err(failed(io::Error::other("longer than 64 MiB")));
        }
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        if whole < text.len() {
            file.set_len(whole as u64).and_then(|()| file.sync_data()).map_err(failed)?;
        }
        let sent = read_records(&path, &text[..whole])?;
        Ok(Self { path, file, sent })
    }

    /// Everything that was sent, oldest first.
    pub(crate) fn sent(&self) -> &[Sent] {
        &self.sent
    }

    /// Transactions whose end is not known.
    pub(crate) fn open_ones(&self) -> Vec<Sent> {
        self.sent.iter().filter(|it| it.end.is_none()).cloned().collect()
    }

    /// The nonce after the last one that is used up, as far as this journal knows.
    pub(crate) fn next_nonce(&self) -> u64 {
        let used = self.sent.iter().filter(|it| it.end.is_some());
        used.map(|it| it.nonce + 1).max().unwrap_or_default()
    }

    /// What the last successful run of an operation created.
    pub(crate) fn created_by(&self, operation: B256) -> Option<(Address, B256)> {
        self.sent.iter().rev().filter(|it| it.operation == operation).find_map(|it| match it.end {
            Some(End::Succeeded { created, .. }) => created.map(|address| (address, it.hash)),
            _ => None,
        })
    }

    /// Writes down a transaction; only then may it be sent.
    pub(crate) fn signed(&mut self, sent: Sent) -> Result<()> {
        self.append(&Record::Signed {
            version: VERSION,
            operation: sent.operation,
            what: sent.what.clone(),
            nonce: sent.nonce,
            hash: sent.hash,
            raw: sent.raw.clone(),
        })?;
        self.sent.push(sent);
        Ok(())
    }

    /// Writes down how a transaction ended.
    pub(crate) fn ended(&mut self, hash: B256, end: End) -> Result<()> {
        self.append(&Record::Ended { hash, end: end.clone() })?;
        if let Some(sent) = self.sent.iter_mut().find(|it| it.hash == hash) {
            sent.end = Some(end);
        }
        Ok(())
    }

    fn append(&mut self, record: &Record) -> Result<()> {
        let written = serde_json::to_vec(record).map_err(io::Error::from).and_then(|mut line| {
            line.push(b'\n');
            self.file.write_all(&line)?;
            self.file.sync_data()
        });
        written.map_err(|source| Error::Journal { path: self.path.clone(), source })
    }
}

fn read_records(path: &Path, text: &str) -> Result<Vec<Sent>> {
    let mut sent: Vec<Sent> = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let wrong =
            |problem: String| Error::JournalRecord { path: path.to_owned(), line: index + 1, problem };
        match serde_json::from_str(line).map_err(|error| wrong(error.to_string()))? {
            Record::Signed { version, .. } if version != VERSION => {
                return Err(wrong(format!("version {version}, expected {VERSION}")));
            }
            Record::Signed { operation, what, nonce, hash, raw, .. } => {
                sent.push(Sent { operation, what, nonce, hash, raw, end: None })
            }
            Record::Ended { hash, end } => match sent.iter_mut().find(|it| it.hash == hash) {
                Some(it) => it.end = Some(end),
                None => return Err(wrong(format!("the end of {hash}, which was never signed"))),
            },
        }
    }
    Ok(sent)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GENESIS: B256 = B256::repeat_byte(0xab);

    fn open(folder: &Path) -> Result<Journal> {
        Journal::open(folder, 1, GENESIS, Address::ZERO)
    }

    fn sent(nonce: u8) -> Sent {
        Sent {
            operation: B256::repeat_byte(7),
            what: "add-image".to_owned(),
            nonce: nonce.into(),
            hash: B256::repeat_byte(nonce),
            raw: Bytes::from_static(&[1, 2, 3]),
            end: None,
        }
    }

    #[test]
    fn what_was_written_is_there_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let mut journal = open(folder.path()).unwrap();
        let created = Some(Address::repeat_byte(9));
        journal.signed(sent(4)).unwrap();
        journal.ended(sent(4).hash, End::Succeeded { block: 12, created }).unwrap();
        journal.signed(sent(5)).unwrap();
        let before = journal.sent().to_vec();
        drop(journal);

        let journal = open(folder.path()).unwrap();
        assert_eq!(journal.sent(), before);
        assert_eq!(journal.open_ones(), [sent(5)]);
        assert_eq!(journal.next_nonce(), 5);
        assert_eq!(journal.created_by(sent(4).operation), created.map(|it| (it, sent(4).hash)));
    }

    /// A crash in the middle of a write leaves a part of the last line: the transaction in it was never sent.
    #[test]
    fn every_torn_last_line_is_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        let mut journal = open(folder.path()).unwrap();
        journal.signed(sent(1)).unwrap();
        let first = std::fs::read(&journal.path).unwrap();
        journal.signed(sent(2)).unwrap();
        let whole = std::fs::read(&journal.path).unwrap();
        let path = journal.path.clone();
        drop(journal);
        for length in first.len()..whole.len() {
            std::fs::write(&path, &whole[..length]).unwrap();
            assert_eq!(open(folder.path()).unwrap().sent(), [sent(1)], "cut at {length}");
            assert_eq!(std::fs::read(&path).unwrap(), first);
        }
    }

    #[test]
    fn a_damaged_line_stops_the_program() {
        let folder = tempfile::tempdir().unwrap();
        let journal = open(folder.path()).unwrap();
        std::fs::write(&journal.path, "{\"record\":\"signed\"}\n").unwrap();
        drop(journal);
        let error = open(folder.path()).map(drop).unwrap_err();
        assert!(matches!(error, Error::JournalRecord { line: 1, .. }), "{error}");
    }

    #[test]
    fn only_one_process_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let _first = open(folder.path()).unwrap();
        assert!(matches!(open(folder.path()).map(drop), Err(Error::JournalBusy { .. })));
    }

    #[test]
    fn a_chain_started_anew_has_a_journal_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let mut journal = open(folder.path()).unwrap();
        journal.signed(sent(1)).unwrap();
        let other = Journal::open(folder.path(), 1, B256::ZERO, Address::ZERO).unwrap();
        assert!(other.sent().is_empty());
    }
}
