//! The page that a KMS is set up with: in a real browser from the first look to finished keys, and without one.

#![allow(clippy::unwrap_used, reason = "a test stops where something is wrong")]

mod common;

use common::browser::Browser;
use common::machine::{Machine, finished, post};
use common::{ask_plain, ask_plain_with, get, image};

#[tokio::test]
async fn an_operator_bootstraps_in_a_browser() {
    let Some(browser) = Browser::start().await else { return };
    let settings = "core.site_name = \"Frankfurt <2>\"\ncore.onboard.token = true\n";
    let machine = Machine::start(None, settings).await;
    let opened = machine.open().await;
    let onboarding = opened.onboard().await.unwrap();
    browser.open(&format!("http://{}/", onboarding.address())).await;

    // Locked: nothing is told but that.
    assert!(browser.shown("#unlock").await.contains("Setup token"));
    assert_eq!(browser.text("#title").await, "Set up this KMS");
    browser.fill("#token", "00112233445566778899aabbccddeeff").await;
    browser.click("#unlock-form button").await;
    let told = browser.shown("#alert").await;
    assert!(told.contains("not the token of this run"), "{told}");
    browser.fill("#token", onboarding.token().unwrap().reveal()).await;
    browser.click("#unlock-form button").await;

    // What an operator has to know and do.
    let facts = browser.shown("#info").await;
    let image = hex::encode(image());
    assert!(facts.contains("dstack-nitro-enclave") && facts.contains(&image), "{facts}");
    assert!(facts.contains("de7d1b721a1e0632b7cf04edf5032c8ecffa9f9a08492152b926f1a5a7e765d7"), "{facts}");
    assert_eq!(browser.text("#title").await, "Set up the KMS of Frankfurt <2>");
    assert_eq!(browser.value("document.getElementById('light').dataset.state").await, "good");
    let commands = browser.shown("#commands").await;
    for command in ["add-image", "add-kms", "add-device"] {
        assert!(commands.contains(&format!("keyferry chain {command} 0x")), "{commands}");
    }
    browser.click("#info .copy").await;
    browser.until("document.querySelector('#info .copy').textContent !== 'Copy'").await;

    // Mistakes, in words beside their fields; nothing is sent.
    for (typed, words) in [
        ("", "Enter the host name."),
        ("https://kms.example.com", "no https://"),
        ("kms_1.example.com", "letters, digits and hyphens"),
    ] {
        browser.fill("#bootstrap-domain", typed).await;
        browser.click("#bootstrap-form button").await;
        let told = browser.shown("#bootstrap-error").await;
        assert!(told.contains(words), "{typed}: {told}");
        assert_eq!(browser.value("document.activeElement.id").await, "bootstrap-domain");
    }
    browser.fill("#bootstrap-domain", "localhost").await;
    browser.click("#bootstrap-form button").await;
    let keys = browser.shown("#done").await;
    assert!(keys.contains("localhost"), "{keys}");
    assert_eq!(browser.value("document.activeElement.id").await, "done-h", "a reader hears of it");

    // The keys are there after another look as well.
    browser.open(&format!("http://{}/", onboarding.address())).await;
    browser.shown("#unlock").await;
    browser.fill("#token", onboarding.token().unwrap().reveal()).await;
    browser.click("#unlock-form button").await;
    let keys = browser.shown("#keys").await;
    browser.click("#finish").await;
    assert!(browser.shown("#over").await.contains("https://localhost:"));

    let server = finished(opened, onboarding).await;
    assert!(keys.contains(&hex::encode(server.k256_public_key())), "{keys}");
    let meta = common::ask_kms(&server, get("/prpc/GetMeta")).await.unwrap().json();
    assert!(keys.contains(meta["bootstrap_info"]["ca_pubkey"].as_str().unwrap()), "{keys}");
}

#[tokio::test]
async fn a_second_node_takes_over_the_keys_in_a_browser() {
    let Some(browser) = Browser::start().await else { return };
    let first = Machine::start(None, "").await;
    let source = first.bootstrapped().await;
    let machine = Machine::start(Some(&first), "").await;
    let opened = machine.open().await;
    let onboarding = opened.onboard().await.unwrap();
    browser.open(&format!("http://{}/", onboarding.address())).await;
    browser.shown("#info").await;
    browser.fill("#onboard-domain", "localhost").await;
    for (typed, words) in [
        ("", "Enter the URL"),
        ("kms.example.com", "begins with https://"),
        ("http://kms.example.com", "begins with https://"),
        ("https://user:pass@kms.example.com", "no user name"),
    ] {
        browser.fill("#source-url", typed).await;
        browser.click("#onboard-form button").await;
        let told = browser.shown("#source-error").await;
        assert!(told.contains(words), "{typed}: {told}");
    }
    // Nobody there: said in words, with what to do, and the form is back.
    browser.fill("#source-url", "https://localhost:1").await;
    browser.click("#onboard-form button").await;
    let told = browser.shown("#alert").await;
    assert!(told.contains("No keys were taken over") && told.contains("Failed to onboard"), "{told}");
    assert!(told.contains("Check the URL of the other KMS"), "{told}");

    browser.shown("#onboard-form").await;
    browser.fill("#source-url", &format!("https://localhost:{}/", source.address().port())).await;
    browser.click("#onboard-form button").await;
    let keys = browser.shown("#keys").await;
    assert!(keys.contains(&hex::encode(source.k256_public_key())), "{keys}");
    assert_eq!(browser.value("document.getElementById('alert').hidden").await, true);
    browser.click("#finish").await;
    browser.shown("#over").await;
    let server = finished(opened, onboarding).await;
    assert_eq!(server.k256_public_key(), source.k256_public_key());
}

#[tokio::test]
async fn refusals_and_silence_are_said_in_words() {
    let Some(browser) = Browser::start().await else { return };
    // An image that the authoriser does not know as a KMS.
    let machine = Machine::with_policy(None, &"77".repeat(32), "").await;
    let opened = machine.open().await;
    let onboarding = opened.onboard().await.unwrap();
    let url = format!("http://{}/", onboarding.address());
    browser.open(&url).await;
    browser.shown("#info").await;
    browser.fill("#bootstrap-domain", "localhost").await;
    browser.click("#bootstrap-form button").await;
    let told = browser.shown("#alert").await;
    assert!(told.contains("No keys were made") && told.contains("not allowed"), "{told}");
    assert!(told.contains("Register this machine"), "{told}");

    // A guest agent that talks nonsense.
    *machine.agent.instead.lock().unwrap() = Some("nonsense".to_owned());
    browser.open(&url).await;
    let told = browser.shown("#alert").await;
    assert!(told.contains("evidence is not available") && told.contains("guest agent"), "{told}");
    *machine.agent.instead.lock().unwrap() = None;
    browser.click("#info-retry").await;
    browser.shown("#info").await;

    // A KMS that has gone.
    onboarding.shutdown().await;
    browser.fill("#bootstrap-domain", "localhost").await;
    browser.click("#bootstrap-form button").await;
    let told = browser.shown("#alert").await;
    assert!(told.contains("cannot be reached") && told.contains("kms-server process"), "{told}");
}

#[tokio::test]
async fn the_page_keeps_others_out_and_loads_nothing_of_theirs() {
    let machine = Machine::start(None, "").await;
    let opened = machine.open().await;
    let onboarding = opened.onboard().await.unwrap();
    let address = onboarding.address();
    assert!(onboarding.token().is_none());
    for (path, content_type) in [
        ("/", "text/html; charset=utf-8"),
        ("/onboard.css", "text/css; charset=utf-8"),
        ("/onboard.js", "text/javascript; charset=utf-8"),
        ("/status", "application/json"),
    ] {
        let told = ask_plain(address, "GET", path, b"").await;
        assert_eq!((told.status, told.content_type.as_str()), (200, content_type), "{path}");
        let policy = told.headers["content-security-policy"].to_str().unwrap();
        assert!(policy.starts_with("default-src 'none'; script-src 'self';"), "{policy}");
        assert_eq!(told.headers["x-frame-options"], "DENY");
        assert_eq!(told.headers["cache-control"], "no-store");
        assert_eq!(ask_plain(address, "POST", path, b"").await.status, 404, "{path}");
    }
    // A page of somebody else makes a visitor's browser send this.
    let evil = [("origin", "http://evil.example"), ("content-type", "text/plain")];
    let body = br#"{"domain":"evil.example"}"#;
    let told = ask_plain_with(address, "POST", "/prpc/Bootstrap?json", &evil, body).await;
    assert_eq!((told.status, told.error().as_str()), (403, "a page of another site may not set up the KMS"));
    let image = [("user-agent", "Mozilla/5.0")];
    let told = ask_plain_with(address, "GET", "/prpc/Bootstrap?domain=evil.example", &image, b"").await;
    assert_eq!(told.status, 403);
    let status = ask_plain(address, "GET", "/status", b"").await.json();
    assert_eq!((&status["locked"], &status["keys"]), (&false.into(), &serde_json::Value::Null));
}

#[tokio::test]
async fn networks_and_the_token_hold_for_every_method() {
    let machine = Machine::start(None, "core.onboard.allow_from = [\"192.0.2.0/24\"]\n").await;
    let opened = machine.open().await;
    let onboarding = opened.onboard().await.unwrap();
    for path in ["/", "/status", "/finish", "/onboard.js"] {
        assert_eq!(ask_plain(onboarding.address(), "GET", path, b"").await.status, 403, "{path}");
    }
    for method in ["Bootstrap", "Onboard", "GetAttestationInfo", "Finish", "Unknown"] {
        let told = post(&onboarding, method, "{}").await;
        assert!(told.status == 403 && told.error().contains("core.onboard.allow_from"), "{told:?}");
    }
    // Whoever watches over the process may.
    assert_eq!(ask_plain(onboarding.address(), "GET", "/health", b"").await.status, 200);

    let machine = Machine::start(None, "core.onboard.token = true\n").await;
    let opened = machine.open().await;
    let onboarding = opened.onboard().await.unwrap();
    let address = onboarding.address();
    for method in ["Bootstrap", "Onboard", "GetAttestationInfo", "Finish"] {
        let told = post(&onboarding, method, "{}").await;
        assert!(told.status == 401 && told.error().contains("setup token"), "{told:?}");
    }
    assert_eq!(ask_plain(address, "GET", "/finish", b"").await.status, 401);
    let status = ask_plain(address, "GET", "/status", b"").await.json();
    assert_eq!((&status["locked"], &status["site_name"]), (&true.into(), &"".into()));
    let token = [("x-onboard-token", onboarding.token().unwrap().reveal())];
    let info = ask_plain_with(address, "POST", "/prpc/GetAttestationInfo?json", &token, b"null").await;
    assert_eq!(info.status, 200, "{info:?}");
    let made =
        ask_plain_with(address, "POST", "/prpc/Bootstrap?json", &token, br#"{"domain":"localhost"}"#).await;
    assert_eq!(made.status, 200, "{made:?}");
    for _ in 0..20 {
        let wrong = [("x-onboard-token", "0")];
        assert_eq!(ask_plain_with(address, "GET", "/finish", &wrong, b"").await.status, 401);
    }
    let told = ask_plain_with(address, "GET", "/finish", &token, b"").await;
    assert_eq!(told.status, 429, "{told:?}");
}
