//! A TDX machine on GCP as the machine of a bring-up.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;

use super::firewall::{self, Action, Port};
use super::{Deployment, Observer, Prepared, Replace};
use crate::Error;
use crate::bring_up::{ConsoleText, Guest, Machine, Visitors};
use crate::gcp::Client;
use crate::patience::Deadline;

const READ: Duration = Duration::from_secs(60);

/// A project's machine.
pub struct GcpMachine<'a> {
    deployment: &'a mut Deployment,
    client: &'a Client,
    prepared: &'a Prepared,
    port: Port,
    observer: &'a mut dyn Observer,
    /// The time as ISO 8601.
    now: fn() -> String,
}

impl<'a> GcpMachine<'a> {
    /// The machine of `deployment`, whose KMS is at `port`.
    #[must_use]
    pub fn new(
        deployment: &'a mut Deployment,
        client: &'a Client,
        prepared: &'a Prepared,
        port: u16,
        observer: &'a mut dyn Observer,
        now: fn() -> String,
    ) -> Self {
        Self { deployment, client, prepared, port: Port::tcp(port), observer, now }
    }
}

impl Machine for GcpMachine<'_> {
    async fn deploy(&mut self) -> Result<String, Error> {
        // A machine that is there with another configuration is refused: it is never replaced on the way.
        let plan = self.deployment.plan(self.client, self.prepared, &Replace::No, false).await?;
        let now = (self.now)();
        let instance = self.deployment.apply(self.client, self.prepared, &plan, self.observer, &now).await?;
        Ok(format!("{} {}", instance.id, instance.creation_timestamp))
    }

    async fn address(&mut self) -> Result<Option<SocketAddr>, Error> {
        let instance = self.deployment.status(self.client, &(self.now)()).await?;
        let running = instance.filter(|instance| instance.status == "RUNNING");
        let address = running.and_then(|instance| instance.external_ip()?.parse::<IpAddr>().ok());
        Ok(address.map(|address| SocketAddr::new(address, self.port.number())))
    }

    async fn console(&mut self, from: u64) -> Result<ConsoleText, Error> {
        let config = self.deployment.config();
        let (zone, name) = (&config.zone, &config.instance_name);
        let output = self.client.serial_output(zone, name, from, Deadline::within(READ)).await?;
        let lost = output.start.saturating_sub(from);
        Ok(ConsoleText { text: output.contents, next: output.next.max(from), lost })
    }

    async fn admit(&mut self, visitors: &Visitors) -> Result<Guest, Error> {
        let config = self.deployment.config();
        let networks = match visitors {
            Visitors::Operators(networks) | Visitors::Clients(networks) => networks,
        };
        if networks.is_empty() {
            firewall::close(self.client, config, self.port).await?;
            return Ok(Guest::RunsOn);
        }
        if matches!(visitors, Visitors::Operators(_)) {
            firewall::refuse_other_ways_in(self.client, config, self.port).await?;
        }
        let sources: Vec<String> = networks.iter().map(IpNet::to_string).collect();
        firewall::set(self.client, config, Action::Allow, self.port, &sources).await?;
        Ok(Guest::RunsOn)
    }

    fn console_command(&self) -> String {
        format!("keyferry kms logs -C {} --follow", self.deployment.project().directory().display())
    }
}
