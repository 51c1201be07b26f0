//! The process of moto.

use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

/// moto on a port of its own, killed when dropped.
#[derive(Debug)]
pub(super) struct Moto {
    process: Child,
    url: String,
}

impl Moto {
    #[expect(clippy::print_stdout, reason = "a test that is skipped says why")]
    pub(super) fn start() -> Option<Self> {
        let Some(library) = installed("moto-") else {
            println!("skipped: no moto; scripts/aws-tools.sh installs it from PyPI");
            return None;
        };
        let mut command = Command::new("python3");
        command.args(["-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]);
        command.env("PYTHONPATH", library).env("PYTHONUNBUFFERED", "1").env("PYTHONDONTWRITEBYTECODE", "1");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut process = command.spawn().expect("python3 starts");
        let stderr = process.stderr.take().expect("stderr is piped");
        let mut lines = BufReader::new(stderr).lines().map_while(Result::ok);
        let url = lines.find_map(|line| line.split_once("Running on ").map(|(_, url)| url.trim().to_owned()));
        // Its log is read and dropped, or it would stop at a full pipe.
        std::thread::spawn(move || lines.for_each(drop));
        let mut moto = Self { process, url: String::new() };
        moto.url = url.expect("moto says where it listens");
        Some(moto)
    }

    pub(super) fn url(&self) -> String {
        self.url.clone()
    }

    pub(super) fn id(&self) -> u32 {
        self.process.id()
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        // Both fail only when the process has ended and was waited for already.
        let _gone = self.process.kill();
        let _gone = self.process.wait();
    }
}

/// The directory `scripts/aws-tools.sh` installed something into.
pub(super) fn installed(prefix: &str) -> Option<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))?;
    let entries = std::fs::read_dir(cache.join("keyferry/aws")).ok()?;
    let mut found: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix)))
        .collect();
    found.sort();
    found.pop()
}
