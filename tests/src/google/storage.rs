//! Cloud Storage: objects, and uploads in parts.

use serde_json::{Value, json};

use super::schema::Matched;
use super::state::{Refusal, State};

/// Parts but the last are multiples of this.
const GRANULE: u64 = 256 << 10;

/// An upload that has begun.
pub(super) struct Session {
    bucket: String,
    name: String,
    bytes: Vec<u8>,
}

/// What an upload session answers: done with this object, or this many bytes stored.
pub(super) enum Part {
    Complete(Value),
    Stored(u64),
}

/// Bucket and object of an image's source, in either form.
pub(super) fn parse_source(source: &str) -> Option<(String, String)> {
    let path = source.strip_prefix("https://storage.googleapis.com/")?;
    let (bucket, name) = match path.strip_prefix("storage/v1/b/") {
        Some(rest) => rest.split_once("/o/")?,
        None => path.split_once('/')?,
    };
    Some((bucket.to_owned(), name.to_owned()))
}

fn describe(bucket: &str, name: &str, bytes: &[u8]) -> Value {
    use base64::Engine as _;
    let crc32c = base64::engine::general_purpose::STANDARD.encode(crc32c::crc32c(bytes).to_be_bytes());
    json!({"bucket": bucket, "name": name, "size": bytes.len().to_string(), "crc32c": crc32c})
}

impl State {
    /// Carries a call to Cloud Storage out that is no upload.
    pub(super) fn storage(
        &mut self,
        call: &Matched<'_>,
        body: Option<&Value>,
    ) -> Result<Option<Value>, Refusal> {
        let (bucket, object) = (call.get("bucket").to_owned(), call.get("object").to_owned());
        match call.id() {
            "storage.buckets.get" => self.bucket(&bucket).map(Some),
            "storage.buckets.insert" => self.insert_bucket(body.unwrap_or(&Value::Null)).map(Some),
            "storage.objects.get" => match self.objects.get(&(bucket.clone(), object.clone())) {
                Some(bytes) => Ok(Some(describe(&bucket, &object, bytes))),
                None => Err((404, "notFound", format!("No such object: {bucket}/{object}"))),
            },
            "storage.objects.delete" => match self.objects.remove(&(bucket.clone(), object.clone())) {
                Some(_) => Ok(None),
                None => Err((404, "notFound", format!("No such object: {bucket}/{object}"))),
            },
            other => Err((501, "notImplemented", format!("{other} is not part of this stand-in"))),
        }
    }

    /// Begins an upload; the answer is the session's name.
    pub(super) fn begin_upload(&mut self, bucket: &str, name: &str) -> Result<String, Refusal> {
        self.bucket(bucket)?;
        self.counter += 1;
        let session = format!("session-{}", self.counter);
        let begun = Session { bucket: bucket.to_owned(), name: name.to_owned(), bytes: Vec::new() };
        self.sessions.insert(session.clone(), begun);
        Ok(session)
    }

    /// Takes a part. `range` is the header `Content-Range`.
    pub(super) fn take_part(&mut self, session: &str, range: &str, part: &[u8]) -> Result<Part, Refusal> {
        let bad = |why: &str| (400, "invalid", format!("Content-Range {range}: {why}"));
        let upload = self.sessions.get_mut(session);
        let upload = upload.ok_or_else(|| (404, "notFound", format!("no upload session {session}")))?;
        let (span, total) =
            range.strip_prefix("bytes ").and_then(|it| it.split_once('/')).ok_or_else(|| bad("malformed"))?;
        let total: u64 = total.parse().map_err(|_| bad("malformed total"))?;
        let stored = upload.bytes.len() as u64;
        if span != "*" {
            let (from, to) = span.split_once('-').ok_or_else(|| bad("malformed span"))?;
            let (from, to): (u64, u64) =
                (from.parse().map_err(|_| bad("malformed"))?, to.parse().map_err(|_| bad("malformed"))?);
            if to - from + 1 != part.len() as u64 || from > stored {
                return Err(bad("does not fit the part or leaves a gap"));
            }
            if to + 1 != total && !(to + 1).is_multiple_of(GRANULE) {
                return Err(bad("a part that is not the last must end at a multiple of 256 KiB"));
            }
            let known = usize::try_from(stored - from).expect("a test's object fits memory").min(part.len());
            upload.bytes.extend_from_slice(&part[known..]);
        }
        if upload.bytes.len() as u64 != total {
            return Ok(Part::Stored(upload.bytes.len() as u64));
        }
        let upload = self.sessions.remove(session).ok_or_else(|| bad("gone"))?;
        let answer = describe(&upload.bucket, &upload.name, &upload.bytes);
        self.objects.insert((upload.bucket, upload.name), upload.bytes);
        Ok(Part::Complete(answer))
    }
}
