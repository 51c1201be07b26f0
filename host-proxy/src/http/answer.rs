//! The answers to a request head. A peer gets a status and one stable word; the whole reason is in the log.

/// Opens the tunnel.
pub const ESTABLISHED: &[u8] = b"HTTP/1.1 200 Connection established\r\n\r\n";

/// A refusal: the status, and `reason` as the body and as a header, so that it survives clients that drop bodies.
pub fn refusal(status: u16, reason: &str) -> Vec<u8> {
    let phrase = phrase(status);
    let body = format!("host-proxy: {reason}\n");
    let len = body.len();
    let extra = match status {
        405 => "Allow: CONNECT\r\n",
        503 => "Retry-After: 1\r\n",
        _ => "",
    };
    format!(
        "HTTP/1.1 {status} {phrase}\r\nX-Host-Proxy: {reason}\r\n{extra}Content-Type: text/plain\r\n\
         Content-Length: {len}\r\nConnection: close\r\n\r\n{body}"
    )
    .into_bytes()
}

/// A complete answer with a body, for the admin socket.
pub fn document(status: u16, content_type: &str, body: &str) -> Vec<u8> {
    let phrase = phrase(status);
    let len = body.len();
    format!(
        "HTTP/1.1 {status} {phrase}\r\nContent-Type: {content_type}\r\nContent-Length: {len}\r\n\
         Connection: close\r\n\r\n{body}"
    )
    .into_bytes()
}

fn phrase(status: u16) -> &'static str {
    match status {
        200 => "OK",
        400 => "Bad Request",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        431 => "Request Header Fields Too Large",
        502 => "Bad Gateway",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        505 => "HTTP Version Not Supported",
        _ => "Error",
    }
}
