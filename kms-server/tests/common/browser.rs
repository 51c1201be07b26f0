//! Chromium, driven through its WebDriver.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::Request;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};
use transport::Endpoint;

/// For the start of the browser, and for everything that a page is waited for.
const PATIENCE: Duration = Duration::from_secs(90);

/// A browser with an empty profile and one page. Ended with its driver when dropped.
pub(crate) struct Browser {
    _driver: Group,
    _profile: tempfile::TempDir,
    endpoint: Endpoint,
    session: String,
}

/// A process and all that it started, killed when dropped.
struct Group(Child);

impl Drop for Group {
    fn drop(&mut self) {
        // The driver was started as the first of a group of its own; without an id it is gone already.
        if let Some(leader) =
            self.0.id().and_then(|id| rustix::process::Pid::from_raw(id.try_into().unwrap()))
        {
            let _gone = rustix::process::kill_process_group(leader, rustix::process::Signal::KILL);
        }
    }
}

impl Browser {
    /// Starts one; `None`, saying why, on a machine that has none.
    #[expect(clippy::print_stdout, reason = "a test says that it is skipped")]
    pub(crate) async fn start() -> Option<Self> {
        let (Some(chromium), Some(driver)) = (find("chromium"), find("chromedriver")) else {
            println!(
                "skipped: chromium and chromedriver are not installed (Debian: chromium, chromium-driver)"
            );
            return None;
        };
        let profile = tempfile::tempdir().unwrap();
        let mut child = Command::new(driver)
            .arg("--port=0")
            .env("HOME", profile.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let port = async {
            loop {
                let line = lines.next_line().await.unwrap().expect("the driver announces its port");
                if let Some((_, port)) = line.split_once("started successfully on port ") {
                    return port.trim_end_matches('.').to_owned();
                }
            }
        };
        let port = tokio::time::timeout(PATIENCE, port).await.expect("the driver starts in time");
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        let endpoint = format!("tcp:127.0.0.1:{port}").parse().unwrap();
        let mut browser = Self { _driver: Group(child), _profile: profile, endpoint, session: String::new() };
        browser.open_session(&chromium).await;
        Some(browser)
    }

    async fn open_session(&mut self, chromium: &Path) {
        let profile = format!("--user-data-dir={}", self._profile.path().join("profile").display());
        // Everything that would look for a network, a graphics card or another user's settings is off.
        let arguments = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--window-size=1280,1000",
            &profile,
        ];
        let options = json!({ "binary": chromium, "args": arguments });
        let wanted = json!({ "capabilities": { "alwaysMatch": { "goog:chromeOptions": options } } });
        let session = self.send("POST", "/session", &wanted).await;
        self.session = format!("/session/{}", session["sessionId"].as_str().unwrap());
        let patience = u64::try_from(PATIENCE.as_millis()).unwrap();
        let limits = json!({ "script": patience, "pageLoad": patience });
        self.send("POST", &format!("{}/timeouts", self.session), &limits).await;
    }

    async fn command(&self, path: &str, body: Value) -> Value {
        self.send("POST", &format!("{}/{path}", self.session), &body).await
    }

    async fn send(&self, verb: &str, path: &str, body: &Value) -> Value {
        let exchange = async {
            let stream = self.endpoint.connect(PATIENCE).await.unwrap();
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
            let connection = tokio::spawn(connection);
            let request = Request::builder()
                .method(verb)
                .uri(path)
                .header("host", "localhost")
                .header("content-type", "application/json")
                .body(Full::new(Bytes::from(body.to_string())))
                .unwrap();
            let response = sender.send_request(request).await.unwrap();
            let status = response.status();
            let text = response.into_body().collect().await.unwrap().to_bytes();
            connection.abort();
            let mut answer: Value = serde_json::from_slice(&text).unwrap();
            assert!(status.is_success(), "{path} {body}: {answer}");
            answer["value"].take()
        };
        tokio::time::timeout(PATIENCE * 2, exchange).await.expect("the driver answers")
    }

    /// Goes to a page.
    pub(crate) async fn open(&self, url: &str) {
        self.command("url", json!({ "url": url })).await;
    }

    /// The value of a JavaScript expression on the page.
    pub(crate) async fn value(&self, expression: &str) -> Value {
        self.command("execute/sync", json!({ "script": format!("return {expression}"), "args": [] })).await
    }

    /// Waits, in the page, until an expression is true.
    pub(crate) async fn until(&self, condition: &str) {
        let script = format!(
            "const done = arguments[0]; const look = () => ({condition}) ? done(true) : setTimeout(look, 20); look();"
        );
        let seen = self.command("execute/async", json!({ "script": script, "args": [] })).await;
        assert_eq!(seen, true, "{condition}");
    }

    /// Waits until an element is shown, and gives its text.
    pub(crate) async fn shown(&self, selector: &str) -> String {
        self.until(&format!("document.querySelector('{selector}')?.checkVisibility()")).await;
        self.text(selector).await
    }

    /// What a reader sees of an element.
    pub(crate) async fn text(&self, selector: &str) -> String {
        let text = self.value(&format!("document.querySelector('{selector}').innerText")).await;
        text.as_str().unwrap().to_owned()
    }

    /// Clicks, as a mouse does: an element that is hidden or covered cannot be.
    pub(crate) async fn click(&self, selector: &str) {
        let element = self.element(selector).await;
        self.command(&format!("element/{element}/click"), json!({})).await;
    }

    /// Types a text into an empty field.
    pub(crate) async fn fill(&self, selector: &str, text: &str) {
        let element = self.element(selector).await;
        self.command(&format!("element/{element}/clear"), json!({})).await;
        self.command(&format!("element/{element}/value"), json!({ "text": text })).await;
    }

    async fn element(&self, selector: &str) -> String {
        let found = self.command("element", json!({ "using": "css selector", "value": selector })).await;
        let id = found.as_object().unwrap().values().next().unwrap();
        id.as_str().unwrap().to_owned()
    }
}

fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join(program)).find(|path| path.is_file())
}
