//! A file behind HTTP.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, TcpListener};

/// Answers every request on a port of its own with these bytes, for as long as the test runs. Gives `http://HOST:PORT`.
///
/// # Panics
/// When no port is free.
#[must_use]
pub fn serve_file(bytes: Vec<u8>) -> String {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port is free");
    let address = listener.local_addr().expect("a listener has an address");
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let Ok(clone) = stream.try_clone() else { continue };
            let (mut reader, mut line) = (BufReader::new(clone), String::new());
            while reader.read_line(&mut line).is_ok_and(|read| read > 2) {
                line.clear();
            }
            let length = bytes.len();
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n");
            // A client that does not like what it sees hangs up.
            let _gone = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&bytes));
        }
    });
    format!("http://{address}")
}
