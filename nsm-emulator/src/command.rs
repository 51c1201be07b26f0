//! The daemon's command line, for its own program and for others that offer it as a subcommand.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use command_line::{Exit, Failure};
use tokio_util::sync::CancellationToken;
use transport::{BindOptions, Endpoint, Listener};

use crate::{Config, Emulator, LocalRoot, PCR_COUNT, PcrValue, serve, system_clock};

/// Arguments of the daemon.
#[derive(Debug, Args)]
pub struct Arguments {
    /// Where to answer: unix:PATH, vsock:CID:PORT or tcp:HOST:PORT
    #[arg(long, value_name = "ENDPOINT")]
    pub listen: Endpoint,
    /// Writes the root certificate (PEM) that documents are to be verified with
    #[arg(long, value_name = "FILE")]
    pub root_out: Option<PathBuf>,
    /// Signs under the root in this directory, which is made when there is none; otherwise under a new one
    #[arg(long, value_name = "DIRECTORY")]
    pub root_dir: Option<PathBuf>,
    /// Start value of a register, as 96 hexadecimal digits; may be repeated
    #[arg(long = "pcr", value_name = "N=HEX", value_parser = parse_pcr)]
    pub pcrs: Vec<(u8, PcrValue)>,
    /// PCR0 to PCR2 are zero, as in an enclave in debug mode
    #[arg(long, conflicts_with = "pcrs")]
    pub debug_mode: bool,
    /// The module's name, such as i-0123abcd-enc4567ef; random when absent
    #[arg(long, value_name = "ID")]
    pub module_id: Option<String>,
    /// Moves the module's clock; with a negative number its documents are old (for tests)
    #[arg(long, value_name = "SECONDS", default_value_t = 0, allow_hyphen_values = true)]
    pub clock_offset: i64,
}

impl Arguments {
    fn into_config(self) -> Config {
        let mut config =
            Config { module_id: self.module_id, clock: system_clock(self.clock_offset), ..Config::default() };
        if self.debug_mode {
            config.pcrs.clear();
        }
        config.pcrs.extend(self.pcrs);
        config
    }
}

/// Starts the module and serves it until `shutdown` is cancelled.
///
/// # Errors
///
/// A [`Failure`] with its exit code: 2 for values that cannot be, 1 when the root cannot be written or the endpoint
/// cannot be bound.
pub async fn run(arguments: Arguments, shutdown: CancellationToken) -> Result<(), Failure> {
    let endpoint = arguments.listen.clone();
    let root_out = arguments.root_out.clone();
    let emulator = match &arguments.root_dir {
        Some(directory) => {
            let root = LocalRoot::open(directory).map_err(|error| Failure::new(Exit::Internal, error))?;
            Emulator::with_root(&root, arguments.into_config())
        }
        None => Emulator::new(arguments.into_config()),
    };
    let emulator = emulator.map_err(|error| Failure::new(Exit::Usage, error))?;
    // The root is on disk before the socket exists: who can connect can also verify.
    if let Some(path) = root_out {
        write_root(&path, &emulator.root_pem()).map_err(|source| {
            Failure::new(
                Exit::Internal,
                format!("writing the root certificate to {}: {source}", path.display()),
            )
        })?;
    }
    let listener = Listener::bind(&endpoint, BindOptions::default())
        .await
        .map_err(|error| Failure::new(Exit::Internal, error))?;
    command_line::print_line(&format!("listening on {}", listener.endpoint()));
    serve(Arc::new(emulator), listener, shutdown).await;
    Ok(())
}

/// Writes beside the target and renames, so that a reader sees a whole certificate or none.
fn write_root(path: &Path, pem: &str) -> std::io::Result<()> {
    let mut name = path.file_name().ok_or(std::io::ErrorKind::IsADirectory)?.to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = path.with_file_name(name);
    let mut file = std::fs::File::create_new(&temporary)?;
    let written = file.write_all(pem.as_bytes()).and_then(|()| std::fs::rename(&temporary, path));
    if written.is_err() {
        std::fs::remove_file(&temporary)?;
    }
    written
}

fn parse_pcr(text: &str) -> Result<(u8, PcrValue), String> {
    let (index, value) = text.split_once('=').ok_or("expected N=HEX")?;
    let index: u8 = index.parse().map_err(|_| format!("{index:?} is not a register number"))?;
    if usize::from(index) >= PCR_COUNT {
        return Err(format!("PCR{index} does not exist: the module has registers 0 to {}", PCR_COUNT - 1));
    }
    let mut bytes = [0; 48];
    hex::decode_to_slice(value, &mut bytes)
        .map_err(|_| format!("expected 96 hexadecimal digits, got {} characters", value.chars().count()))?;
    Ok((index, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_are_parsed_strictly() {
        assert_eq!(parse_pcr(&format!("3={}", "0A".repeat(48))).unwrap(), (3, [10; 48]));
        for text in ["", "3", "3=", "3=0a", "32=", &format!("32={}", "00".repeat(48)), "-1=00", "x=00"] {
            assert!(parse_pcr(text).is_err(), "{text:?}");
        }
        assert!(parse_pcr(&format!("0={}", "00".repeat(49))).is_err());
    }

    #[test]
    fn a_root_that_cannot_be_put_in_place_leaves_nothing_behind() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("root.pem");
        std::fs::create_dir(&target).unwrap();
        write_root(&target, "x").unwrap_err();
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
