//! The guest's serial console: what it tells of the guest's life, and where its bytes go.
//!
//! Everything on it is written by the guest. It is believed only as far as this enclave's own life goes: a guest that
//! prints the kernel's last words is ended, as it asked for.

use std::fmt::{self, Display, Formatter};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A line is remembered and searched up to here; the bytes themselves pass in any case.
const MAX_LINE: usize = 4096;
/// Size at which a kept console starts a new file. The one before is kept too, so twice this is on disk at most.
pub const MAX_LOG: u64 = 8 << 20;

/// How a guest says that it is done.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GuestEnd {
    /// It restarted, which is how an enclave ends.
    Restarted,
    /// It restarted after its init had said how it ended.
    Reported(ExitReport),
    /// It halted or switched itself off.
    Halted,
    /// Its kernel panicked, with this message.
    Panicked(String),
}

impl Display for GuestEnd {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Restarted => f.write_str("the guest restarted"),
            Self::Reported(ExitReport { code: 0, reason }) => write!(f, "the guest is done: {reason}"),
            Self::Reported(ExitReport { code, reason }) => {
                write!(f, "the guest ended with exit code {code}: {reason}")
            }
            Self::Halted => f.write_str("the guest halted"),
            Self::Panicked(message) => write!(f, "the guest's kernel panicked: {message}"),
        }
    }
}

/// What an enclave's init says last, `keyferry: exit 3: no keys …`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExitReport {
    /// As a command's exit code: 0 done, 1 failed, 2 wrong configuration, 3 refused, 4 no answer.
    pub code: u8,
    /// Why.
    pub reason: String,
}

/// How that line begins; the agent's init writes it.
const EXIT_LINE: &str = "keyferry: exit ";

impl ExitReport {
    fn in_line(line: &str) -> Option<Self> {
        let (code, reason) = line.strip_prefix(EXIT_LINE)?.split_once(": ")?;
        Some(Self { code: code.parse().ok()?, reason: reason.to_owned() })
    }
}

/// Something the console tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// The kernel starts init, so long after the guest's start by its own clock.
    Init(Duration),
    /// The line came that the caller waits for.
    Ready,
    /// Init said how it ends.
    Reported(ExitReport),
    /// The guest is done.
    End(GuestEnd),
}

/// Splits the console into lines and looks for events in them.
#[derive(Debug, Default)]
pub(crate) struct Watcher {
    /// What the kernel says when it starts the ramdisk's init. It says the same of others, such as /sbin/init, which
    /// it tries when the ramdisk has none.
    init_message: String,
    ready_line: Option<String>,
    line: Vec<u8>,
    last: String,
}

impl Watcher {
    /// For a kernel that runs `init` and a caller that waits for a line with `ready_line` in it.
    pub(crate) fn new(init: &str, ready_line: Option<String>) -> Self {
        Self { init_message: format!("Run {init} as init process"), ready_line, ..Self::default() }
    }

    /// The last line that was not empty.
    pub(crate) fn last_line(&self) -> &str {
        &self.last
    }

    /// Takes the next bytes and gives what they tell.
    pub(crate) fn feed(&mut self, bytes: &[u8]) -> Vec<Event> {
        let mut events = Vec::new();
        for &byte in bytes {
            match byte {
                b'\n' => self.end_line(&mut events),
                b'\r' => {}
                _ if self.line.len() < MAX_LINE => self.line.push(byte),
                _ => {}
            }
        }
        events
    }

    fn end_line(&mut self, events: &mut Vec<Event>) {
        let line = std::mem::take(&mut self.line);
        let text: String = String::from_utf8_lossy(&line).chars().filter(|it| !it.is_control()).collect();
        if self.ready_line.as_ref().is_some_and(|expected| text.contains(expected.as_str())) {
            events.push(Event::Ready);
        }
        events.extend(ExitReport::in_line(&text).map(Event::Reported));
        events.extend(kernel_message(&text).and_then(|(time, message)| self.event_of(time, message)));
        if !text.trim().is_empty() {
            self.last = text;
        }
    }

    fn event_of(&self, time: Duration, message: &str) -> Option<Event> {
        if message == self.init_message {
            return Some(Event::Init(time));
        }
        if let Some(panic) = message.strip_prefix("Kernel panic - not syncing: ") {
            return Some(Event::End(GuestEnd::Panicked(panic.to_owned())));
        }
        match message.strip_prefix("reboot: ")? {
            it if it.starts_with("Restarting system") => Some(Event::End(GuestEnd::Restarted)),
            "System halted" | "Power down" => Some(Event::End(GuestEnd::Halted)),
            _ => None,
        }
    }
}

/// The kernel's time stamp and message, `[    0.123456] message`, which may follow an unfinished line of a program.
fn kernel_message(line: &str) -> Option<(Duration, &str)> {
    line.match_indices('[').filter_map(|(at, _)| stamped(&line[at + 1..])).next()
}

fn stamped(text: &str) -> Option<(Duration, &str)> {
    let (stamp, message) = text.split_once("] ")?;
    let (seconds, micros) = stamp.trim_start().split_once('.')?;
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(seconds) || !digits(micros) || micros.len() != 6 {
        return None;
    }
    let time = Duration::from_secs(seconds.parse().ok()?) + Duration::from_micros(micros.parse().ok()?);
    Some((time, message))
}

/// Where the bytes of a console go.
pub enum Sink {
    /// To a file, as they are. It is started anew when it reaches [`MAX_LOG`]; the one before keeps `.1` in its name.
    Log(Log),
    /// To a terminal or another reader, without what a terminal would take for a command: the guest decides what is
    /// on its console, and a terminal does more than show.
    Plain(Plain),
}

impl Sink {
    pub(crate) fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Log(log) => log.write(bytes),
            Self::Plain(plain) => plain.write(bytes),
        }
    }
}

impl fmt::Debug for Sink {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Log(log) => f.debug_tuple("Log").field(&log.path).finish(),
            Self::Plain(_) => f.write_str("Plain"),
        }
    }
}

/// A writer of [`PlainText`].
pub struct Plain {
    writer: Box<dyn Write + Send>,
    text: PlainText,
}

impl Plain {
    /// Writes to `writer`.
    pub fn new(writer: impl Write + Send + 'static) -> Self {
        Self { writer: Box::new(writer), text: PlainText::default() }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.writer.write_all(self.text.of(bytes).as_bytes())?;
        self.writer.flush()
    }
}

/// Turns bytes into text without control characters other than tab and line feed.
#[derive(Debug, Default)]
pub struct PlainText {
    /// The start of a character whose end has not come yet, at most three bytes.
    begun: Vec<u8>,
}

impl PlainText {
    /// The text of the next bytes. What is no character at all is replaced by U+FFFD.
    pub fn of(&mut self, bytes: &[u8]) -> String {
        let mut waiting = std::mem::take(&mut self.begun);
        waiting.extend_from_slice(bytes);
        let mut text = String::with_capacity(waiting.len());
        for chunk in waiting.utf8_chunks() {
            text.push_str(chunk.valid());
            let invalid = chunk.invalid();
            let at_end = std::ptr::eq(invalid.as_ptr_range().end, waiting.as_ptr_range().end);
            let incomplete = std::str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none());
            if at_end && incomplete {
                self.begun = invalid.to_vec();
            } else if !invalid.is_empty() {
                text.push(char::REPLACEMENT_CHARACTER);
            }
        }
        text.retain(|character| matches!(character, '\t' | '\n') || !character.is_control());
        text
    }
}

/// A console kept in a file of bounded size.
#[derive(Debug)]
pub struct Log {
    path: PathBuf,
    file: File,
    len: u64,
    max: u64,
}

impl Log {
    /// Starts a new file at `path`, readable by its owner only.
    ///
    /// # Errors
    ///
    /// When it cannot be created.
    pub fn create(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), file: create(path)?, len: 0, max: MAX_LOG })
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.len >= self.max {
            std::fs::rename(&self.path, older(&self.path))?;
            self.file = create(&self.path)?;
            self.len = 0;
        }
        self.file.write_all(bytes)?;
        self.len += bytes.len() as u64;
        Ok(())
    }
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)
}

/// Where the earlier part of a console that was kept at `path` is.
fn older(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOOT: &[u8] = include_bytes!("../tests/console/boot-and-restart.txt");

    #[test]
    fn a_boot_and_a_restart_are_seen() {
        let mut watcher = Watcher::new("/init", Some("app: ready".into()));
        let events = watcher.feed(BOOT);
        assert_eq!(
            events,
            [Event::Init(Duration::from_micros(941_207)), Event::Ready, Event::End(GuestEnd::Restarted)]
        );
        assert_eq!(watcher.last_line(), "[    1.530011] reboot: Restarting system with command 'done'");
    }

    #[test]
    fn events_do_not_depend_on_how_the_bytes_arrive() {
        let whole = Watcher::new("/init", None).feed(BOOT);
        for size in [1, 2, 7, 64] {
            let mut watcher = Watcher::new("/init", None);
            let pieces: Vec<_> = BOOT.chunks(size).flat_map(|piece| watcher.feed(piece)).collect();
            assert_eq!(pieces, whole, "in pieces of {size}");
        }
    }

    #[test]
    fn the_kernels_words_count_behind_an_unfinished_line_and_nothing_else_does() {
        let end = |line: &str| Watcher::new("/init", None).feed(format!("{line}\n").as_bytes());
        assert_eq!(end("[app] 50% [    2.000001] reboot: System halted"), [Event::End(GuestEnd::Halted)]);
        let panic =
            end("[   12.345678] Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000100");
        let message = "Attempted to kill init! exitcode=0x00000100".to_owned();
        assert_eq!(panic, [Event::End(GuestEnd::Panicked(message))]);
        for other in [
            "reboot: Power down",
            "[2.0] reboot: Power down",
            "[ abc.000001] reboot: Power down",
            "[    2.000001] app: reboot: Power down",
            "[    2.000001]",
            "[    2.000001] Run /sbin/init as init process",
            "[99999999999999999999.000001] reboot: Power down",
        ] {
            assert_eq!(end(other), [], "{other}");
        }
    }

    #[test]
    fn inits_last_words_are_read_where_they_begin_a_line() {
        let events = |line: &str| Watcher::new("/init", None).feed(format!("{line}\r\n").as_bytes());
        let report = |code, reason: &str| [Event::Reported(ExitReport { code, reason: reason.to_owned() })];
        assert_eq!(events("keyferry: exit 3: the KMS said: no"), report(3, "the KMS said: no"));
        assert_eq!(events("keyferry: exit 0: "), report(0, ""));
        for other in [
            "keyferry: exit : x",
            "keyferry: exit 256: x",
            "keyferry: exit -1: x",
            "keyferry: exit 1",
            "app: keyferry: exit 0: x",
            "keyferry: exited 1: x",
        ] {
            assert_eq!(events(other), [], "{other}");
        }
    }

    #[test]
    fn an_endless_line_takes_no_memory() {
        let mut watcher = Watcher::new("/init", None);
        for _ in 0..100 {
            watcher.feed(&[b'x'; 1000]);
        }
        assert_eq!(watcher.line.len(), MAX_LINE);
        watcher.feed(b"\n");
        assert_eq!(watcher.feed(b"[    1.000000] reboot: Power down\n"), [Event::End(GuestEnd::Halted)]);
    }

    #[derive(Clone, Default)]
    struct Screen(std::sync::Arc<std::sync::Mutex<Vec<u8>>>);

    impl Write for Screen {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_terminal_gets_no_commands() {
        let hostile = b"a\x1b]0;title\x07b\r\n\tc\xc2\x9b2Jd\x7f \xc3\xa9\xc2\xa0\x9b\xe2\x82\xac\xff!";
        for size in [1, 2, 3, hostile.len()] {
            let screen = Screen::default();
            let mut plain = Plain::new(screen.clone());
            for piece in hostile.chunks(size) {
                plain.write(piece).unwrap();
            }
            let shown = String::from_utf8(screen.0.lock().unwrap().clone()).unwrap();
            assert_eq!(
                shown, "a]0;titleb\n\tc2Jd \u{e9}\u{a0}\u{fffd}\u{20ac}\u{fffd}!",
                "in pieces of {size}"
            );
        }
    }

    #[test]
    fn a_log_starts_anew_and_keeps_what_was_before() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console");
        let mut log = Log::create(&path).unwrap();
        log.max = 4;
        for part in ["12", "34", "56", "78", "9"] {
            log.write(part.as_bytes()).unwrap();
        }
        assert_eq!(std::fs::read(&path).unwrap(), b"9");
        assert_eq!(std::fs::read(older(&path)).unwrap(), b"5678");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 2);
    }
}
