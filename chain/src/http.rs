//! What every HTTP client of this crate has in common.

use std::time::Duration;

use reqwest::{Client, Response, redirect};

/// A client without redirects and proxies: a redirect could lead to a private address or strip TLS, and a proxy would
/// see access keys.
pub(crate) fn client(connect: Duration) -> reqwest::Result<Client> {
    Client::builder()
        .redirect(redirect::Policy::none())
        .no_proxy()
        .connect_timeout(connect)
        .user_agent(concat!("keyferry/", env!("CARGO_PKG_VERSION")))
        .build()
}

/// The body of an answer; `None` when it is longer than `limit` bytes.
pub(crate) async fn body(mut response: Response, limit: usize) -> reqwest::Result<Option<Vec<u8>>> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        if body.len() + chunk.len() > limit {
            return Ok(None);
        }
        body.extend_from_slice(&chunk);
    }
    Ok(Some(body))
}
