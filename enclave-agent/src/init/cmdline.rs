//! How to reach the parent: the kernel's command line says where it is not at its usual place.

use std::path::PathBuf;
use std::str::FromStr;

use transport::{Endpoint, ParseEndpointError, VsockCid, VsockPort};

use super::error::InitError;

/// The word of the kernel command line that names the parent's CID. On AWS the command line is measured, and there it
/// is not needed; a local runner appends it.
const PARENT_CID: &str = "keyferry.parent_cid=";

/// The machine that started this enclave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Parent {
    /// At this context id.
    Vsock(VsockCid),
    /// Unix sockets whose names start with this path: its port P is `PATH_P`, and port P of the enclave is `PATH.in_P`.
    /// For trying an image's configuration without an enclave.
    Unix(PathBuf),
}

impl Default for Parent {
    /// CID 3, where AWS puts it.
    fn default() -> Self {
        Self::Vsock(VsockCid::PARENT)
    }
}

impl Parent {
    /// As the kernel command line says.
    pub(super) fn from_kernel() -> Result<Self, InitError> {
        const PATH: &str = "/proc/cmdline";
        let line =
            std::fs::read_to_string(PATH).map_err(|source| InitError::File { path: PATH.into(), source })?;
        Self::from_command_line(&line)
    }

    fn from_command_line(line: &str) -> Result<Self, InitError> {
        let Some(text) = line.split_ascii_whitespace().rev().find_map(|word| word.strip_prefix(PARENT_CID))
        else {
            return Ok(Self::default());
        };
        let wrong = || InitError::ParentCid { text: text.chars().take(40).collect() };
        let cid: VsockCid = text.parse().map_err(|_| wrong())?;
        // Connections to these stay inside the enclave, or name nobody.
        if [VsockCid::LOCAL, VsockCid::ANY].contains(&cid) { Err(wrong()) } else { Ok(Self::Vsock(cid)) }
    }

    /// A port of the parent.
    ///
    /// # Errors
    /// [`ParseEndpointError`] for a path that is too long.
    pub fn port(&self, port: VsockPort) -> Result<Endpoint, ParseEndpointError> {
        match self {
            Self::Vsock(cid) => Ok(Endpoint::vsock(*cid, port)),
            Self::Unix(path) => Endpoint::unix(format!("{}_{port}", path.display())),
        }
    }

    /// Where the enclave listens for the parent.
    ///
    /// # Errors
    /// [`ParseEndpointError`] for a path that is too long.
    pub fn own_port(&self, port: u16) -> Result<Endpoint, ParseEndpointError> {
        match self {
            Self::Vsock(_) => Ok(Endpoint::vsock(VsockCid::ANY, VsockPort::new(port.into()))),
            Self::Unix(path) => Endpoint::unix(format!("{}.in_{port}", path.display())),
        }
    }
}

impl FromStr for Parent {
    type Err = String;

    /// `vsock:CID` or `unix:PATH`.
    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("vsock", cid)) => cid.parse().map(Self::Vsock).map_err(|error| error.to_string()),
            Some(("unix", path)) if !path.is_empty() => Ok(Self::Unix(path.into())),
            _ => Err("expected vsock:CID or unix:PATH".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parent_is_at_three_unless_the_kernel_is_told() {
        let parent = |line: &str| Parent::from_command_line(line).map_err(|error| error.to_string());
        assert_eq!(parent("console=ttyS0 reboot=k\n"), Ok(Parent::Vsock(VsockCid::PARENT)));
        assert_eq!(parent("x keyferry.parent_cid=2 y"), Ok(Parent::Vsock(VsockCid::HOST)));
        assert_eq!(
            parent("keyferry.parent_cid=4 keyferry.parent_cid=2\n"),
            Ok(Parent::Vsock(VsockCid::HOST)),
            "the last word counts, as for the kernel's own"
        );
        for wrong in ["", "1", "x", "-1", "4294967295", "4294967296", "2,"] {
            let error = parent(&format!("keyferry.parent_cid={wrong}")).unwrap_err();
            assert!(error.contains("keyferry.parent_cid"), "{wrong}: {error}");
        }
    }

    #[test]
    fn ports_have_endpoints() {
        let text = |endpoint: Result<Endpoint, ParseEndpointError>| endpoint.unwrap().to_string();
        let parent = Parent::default();
        assert_eq!(text(parent.port(VsockPort::new(9000))), "vsock:3:9000");
        assert_eq!(text(parent.own_port(80)), "vsock:any:80");
        let parent: Parent = "unix:/tmp/p".parse().unwrap();
        assert_eq!(text(parent.port(VsockPort::new(9000))), "unix:/tmp/p_9000");
        assert_eq!(text(parent.own_port(80)), "unix:/tmp/p.in_80");
        for wrong in ["", "3", "unix:", "tcp:1", "vsock:x"] {
            wrong.parse::<Parent>().unwrap_err();
        }
    }
}
