//! The server name in a TLS ClientHello (RFC 8446 §4.1.2, RFC 6066 §3), read from the bytes received so far.
//!
//! Only what is needed to find the name; the handshake itself stays between the enclave and its server.

use crate::policy::target::HostName;

/// Largest ClientHello looked at; post-quantum key shares make them about 2 KiB, resumption tickets more.
const MAX_HELLO: usize = 32 << 10;
/// Record content type of handshake messages.
const HANDSHAKE: u8 = 22;
/// Largest plaintext record (RFC 8446 §5.1).
const MAX_RECORD: usize = 1 << 14;
/// Handshake message type.
const CLIENT_HELLO: u8 = 1;
/// Extension number of `server_name`.
const SERVER_NAME: u16 = 0;
/// Name type `host_name`.
const HOST_NAME: u8 = 0;

/// What the bytes so far say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hello {
    /// The ClientHello is not complete.
    Incomplete,
    /// It names a server.
    Named(HostName),
    /// It names none.
    Unnamed,
}

/// Why bytes are not a ClientHello.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TlsError {
    /// Not a TLS handshake record.
    #[error("not a TLS handshake record")]
    NotHandshake,
    /// The first message is another one.
    #[error("the first handshake message is not a ClientHello")]
    NotClientHello,
    /// Larger than anybody needs.
    #[error("the ClientHello is larger than {MAX_HELLO} bytes")]
    TooLarge,
    /// A length inside does not fit.
    #[error("the ClientHello is malformed")]
    Malformed,
    /// The server name is no host name, or there are several.
    #[error("the server name is not one host name")]
    ServerName,
}

/// Finds the server name.
///
/// # Errors
/// [`TlsError`], as soon as the bytes cannot become a ClientHello.
pub fn server_name(bytes: &[u8]) -> Result<Hello, TlsError> {
    let message = gather(bytes)?;
    let Some((&kind, rest)) = message.split_first() else { return Ok(Hello::Incomplete) };
    if kind != CLIENT_HELLO {
        return Err(TlsError::NotClientHello);
    }
    let Some((&[a, b, c], rest)) = rest.split_first_chunk() else { return Ok(Hello::Incomplete) };
    let len = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
    if len > MAX_HELLO {
        return Err(TlsError::TooLarge);
    }
    match rest.get(..len) {
        Some(hello) => read_hello(hello),
        None => Ok(Hello::Incomplete),
    }
}

/// Joins the payloads of the complete and the last, incomplete record.
fn gather(mut bytes: &[u8]) -> Result<Vec<u8>, TlsError> {
    let mut message = Vec::new();
    while let Some(&kind) = bytes.first() {
        if kind != HANDSHAKE || bytes.get(1).is_some_and(|major| *major != 3) {
            // Bytes behind a whole ClientHello are not looked at.
            return if is_whole(&message) { Ok(message) } else { Err(TlsError::NotHandshake) };
        }
        let Some((&[_, _, _, high, low], rest)) = bytes.split_first_chunk() else { break };
        let len = usize::from(high) << 8 | usize::from(low);
        if len == 0 || len > MAX_RECORD {
            return Err(TlsError::NotHandshake);
        }
        let (payload, rest) = rest.split_at(len.min(rest.len()));
        message.extend_from_slice(payload);
        bytes = rest;
        if message.len() > MAX_HELLO + MAX_RECORD {
            return Err(TlsError::TooLarge);
        }
    }
    Ok(message)
}

fn is_whole(message: &[u8]) -> bool {
    match message {
        [_, a, b, c, rest @ ..] => {
            rest.len() >= (usize::from(*a) << 16 | usize::from(*b) << 8 | usize::from(*c))
        }
        _ => false,
    }
}

fn read_hello(hello: &[u8]) -> Result<Hello, TlsError> {
    let mut reader = Reader(hello);
    reader.take(2 + 32)?; // version and random
    reader.take_prefixed(1)?; // session id
    reader.take_prefixed(2)?; // cipher suites
    reader.take_prefixed(1)?; // compression methods
    if reader.0.is_empty() {
        return Ok(Hello::Unnamed);
    }
    let mut extensions = Reader(reader.take_prefixed(2)?);
    if !reader.0.is_empty() {
        return Err(TlsError::Malformed);
    }
    let mut found = Hello::Unnamed;
    while !extensions.0.is_empty() {
        let kind = extensions.take_number(2)?;
        let body = extensions.take_prefixed(2)?;
        if kind != usize::from(SERVER_NAME) {
            continue;
        }
        if found != Hello::Unnamed {
            return Err(TlsError::ServerName);
        }
        found = Hello::Named(read_names(body)?);
    }
    Ok(found)
}

fn read_names(body: &[u8]) -> Result<HostName, TlsError> {
    let mut outer = Reader(body);
    let mut list = Reader(outer.take_prefixed(2)?);
    let kind = list.take(1)?;
    let name = list.take_prefixed(2)?;
    if !outer.0.is_empty() || !list.0.is_empty() || kind != [HOST_NAME] {
        return Err(TlsError::ServerName);
    }
    std::str::from_utf8(name).ok().and_then(|name| name.parse().ok()).ok_or(TlsError::ServerName)
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], TlsError> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or(TlsError::Malformed)?;
        self.0 = rest;
        Ok(taken)
    }

    /// A big-endian number of `width` bytes.
    fn take_number(&mut self, width: usize) -> Result<usize, TlsError> {
        Ok(self.take(width)?.iter().fold(0, |number, byte| number << 8 | usize::from(*byte)))
    }

    /// A field behind its length of `width` bytes.
    fn take_prefixed(&mut self, width: usize) -> Result<&'a [u8], TlsError> {
        let len = self.take_number(width)?;
        self.take(len)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn prefixed(width: usize, body: &[u8]) -> Vec<u8> {
        let len = body.len().to_be_bytes();
        [&len[len.len() - width..], body].concat()
    }

    fn extension(kind: u16, body: &[u8]) -> Vec<u8> {
        [&kind.to_be_bytes()[..], &prefixed(2, body)].concat()
    }

    fn names(name: &str) -> Vec<u8> {
        extension(SERVER_NAME, &prefixed(2, &[&[HOST_NAME][..], &prefixed(2, name.as_bytes())].concat()))
    }

    fn message(extensions: &[u8]) -> Vec<u8> {
        let body = [
            &[3, 3][..],
            &[7; 32],
            &prefixed(1, &[1; 32]),
            &prefixed(2, &[0x13, 0x01]),
            &prefixed(1, &[0]),
            &prefixed(2, extensions),
        ]
        .concat();
        [&[CLIENT_HELLO][..], &prefixed(3, &body)].concat()
    }

    fn record(payload: &[u8]) -> Vec<u8> {
        [&[HANDSHAKE, 3, 1][..], &prefixed(2, payload)].concat()
    }

    fn named(name: &str) -> Hello {
        Hello::Named(name.parse().unwrap())
    }

    #[test]
    fn the_name_is_found_in_one_record_and_in_many() {
        let extensions = [extension(0xfe0d, b"grease"), names("kms.example.com")].concat();
        let message = message(&extensions);
        assert_eq!(server_name(&record(&message)), Ok(named("kms.example.com")));
        let split: Vec<u8> = message.chunks(7).flat_map(record).collect();
        assert_eq!(server_name(&split), Ok(named("kms.example.com")));
        let with_data = [record(&message), b"\x17\x03\x03\x00\x05early".to_vec()].concat();
        assert_eq!(server_name(&with_data), Ok(named("kms.example.com")));
    }

    #[test]
    fn every_truncation_waits_for_more() {
        let whole = record(&message(&names("kms.example.com")));
        for len in 0..whole.len() {
            assert_eq!(server_name(&whole[..len]), Ok(Hello::Incomplete), "a prefix of {len} bytes");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let twice = [names("a.example"), names("b.example")].concat();
        let mut cut = message(&names("a.example"));
        let end = cut.len() - 1;
        cut[end - 8] ^= 0x40; // inside the name's length
        for (bytes, error) in [
            (b"GET / HTTP/1.1\r\n\r\n".to_vec(), TlsError::NotHandshake),
            (vec![HANDSHAKE, 2, 0], TlsError::NotHandshake),
            (vec![HANDSHAKE, 3, 1, 0, 0], TlsError::NotHandshake),
            (record(&[2, 0, 0, 0]), TlsError::NotClientHello),
            (record(&[CLIENT_HELLO, 1, 0, 0]), TlsError::TooLarge),
            (record(&[CLIENT_HELLO, 0, 0, 3, 1, 2, 3]), TlsError::Malformed),
            (record(&message(&twice)), TlsError::ServerName),
            (record(&message(&names("127.0.0.1"))), TlsError::ServerName),
            (record(&message(&names("a\0.example"))), TlsError::ServerName),
        ] {
            assert_eq!(server_name(&bytes), Err(error), "{bytes:02x?}");
        }
        assert_eq!(server_name(&record(&message(&[]))), Ok(Hello::Unnamed));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let record = record(&bytes);
            drop((server_name(&bytes), server_name(&record)));
        }
    }
}
