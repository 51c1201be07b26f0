//! The calls to Cloud Storage: a bucket for uploads, and uploads that go on where they were cut.

use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::{Method, StatusCode, Url, header};
use serde::{Deserialize, Serialize};

use super::client::{Client, parse, read};
use super::error::{Error, refusal};
use crate::patience::{Deadline, Pauses};

/// Size of a part; all but the last must be a multiple of 256 KiB.
const PART: u64 = 8 << 20;
/// How often a session that Google has forgotten is begun anew.
const SESSIONS: usize = 3;

/// An object: bucket and name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    /// The bucket's name, without `gs://`.
    pub bucket: String,
    /// The object's name.
    pub name: String,
}

impl Object {
    fn shown(&self) -> String {
        format!("gs://{}/{}", self.bucket, self.name)
    }

    /// The address by which Compute Engine reads it.
    #[must_use]
    pub fn source_url(&self) -> String {
        format!("https://storage.googleapis.com/{}/{}", self.bucket, self.name)
    }
}

/// Watches an upload.
pub trait Upload: Send {
    /// The address of the session, which a later run can go on with. It is as good as a token for this one object.
    fn session(&mut self, address: &str);
    /// Bytes Google has, of the total.
    fn progress(&mut self, stored: u64, total: u64);
}

/// What Google says of an object.
#[derive(Deserialize)]
struct Stored {
    #[serde(default)]
    size: String,
    #[serde(default)]
    crc32c: String,
}

/// How a part was taken.
enum Taken {
    /// Google has the bytes before this position.
    UpTo(u64),
    /// The object is complete.
    Complete(Stored),
    /// The session is gone.
    Forgotten,
}

impl Client {
    /// Whether the bucket is there.
    ///
    /// # Errors
    ///
    /// As for every call; also when it belongs to someone else.
    pub async fn has_bucket(&self, name: &str, deadline: Deadline) -> Result<bool, Error> {
        let url = self.storage_url(&["storage", "v1", "b", name]);
        let found = self.find::<serde::de::IgnoredAny>(&format!("bucket {name}"), url, deadline).await?;
        Ok(found.is_some())
    }

    /// Makes the bucket where there is none: private, uniform access, in `location`. Says whether it was made.
    ///
    /// # Errors
    ///
    /// As for every call; a bucket of this name that belongs to someone else is refused by Google.
    pub async fn ensure_bucket(&self, name: &str, location: &str, deadline: Deadline) -> Result<bool, Error> {
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Bucket<'a> {
            name: &'a str,
            location: &'a str,
            iam_configuration: Access,
        }
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Access {
            public_access_prevention: &'static str,
            uniform_bucket_level_access: Enabled,
        }
        #[derive(Serialize)]
        struct Enabled {
            enabled: bool,
        }
        if self.has_bucket(name, deadline).await? {
            return Ok(false);
        }
        let access = Access {
            public_access_prevention: "enforced",
            uniform_bucket_level_access: Enabled { enabled: true },
        };
        let bucket = Bucket { name, location, iam_configuration: access };
        let call = format!("create bucket {name}");
        let body = serde_json::to_vec(&bucket);
        let body = body.map_err(|error| Error::Answer { call: call.clone(), problem: error.to_string() })?;
        let mut url = self.storage_url(&["storage", "v1", "b"]);
        url.query_pairs_mut().append_pair("project", &self.project);
        self.call(&call, &Method::POST, &url, Some(&body), deadline).await.map(|_| true)
    }

    /// Deletes an object. One that is not there is no error.
    ///
    /// # Errors
    ///
    /// As for every call.
    pub async fn delete_object(&self, object: &Object, deadline: Deadline) -> Result<(), Error> {
        let url = self.storage_url(&["storage", "v1", "b", &object.bucket, "o", &object.name]);
        match self.call(&format!("delete {}", object.shown()), &Method::DELETE, &url, None, deadline).await {
            Err(error) if !error.is_not_found() => Err(error),
            _ => Ok(()),
        }
    }

    /// Uploads `file`, going on with the session `resume` where an earlier run left one. Google's checksum of what
    /// arrived is compared with that of the file.
    ///
    /// # Errors
    ///
    /// As for every call; [`Error::Upload`] when what arrived differs.
    pub async fn upload(
        &self,
        object: &Object,
        file: &Path,
        resume: Option<&str>,
        watcher: &mut dyn Upload,
        deadline: Deadline,
    ) -> Result<(), Error> {
        let source = Source::open(object, file).await?;
        let mut session = match resume.map(Url::parse) {
            Some(Ok(url)) if url.origin() == self.endpoints.storage.origin() => Some(url),
            _ => None,
        };
        for _ in 0..SESSIONS {
            let url = match session.take() {
                Some(url) => url,
                None => self.begin(object, source.size, deadline).await?,
            };
            watcher.session(url.as_str());
            if let Some(stored) = self.send_parts(object, &source, &url, watcher, deadline).await? {
                return source.check(&stored);
            }
        }
        let problem = format!("Google forgot the session {SESSIONS} times");
        Err(Error::Upload { object: object.shown(), problem })
    }

    /// Begins a session. Its address comes in a header.
    async fn begin(&self, object: &Object, size: u64, deadline: Deadline) -> Result<Url, Error> {
        let call = format!("upload {}", object.shown());
        let mut pauses = Pauses::new(Duration::from_millis(500), Duration::from_secs(10));
        loop {
            let mut url = self.storage_url(&["upload", "storage", "v1", "b", &object.bucket, "o"]);
            url.query_pairs_mut().append_pair("uploadType", "resumable").append_pair("name", &object.name);
            let request = self.request(Method::POST, url, deadline).await?;
            let request = request
                .header(header::CONTENT_TYPE, "application/json")
                .header("X-Upload-Content-Type", "application/gzip")
                .header("X-Upload-Content-Length", size)
                .body("{}");
            let error = match self.send(&call, request, deadline).await {
                Ok(answer) if answer.status().is_success() => {
                    let location = answer.headers().get(header::LOCATION).and_then(|it| it.to_str().ok());
                    let session = location.and_then(|it| Url::parse(it).ok());
                    let session = session.filter(|url| url.origin() == self.endpoints.storage.origin());
                    let problem = "the answer names no upload session of the same service".to_owned();
                    return session.ok_or(Error::Answer { call, problem });
                }
                Ok(answer) => {
                    let status = answer.status();
                    let error = refusal(&call, status.as_u16(), &read(&call, answer, deadline).await?);
                    if !status.is_server_error() && status != StatusCode::TOO_MANY_REQUESTS {
                        return Err(error);
                    }
                    error
                }
                Err(error) => error,
            };
            pauses.pause(deadline).await;
            if deadline.passed() {
                return Err(error);
            }
        }
    }

    /// Sends what Google does not have yet. `None`: the session is gone.
    async fn send_parts(
        &self,
        object: &Object,
        source: &Source,
        session: &Url,
        watcher: &mut dyn Upload,
        deadline: Deadline,
    ) -> Result<Option<Stored>, Error> {
        let mut pauses = Pauses::new(Duration::from_millis(500), Duration::from_secs(10));
        // Where Google is, unknown at first: the session may be one an earlier run began.
        let mut position = None;
        loop {
            let sent = match position {
                None => {
                    self.put(object, session, format!("bytes */{}", source.size), Vec::new(), deadline).await
                }
                Some(from) => {
                    let part = source.part(from).await?;
                    let range = match part.len() as u64 {
                        0 => format!("bytes */{}", source.size),
                        length => format!("bytes {from}-{}/{}", from + length - 1, source.size),
                    };
                    self.put(object, session, range, part, deadline).await
                }
            };
            match sent {
                Ok(Taken::Complete(stored)) => {
                    watcher.progress(source.size, source.size);
                    return Ok(Some(stored));
                }
                Ok(Taken::Forgotten) => return Ok(None),
                Ok(Taken::UpTo(stored)) if stored <= source.size => {
                    if position.is_some_and(|before| stored > before) {
                        pauses = Pauses::new(Duration::from_millis(500), Duration::from_secs(10));
                    } else if position.is_some() {
                        pauses.pause(deadline).await;
                    }
                    watcher.progress(stored, source.size);
                    position = Some(stored);
                }
                Ok(Taken::UpTo(stored)) => {
                    let problem = format!("Google says it has {stored} of {} bytes", source.size);
                    return Err(Error::Upload { object: object.shown(), problem });
                }
                Err(error) if super::client::is_final(&error) => return Err(error),
                // The connection broke: ask where Google is, and go on there.
                Err(_) => {
                    pauses.pause(deadline).await;
                    position = None;
                }
            }
            if deadline.passed() {
                return Err(Error::Deadline {
                    call: format!("upload {}", object.shown()),
                    allowed: deadline.allowed(),
                });
            }
        }
    }

    async fn put(
        &self,
        object: &Object,
        session: &Url,
        range: String,
        part: Vec<u8>,
        deadline: Deadline,
    ) -> Result<Taken, Error> {
        let call = format!("upload {}", object.shown());
        let request = self.request(Method::PUT, session.clone(), deadline).await?;
        let request = request
            .header(header::CONTENT_RANGE, range)
            .header(header::CONTENT_LENGTH, part.len())
            .body(part);
        let answer = self.send(&call, request, deadline).await?;
        let status = answer.status();
        match status.as_u16() {
            200 | 201 => parse(&call, &read(&call, answer, deadline).await?).map(Taken::Complete),
            308 => {
                let range = answer.headers().get(header::RANGE).and_then(|it| it.to_str().ok());
                // No header: Google has nothing. Else `bytes=0-LAST`.
                let stored = match range {
                    None => Some(0),
                    Some(range) => {
                        range.strip_prefix("bytes=0-").and_then(|it| it.parse().ok()).map(|it: u64| it + 1)
                    }
                };
                let problem = || format!("the answer has the range {range:?}");
                stored
                    .map(Taken::UpTo)
                    .ok_or_else(|| Error::Answer { call: call.clone(), problem: problem() })
            }
            404 | 410 => Ok(Taken::Forgotten),
            code => Err(refusal(&call, code, &read(&call, answer, deadline).await?)),
        }
    }

    fn storage_url(&self, path: &[&str]) -> Url {
        let mut url = self.endpoints.storage.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().extend(path);
        }
        url
    }
}

/// The file that is uploaded. Every read happens off the async threads.
struct Source {
    object: String,
    path: PathBuf,
    size: u64,
    /// CRC-32C of the whole file, as Google writes it: base64 of the big-endian bytes.
    crc32c: String,
}

impl Source {
    async fn open(object: &Object, path: &Path) -> Result<Self, Error> {
        let (object, path) = (object.shown(), path.to_owned());
        let file = path.clone();
        let summed = blocking(move || {
            let mut file = std::fs::File::open(file)?;
            let mut buffer = vec![0; 1 << 20];
            let (mut size, mut sum) = (0, 0);
            loop {
                match file.read(&mut buffer)? {
                    0 => return Ok((size, sum)),
                    count => {
                        size += count as u64;
                        sum = crc32c::crc32c_append(sum, &buffer[..count]);
                    }
                }
            }
        });
        let (size, sum) = summed.await.map_err(|source| Error::File { object: object.clone(), source })?;
        use base64::Engine as _;
        let crc32c = base64::engine::general_purpose::STANDARD.encode(sum.to_be_bytes());
        Ok(Self { object, path, size, crc32c })
    }

    /// The part that begins at `from`.
    async fn part(&self, from: u64) -> Result<Vec<u8>, Error> {
        let path = self.path.clone();
        let length = PART.min(self.size.saturating_sub(from));
        let part = blocking(move || {
            let mut file = std::fs::File::open(path)?;
            file.seek(SeekFrom::Start(from))?;
            let mut part = Vec::new();
            file.take(length).read_to_end(&mut part)?;
            Ok(part)
        });
        let part = part.await.map_err(|source| Error::File { object: self.object.clone(), source })?;
        match part.len() as u64 == length {
            true => Ok(part),
            false => Err(self.differs("the file became shorter during the upload".to_owned())),
        }
    }

    fn check(&self, stored: &Stored) -> Result<(), Error> {
        if stored.size != self.size.to_string() {
            return Err(self.differs(format!("{} bytes were sent, {} arrived", self.size, stored.size)));
        }
        match stored.crc32c == self.crc32c {
            true => Ok(()),
            false => {
                Err(self
                    .differs(format!("the checksum is {}, what arrived has {}", self.crc32c, stored.crc32c)))
            }
        }
    }

    fn differs(&self, problem: String) -> Error {
        Error::Upload { object: self.object.clone(), problem }
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> std::io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(std::io::Error::other)?
}
