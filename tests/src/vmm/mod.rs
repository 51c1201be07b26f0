//! A stand-in for a dstack-vmm: it keeps machines, refuses what a VMM refuses, and fails on demand.
//!
//! Left out: guests. What a guest would answer, a test lets a program of this project answer at the published port.

mod state;

use std::sync::{Arc, Mutex, MutexGuard};

use serde_json::{Value, json};

use crate::serve::{Answer, Question, Server};
use state::State;

/// How a call fails.
#[derive(Clone, Debug)]
pub enum Fault {
    /// It is refused with these words; nothing happens.
    Refused(&'static str),
    /// The connection is closed without an answer; nothing happens.
    Unanswered,
    /// It happens, and the connection is closed without an answer.
    AnswerLost,
}

/// A call the stand-in received.
#[derive(Clone, Debug)]
pub struct Call {
    /// The method, `CreateVm`, or `logs`.
    pub method: String,
    /// Its body.
    pub body: Value,
}

/// The stand-in, on a port of its own. It ends when dropped.
pub struct Vmm {
    server: Server,
    inner: Arc<Mutex<Inner>>,
}

struct Inner {
    state: State,
    token: Option<String>,
    calls: Vec<Call>,
    /// Faults by the number of the call they hit, counted from 0.
    faults: Vec<(usize, Fault)>,
}

impl Vmm {
    /// Starts one with the guest image `dstack-0.6.0` and a development one, and ports of 1 to 20000. With a token, it asks
    /// for it.
    ///
    /// # Panics
    /// When it cannot listen.
    #[must_use]
    pub fn start(token: Option<&str>) -> Self {
        let token = token.map(str::to_owned);
        let inner = Inner { state: State::default(), token, calls: Vec::new(), faults: Vec::new() };
        let inner = Arc::new(Mutex::new(inner));
        let shared = Arc::clone(&inner);
        Self { server: Server::start(move |question| answer(&shared, question)), inner }
    }

    /// Its address.
    #[must_use]
    pub fn url(&self) -> String {
        self.server.url()
    }

    /// The names of its machines, each with its status.
    #[must_use]
    pub fn machines(&self) -> Vec<String> {
        self.inner().state.machines()
    }

    /// A machine as it was asked for, by its name.
    #[must_use]
    pub fn configuration(&self, name: &str) -> Option<Value> {
        self.inner().state.configuration(name)
    }

    /// Every call so far, in order.
    #[must_use]
    pub fn calls(&self) -> Vec<Call> {
        self.inner().calls.clone()
    }

    /// Forgets the calls so far; the next one has number 0.
    pub fn forget_calls(&self) {
        self.inner().calls.clear();
    }

    /// Lets call number `at` fail.
    pub fn fail(&self, at: usize, fault: Fault) {
        self.inner().faults.push((at, fault));
    }

    /// Appends to the console of a machine.
    pub fn print_on_console(&self, name: &str, text: &str) {
        self.inner().state.print(name, text);
    }

    /// Puts a machine there that another made.
    ///
    /// # Panics
    /// When it would be refused.
    pub fn add_machine(&self, configuration: &Value) {
        self.inner().state.call("CreateVm", configuration).expect("the machine of a test can be made");
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no holder of this lock panics")
    }
}

fn answer(shared: &Mutex<Inner>, question: &Question) -> Option<Answer> {
    let mut inner = shared.lock().expect("no holder of this lock panics");
    let refuse = |status, words: &str| Some(Answer::json(status, &json!({ "error": words })));
    let method = match question.line.split_once(' ') {
        Some(("POST", path)) => path.strip_prefix("/prpc/"),
        Some(("GET", "/logs")) => Some("logs"),
        _ => None,
    };
    let Some(method) = method else { return refuse(404, "not found") };
    let body: Value = serde_json::from_slice(&question.body).unwrap_or(Value::Null);
    let number = inner.calls.len();
    inner.calls.push(Call { method: method.to_owned(), body: body.clone() });
    let hit = inner.faults.iter().position(|(at, _)| *at == number);
    let fault = hit.map(|index| inner.faults.remove(index).1);
    if inner.token.as_ref().is_some_and(|token| question.header("authorization") != format!("Bearer {token}"))
    {
        return refuse(401, "unauthorized");
    }
    match &fault {
        Some(Fault::Refused(words)) => return refuse(400, words),
        Some(Fault::Unanswered) => return None,
        _ => {}
    }
    let answered = match method {
        "logs" => {
            let lines = question.parameter("lines").and_then(|it| it.parse().ok()).unwrap_or(10_000);
            match inner.state.log(question.parameter("id").unwrap_or_default(), lines) {
                Some(log) => Answer::bytes(200, log.into_bytes()),
                None => return refuse(404, "VM not found"),
            }
        }
        method => {
            // Without it the answer would be protobuf.
            if question.parameter("json").is_none() {
                return refuse(400, "this stand-in speaks JSON only");
            }
            match inner.state.call(method, &body) {
                Ok(value) => Answer::json(200, &value),
                Err(words) => return refuse(400, &words),
            }
        }
    };
    match fault {
        Some(Fault::AnswerLost) => None,
        _ => Some(answered),
    }
}
