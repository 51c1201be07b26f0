//! A stand-in for a dstack-vmm: it keeps machines, refuses what a VMM refuses, and fails on demand.
//!
//! Left out: guests. What a guest would answer, a test lets a program of this project answer at the published port.

mod state;

use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

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
    /// Nothing happens, and no answer ever comes.
    Hangs,
    /// It happens, and no answer ever comes.
    HangsAfter,
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
    shared: Arc<Shared>,
}

struct Shared {
    inner: Mutex<Inner>,
    /// Told when a call begins to hang.
    hung: Condvar,
}

impl Shared {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no holder of this lock panics")
    }
}

struct Inner {
    state: State,
    token: Option<String>,
    calls: Vec<Call>,
    /// Faults by the number of the call they hit, counted from 0.
    faults: Vec<(usize, Fault)>,
    /// Faults by the method whose next call they hit.
    faults_of: Vec<(&'static str, Fault)>,
    /// Calls that hang.
    hanging: usize,
}

impl Vmm {
    /// Starts one with the guest image `dstack-0.6.0` and a development one, and ports of 1 to 32767. With a token, it asks
    /// for it.
    ///
    /// # Panics
    /// When it cannot listen.
    #[must_use]
    pub fn start(token: Option<&str>) -> Self {
        let token = token.map(str::to_owned);
        let inner = Inner {
            state: State::default(),
            token,
            calls: Vec::new(),
            faults: Vec::new(),
            faults_of: Vec::new(),
            hanging: 0,
        };
        let shared = Arc::new(Shared { inner: Mutex::new(inner), hung: Condvar::new() });
        let answering = Arc::clone(&shared);
        Self { server: Server::start(move |question| answer(&answering, question)), shared }
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

    /// The ports that the guest of a machine has, `tcp:ADDRESS:HOST:GUEST`: those it was started with.
    #[must_use]
    pub fn open_ports(&self, name: &str) -> Vec<String> {
        self.inner().state.open_ports(name)
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

    /// Lets the next call of a method fail.
    pub fn fail_method(&self, method: &'static str, fault: Fault) {
        self.inner().faults_of.push((method, fault));
    }

    /// Whether a call hangs within `deadline`.
    ///
    /// # Panics
    /// When another thread has panicked.
    #[must_use]
    pub fn wait_for_hang(&self, deadline: Duration) -> bool {
        let inner = self.inner();
        let waited = self.shared.hung.wait_timeout_while(inner, deadline, |inner| inner.hanging == 0);
        !waited.expect("no holder of this lock panics").1.timed_out()
    }

    /// Forgets the calls that hang; their callers are gone.
    pub fn forget_hangs(&self) {
        self.inner().hanging = 0;
    }

    /// What guests print on their consoles as they start.
    pub fn print_at_boot(&self, text: &str) {
        text.clone_into(&mut self.inner().state.boot_text);
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
        self.shared.inner()
    }
}

fn answer(shared: &Shared, question: &Question) -> Option<Answer> {
    let mut inner = shared.inner();
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
    let fault = match hit.map(|index| inner.faults.remove(index).1) {
        Some(fault) => Some(fault),
        None => {
            let hit = inner.faults_of.iter().position(|(name, _)| *name == method);
            hit.map(|index| inner.faults_of.remove(index).1)
        }
    };
    if inner.token.as_ref().is_some_and(|token| question.header("authorization") != format!("Bearer {token}"))
    {
        return refuse(401, "unauthorized");
    }
    match &fault {
        Some(Fault::Refused(words)) => return refuse(400, words),
        Some(Fault::Unanswered) => return None,
        Some(Fault::Hangs) => return Some(hang(shared, &mut inner)),
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
        Some(Fault::HangsAfter) => Some(hang(shared, &mut inner)),
        _ => Some(answered),
    }
}

/// Says that a call hangs, and lets it.
fn hang(shared: &Shared, inner: &mut Inner) -> Answer {
    inner.hanging += 1;
    shared.hung.notify_all();
    Answer::never()
}
