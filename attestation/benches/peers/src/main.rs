//! Verifications of real documents per second of thread CPU time: ours and attestation-doc-validation, interleaved.
//!
//! ```text
//! cargo run --release -- [SECONDS [ROUNDS]]
//! ```
//!
//! The peer reads the system clock, so this process lives at the document's own time: it defines `clock_gettime`, which
//! the linker finds before libc's.

use std::cell::Cell;
use std::hint::black_box;
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, ensure};
use attestation::{AttestationDocument, TrustAnchor, UnixMillis, Verifier};

/// Two enclaves of one instance, six minutes apart: one cabundle, two leaves.
const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../../shared/fixtures/nitro");
const DOCUMENT: &str = "20220706-141822-tkhq-e20c1c02.bin";
const SIBLING: &str = "20220706-141150-tkhq-cfd586e3.bin";

/// What is compared with.
const PEER: usize = 0;

struct Contender {
    name: &'static str,
    verify: Box<dyn Fn(&[u8]) -> anyhow::Result<()>>,
    /// Verifications per second, one per round.
    rates: Vec<f64>,
}

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let seconds: f64 = arguments.next().map_or(Ok(2.0), |text| text.parse())?;
    let rounds: usize = arguments.next().map_or(Ok(9), |text| text.parse())?;
    let read = |name| std::fs::read(format!("{FIXTURES}/{name}")).context(name);
    let (evidence, sibling) = (read(DOCUMENT)?, read(SIBLING)?);
    let now = AttestationDocument::decode(&evidence)?.timestamp();
    NOW.store(now.as_secs().try_into()?, Relaxed);
    ensure!(
        SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs() == now.as_secs(),
        "the clock is not ours"
    );

    let mut contenders = contenders(now, sibling);
    for contender in &contenders {
        check(contender, &evidence)?;
    }
    for round in 0..rounds {
        let count = contenders.len();
        for turn in 0..count {
            let contender = &mut contenders[(turn + round) % count];
            let rate = rate(contender, &evidence, seconds)?;
            contender.rates.push(rate);
        }
    }
    print(&mut contenders, &evidence, seconds, rounds)
}

fn contenders(now: UnixMillis, sibling: Vec<u8>) -> Vec<Contender> {
    let cached = |capacity: usize| {
        let capacity = capacity.try_into().expect("not zero");
        Verifier::new(TrustAnchor::aws_nitro_g1()).with_chain_cache(capacity)
    };
    let full = Verifier::new(TrustAnchor::aws_nitro_g1());
    let (instance, enclave) = (cached(1), cached(16));
    let sibling_is_next = Cell::new(false);
    let contender = |name, verify| Contender { name, verify, rates: Vec::new() };
    vec![
        contender(
            "attestation-doc-validation 0.10.1",
            Box::new(|evidence| {
                attestation_doc_validation::validate_and_parse_attestation_doc(evidence)?;
                Ok(())
            }),
        ),
        contender("ours, full", Box::new(move |evidence| Ok(full.verify(evidence, now).map(drop)?))),
        // A cache of one entry forgets a leaf as soon as the other enclave of the instance comes.
        contender(
            "ours, instance seen before",
            Box::new(move |evidence| {
                sibling_is_next.set(!sibling_is_next.get());
                let evidence = if sibling_is_next.get() { &sibling } else { evidence };
                Ok(instance.verify(evidence, now).map(drop)?)
            }),
        ),
        contender(
            "ours, enclave seen before",
            Box::new(move |evidence| Ok(enclave.verify(evidence, now).map(drop)?)),
        ),
    ]
}

/// Nobody is measured who takes a broken document.
fn check(contender: &Contender, evidence: &[u8]) -> anyhow::Result<()> {
    // Twice, since every other document of one contender is the sibling.
    (contender.verify)(evidence).and_then(|()| (contender.verify)(evidence)).context(contender.name)?;
    let mut broken = evidence.to_vec();
    *broken.last_mut().context("empty")? ^= 1;
    let taken = (contender.verify)(&broken).and_then(|()| (contender.verify)(&broken)).is_ok();
    ensure!(!taken, "{} takes a broken signature", contender.name);
    Ok(())
}

fn rate(contender: &Contender, evidence: &[u8], seconds: f64) -> anyhow::Result<f64> {
    (contender.verify)(evidence)?;
    let (start, mut count) = (thread_seconds(), 0.0);
    loop {
        (contender.verify)(black_box(evidence))?;
        count += 1.0;
        let spent = thread_seconds() - start;
        if spent >= seconds {
            return Ok(count / spent);
        }
    }
}

fn print(contenders: &mut [Contender], evidence: &[u8], seconds: f64, rounds: usize) -> anyhow::Result<()> {
    for contender in contenders.iter_mut() {
        contender.rates.sort_by(f64::total_cmp);
    }
    let median = |contender: &Contender| contender.rates[contender.rates.len() / 2];
    let peer = median(&contenders[PEER]);
    println!("{} bytes, {rounds} rounds of {seconds} s of thread CPU time each", evidence.len());
    println!("| verifier | per second (min to max) | times the peer | allocations |");
    println!("|---|---|---|---|");
    for contender in &*contenders {
        let mut verdict = Ok(());
        let cost = allocation_counter::measure(|| verdict = (contender.verify)(evidence));
        verdict?;
        let (rates, median) = (&contender.rates, median(contender));
        println!(
            "| {} | {median:.0} ({:.0} to {:.0}) | {:.2} | {}, {} bytes |",
            contender.name,
            rates[0],
            rates[rates.len() - 1],
            median / peer,
            cost.count_total,
            cost.bytes_total,
        );
    }
    Ok(())
}

/// Seconds since 1970 that this process sees; 0 stands for the true time.
static NOW: AtomicI64 = AtomicI64::new(0);

/// Answers instead of libc's function of this name.
///
/// # Safety
/// `time` points to a `timespec` that may be written, as `clock_gettime(2)` asks of its callers.
#[unsafe(no_mangle)]
unsafe extern "C" fn clock_gettime(clock: libc::clockid_t, time: *mut libc::timespec) -> libc::c_int {
    let now = NOW.load(Relaxed);
    if now != 0 && clock == libc::CLOCK_REALTIME {
        // SAFETY: the caller vouches for the pointer.
        unsafe { *time = libc::timespec { tv_sec: now, tv_nsec: 0 } };
        return 0;
    }
    // SAFETY: the system call writes to the same pointer as the function would.
    unsafe { libc::syscall(libc::SYS_clock_gettime, clock, time) as libc::c_int }
}

fn thread_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a local variable.
    let failed = unsafe { clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    assert_eq!(failed, 0, "no thread clock");
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}
