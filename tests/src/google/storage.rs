//! Cloud Storage: objects, and uploads in parts.

use std::collections::BTreeSet;

use md5::{Digest as _, Md5};
use serde_json::{Value, json};

use super::schema::Matched;
use super::state::{Refusal, State};

/// Parts but the last are multiples of this.
const GRANULE: u64 = 256 << 10;

/// Parts of an upload in one request.
const PARTS: usize = 2;

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

/// Bucket and object of an image's source, in either form. gcloud writes the address it was sent to, `own`.
pub(super) fn parse_source(source: &str, own: &str) -> Option<(String, String)> {
    let own = own.strip_suffix("compute/v1/").unwrap_or(own);
    let path = source.strip_prefix("https://storage.googleapis.com/").or_else(|| source.strip_prefix(own))?;
    let (bucket, name) = match path.strip_prefix("storage/v1/b/") {
        Some(rest) => rest.split_once("/o/")?,
        None => path.split_once('/')?,
    };
    Some((bucket.to_owned(), name.to_owned()))
}

fn describe(bucket: &str, name: &str, bytes: &[u8]) -> Value {
    use base64::Engine as _;
    let base64 = |bytes: &[u8]| base64::engine::general_purpose::STANDARD.encode(bytes);
    json!({
        "kind": "storage#object",
        "bucket": bucket,
        "name": name,
        "generation": "1",
        "size": bytes.len().to_string(),
        "crc32c": base64(&crc32c::crc32c(bytes).to_be_bytes()),
        // gcloud deletes what it uploaded when this is not what it computed.
        "md5Hash": base64(&Md5::digest(bytes)),
    })
}

/// Metadata and content of a body `multipart/related`. gcloud writes it with line feeds alone and puts the boundary into
/// apostrophes.
pub(super) fn multipart<'a>(content_type: &str, body: &'a [u8]) -> Option<(Value, &'a [u8])> {
    let (_, boundary) = content_type.split_once("boundary=")?;
    let boundary = format!("--{}", boundary.trim_matches(['\'', '"']));
    let position = |within: &[u8], what: &[u8]| within.windows(what.len()).position(|window| window == what);
    let mut parts = Vec::new();
    let mut rest = &body[position(body, boundary.as_bytes())? + boundary.len()..];
    while parts.len() < PARTS {
        let end = position(rest, boundary.as_bytes())?;
        let part = &rest[..end];
        let (head, blank) = match (position(part, b"\r\n\r\n"), position(part, b"\n\n")) {
            (Some(head), _) => (head, 4),
            (None, Some(head)) => (head, 2),
            (None, None) => return None,
        };
        let content = &part[head + blank..];
        let content = content.strip_suffix(b"\r\n").or_else(|| content.strip_suffix(b"\n"))?;
        parts.push(content);
        rest = &rest[end + boundary.len()..];
    }
    Some((serde_json::from_slice(parts[0]).ok()?, parts[1]))
}

impl State {
    /// Carries a call to Cloud Storage out that is no upload.
    pub(super) fn storage(
        &mut self,
        call: &Matched<'_>,
        query: &[(String, String)],
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
            "storage.objects.list" => {
                let parameter = |name: &str| {
                    query.iter().find(|(key, _)| key == name).map_or("", |(_, value)| value.as_str())
                };
                self.bucket(&bucket)?;
                Ok(Some(self.listed(&bucket, parameter("prefix"), parameter("delimiter"))))
            }
            other => Err((501, "notImplemented", format!("{other} is not part of this stand-in"))),
        }
    }

    fn listed(&self, bucket: &str, prefix: &str, delimiter: &str) -> Value {
        let mut items = Vec::new();
        let mut prefixes = BTreeSet::new();
        for ((_, name), bytes) in
            self.objects.iter().filter(|((of, name), _)| of == bucket && name.starts_with(prefix))
        {
            match name[prefix.len()..].split_once(delimiter).filter(|_| !delimiter.is_empty()) {
                Some((folder, _)) => {
                    prefixes.insert(format!("{prefix}{folder}{delimiter}"));
                }
                None => items.push(describe(bucket, name, bytes)),
            }
        }
        json!({"kind": "storage#objects", "items": items, "prefixes": prefixes})
    }

    /// Takes an object in one request.
    pub(super) fn store(&mut self, bucket: &str, name: &str, content: &[u8]) -> Result<Value, Refusal> {
        self.bucket(bucket)?;
        self.objects.insert((bucket.to_owned(), name.to_owned()), content.to_owned());
        Ok(describe(bucket, name, content))
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
