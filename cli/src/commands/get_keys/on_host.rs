//! `keyferry get-keys --host`: the image is built and measured here, sent to a Nitro host, run there behind its proxy, and
//! the keys that it exports are opened here.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;
use cloud_provisioners::command::host_access::{
    HostArguments, LoginArguments, ProxyArguments, failure, tell, unit,
};
use cloud_provisioners::nitro_host::{
    Host, HostLog, Launch, Patience, Ran, Told, Upload, Wanted, enclave_name, run, setup,
};
use command_line::{Exit, Failure};
use tokio::task::spawn_blocking;

use super::{Built, internal};
use crate::commands::keys;

/// nitro-cli wants so many times the image.
const TIMES_IMAGE: u64 = 4;
/// Lines of the proxy's log that are kept.
const LOG_LINES: u32 = 1000;

/// Where and how an enclave runs that is not on this machine.
#[derive(Args, Clone, Debug)]
pub(super) struct RemoteArguments {
    /// Run the image on this Nitro host: its folder with keyferry-host.json (see `keyferry host up`), or its address
    #[arg(long, value_name = "HOST")]
    pub(super) host: Option<String>,
    #[command(flatten)]
    login: LoginArguments,
    #[command(flatten)]
    proxy: ProxyArguments,
    /// Print PCR0, PCR1, PCR2 and OS_IMAGE_HASH of the image and end; no host is needed
    #[arg(long)]
    pub(super) show_mrs: bool,
    /// With --host: ask the contracts first whether the image may have the keys (RPC_URL, KMS_CONTRACT_ADDR)
    #[arg(long, requires = "host")]
    check_registration: bool,
    /// With --host: run in debug mode for its console. PCR0, PCR1 and PCR2 are zero there, so that no KMS gives keys
    #[arg(long, requires = "host")]
    debug_console: bool,
    /// With --host: write the attestation document that came with the keys to this file; without --output the keys are
    /// not kept
    #[arg(long, value_name = "FILE", requires = "host")]
    evidence: Option<PathBuf>,
    /// With --host: file for the console of a run with --debug-console
    #[arg(long, value_name = "FILE", default_value = "enclave_console.log")]
    console_log: PathBuf,
    /// With --host: file for the log of the host's proxy
    #[arg(long, value_name = "FILE", default_value = "host_proxy.log")]
    proxy_log: PathBuf,
}

/// An enclave for a host.
pub(super) struct OnHost {
    pub(super) remote: RemoteArguments,
    pub(super) built: Built,
    /// The image.
    pub(super) image: PathBuf,
    /// What its proxy opens besides the KMS.
    pub(super) open: Vec<String>,
    /// What opens the export.
    pub(super) identity: PathBuf,
    /// Instead of AWS's root.
    pub(super) module_root: Option<PathBuf>,
    /// Where the keys go.
    pub(super) target: keys::Target,
}

impl OnHost {
    pub(super) async fn run(self, directory: &Path) -> Result<Exit, Failure> {
        let Self { remote, built, image, open, identity, module_root, target } = self;
        let at = HostArguments { host: remote.host.clone().unwrap_or_default(), login: remote.login.clone() };
        let reach = at.reach()?;
        let export = directory.join("keys.age");
        let keys = keys::Open::of_enclave(export.clone(), identity, built.os_image_hash, module_root, target);
        // What cannot be kept or opened in the end is not begun.
        let without_keys = remote.evidence.is_some() && !keys.is_kept();
        keys.check(without_keys)?;
        if remote.check_registration {
            check_registration(&built).await?;
        }
        let image = Upload::of("image", &image).await.map_err(failure)?;
        let memory_mib = built.memory_mib.max((image.len * TIMES_IMAGE).div_ceil(1 << 20));
        let name = enclave_name(&format!("{} {}", built.app_id, reach.host_key));
        let wanted = Wanted {
            arch: built.arch,
            cpus: built.cpus.into(),
            memory_mib,
            name: name.clone(),
            proxy: remote.proxy.upload().await?,
            proxy_unit: unit(host_proxy::UNIT),
        };
        let launch = Launch {
            image,
            pcrs: built.pcrs.clone(),
            name,
            cpus: built.cpus.into(),
            memory_mib,
            opens: std::iter::once(built.kms.clone()).chain(open).collect(),
            debug: remote.debug_console,
        };
        if launch.debug {
            super::tell(
                "warning: in debug mode PCR0, PCR1 and PCR2 are zero: the KMS refuses, and no keys come of this run",
            );
        }
        let mut host = Host::new(reach, Patience::default());
        let ran = ready_and_run(&mut host, &wanted, &launch).await;
        // Of a run that failed the log says why; where the host does not even give that, the failure says it.
        if let Ok(log) = host.log(HostLog::Proxy, LOG_LINES).await
            && !log.is_empty()
        {
            keep(&remote.proxy_log, &log)?;
        }
        host.close().await;
        let Ran { result, console } = ran.map_err(failure)?;
        if let Some(console) = console {
            keep(&remote.console_log, &console)?;
        }
        let Some(result) = result else {
            let message =
                format!("no keys in debug mode; its console is in {}", remote.console_log.display());
            return Err(
                Failure::new(Exit::Refused, message).with_hint("run it again without --debug-console")
            );
        };
        let open = move || {
            fs::write(&export, &*result).map_err(internal)?;
            if let Some(path) = &remote.evidence {
                keep(path, keys.evidence()?)?;
            }
            if without_keys { Ok(Exit::Done) } else { keys.run() }
        };
        spawn_blocking(open).await.map_err(internal)?
    }
}

async fn ready_and_run(
    host: &mut Host,
    wanted: &Wanted,
    launch: &Launch,
) -> Result<Ran, cloud_provisioners::nitro_host::Error> {
    setup(host, wanted, &mut |action| tell(action)).await?;
    run(host, launch, &mut |told| match told {
        Told::Measured => super::tell("the image is on the host, which measures it as this machine does"),
        Told::Other(id) => super::tell(&format!("enclave {id} runs there too; it is left alone")),
        Told::Booted(id) => super::tell(&format!("enclave {id} booted")),
        Told::Delivered(bytes) => super::tell(&format!("the enclave delivered {bytes} bytes")),
    })
    .await
}

fn keep(path: &Path, text: impl AsRef<[u8]>) -> Result<(), Failure> {
    fs::write(path, text)
        .map_err(|error| Failure::new(Exit::Internal, format!("{}: {error}", path.display())))
}

/// Asks the contracts, as `keyferry chain explain` does, with what it knows from the environment.
async fn check_registration(built: &Built) -> Result<(), Failure> {
    #[derive(clap::Parser)]
    struct Chain {
        #[command(subcommand)]
        command: chain::command::Command,
    }
    let image = format!("0x{}", built.os_image_hash);
    let app_id = format!("0x{}", built.app_id.trim_start_matches("0x"));
    let words = ["chain", "explain", "--image", &image, "--app-id", &app_id];
    let Chain { command } = <Chain as clap::Parser>::try_parse_from(words).map_err(|error| {
        Failure::new(Exit::Usage, error)
            .with_hint("--check-registration takes RPC_URL and KMS_CONTRACT_ADDR from the environment")
    })?;
    let asking = spawn_blocking(move || {
        let mut said = Vec::new();
        chain::command::run(command, &mut said).map(|exit| (exit, said))
    });
    let (exit, said) = asking.await.map_err(internal)??;
    let said = String::from_utf8_lossy(&said);
    if exit == Exit::Done {
        return Ok(());
    }
    let failure =
        Failure::new(Exit::Refused, format!("the contracts do not allow this image: {}", said.trim()));
    Err(failure
        .with_hint(format!("register it: `keyferry chain add-image {image}` and `keyferry chain add-hash`")))
}
