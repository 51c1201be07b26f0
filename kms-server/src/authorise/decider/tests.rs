use std::sync::atomic::{AtomicUsize, Ordering};

use kms_protocol::wire::webhook::BootInfo;
use tokio::time::{Instant, advance};

use super::*;
use crate::authorise::{Pending, Purpose};

/// Answers as told, and counts.
struct Scripted {
    answer: Arc<RwLock<Result<Grant, Refusal>>>,
    asked: Arc<AtomicUsize>,
    /// How long it takes.
    delay: Duration,
}

impl Authoriser for Scripted {
    fn kind(&self) -> &'static str {
        "scripted"
    }

    fn authorise<'a>(&'a self, _question: &'a Question) -> Pending<'a, Result<Grant, Refusal>> {
        Box::pin(async {
            self.asked.fetch_add(1, Ordering::SeqCst);
            sleep(self.delay).await;
            self.answer.read().unwrap().clone()
        })
    }

    fn describe(&self) -> Pending<'_, Result<Option<AuthInfo>, Refusal>> {
        Box::pin(std::future::ready(Ok(None)))
    }
}

struct World {
    decider: Decider,
    answer: Arc<RwLock<Result<Grant, Refusal>>>,
    asked: Arc<AtomicUsize>,
}

impl World {
    fn new(remember: Duration, delay: Duration) -> Self {
        let answer = Arc::new(RwLock::new(yes()));
        let asked = Arc::new(AtomicUsize::new(0));
        let scripted = Scripted { answer: Arc::clone(&answer), asked: Arc::clone(&asked), delay };
        let decider = Decider::new(Box::new(scripted), remember, None);
        decider.described.store(true, Ordering::Relaxed);
        Self { decider, answer, asked }
    }

    fn says(&self, answer: Result<Grant, Refusal>) {
        *self.answer.write().unwrap() = answer;
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

fn yes() -> Result<Grant, Refusal> {
    Ok(Grant { gateway_app_id: "0x1".into() })
}

fn silence() -> Result<Grant, Refusal> {
    Err(Refusal::unavailable("silent"))
}

fn question(app: u8) -> Question {
    let boot_info = BootInfo { app_id: vec![app; 20], ..BootInfo::default() };
    Question { purpose: Purpose::App, boot_info, registers: Vec::new(), evidence: None }
}

const REMEMBER: Duration = Duration::from_secs(60);

#[tokio::test(start_paused = true)]
async fn an_allowance_is_remembered_as_long_as_the_setting_says() {
    let world = World::new(REMEMBER, Duration::ZERO);
    assert_eq!(world.decider.decide(question(1)).await, yes());
    world.says(silence());
    advance(REMEMBER - Duration::from_millis(1)).await;
    assert_eq!(world.decider.decide(question(1)).await, yes());
    assert_eq!(world.asked(), 1);
    advance(Duration::from_millis(1)).await;
    // Over, and an authoriser that cannot be asked does not make it longer.
    assert_eq!(world.decider.decide(question(1)).await, silence());
}

#[tokio::test(start_paused = true)]
async fn nothing_is_remembered_without_the_setting() {
    let world = World::new(Duration::ZERO, Duration::ZERO);
    assert_eq!(world.decider.decide(question(1)).await, yes());
    world.says(Err(Refusal::denied("no")));
    assert_eq!(world.decider.decide(question(1)).await, Err(Refusal::denied("no")));
}

#[tokio::test(start_paused = true)]
async fn a_refusal_is_never_remembered_and_never_an_allowance() {
    let world = World::new(REMEMBER, Duration::ZERO);
    world.says(Err(Refusal::denied("no")));
    for _ in 0..3 {
        assert_eq!(world.decider.decide(question(1)).await, Err(Refusal::denied("no")));
    }
    assert_eq!(world.asked(), 3);
    world.says(yes());
    assert_eq!(world.decider.decide(question(1)).await, yes());
}

#[tokio::test(start_paused = true)]
async fn another_question_has_another_answer() {
    let world = World::new(REMEMBER, Duration::ZERO);
    assert_eq!(world.decider.decide(question(1)).await, yes());
    world.says(Err(Refusal::denied("no")));
    let kms = Question { purpose: Purpose::Kms, ..question(1) };
    let role = attestation::Pcr::new([3; 48]);
    let with_role = Question { registers: vec![(attestation::PcrIndex::ROLE, role)], ..question(1) };
    for other in [question(2), kms, with_role] {
        assert_eq!(world.decider.decide(other).await, Err(Refusal::denied("no")));
    }
}

#[tokio::test(start_paused = true)]
async fn many_allowances_do_not_fill_the_memory() {
    let cache = Cache::new(REMEMBER);
    let grant = yes().unwrap();
    for number in 0_u64..10_000 {
        let mut key = cache::Key::default();
        key[..8].copy_from_slice(&number.to_be_bytes());
        cache.put(key, &grant);
        assert_eq!(cache.get(&key), yes().ok());
    }
    assert_eq!(cache.get(&cache::Key::default()), None);
    assert_eq!(cache.len(), 4096);
}

#[tokio::test(start_paused = true)]
async fn a_silent_authoriser_soon_costs_no_time() {
    let delay = Duration::from_secs(10);
    let world = World::new(Duration::ZERO, delay);
    world.says(silence());
    for _ in 0..5 {
        assert_eq!(world.decider.decide(question(1)).await, silence());
    }
    let before = Instant::now();
    let Err(Refusal::Unavailable(text)) = world.decider.decide(question(1)).await else { panic!() };
    assert_eq!(before.elapsed(), Duration::ZERO);
    let expected = "the scripted authoriser has given no answer 5 times in a row and is not asked for";
    assert!(text.starts_with(expected), "{text}");
    let health = world.decider.health();
    assert!(health.paused && health.failures == 5 && !health.is_good());
    world.says(yes());
    advance(Duration::from_secs(1)).await;
    assert_eq!(world.decider.decide(question(1)).await, yes());
    assert!(world.decider.health().is_good());
}

#[tokio::test(start_paused = true)]
async fn silence_counts_although_the_caller_went_away() {
    let world = World::new(Duration::ZERO, Duration::from_secs(10));
    world.says(silence());
    for _ in 0..5 {
        let deadline = Duration::from_secs(1);
        assert!(tokio::time::timeout(deadline, world.decider.decide(question(1))).await.is_err());
    }
    sleep(Duration::from_secs(10)).await;
    assert!(world.decider.health().paused);
}

#[tokio::test(start_paused = true)]
async fn questions_at_once_are_bounded() {
    let world = Arc::new(World::new(Duration::ZERO, Duration::from_secs(10)));
    let mut asking = tokio::task::JoinSet::new();
    for _ in 0..MAX_QUESTIONS {
        let world = Arc::clone(&world);
        asking.spawn(async move { world.decider.decide(question(1)).await });
    }
    while world.asked() < MAX_QUESTIONS {
        tokio::task::yield_now().await;
    }
    let refused = world.decider.decide(question(1)).await;
    assert_eq!(refused, Err(Refusal::unavailable("too many questions to the authoriser at once")));
    while let Some(answer) = asking.join_next().await {
        assert_eq!(answer.unwrap(), yes());
    }
}

#[tokio::test]
async fn what_cannot_be_recorded_is_not_allowed() {
    let directory = tempfile::tempdir().unwrap();
    let clock: crate::Clock = Arc::new(|| attestation::UnixMillis(0));
    let audit = Arc::new(Audit::unwritable(&directory.path().join("audit"), clock));
    let mut world = World::new(Duration::ZERO, Duration::ZERO);
    world.decider.audit = Some(audit);
    let refusal = Refusal::unavailable("the audit log cannot be written");
    assert_eq!(world.decider.decide(question(1)).await, Err(refusal));
    world.says(Err(Refusal::denied("no")));
    assert_eq!(world.decider.decide(question(1)).await, Err(Refusal::denied("no")));
    let decisions = world.decider.statistics().decisions.clone();
    assert_eq!(decisions, [("denied", 1), ("not-audited", 1)].into());
}

#[tokio::test(start_paused = true)]
async fn who_does_not_say_what_it_is_is_not_ready() {
    let world = World::new(Duration::ZERO, Duration::ZERO);
    world.decider.described.store(false, Ordering::Relaxed);
    assert!(!world.decider.health().is_good());
    assert_eq!(world.decider.description_if_ready(), None);
    // This one has nothing to say, which is an answer.
    world.decider.tend().await;
    assert!(world.decider.health().is_good());
}

#[tokio::test(start_paused = true)]
async fn one_question_about_ourselves_is_enough_for_many() {
    let world = World::new(Duration::ZERO, Duration::ZERO);
    let about_self = || world.decider.decide_about_self(Question { purpose: Purpose::Kms, ..question(1) });
    for _ in 0..100 {
        assert_eq!(about_self().await, yes());
    }
    assert_eq!(world.asked(), 1);
    world.says(Err(Refusal::denied("no")));
    advance(REMEMBER_SELF).await;
    for asked in 2..5 {
        assert_eq!(about_self().await, Err(Refusal::denied("no")));
        assert_eq!(world.asked(), asked, "a refusal is not remembered");
    }
    world.says(yes());
    assert_eq!(about_self().await, yes());
}
