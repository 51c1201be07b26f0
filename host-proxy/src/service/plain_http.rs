//! Plain HTTP in absolute form, carried when the configuration says so: one request per connection, rewritten to
//! origin form. What follows the head goes to the same target and nowhere else, so it needs no reading.

use crate::policy::target::Target;

/// Headers between a client and its proxy (RFC 9110 §7.6.1); `Host` is written anew.
const DROPPED: [&[u8]; 6] =
    [b"host", b"connection", b"proxy-connection", b"proxy-authorization", b"keep-alive", b"upgrade"];

/// The bytes to send for a request of which `bytes[..head_len]` is the head.
pub(super) fn rewrite(bytes: &[u8], head_len: usize, target: &Target) -> Option<Vec<u8>> {
    let (head, body) = bytes.split_at_checked(head_len)?;
    let mut lines = head.split(|b| *b == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    let mut words = lines.next()?.split(|b| *b == b' ');
    let (method, url, version) = (words.next()?, words.next()?, words.next()?);
    let after = url.strip_prefix(b"http://")?;
    let path = after.iter().position(|b| matches!(b, b'/' | b'?')).map_or(&b""[..], |at| &after[at..]);
    let slash: &[u8] = if path.starts_with(b"/") { b"" } else { b"/" };
    let host = target.to_string();
    let mut out =
        [method, b" ", slash, path, b" ", version, b"\r\nHost: ", host.as_bytes(), b"\r\n"].concat();
    for line in lines.take_while(|line| !line.is_empty()) {
        let name = line.split(|b| *b == b':').next()?;
        if !DROPPED.iter().any(|dropped| name.eq_ignore_ascii_case(dropped)) {
            out.extend_from_slice(line);
            out.extend_from_slice(b"\r\n");
        }
    }
    out.extend_from_slice(b"Connection: close\r\n\r\n");
    out.extend_from_slice(body);
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_rewritten_to_origin_form() {
        let head = "POST http://h.example/a?b HTTP/1.1\r\nHost: h.example\r\nProxy-Authorization: x\r\n\
                    Content-Length: 2\r\nConnection: keep-alive\r\n\r\n";
        let bytes = format!("{head}ab");
        let out = rewrite(bytes.as_bytes(), head.len(), &"h.example:80".parse().unwrap()).unwrap();
        let expected =
            "POST /a?b HTTP/1.1\r\nHost: h.example:80\r\nContent-Length: 2\r\nConnection: close\r\n\r\nab";
        assert_eq!(String::from_utf8(out).unwrap(), expected);
        let out =
            rewrite(b"GET http://h.example HTTP/1.1\r\n\r\n", 33, &"h.example:80".parse().unwrap()).unwrap();
        assert!(out.starts_with(b"GET / HTTP/1.1\r\n"));
    }
}
