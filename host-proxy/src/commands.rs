//! What the commands do. Standard output carries the answer.

use std::sync::Arc;

use command_line::{Exit, Failure};
use tokio::signal::unix::{SignalKind, signal};
use tracing::{error, info, warn};

use crate::args::{CheckArgs, Command, HostProxy, RunArgs, WaitForBootArgs};
use crate::config::{Config, Egress, Format, Forward, Kind, Receive, Service};
use crate::error::Error;
use crate::limits::TunnelLimits;
use crate::output::{print_json, print_line};
use crate::policy::{Entry, RuleSet};
use crate::proxy::Proxy;
use crate::service::heartbeat::wait_for_boot;
use crate::{explain, file, notify};

/// Does what the command line asks, on a runtime of its own: one thread, for waking another one costs more than the
/// work of a connection.
///
/// # Errors
/// [`Failure`] with the exit code.
pub fn run(args: HostProxy) -> Result<Exit, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(Exit::Internal, error))?;
    runtime.block_on(run_here(args))
}

/// Does what the command line asks, on the runtime this is called in.
///
/// # Errors
/// [`Failure`] with the exit code.
pub async fn run_here(args: HostProxy) -> Result<Exit, Failure> {
    match args.command {
        None => serve(args.run).await,
        Some(Command::Check(args)) => check(&args),
        Some(Command::Explain(args)) => explain::run(args).await,
        Some(Command::WaitForBoot(args)) => wait(args).await,
    }
}

impl RunArgs {
    /// The configuration these flags stand for.
    ///
    /// # Errors
    /// [`Error`], as for a file.
    pub fn config(&self) -> Result<Config, Error> {
        let Self { config, listen, allow, check_sni, forward, receive, heartbeat, admin, log_format: _ } =
            self;
        if let Some(path) = config {
            return file::read(path);
        }
        let entries = allow.iter().map(|rule| Entry { check_sni: *check_sni, ..Entry::new(rule.clone()) });
        let rules = Arc::new(RuleSet::new(entries.collect()));
        let service = |name: &str, at: usize, listen: &transport::Endpoint, kind| {
            let name = if at == 0 { name.into() } else { format!("{name}-{}", at + 1).into() };
            Service { name, listen: listen.clone(), cids: None, tunnel: TunnelLimits::default(), kind }
        };
        let mut services = Vec::new();
        for (at, listen) in listen.iter().enumerate() {
            let kind = Kind::Egress(Egress { rules: Arc::clone(&rules), plain_http: false });
            services.push(service("egress", at, listen, kind));
        }
        for (at, (listen, target)) in forward.iter().enumerate() {
            let rules = Arc::new(RuleSet::default());
            let kind = Kind::Forward(Forward { target: target.clone(), rules, proxy_protocol: false });
            services.push(service("forward", at, listen, kind));
        }
        for (at, (listen, path)) in receive.iter().enumerate() {
            let kind =
                Kind::Receive(Receive { path: path.clone(), max_bytes: 1 << 20, format: Format::Framed });
            services.push(service("receive", at, listen, kind));
        }
        for (at, listen) in heartbeat.iter().enumerate() {
            services.push(service("heartbeat", at, listen, Kind::Heartbeat));
        }
        let mut config = Config::new(services)?;
        config.admin.clone_from(admin);
        Ok(config)
    }
}

async fn serve(args: RunArgs) -> Result<Exit, Failure> {
    let config = args.config().map_err(usage)?;
    for warning in warnings(&config) {
        warn!("{warning}");
    }
    let mut hangup = signal(SignalKind::hangup()).map_err(internal)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(internal)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(internal)?;
    let mut proxy = Proxy::start(config).await.map_err(internal)?;
    for endpoint in proxy.endpoints() {
        print_line(&format!("listening on {endpoint}"));
    }
    notify::ready();
    let exit = loop {
        tokio::select! {
            _ = hangup.recv() => reload(&mut proxy, &args).await,
            _ = terminate.recv() => break Exit::Done,
            _ = interrupt.recv() => break Exit::Interrupted,
        }
    };
    notify::stopping();
    info!(open = proxy.open_connections(), "stopping");
    let left = proxy.shutdown().await;
    if left > 0 {
        warn!(left, "the grace time is over, connections were cut");
    }
    Ok(exit)
}

/// A configuration that cannot be taken leaves the old one in force: a typing error must not stop the traffic.
async fn reload(proxy: &mut Proxy, args: &RunArgs) {
    notify::reloading();
    let taken = match args.config() {
        Ok(config) => proxy.reload(config).await,
        Err(error) => Err(error),
    };
    match taken {
        Ok(()) => info!("configuration taken"),
        Err(cause) => {
            let source = std::error::Error::source(&cause).map(ToString::to_string).unwrap_or_default();
            error!(error = %cause, source, "configuration not taken, the old one stays in force");
        }
    }
    notify::ready();
}

fn check(args: &CheckArgs) -> Result<Exit, Failure> {
    let config = file::read(&args.config).map_err(usage)?;
    let warnings = warnings(&config);
    if args.json {
        let services: Vec<_> = config.services.iter().map(describe).collect();
        print_json(
            &serde_json::json!({ "version": 1, "valid": true, "services": services, "warnings": warnings }),
        );
        return Ok(Exit::Done);
    }
    for service in &config.services {
        let facts = describe(service);
        let text = |key: &str| facts[key].as_str().unwrap_or_default().to_owned();
        print_line(&format!("{:<12} {:<24} {}", text("name"), text("listen"), text("what")));
    }
    for warning in warnings {
        print_line(&format!("warning: {warning}"));
    }
    Ok(Exit::Done)
}

fn describe(service: &Service) -> serde_json::Value {
    let what = match &service.kind {
        Kind::Egress(egress) => {
            let rules = egress.rules.entries().iter().map(|entry| entry.rule.to_string()).collect::<Vec<_>>();
            format!("CONNECT to {}", if rules.is_empty() { "nothing".to_owned() } else { rules.join(", ") })
        }
        Kind::Forward(forward) => format!("forward to {}", forward.target),
        Kind::Receive(receive) => format!("receive into {}", receive.path.display()),
        Kind::Heartbeat => "answer heartbeats".to_owned(),
    };
    serde_json::json!({ "name": &*service.name, "listen": service.listen.to_string(), "what": what })
}

/// What is allowed and still worth a second look.
fn warnings(config: &Config) -> Vec<String> {
    let mut found = Vec::new();
    for service in &config.services {
        let name = &service.name;
        match &service.kind {
            Kind::Egress(egress) => {
                if egress.rules.entries().is_empty() {
                    found.push(format!("service {name} has no rule and refuses everything"));
                }
                found.extend(egress.rules.entries().iter().flat_map(|entry| entry.rule.warnings()));
                if egress.plain_http {
                    found.push(format!(
                        "service {name} carries plain HTTP, which the parent can read and change"
                    ));
                }
            }
            Kind::Receive(receive) if receive.format == Format::Unframed => {
                found.push(format!("service {name} takes unframed messages: a cut transfer can look whole"));
            }
            Kind::Forward(_) | Kind::Receive(_) | Kind::Heartbeat => {}
        }
    }
    found
}

async fn wait(args: WaitForBootArgs) -> Result<Exit, Failure> {
    let booted = wait_for_boot(&args.listen, args.cid, args.timeout).await.map_err(internal)?;
    match booted {
        Some(peer) => {
            print_line(&peer.to_string());
            Ok(Exit::Done)
        }
        None => {
            let message = format!("no heartbeat on {} within {:?}", args.listen, args.timeout);
            Err(Failure::new(Exit::NoAnswer, message)
                .with_hint("is the enclave running? `nitro-cli describe-enclaves` lists it"))
        }
    }
}

fn usage(error: Error) -> Failure {
    let hint = match &error {
        Error::NoService => "for example: host-proxy --listen vsock:any:3128 --allow kms.example.com:12001",
        Error::Rule { .. } => "a rule is HOST:PORTS, *.SUFFIX:PORTS, ADDRESS:PORTS or RANGE:PORTS",
        _ => return Failure::new(Exit::Usage, error),
    };
    Failure::new(Exit::Usage, error).with_hint(hint)
}

fn internal(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Failure {
    Failure::new(Exit::Internal, error)
}
