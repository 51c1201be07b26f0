//! A stand-in for Compute Engine and Cloud Storage: it keeps state, refuses what Google's discovery documents refuse,
//! and fails on demand.
//!
//! Left out: permissions, quotas, the import of an image, and billing.

mod schema;
mod server;
mod state;
mod storage;

use std::net::SocketAddr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::Value;
use tokio::sync::oneshot;

use schema::Schemas;
use state::State;

/// A call the stand-in received.
#[derive(Clone, Debug)]
pub struct Call {
    /// Method and path, `POST /compute/v1/projects/p/global/images`.
    pub line: String,
    /// Query, without its `requestId`.
    pub query: Vec<(String, String)>,
    /// JSON body.
    pub body: Option<Value>,
}

/// How a call fails.
#[derive(Clone, Debug)]
pub enum Fault {
    /// It is refused with this status, reason and message; nothing happens.
    Refused(u16, &'static str, &'static str),
    /// The connection is closed without an answer; nothing happens.
    Unanswered,
    /// It happens, and the connection is closed without an answer.
    AnswerLost,
    /// Nothing happens, and no answer ever comes.
    Hangs,
    /// It happens, and no answer ever comes.
    HangsAfter,
    /// It is accepted, and its operation fails with this code and message. Of a call without an operation: nothing.
    OperationFails(&'static str, &'static str),
}

/// The stand-in, on a port of its own. It ends when dropped.
pub struct Google {
    address: SocketAddr,
    shared: Arc<Shared>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    compute: Schemas,
    storage: Schemas,
    inner: Mutex<Inner>,
    /// Told when a call begins to hang.
    hung: Condvar,
}

#[derive(Default)]
struct Inner {
    state: State,
    calls: Vec<Call>,
    /// Faults by the number of the call they hit, counted from 0.
    faults: Vec<(usize, Fault)>,
    /// Calls that hang.
    hanging: usize,
}

/// Waits for calls that hang.
#[derive(Clone)]
pub struct Hangs(Arc<Shared>);

impl Hangs {
    /// Whether a call hangs within `deadline`.
    #[must_use]
    pub fn wait(&self, deadline: Duration) -> bool {
        let inner = self.0.inner();
        let waited = self.0.hung.wait_timeout_while(inner, deadline, |inner| inner.hanging == 0);
        !waited.expect("no holder of this lock panics").1.timed_out()
    }
}

impl Shared {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no holder of this lock panics")
    }
}

impl Google {
    /// Starts it with an empty project of any name.
    ///
    /// # Panics
    /// When it cannot listen.
    #[must_use]
    pub fn start() -> Self {
        let compute = Schemas::read(include_str!("../../google/compute-v1.json"));
        let storage = Schemas::read(include_str!("../../google/storage-v1.json"));
        let shared = Arc::new(Shared { compute, storage, inner: Mutex::default(), hung: Condvar::new() });
        let (stop, stopped) = oneshot::channel();
        let (address, thread) = server::start(Arc::clone(&shared), stopped);
        shared.inner().state.address = format!("http://{address}/compute/v1/");
        Self { address, shared, stop: Some(stop), thread: Some(thread) }
    }

    /// The variables by which gcloud and our programs are sent here.
    #[must_use]
    pub fn environment(&self) -> [(&'static str, String); 3] {
        let at = |path| format!("http://{}/{path}", self.address);
        [
            ("CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE", at("compute/v1/")),
            ("CLOUDSDK_API_ENDPOINT_OVERRIDES_STORAGE", at("storage/v1/")),
            ("CLOUDSDK_AUTH_ACCESS_TOKEN", server::TOKEN.to_owned()),
        ]
    }

    /// Every call so far, in order.
    #[must_use]
    pub fn calls(&self) -> Vec<Call> {
        self.shared.inner().calls.clone()
    }

    /// Forgets the calls so far; the next one has number 0.
    pub fn forget_calls(&self) {
        self.shared.inner().calls.clear();
    }

    /// Lets call number `at` fail, counted from 0 since the start or [`Self::forget_calls`].
    pub fn fail(&self, at: usize, fault: Fault) {
        self.shared.inner().faults.push((at, fault));
    }

    /// Something to wait for a hanging call with, on any thread.
    #[must_use]
    pub fn hangs(&self) -> Hangs {
        Hangs(Arc::clone(&self.shared))
    }

    /// Forgets the calls that hang; their callers are gone.
    pub fn forget_hangs(&self) {
        self.shared.inner().hanging = 0;
    }

    /// What exists, one line each: `instance us-central1-a/kms`, `image x`, `object bucket/name`, ..
    #[must_use]
    pub fn inventory(&self) -> Vec<String> {
        self.shared.inner().state.inventory()
    }

    /// A resource as the API shows it, by its line of the inventory.
    #[must_use]
    pub fn resource(&self, line: &str) -> Option<Value> {
        self.shared.inner().state.resource(line)
    }

    /// The bytes of an object.
    #[must_use]
    pub fn object(&self, bucket: &str, name: &str) -> Option<Vec<u8>> {
        self.shared.inner().state.object(bucket, name)
    }

    /// The archive an image was made from, the latest of its name.
    #[must_use]
    pub fn archive(&self, image: &str) -> Option<Vec<u8>> {
        self.shared.inner().state.archive(image)
    }

    /// Appends to the output of an instance's serial port. The server keeps the last MiB.
    pub fn print_on_console(&self, instance: &str, text: &str) {
        self.shared.inner().state.print(instance, text);
    }

    /// What new instances print on their serial port as they start.
    pub fn print_at_boot(&self, text: &str) {
        text.clone_into(&mut self.shared.inner().state.boot_text);
    }

    /// The external address new instances get.
    pub fn set_external_address(&self, address: &str) {
        address.clone_into(&mut self.shared.inner().state.external_address);
    }
}

impl Drop for Google {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // Fails only when the server has ended already.
            let _ended = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}
