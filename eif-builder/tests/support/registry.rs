//! A registry on this machine: what pulling needs of the OCI distribution protocol, and what it must survive.

#![allow(
    clippy::unwrap_used,
    dead_code,
    unreachable_pub,
    reason = "each test binary uses its own part; a set-up that fails is a failed test"
)]

use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::{Arc, Mutex};

use super::images::TestImage;
use super::sha256;

/// `test:secret` for HTTP's Basic.
pub const PASSWORD: &str = "dGVzdDpzZWNyZXQ=";

/// Who may pull.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Everyone.
    Open,
    /// Who sends the password.
    Password,
    /// Who sends a token, which the token service gives for the password or the identity token.
    Token,
    /// Who sends a token, which everyone gets.
    AnonymousToken,
}

/// What the registry does wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// Manifests are not the ones asked for.
    OtherManifest,
    /// Manifests never end.
    EndlessManifest,
    /// Tokens never end.
    EndlessToken,
    /// Layers have one byte more than the manifest says.
    LongLayer,
    /// Layers have a bit flipped.
    ChangedLayer,
}

/// A certificate that no one trusts, and the configuration that shows it.
pub struct Tls {
    pub pem: String,
    pub config: Arc<rustls::ServerConfig>,
}

impl Tls {
    pub fn for_address(address: &str) -> Self {
        Self::with_key(address).1
    }

    /// Also the private key in PEM.
    pub fn with_key(address: &str) -> (String, Self) {
        let made = rcgen::generate_simple_self_signed([address.to_owned()]).unwrap();
        let key = rustls::pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key)
            .unwrap();
        (made.signing_key.serialize_pem(), Self { pem: made.cert.pem(), config: Arc::new(config) })
    }
}

/// One request: its first line and its Authorization header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    pub line: String,
    pub authorization: Option<String>,
}

/// A running registry; it ends with the process.
pub struct Registry {
    /// `host:port`.
    pub address: String,
    seen: Arc<Mutex<Vec<Seen>>>,
}

struct Service {
    image: TestImage,
    access: Access,
    fault: Fault,
    /// Where blobs are, instead of here.
    blobs_at: Option<String>,
    origin: String,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Registry {
    /// Serves `image` as `app:1` on `ip`.
    pub fn start(ip: &str, tls: Option<&Tls>, image: TestImage, access: Access, fault: Fault) -> Self {
        Self::start_with_blobs_at(ip, tls, image, access, fault, None)
    }

    pub fn start_with_blobs_at(
        ip: &str,
        tls: Option<&Tls>,
        image: TestImage,
        access: Access,
        fault: Fault,
        blobs_at: Option<String>,
    ) -> Self {
        let listener = TcpListener::bind((ip, 0)).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let scheme = if tls.is_some() { "https" } else { "http" };
        let origin = format!("{scheme}://{address}");
        let service = Arc::new(Service { image, access, fault, blobs_at, origin, seen: Arc::clone(&seen) });
        let config = tls.map(|tls| Arc::clone(&tls.config));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (service, config) = (Arc::clone(&service), config.clone());
                // Clients try TLS first and give up: what they leave unfinished is no failure of the test.
                std::thread::spawn(move || {
                    let stream = stream.unwrap();
                    let _ended = match config {
                        None => service.serve(stream),
                        Some(config) => {
                            let connection = rustls::ServerConnection::new(config).unwrap();
                            service.serve(rustls::StreamOwned::new(connection, stream))
                        }
                    };
                });
            }
        });
        Self { address, seen }
    }

    pub fn reference(&self) -> String {
        format!("{}/app:1", self.address)
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }
}

struct Request {
    line: String,
    headers: String,
    body: String,
}

impl Request {
    fn read(stream: &mut impl Read) -> std::io::Result<Self> {
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") {
            stream.read_exact(&mut byte)?;
            head.push(byte[0]);
            // A TLS handshake. Like any HTTP server, this one hangs up on it.
            if head[0] == 0x16 {
                return Err(std::io::ErrorKind::InvalidData.into());
            }
        }
        let head = String::from_utf8_lossy(&head).into_owned();
        let (line, headers) = head.split_once("\r\n").unwrap_or_default();
        let mut request = Self { line: line.to_owned(), headers: headers.to_owned(), body: String::new() };
        let len = request.header("content-length").and_then(|len| len.parse().ok()).unwrap_or(0);
        let mut body = vec![0; len];
        stream.read_exact(&mut body)?;
        request.body = String::from_utf8_lossy(&body).into_owned();
        Ok(request)
    }

    fn header(&self, name: &str) -> Option<&str> {
        let mut pairs = self.headers.lines().filter_map(|line| line.split_once(": "));
        pairs.find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }

    fn path(&self) -> &str {
        self.line.split(' ').nth(1).unwrap_or_default()
    }
}

impl Service {
    fn serve(&self, mut stream: impl Read + Write) -> std::io::Result<()> {
        let request = Request::read(&mut stream)?;
        let authorization = request.header("authorization").map(str::to_owned);
        self.seen.lock().unwrap().push(Seen { line: request.line.clone(), authorization });
        let (status, headers, body) = self.answer(&request);
        let is_endless = match self.fault {
            Fault::EndlessManifest => request.path().contains("/manifests/") && status == "200 OK",
            Fault::EndlessToken => request.path().starts_with("/token"),
            _ => false,
        };
        let len = if is_endless { String::new() } else { format!("Content-Length: {}\r\n", body.len()) };
        let head = format!("HTTP/1.1 {status}\r\n{headers}{len}Connection: close\r\n\r\n");
        stream.write_all(head.as_bytes())?;
        stream.write_all(&body)?;
        if is_endless {
            loop {
                stream.write_all(&[b' '; 4096])?; // until the client has enough
            }
        }
        stream.flush()
    }

    fn answer(&self, request: &Request) -> (&'static str, String, Vec<u8>) {
        if request.path().starts_with("/token") {
            return self.token(request);
        }
        let authorization = request.header("authorization");
        let basic = format!("Basic {PASSWORD}");
        let (allowed, challenge) = match self.access {
            Access::Open => (true, String::new()),
            Access::Password => (authorization == Some(basic.as_str()), "Basic realm=\"test\"".to_owned()),
            Access::Token | Access::AnonymousToken => (
                authorization == Some("Bearer the-token"),
                format!(
                    "Bearer realm=\"{}/token\",service=\"test\",scope=\"repository:app:pull\"",
                    self.origin
                ),
            ),
        };
        if !allowed {
            let headers = format!("WWW-Authenticate: {challenge}\r\n");
            return ("401 Unauthorized", headers, b"{\"errors\":[{\"code\":\"UNAUTHORIZED\"}]}".to_vec());
        }
        self.content(request.path())
    }

    fn token(&self, request: &Request) -> (&'static str, String, Vec<u8>) {
        let basic = format!("Basic {PASSWORD}");
        let with_password = request.header("authorization") == Some(basic.as_str())
            && request.path().contains("scope=repository%3Aapp%3Apull")
            && request.path().contains("service=test");
        let with_identity = request.line.starts_with("POST /token ")
            && ["grant_type=refresh_token", "service=test", "refresh_token=the-identity"]
                .iter()
                .all(|part| request.body.contains(part));
        if self.access == Access::AnonymousToken || with_password || with_identity {
            let name = if with_identity { "access_token" } else { "token" };
            return ("200 OK", String::new(), format!("{{\"{name}\":\"the-token\"}}").into_bytes());
        }
        ("401 Unauthorized", String::new(), b"{\"details\":\"who are you?\"}".to_vec())
    }

    fn content(&self, path: &str) -> (&'static str, String, Vec<u8>) {
        let kind = |kind: &str| format!("Content-Type: application/{kind}\r\n");
        if path == "/v2/app/manifests/1" {
            return ("200 OK", kind("vnd.oci.image.index.v1+json"), self.image.index.clone());
        }
        let digest = path.rsplit("sha256:").next().unwrap_or_default();
        let found = self.image.blobs().into_iter().find(|blob| sha256(blob) == digest).map(<[u8]>::to_vec);
        let Some(mut body) = found else { return ("404 Not Found", kind("json"), b"{}".to_vec()) };
        if path.contains("/manifests/") {
            if self.fault == Fault::OtherManifest {
                body.push(b'\n');
            }
            return ("200 OK", kind("vnd.oci.image.manifest.v1+json"), body);
        }
        if let Some(other) = &self.blobs_at {
            return ("307 Temporary Redirect", format!("Location: {other}{path}\r\n"), Vec::new());
        }
        if body != self.image.config {
            match self.fault {
                Fault::LongLayer => body.push(0),
                Fault::ChangedLayer => *body.last_mut().unwrap() ^= 1,
                _ => {}
            }
        }
        ("200 OK", kind("octet-stream"), body)
    }
}
