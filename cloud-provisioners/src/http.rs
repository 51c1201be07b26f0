//! Reading answers that others wrote: bounded in size and time.

use reqwest::Response;
use tokio::time::timeout;

use crate::{Deadline, Error};

/// The body of an answer, at most `longest` bytes of it. `call` is what was asked, for messages. Cancel safe.
///
/// # Errors
///
/// [`Error::Http`] when it is longer, late or cut.
pub(crate) async fn body(
    call: &str,
    mut answer: Response,
    longest: usize,
    deadline: Deadline,
) -> Result<Vec<u8>, Error> {
    let failed = |problem: String| Error::Http { call: call.to_owned(), problem };
    let mut body = Vec::new();
    loop {
        let chunk = timeout(deadline.left(), answer.chunk()).await;
        let chunk = chunk.map_err(|_| failed(format!("no end after {} s", deadline.allowed().as_secs())))?;
        let Some(chunk) = chunk.map_err(|error| failed(error.without_url().to_string()))? else {
            return Ok(body);
        };
        if body.len() + chunk.len() > longest {
            return Err(failed(format!("the answer is longer than {longest} bytes")));
        }
        body.extend_from_slice(&chunk);
    }
}
