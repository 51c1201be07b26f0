//! A machine on a VMM as the machine of a bring-up.
//!
//! A VMM cannot tell one visitor from another: whoever reaches a published port is let in. So the KMS's port is published on
//! loopback alone until clients are let in, and whoever sets the KMS up sits on the host, or at the other end of a tunnel.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::console::{LINES, Reader};
use super::{Client, Deployment, PortMapping, Prepared};
use crate::Error;
use crate::bring_up::{ConsoleText, Guest, Machine, Visitors};

/// A project's machine.
pub struct VmmMachine<'a> {
    deployment: &'a mut Deployment,
    client: &'a Client,
    prepared: &'a Prepared,
    /// The KMS's port of the host.
    port: u16,
    /// The address of the host on which clients reach the KMS.
    published: IpAddr,
    console: Reader,
    /// The error of the guest's boot that was told last.
    boot_error: String,
    /// The time as ISO 8601.
    now: fn() -> String,
}

impl<'a> VmmMachine<'a> {
    /// The machine of `deployment`, whose KMS is behind the port `port` of the host.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] when the project does not say on which address it publishes that port.
    pub fn new(
        deployment: &'a mut Deployment,
        client: &'a Client,
        prepared: &'a mut Prepared,
        port: u16,
        now: fn() -> String,
    ) -> Result<Self, Error> {
        let wrong = |problem: String| Error::Setting { setting: "vmm_config.ports", problem };
        let Some(mapping) = of_kms(&mut prepared.configuration.ports, port) else {
            return Err(wrong(format!(
                "publishes no tcp port {port} of the host, where the KMS is looked for"
            )));
        };
        let published = mapping.host_address.parse();
        let published = published.map_err(|_| {
            let guest = mapping.vm_port;
            wrong(format!(
                "names no address of the host for port {port}, expected tcp:0.0.0.0:{port}:{guest}"
            ))
        })?;
        mapping.host_address = Ipv4Addr::LOCALHOST.to_string();
        let (console, boot_error) = (Reader::default(), String::new());
        Ok(Self { deployment, client, prepared, port, published, console, boot_error, now })
    }

    /// The address of the host on which clients reach the KMS when they are let in.
    #[must_use]
    pub fn published(&self) -> IpAddr {
        self.published
    }

    async fn machine(&mut self) -> Result<super::Machine, Error> {
        let machine = self.deployment.machine(self.client).await?;
        machine.ok_or_else(|| Error::NoInstance { name: self.deployment.name() })
    }
}

/// The mapping of the KMS's port.
fn of_kms(ports: &mut [PortMapping], port: u16) -> Option<&mut PortMapping> {
    ports.iter_mut().find(|it| it.host_port == u32::from(port) && it.protocol == "tcp")
}

/// The address of the host at which a port that is published on `address` is reached from the host.
fn from_the_host(address: &str) -> IpAddr {
    let address = address.parse().ok().filter(|it: &IpAddr| !it.is_unspecified());
    address.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST))
}

impl Machine for VmmMachine<'_> {
    async fn deploy(&mut self) -> Result<String, Error> {
        let found = self.deployment.check(self.client, self.prepared).await?;
        let (machine, _) = self.deployment.apply(self.client, self.prepared, found, &(self.now)()).await?;
        Ok(machine.id)
    }

    async fn address(&mut self) -> Result<Option<SocketAddr>, Error> {
        let machine = self.machine().await?;
        let mut ports = machine.configuration.as_ref().map(|it| it.ports.clone()).unwrap_or_default();
        let mapping = of_kms(&mut ports, self.port).filter(|_| machine.is_running());
        Ok(mapping.map(|it| SocketAddr::new(from_the_host(&it.host_address), self.port)))
    }

    async fn console(&mut self, from: u64) -> Result<ConsoleText, Error> {
        let machine = self.machine().await?;
        let log = self.client.log(&machine.id, LINES).await?;
        let mut text = self.console.new_text(&log).to_owned();
        let next = from + text.len() as u64;
        if !machine.boot_error.is_empty() && machine.boot_error != self.boot_error {
            text.push_str(&format!("\nthe VMM was told of a boot error: {}\n", machine.boot_error));
            self.boot_error = machine.boot_error;
        }
        Ok(ConsoleText { text, next, lost: 0 })
    }

    async fn admit(&mut self, visitors: &Visitors) -> Result<Guest, Error> {
        let wanted = match visitors {
            Visitors::Clients(networks) if !networks.is_empty() => self.published,
            _ => IpAddr::V4(Ipv4Addr::LOCALHOST),
        };
        let machine = self.machine().await?;
        let mut ports = machine.configuration.as_ref().map(|it| it.ports.clone()).unwrap_or_default();
        let Some(mapping) = of_kms(&mut ports, self.port) else {
            let problem =
                format!("names port {}, which the machine does not publish: remove it first", self.port);
            return Err(Error::Setting { setting: "vmm_config.ports", problem });
        };
        if mapping.host_address.parse() == Ok(wanted) {
            return Ok(Guest::RunsOn);
        }
        mapping.host_address = wanted.to_string();
        self.deployment.publish(self.client, &machine, &ports).await?;
        Ok(Guest::StartsAnew)
    }

    fn console_command(&self) -> String {
        format!("keyferry kms vmm logs -C {}", self.deployment.project().directory().display())
    }
}
