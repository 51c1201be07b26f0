//! What is waited for on the way, for how long, and where to look when it does not come.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// What is waited for, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Gate {
    /// The machine has an address.
    Address,
    /// The guest started, and its KMS answers.
    Boot,
    /// The KMS's authoriser answers.
    Authoriser,
    /// The KMS says what it measures.
    Measurements,
    /// The KMS's name leads to the machine.
    Name,
    /// The measurements are registered, as the KMS sees it, and there are keys.
    Registration,
    /// The KMS ends onboarding.
    Finish,
    /// The KMS serves under its root.
    Serving,
}

impl Gate {
    /// All of them, in order.
    pub const ALL: [Self; 8] = [
        Self::Address,
        Self::Boot,
        Self::Authoriser,
        Self::Measurements,
        Self::Name,
        Self::Registration,
        Self::Finish,
        Self::Serving,
    ];

    /// Its name, for `--wait`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Address => "address",
            Self::Boot => "boot",
            Self::Authoriser => "authoriser",
            Self::Measurements => "measurements",
            Self::Name => "name",
            Self::Registration => "registration",
            Self::Finish => "finish",
            Self::Serving => "serving",
        }
    }

    /// What is waited for, in words that follow "waiting for".
    #[must_use]
    pub fn waits_for(self) -> &'static str {
        match self {
            Self::Address => "an address of the machine",
            Self::Boot => "the guest to start its KMS",
            Self::Authoriser => "the authoriser of the KMS",
            Self::Measurements => "the KMS to say what it measures",
            Self::Name => "the name to lead to the machine",
            Self::Registration => "the KMS to be allowed to have keys",
            Self::Finish => "the KMS to end onboarding",
            Self::Serving => "the KMS to serve",
        }
    }

    /// How long, when nothing else is said: several times what guests usually take (one to two minutes to boot, up to
    /// five until the authoriser's container is built and its light client has synced). The name and the registration
    /// may wait for a person.
    #[must_use]
    pub fn usual(self) -> Duration {
        let minutes = |count: u64| Duration::from_secs(60 * count);
        match self {
            Self::Address | Self::Measurements | Self::Finish => minutes(3),
            Self::Boot => minutes(15),
            Self::Authoriser => minutes(10),
            Self::Name | Self::Registration => minutes(30),
            Self::Serving => minutes(5),
        }
    }

    /// Where to look when it does not come. `console` is the command that shows the machine's console.
    #[must_use]
    pub fn look(self, console: &str) -> String {
        match self {
            Self::Address => "whether the machine runs, and whether it was given an external address".into(),
            Self::Boot => format!(
                "`{console}` shows how far the guest came; when its containers run, whether the port is open to \
                 your own address"
            ),
            Self::Authoriser => format!(
                "whether the authoriser's endpoint answers from the machine (RPC URL, rate limits, for a light \
                 client eth_getProof): `keyferry chain doctor`, and `{console}`"
            ),
            Self::Measurements => {
                format!("whether the guest agent's socket is mounted into the KMS's container: `{console}`")
            }
            Self::Name => "the A record of the KMS's name, and how long its old value may be kept".into(),
            Self::Registration => {
                "register the measurements, then run the same command again: it goes on from here".into()
            }
            Self::Finish => format!(
                "whether the KMS's container restarts (restart: unless-stopped) and what it says: `{console}`"
            ),
            Self::Serving => format!(
                "whether the KMS's container restarts (restart: unless-stopped) and what it says: `{console}`; one that \
                 takes connections and does not answer mostly waits for its chain's endpoint: `keyferry chain doctor`, \
                 or another endpoint"
            ),
        }
    }
}

impl fmt::Display for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How long to wait for what.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Patience(BTreeMap<Gate, Duration>);

impl Patience {
    /// Waits so long for that.
    #[must_use]
    pub fn with(mut self, gate: Gate, allowed: Duration) -> Self {
        self.0.insert(gate, allowed);
        self
    }

    /// How long to wait for that.
    #[must_use]
    pub fn of(&self, gate: Gate) -> Duration {
        self.0.get(&gate).copied().unwrap_or_else(|| gate.usual())
    }
}

/// One exception, `boot=20m`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception(pub Gate, pub Duration);

impl FromStr for Exception {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || {
            let names: Vec<_> = Gate::ALL.iter().map(|gate| gate.name()).collect();
            format!("expected NAME=TIME, a name of {} and a time such as 90s, 20m or 2h", names.join(", "))
        };
        let (name, time) = text.split_once('=').ok_or_else(expected)?;
        let gate = Gate::ALL.into_iter().find(|gate| gate.name() == name).ok_or_else(expected)?;
        Ok(Self(gate, time_of(time).ok_or_else(expected)?))
    }
}

/// A time such as `90s`, `20m` or `2h`, up to a week.
pub(crate) fn time_of(text: &str) -> Option<Duration> {
    let (count, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let unit = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        _ => return None,
    };
    let seconds = count.parse::<u64>().ok()?.checked_mul(unit)?;
    (1..=604_800).contains(&seconds).then(|| Duration::from_secs(seconds))
}

impl FromIterator<Exception> for Patience {
    fn from_iter<I: IntoIterator<Item = Exception>>(exceptions: I) -> Self {
        Self(exceptions.into_iter().map(|Exception(gate, allowed)| (gate, allowed)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exceptions_are_read_strictly() {
        let read = |text: &str| text.parse::<Exception>();
        assert_eq!(read("boot=20m"), Ok(Exception(Gate::Boot, Duration::from_secs(1200))));
        assert_eq!(read("name=2h"), Ok(Exception(Gate::Name, Duration::from_secs(7200))));
        for text in [
            "",
            "boot",
            "boot=",
            "boot=0s",
            "boot=5",
            "boot=-1m",
            "boot=1d",
            "moon=1s",
            "boot=9999999h",
            "boot=é",
        ] {
            assert!(read(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn every_gate_says_where_to_look() {
        for gate in Gate::ALL {
            assert!(gate.look("keyferry kms logs").len() > 20 && !gate.usual().is_zero(), "{gate}");
        }
    }
}
