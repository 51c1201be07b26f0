//! A download that goes on where it was cut.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::redirect::{Attempt, Policy};
use reqwest::{Response, StatusCode, Url, header};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::Error;
use crate::durable;
use crate::patience::{Deadline, Pauses};

/// No archive is larger; the published ones have less than 1 GiB.
const LARGEST: u64 = 8 << 30;
/// Longest wait for the next bytes.
const SILENCE: Duration = Duration::from_secs(60);
/// Cuts in a row that brought nothing, after which this gives up.
const FRUITLESS: u32 = 6;
const REDIRECTS: usize = 5;

/// Watches a download.
pub trait Progress: Send {
    /// Bytes that are here, of the total when it is known.
    fn progress(&mut self, here: u64, total: Option<u64>);
}

/// What must be the same for a download to go on.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Origin {
    url: String,
    /// A strong `ETag`: it changes with the content.
    validator: Option<String>,
}

/// A file that is being downloaded, locked for this process while it lives.
#[derive(Debug)]
pub(super) struct Part {
    path: PathBuf,
    file: File,
}

impl Part {
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    fn origin_path(path: &Path) -> PathBuf {
        path.with_extension("origin")
    }

    pub(super) fn remove(self) -> Result<(), crate::Error> {
        for path in [&Self::origin_path(&self.path), &self.path] {
            match std::fs::remove_file(path) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(crate::Error::file("remove", path)(error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// How much of this very content is here.
    fn known(&self, url: &Url) -> Result<(u64, Option<String>), crate::Error> {
        let origin = std::fs::read(Self::origin_path(&self.path)).unwrap_or_default();
        let origin: Origin = serde_json::from_slice(&origin).unwrap_or_default();
        let length = self.file.metadata().map_err(crate::Error::file("look at", &self.path))?.len();
        match origin.url == url.as_str() && origin.validator.is_some() {
            true => Ok((length, origin.validator)),
            // Without a way to tell, what is here may be of another content.
            false => Ok((0, None)),
        }
    }

    /// Begins anew with this content.
    fn begin(&mut self, url: &Url, validator: Option<String>) -> Result<(), crate::Error> {
        let failed = crate::Error::file("write", &self.path);
        self.file.set_len(0).and_then(|()| self.file.rewind()).map_err(failed)?;
        let path = Self::origin_path(&self.path);
        let origin = serde_json::to_vec(&Origin { url: url.to_string(), validator });
        let origin = origin.map_err(|source| crate::Error::Json { path: path.clone(), source })?;
        durable::replace(&path, &origin, 0o600)
    }
}

/// Downloads `url` into the file `path`, going on with what is there of it.
pub(super) async fn download(
    url: &Url,
    path: &Path,
    progress: &mut dyn Progress,
) -> Result<Part, crate::Error> {
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create(true).truncate(false).open(path);
    let file = file.map_err(crate::Error::file("open", path))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => return Err(Error::Locked { path: path.to_owned() }.into()),
        Err(errno) => return Err(crate::Error::file("lock", path)(errno.into())),
    }
    let mut part = Part { path: path.to_owned(), file };
    let client = reqwest::Client::builder()
        .connect_timeout(Duration::from_secs(10))
        .read_timeout(SILENCE)
        .redirect(Policy::custom(follow))
        .user_agent(concat!("keyferry/", env!("CARGO_PKG_VERSION")))
        .build()
        .map_err(crate::Error::HttpClient)?;
    let mut pauses = Pauses::new(Duration::from_millis(500), Duration::from_secs(10));
    let mut fruitless = 0;
    loop {
        let before = part.known(url)?.0;
        let problem = match attempt(&client, url, &mut part, progress).await? {
            Attempted::Complete => return Ok(part),
            Attempted::Cut(problem) => problem,
        };
        fruitless = if part.known(url)?.0 > before { 0 } else { fruitless + 1 };
        if fruitless >= FRUITLESS {
            return Err(Error::Unreachable { url: url.to_string(), problem }.into());
        }
        tracing::debug!(%url, problem, "a download was cut, going on");
        pauses.pause(Deadline::within(SILENCE)).await;
    }
}

/// GitHub sends to where its files are; never from TLS to none.
fn follow(attempt: Attempt<'_>) -> reqwest::redirect::Action {
    let secure = attempt.previous().iter().any(|url| url.scheme() == "https");
    if attempt.previous().len() > REDIRECTS {
        return attempt.error("too many redirections");
    }
    match secure && attempt.url().scheme() != "https" {
        true => attempt.error("a redirection from https to http"),
        false => attempt.follow(),
    }
}

enum Attempted {
    Complete,
    Cut(String),
}

async fn attempt(
    client: &reqwest::Client,
    url: &Url,
    part: &mut Part,
    progress: &mut dyn Progress,
) -> Result<Attempted, crate::Error> {
    let (here, validator) = part.known(url)?;
    let mut request = client.get(url.clone());
    if let (1.., Some(validator)) = (here, &validator) {
        request = request.header(header::RANGE, format!("bytes={here}-")).header(header::IF_RANGE, validator);
    }
    let mut answer = match timeout(SILENCE, request.send()).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) if error.is_redirect() || error.is_builder() => {
            let problem = command_line::chain(&error.without_url());
            return Err(Error::Unreachable { url: url.to_string(), problem }.into());
        }
        Ok(Err(error)) => return Ok(Attempted::Cut(command_line::chain(&error.without_url()))),
        Err(_) => return Ok(Attempted::Cut(format!("no answer after {} s", SILENCE.as_secs()))),
    };
    let status = answer.status();
    let (mut here, total) = match status {
        StatusCode::PARTIAL_CONTENT if continues(&answer, here) => (here, total_of(&answer, here)),
        StatusCode::OK => {
            let validator = answer.headers().get(header::ETAG).and_then(|it| it.to_str().ok());
            let validator = validator.filter(|it| it.starts_with('"')).map(str::to_owned);
            part.begin(url, validator)?;
            (0, answer.content_length())
        }
        // All of it is here already, or the content changed and became shorter.
        StatusCode::RANGE_NOT_SATISFIABLE if whole(&answer) == Some(here) => return Ok(Attempted::Complete),
        StatusCode::RANGE_NOT_SATISFIABLE | StatusCode::PARTIAL_CONTENT => {
            part.begin(url, None)?;
            return Ok(Attempted::Cut("the server's part does not continue what is here".into()));
        }
        status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => {
            return Ok(Attempted::Cut(format!("status {}", status.as_u16())));
        }
        status => return Err(Error::Status { url: url.to_string(), status: status.as_u16() }.into()),
    };
    let too_large = |actual| Error::TooLarge { what: url.to_string(), actual, limit: LARGEST };
    if let Some(total) = total.filter(|total| *total > LARGEST) {
        return Err(too_large(total).into());
    }
    let failed = |error| crate::Error::file("write", &part.path)(error);
    part.file.seek(SeekFrom::Start(here)).map_err(failed)?;
    loop {
        let chunk = match timeout(SILENCE, answer.chunk()).await {
            Ok(Ok(Some(chunk))) => chunk,
            Ok(Ok(None)) if total.is_none_or(|total| total == here) => break,
            Ok(Ok(None)) => return Ok(Attempted::Cut("the connection ended early".into())),
            Ok(Err(error)) => return Ok(Attempted::Cut(command_line::chain(&error.without_url()))),
            Err(_) => return Ok(Attempted::Cut(format!("nothing for {} s", SILENCE.as_secs()))),
        };
        here += chunk.len() as u64;
        if here > LARGEST {
            return Err(too_large(here).into());
        }
        part.file.write_all(&chunk).map_err(failed)?;
        progress.progress(here, total);
    }
    part.file.sync_all().map_err(failed)?;
    Ok(Attempted::Complete)
}

/// `Content-Range: bytes A-B/TOTAL`: whether A is where we are.
fn continues(answer: &Response, here: u64) -> bool {
    let first = content_range(answer).and_then(|(span, _)| span.split_once('-')?.0.parse::<u64>().ok());
    first == Some(here)
}

fn total_of(answer: &Response, here: u64) -> Option<u64> {
    whole(answer).or_else(|| answer.content_length().map(|rest| here + rest))
}

fn whole(answer: &Response) -> Option<u64> {
    content_range(answer).and_then(|(_, total)| total.parse().ok())
}

fn content_range(answer: &Response) -> Option<(&str, &str)> {
    let range = answer.headers().get(header::CONTENT_RANGE)?.to_str().ok()?;
    range.strip_prefix("bytes ")?.split_once('/')
}
