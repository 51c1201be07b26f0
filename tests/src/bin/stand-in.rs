//! A stand-in of the tests, to be tried by hand: `stand-in google` prints the variables that send gcloud and `keyferry kms`
//! to it, and ends with its standard input.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "what to set is the answer")]

use std::io::{self, Read as _};
use std::process::ExitCode;

use e2e::google::Google;

fn main() -> ExitCode {
    let name = std::env::args().nth(1);
    match name.as_deref() {
        Some("google") => {
            let google = Google::start();
            for (name, value) in google.environment() {
                println!("export {name}={value}");
            }
            // Ends when nobody holds the other end any more; what it reads does not matter.
            let _read = io::stdin().read_to_end(&mut Vec::new());
            for line in google.inventory() {
                println!("{line}");
            }
            ExitCode::SUCCESS
        }
        other => {
            eprintln!("error: there is no stand-in {}, expected google", other.unwrap_or("without a name"));
            ExitCode::from(2)
        }
    }
}
