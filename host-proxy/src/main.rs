//! The `host-proxy` command.

use std::process::ExitCode;

use clap::Parser;
use host_proxy::args::HostProxy;

fn main() -> ExitCode {
    let args = HostProxy::parse();
    command_line::logs::install(args.run.log_format.into(), "info");
    match host_proxy::run(args) {
        Ok(exit) => exit.into(),
        Err(failure) => failure.report(),
    }
}
