//! The administration service (reference §1.7 and §2.3): a listener of its own, behind a token, and what it clears.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use hyper::StatusCode;
use hyper::header::{AUTHORIZATION, HeaderValue, WWW_AUTHENTICATE};
use hyper::http::request::Parts;
use kms_protocol::wire::{ClearImageCacheRequest, LegacyClearImageCacheRequest, Method, Service};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use tracing::{info, warn};

use crate::authorise::Pending;
use crate::http::{Answer, Body, Caller, Failure, Message, Methods, Peer, plain};

/// The realm that browsers show.
const REALM: HeaderValue = HeaderValue::from_static("Basic realm=\"dstack-kms admin\"");

/// SHA-256 of a token: what is compared, and all that is kept.
#[derive(Clone, PartialEq, Eq)]
pub struct TokenHash([u8; 32]);

impl std::fmt::Debug for TokenHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TokenHash")
    }
}

impl TokenHash {
    /// Of a token.
    #[must_use]
    pub fn of(token: &str) -> Self {
        Self(Sha256::digest(token).into())
    }

    /// From 64 hexadecimal digits.
    #[must_use]
    pub fn from_hex(text: &str) -> Option<Self> {
        let mut hash = [0; 32];
        hex::decode_to_slice(text, &mut hash).ok().map(|()| Self(hash))
    }

    /// In constant time.
    pub(crate) fn is_of(&self, token: &str) -> bool {
        Self::of(token).0.ct_eq(&self.0).into()
    }
}

/// Who may administer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AdminAuth {
    /// Whoever knows the token.
    Token(TokenHash),
    /// Anybody who reaches the listener.
    DangerNobodyAsked,
}

/// The administration service.
pub(crate) struct Admin {
    pub(crate) auth: AdminAuth,
    pub(crate) cache: ImageCache,
}

impl Methods for Admin {
    fn service(&self) -> Service {
        Service::Admin
    }

    fn refuse(&self, parts: &Parts, _peer: &Peer) -> Option<Answer> {
        let allowed = match &self.auth {
            AdminAuth::DangerNobodyAsked => true,
            AdminAuth::Token(hash) => tokens(parts).iter().any(|token| hash.is_of(token)),
        };
        if allowed {
            return None;
        }
        let mut answer = plain(StatusCode::UNAUTHORIZED, "text/plain; charset=utf-8", "");
        answer.headers_mut().insert(WWW_AUTHENTICATE, REALM);
        Some(answer)
    }

    fn call<'a>(
        &'a self,
        method: Method,
        message: Message<'a>,
        _caller: Caller<'a>,
    ) -> Pending<'a, Result<Body, Failure>> {
        Box::pin(async move {
            match method {
                Method::ClearImageCache => {
                    let ClearImageCacheRequest { image_hash, config_hash } = message.decode()?;
                    self.cache.clear(image_hash, config_hash).await.map_err(Failure::bad)?;
                    message.empty()
                }
                other => Err(Failure::unknown(other.name())),
            }
        })
    }
}

/// Every token a request offers: `Bearer`, `X-Admin-Token`, or `Basic` with it as the password, or as the user name
/// without a password.
fn tokens(parts: &Parts) -> Vec<String> {
    let header = |name: &str| parts.headers.get(name).and_then(|value| value.to_str().ok());
    let mut tokens: Vec<String> = header("x-admin-token").map(str::to_owned).into_iter().collect();
    let Some((scheme, value)) = header(AUTHORIZATION.as_str()).and_then(|text| text.split_once(' ')) else {
        return tokens;
    };
    if scheme.eq_ignore_ascii_case("bearer") {
        tokens.push(value.trim().to_owned());
    } else if scheme.eq_ignore_ascii_case("basic")
        && let Some(pair) = basic(value.trim())
        && let Some((user, password)) = pair.split_once(':')
    {
        tokens.push(if password.is_empty() { user } else { password }.to_owned());
    }
    tokens
}

fn basic(text: &str) -> Option<String> {
    use base64::Engine as _;
    let bytes = base64::engine::general_purpose::STANDARD.decode(text).ok()?;
    String::from_utf8(bytes).ok()
}

/// The directory that an upstream KMS keeps images and measurements in. This KMS puts nothing there; it clears what an
/// earlier one has left.
#[derive(Debug, Clone)]
pub(crate) struct ImageCache {
    directory: Arc<Path>,
    /// Generations A and B have the method in the main service, behind this.
    legacy_token: Option<TokenHash>,
}

impl ImageCache {
    pub(crate) fn new(directory: PathBuf, legacy_token: Option<TokenHash>) -> Self {
        Self { directory: directory.into(), legacy_token }
    }

    pub(crate) fn has_legacy_token(&self) -> bool {
        self.legacy_token.is_some()
    }

    /// The method as generations A and B have it.
    pub(crate) async fn clear_legacy(&self, request: LegacyClearImageCacheRequest) -> Result<(), String> {
        let LegacyClearImageCacheRequest { token, image_hash, config_hash } = request;
        if !self.legacy_token.as_ref().is_some_and(|hash| hash.is_of(&token)) {
            return Err("Invalid token".into());
        }
        self.clear(image_hash, config_hash).await
    }

    /// Removes entries. Each name is empty (nothing), `all`, or hexadecimal digits.
    pub(crate) async fn clear(&self, image_hash: String, config_hash: String) -> Result<(), String> {
        let directory = Arc::clone(&self.directory);
        let work = move || {
            remove(&directory.join("images"), &image_hash)
                .map_err(|error| format!("failed to clear image cache: {error}"))?;
            remove(&directory.join("measurements"), &config_hash)
                .map_err(|error| format!("failed to clear measurement cache: {error}"))
        };
        let cleared = tokio::task::spawn_blocking(work).await.map_err(|error| error.to_string())?;
        match &cleared {
            Ok(()) => info!(directory = %self.directory.display(), "cleared image cache"),
            Err(error) => warn!(error, "image cache not cleared"),
        }
        cleared
    }
}

/// Removes one entry of `directory`, or the directory with everything in it. Symbolic links are removed, never followed.
fn remove(directory: &Path, name: &str) -> Result<(), String> {
    let path = match name {
        "" => return Ok(()),
        "all" => directory.to_owned(),
        name if name.len() <= 128 && name.bytes().all(|byte| byte.is_ascii_hexdigit()) => {
            directory.join(name)
        }
        _ => return Err("invalid cache key".into()),
    };
    let removed = match std::fs::symlink_metadata(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => Err(error),
        Ok(metadata) if metadata.is_dir() => std::fs::remove_dir_all(&path),
        Ok(_) => std::fs::remove_file(&path),
    };
    removed.map_err(|error| format!("cannot remove {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper::Request;

    fn parts(headers: &[(&str, &str)]) -> Parts {
        let mut request = Request::builder();
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    fn admin() -> Admin {
        let auth = AdminAuth::Token(TokenHash::of("secret"));
        Admin { auth, cache: ImageCache::new("/nowhere".into(), None) }
    }

    #[test]
    fn the_token_is_taken_in_upstreams_forms_and_no_other() {
        // "user:secret", "secret:", "secret:other", "user:"
        for (allowed, headers) in [
            (true, &[("authorization", "Bearer secret")]),
            (true, &[("x-admin-token", "secret")]),
            (true, &[("authorization", "Basic dXNlcjpzZWNyZXQ=")]),
            (true, &[("authorization", "basic c2VjcmV0Og==")]),
            (false, &[("authorization", "Basic c2VjcmV0Om90aGVy")]),
            (false, &[("authorization", "Basic dXNlcjo=")]),
            (false, &[("authorization", "Basic x")]),
            (false, &[("authorization", "Bearer Secret")]),
            (false, &[("authorization", "secret")]),
            (false, &[("x-admin-token", "")]),
            (false, &[("x-other", "secret")]),
        ] {
            let refusal = admin().refuse(&parts(headers), &Peer::test());
            assert_eq!(refusal.is_none(), allowed, "{headers:?}");
            if let Some(refusal) = refusal {
                assert_eq!(refusal.status(), StatusCode::UNAUTHORIZED);
                assert!(refusal.headers().contains_key(WWW_AUTHENTICATE));
            }
        }
    }

    #[test]
    fn only_named_entries_are_removed() {
        let directory = tempfile::tempdir().unwrap();
        let images = directory.path().join("images");
        let entry = |name: &str| images.join(name);
        std::fs::create_dir_all(entry("cafe")).unwrap();
        std::fs::write(entry("beef"), "").unwrap();
        let outside = directory.path().join("outside");
        std::fs::create_dir(&outside).unwrap();
        std::os::unix::fs::symlink(&outside, entry("0123")).unwrap();
        for name in ["../outside", "..", "/", "cafe/..", "xyz", &"0".repeat(129)] {
            assert!(remove(&images, name).is_err(), "{name}");
        }
        remove(&images, "").unwrap();
        remove(&images, "0000").unwrap();
        remove(&images, "beef").unwrap();
        remove(&images, "0123").unwrap();
        assert!(
            entry("cafe").exists() && !entry("beef").exists() && !entry("0123").exists() && outside.exists()
        );
        remove(&images, "all").unwrap();
        assert!(!images.exists() && outside.exists());
    }
}
