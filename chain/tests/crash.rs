//! The command is killed at every request it makes, before and after the chain sees it. The next run must finish the
//! work with exactly one transaction per operation.

#![allow(clippy::unwrap_used, reason = "a test stops where something is wrong, and says what it skips")]

mod support;

use std::sync::atomic::{AtomicUsize, Ordering};

use alloy::primitives::B256;
use support::{Act, Chain, Proxy};

/// Runs `arguments` behind a proxy that kills the command at request number `at`. Says whether it got that far.
fn killed_at(chain: &Chain, arguments: &[&str], at: usize, after: bool) -> bool {
    let proxy = Proxy::start(&chain.url, move |number, _, _| match (number == at, after) {
        (false, _) => Act::Forward,
        (true, false) => Act::KillBefore,
        (true, true) => Act::KillAfter,
    });
    // The script can only run once the command does, and the command is started with the lock held.
    let mut victim = proxy.victim.lock().unwrap();
    let child = chain.command(&proxy.url, arguments).spawn().unwrap();
    let pid = child.id();
    *victim = Some(child);
    drop(victim);
    // Either the proxy takes the child and kills it, or it ends by itself and is collected here.
    loop {
        let mut victim = proxy.victim.lock().unwrap();
        match victim.as_mut() {
            None => return true,
            Some(child) => {
                if let Some(status) = child.try_wait().unwrap() {
                    assert!(status.success(), "process {pid} failed by itself");
                    return false;
                }
            }
        }
        drop(victim);
        std::thread::yield_now();
    }
}

/// Kills at every step until the command is through before it can be killed; `check` judges each second run.
fn at_every_step(after: bool, transactions: u64, arguments: impl Fn(usize) -> Vec<String>, chain: &Chain) {
    for step in 0..200 {
        let before = chain.nonce();
        let arguments = arguments(step);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let was_killed = killed_at(chain, &arguments, step, after);
        chain.run(&arguments).expect(0);
        assert_eq!(chain.nonce(), before + transactions, "killed at request {step}, after: {after}");
        chain.run(&arguments).expect(0);
        assert_eq!(chain.nonce(), before + transactions, "a third run sent again after request {step}");
        if !was_killed {
            assert!(step > 5, "the command asked only {step} times");
            return;
        }
    }
    panic!("the command never ends");
}

fn add_image(after: bool) {
    let Some(chain) = Chain::start() else { return };
    let hash = |step: usize| B256::with_last_byte(u8::try_from(step + 1).unwrap()).to_string();
    at_every_step(after, 1, |step| vec!["add-image".into(), hash(step), "--yes".into()], &chain);
}

fn create_app(after: bool) {
    let Some(chain) = Chain::start() else { return };
    let runs = AtomicUsize::new(0);
    at_every_step(
        after,
        1,
        |step| {
            runs.fetch_add(1, Ordering::Relaxed);
            ["create-app", "--yes", "--label", &format!("app {step}")].map(str::to_owned).to_vec()
        },
        &chain,
    );
    // One application per label, and the one the chain was seeded with.
    let apps = chain.run(&["status", "--json"]).expect(0).json()["kms"]["apps"].as_array().unwrap().len();
    assert_eq!(apps, runs.into_inner() + 1);
}

fn deploy(after: bool) {
    let Some(chain) = Chain::start() else { return };
    let label = |step: usize| format!("deployment {step}");
    at_every_step(
        after,
        3,
        |step| ["deploy", "--stand-ins", "--yes", "--label", &label(step)].map(str::to_owned).to_vec(),
        &chain,
    );
}

#[test]
fn adding_an_image_survives_a_kill_before_each_request() {
    add_image(false);
}

#[test]
fn adding_an_image_survives_a_kill_after_each_request() {
    add_image(true);
}

#[test]
fn creating_an_app_survives_a_kill_before_each_request() {
    create_app(false);
}

#[test]
fn creating_an_app_survives_a_kill_after_each_request() {
    create_app(true);
}

#[test]
fn a_deployment_survives_a_kill_before_each_request() {
    deploy(false);
}

#[test]
fn a_deployment_survives_a_kill_after_each_request() {
    deploy(true);
}
