//! Stands for the program of this name that the AWS CLI starts: carries bytes between its standard streams and the SSH server
//! that `SESSION_LEADS_TO` names, for a session that the CLI was given. While it runs it holds `SESSION_LOCK`.

#![expect(clippy::print_stdout, reason = "its version is the answer")]

use std::error::Error;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd as _;
use std::thread;

use serde_json::Value;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments == ["--version"] {
        println!("1.2.707.0");
        return Ok(());
    }
    let [response, _region, operation, _profile, parameters, _endpoint] = &arguments[..] else {
        return Err("expected six arguments".into());
    };
    // Newer ones are given the name of a variable.
    let response: Value = serde_json::from_str(&std::env::var(response)?)?;
    let parameters: Value = serde_json::from_str(parameters)?;
    let target = parameters["Target"].as_str().ok_or("a session has a target")?;
    if operation != "StartSession" || response["TokenValue"] != format!("token of {target}") {
        return Err(format!("no session with {target}").into());
    }
    let lock = File::create(std::env::var("SESSION_LOCK")?)?;
    lock.lock_shared()?;
    let from_server = TcpStream::connect(std::env::var("SESSION_LEADS_TO")?)?;
    let to_server = from_server.try_clone()?;
    // Without the buffers of the standard streams, which wait for more.
    let [input, output] = [io::stdin().as_fd(), io::stdout().as_fd()].map(|it| it.try_clone_to_owned());
    let (input, output) = (File::from(input?), File::from(output?));
    thread::spawn(move || {
        // However its input ends, the server hears of it; the answers tell the rest.
        let _ended = pump(input, &to_server);
        let _ended = to_server.shutdown(Shutdown::Write);
    });
    Ok(pump(from_server, output)?)
}

/// Passes bytes on as they come.
fn pump(mut from: impl Read, mut to: impl Write) -> io::Result<()> {
    let mut buffer = vec![0; 16 << 10];
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(()),
            length => to.write_all(&buffer[..length])?,
        }
    }
}
