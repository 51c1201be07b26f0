//! What a guest's console tells of its start. The console is the only view into the guest, and an untrusted one: it
//! decides what an operator is told, never whether something is believed.
//!
//! Source of the lines: the guest images 0.6.0 (`dstack-prepare.service`, `app-compose.service`) and their successors.

use crate::doctor;

/// How far the guest is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Milestone {
    /// The kernel started.
    Kernel,
    /// The guest's own services started.
    Preparing,
    /// The data disk was found.
    DataDisk,
    /// The configuration volume was found.
    Configuration,
    /// The key of the data disk was sealed, or unsealed.
    DiskKey,
    /// The project's script runs.
    PreLaunch,
    /// Images are fetched and containers started.
    Containers,
    /// All containers run.
    Started,
}

impl Milestone {
    const ALL: [(Self, &'static [&'static str]); 8] = [
        (Self::Kernel, &["Linux version "]),
        (Self::Preparing, &["Preparing dstack system"]),
        (Self::DataDisk, &["Using persistent data disk"]),
        (Self::Configuration, &["Mounting host-shared", "found host-shared disk"]),
        (Self::DiskKey, &["seed sealed", "seed unsealed", "sealed to TPM", "unsealed from TPM"]),
        (Self::PreLaunch, &["Running pre-launch script"]),
        (Self::Containers, &["Starting containers"]),
        (Self::Started, &["Finished App Compose Service", "Reached target Multi-User System"]),
    ];

    /// In words, for progress and hints.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Kernel => "kernel started",
            Self::Preparing => "guest services started",
            Self::DataDisk => "data disk found",
            Self::Configuration => "configuration volume found",
            Self::DiskKey => "disk key ready",
            Self::PreLaunch => "pre-launch script runs",
            Self::Containers => "containers are starting",
            Self::Started => "containers run",
        }
    }
}

/// Lines that tell of trouble, what to do, and whether the guest can never get over it.
const FAILURES: [(&str, &str, bool); 7] = [
    (
        "not found, rebooting",
        "the data disk lacks its label: remove the machine and its data image, then deploy again",
        true,
    ),
    (
        "is too large, max size",
        "a file of the configuration is larger than the guest takes; it restarts for ever: make the file smaller and deploy again",
        true,
    ),
    (
        "i/o timeout",
        "the guest cannot reach the registry of its images: check the image names, the network and its egress rules",
        false,
    ),
    ("manifest unknown", "the registry has no image of that name: check KMS_IMAGE, by digest", false),
    ("manifest for ", "the registry has no image of that name: check KMS_IMAGE, by digest", false),
    (
        "failed to start containers",
        "the compose file or the pre-launch script failed; the lines before this one say why",
        false,
    ),
    (
        "Waiting for the system time to be synchronized",
        "secure_time waits for authenticated time, which can take for ever: set it to false in app.json and deploy again",
        false,
    ),
];
/// Kernels seen after which a guest is taken to restart for ever.
const BOOT_LOOP: u32 = 3;
/// Longest line kept between two readings; a guest chooses its lines.
const MAX_LINE: usize = 4096;

/// What keeps a guest from getting further.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// What the console said.
    pub said: String,
    /// What to do.
    pub remedy: &'static str,
    /// Whether the guest can never get over it; else it may still.
    pub is_final: bool,
}

/// Follows a console.
#[derive(Debug, Default)]
pub struct Milestones {
    reached: Option<Milestone>,
    kernels: u32,
    trouble: Option<Trouble>,
    /// The beginning of a line whose end was not printed yet.
    rest: String,
    last: String,
}

impl Milestones {
    /// Takes what was on the console before it was watched. Only the last start counts: what ended those before may have
    /// been mended, and somebody may have restarted the machine.
    pub fn catch_up(&mut self, text: &str) -> Vec<Milestone> {
        let marks = Milestone::ALL.iter().filter(|(it, _)| *it == Milestone::Kernel);
        let last = marks.flat_map(|(_, marks)| marks.iter().filter_map(|mark| text.rfind(mark))).max();
        self.read(&text[last.unwrap_or(0)..])
    }

    /// Takes further text; gives the milestones that it passes, in order.
    pub fn read(&mut self, text: &str) -> Vec<Milestone> {
        let mut passed = Vec::new();
        self.rest.push_str(text);
        let whole = self.rest.rfind('\n').map_or(0, |end| end + 1);
        let rest = self.rest.split_off(whole);
        let lines = std::mem::replace(&mut self.rest, rest);
        if self.rest.len() > MAX_LINE {
            self.rest.clear();
        }
        for line in lines.lines() {
            self.line(line, &mut passed);
        }
        passed
    }

    fn line(&mut self, line: &str, passed: &mut Vec<Milestone>) {
        let found = Milestone::ALL.iter().find(|(_, marks)| marks.iter().any(|mark| line.contains(mark)));
        if let Some((milestone, _)) = found {
            if *milestone == Milestone::Kernel {
                self.kernels += 1;
                self.reached = None;
            }
            if self.reached.is_none_or(|reached| reached < *milestone) {
                self.reached = Some(*milestone);
                // What it has got over is no trouble any more.
                self.trouble = self.trouble.take().filter(|trouble| trouble.is_final);
                passed.push(*milestone);
            }
        }
        if let Some((_, remedy, is_final)) = FAILURES.iter().find(|(mark, ..)| line.contains(mark)) {
            self.trouble = Some(Trouble { said: shortened(line), remedy, is_final: *is_final });
        } else if let Some(symptom) = doctor::known(line) {
            self.trouble = Some(Trouble { said: shortened(line), remedy: symptom.remedy, is_final: false });
        }
        if !line.trim().is_empty() {
            self.last = shortened(line);
        }
    }

    /// How far the guest is.
    #[must_use]
    pub fn reached(&self) -> Option<Milestone> {
        self.reached
    }

    /// What keeps the guest from getting further, as far as the console tells.
    #[must_use]
    pub fn trouble(&self) -> Option<Trouble> {
        if let Some(trouble) = &self.trouble {
            return Some(trouble.clone());
        }
        (self.kernels >= BOOT_LOOP).then(|| Trouble {
            said: format!("the guest started {} times", self.kernels),
            remedy: "it restarts for ever: the lines before each restart say why",
            is_final: true,
        })
    }

    /// Where the guest stands, for a message.
    #[must_use]
    pub fn describe(&self) -> String {
        match (self.trouble(), self.reached) {
            (Some(trouble), _) => format!("the console says: {}", trouble.said),
            (None, Some(milestone)) if self.last.is_empty() => format!("console: {}", milestone.name()),
            (None, Some(milestone)) => format!("console: {}, last line {:?}", milestone.name(), self.last),
            (None, None) => "the console is empty".to_owned(),
        }
    }
}

/// A line without control characters, short enough for a message.
fn shortened(line: &str) -> String {
    line.trim().chars().filter(|it| !it.is_control()).take(160).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "[    0.0] Linux version 6.9\r\n[ OK ] Preparing dstack system...\nUsing persistent data disk /dev/nvme1n1p1\n\
        Mounting host-shared\nseed sealed to the TPM\n======== Disk usage ========\nRunning pre-launch script\n\
        Starting containers\nContainer dstack-kms-1  Started\nFinished App Compose Service\n";

    #[test]
    fn milestones_come_in_order_however_the_text_is_cut() {
        let all: Vec<_> = Milestone::ALL.iter().map(|(milestone, _)| *milestone).collect();
        for cut in 0..GOOD.len() {
            let mut milestones = Milestones::default();
            let mut passed = milestones.read(&GOOD[..cut]);
            passed.extend(milestones.read(&GOOD[cut..]));
            assert_eq!(passed, all, "cut at {cut}");
        }
    }

    #[test]
    fn every_failure_has_a_remedy() {
        for (line, remedy) in [
            ("Persistent data disk /dev/vdb not found, rebooting", "data disk lacks its label"),
            ("app-compose.json is too large, max size 262144", "larger than the guest takes"),
            (
                "Error response from daemon: Get \"https://r/v2/\": dial tcp: i/o timeout",
                "reach the registry",
            ),
            ("manifest unknown: manifest unknown", "no image of that name"),
            ("manifest for registry.local/dstack-kms:0.5.5 not found", "no image of that name"),
            ("app-compose.sh: failed to start containers", "compose file or the pre-launch script"),
            (
                "tls: failed to verify certificate: x509: certificate signed by unknown authority",
                "public roots",
            ),
            ("write /var/lib/docker/tmp/x: no space left on device", "disk_size"),
            ("Bind for 0.0.0.0:18000 failed: port is already allocated", "18000"),
            ("listen tcp4 0.0.0.0:18000: bind: address already in use", "18000"),
            ("toomanyrequests: You have reached your pull rate limit", "a registry of your own"),
            ("QGS error code: 0x12001", "pccs-host"),
            ("Waiting for the system time to be synchronized", "secure_time"),
        ] {
            let mut milestones = Milestones::default();
            milestones.read(&format!("{line}\n"));
            let found = milestones.trouble().expect(line);
            assert!(found.said == line && found.remedy.contains(remedy), "{line}: {found:?}");
        }
        let mut milestones = Milestones::default();
        milestones.read("Linux version 6.9\nLinux version 6.9\n");
        assert_eq!(milestones.trouble(), None);
        milestones.read("Linux version 6.9\n");
        assert_eq!(milestones.trouble().unwrap().said, "the guest started 3 times");
    }

    #[test]
    fn trouble_that_the_guest_got_over_is_forgotten() {
        let mut milestones = Milestones::default();
        milestones.read("Linux version 6.9\nWaiting for the system time to be synchronized\n");
        assert!(!milestones.trouble().unwrap().is_final);
        milestones.read("Starting containers\n");
        assert_eq!(milestones.trouble(), None);
    }

    #[test]
    fn starts_before_the_last_one_are_over() {
        let before = "Linux version 6.9\napp-compose.json is too large, max size 1\n".repeat(3);
        let mut milestones = Milestones::default();
        let passed = milestones.catch_up(&format!("{before}{GOOD}"));
        assert_eq!((passed.len(), milestones.trouble()), (Milestone::ALL.len(), None));
        assert_eq!(milestones.catch_up("no start in it\n"), []);
        milestones.read(&"Linux version 6.9\n".repeat(2));
        assert_eq!(milestones.trouble().unwrap().said, "the guest started 3 times");
    }

    #[test]
    fn a_line_without_an_end_is_not_kept_for_ever() {
        let mut milestones = Milestones::default();
        for _ in 0..100 {
            milestones.read(&"x".repeat(1000));
        }
        assert!(milestones.rest.len() <= MAX_LINE);
    }
}
