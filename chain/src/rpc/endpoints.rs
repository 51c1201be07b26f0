use std::fmt::Debug;
use std::future::Future;
use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use alloy::primitives::{Address, B256, Bytes};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::time::sleep;

use crate::revert::Revert;
use crate::rpc::{Endpoint, Head, Limits};
use crate::{Error, LOCAL_CHAIN_ID, Result};

/// Seconds since 1970. The outermost layer reads the real one.
pub type Clock = fn() -> u64;

/// How often one endpoint is asked the same before its trouble counts.
const ATTEMPTS: u32 = 3;
/// First pause between two attempts; it doubles, and a random part of the same size is added.
const PAUSE: Duration = Duration::from_millis(150);

/// Several endpoints of one chain, of which a number must agree on every answer.
pub struct Endpoints {
    all: Vec<Endpoint>,
    agreement: usize,
    expected_chain: Option<u64>,
    max_head_age: Duration,
    behind_head: u64,
    clock: Clock,
}

/// The block that all questions of one decision are asked about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// Which chain.
    pub chain_id: u64,
    /// The block, as the agreeing endpoints describe it.
    pub head: Head,
}

impl View {
    /// Number of the block.
    pub fn block(&self) -> u64 {
        self.head.number.to()
    }
}

impl Endpoints {
    /// Endpoints at these addresses, of which `agreement` must give the same answer.
    ///
    /// # Errors
    /// [`Error::Agreement`] when that many do not exist, [`Error::EndpointAddress`], [`Error::HttpClient`].
    pub fn new(addresses: &[String], agreement: usize, limits: Limits, clock: Clock) -> Result<Self> {
        if agreement == 0 || agreement > addresses.len() {
            return Err(Error::Agreement { wanted: agreement, endpoints: addresses.len() });
        }
        let all = addresses.iter().map(|it| Endpoint::new(it, limits)).collect::<Result<_>>()?;
        let max_head_age = Duration::from_secs(300);
        Ok(Self { all, agreement, expected_chain: None, max_head_age, behind_head: 0, clock })
    }

    /// Refuses endpoints of any other chain.
    #[must_use]
    pub fn on_chain(mut self, chain_id: u64) -> Self {
        self.expected_chain = Some(chain_id);
        self
    }

    /// Refuses endpoints whose newest block is older; 300 s without this. The local chain is exempt: it makes blocks
    /// on demand.
    #[must_use]
    pub fn with_max_head_age(mut self, age: Duration) -> Self {
        self.max_head_age = age;
        self
    }

    /// Reads so many blocks behind the newest: what is read there, a short reorganisation no longer takes back. What was
    /// just changed shows that much later. 0 without this.
    #[must_use]
    pub fn behind_head(mut self, blocks: u64) -> Self {
        self.behind_head = blocks;
        self
    }

    /// Every endpoint, in the order given.
    pub fn each(&self) -> &[Endpoint] {
        &self.all
    }

    /// How many must agree.
    pub fn agreement(&self) -> usize {
        self.agreement
    }

    /// Asks every endpoint and returns the answer that enough of them give, as soon as they do. Cancel safe.
    ///
    /// # Errors
    /// [`Error::Disagreement`] when the answers differ too much, [`Error::TooFewAnswers`] when too few came; with a
    /// single endpoint its own error.
    pub async fn agree<'a, T, F, A>(&'a self, what: &str, ask: F) -> Result<T>
    where
        T: PartialEq + Debug,
        F: Fn(&'a Endpoint) -> A,
        A: Future<Output = Result<T>>,
    {
        let mut open: FuturesUnordered<_> =
            self.all.iter().map(|it| async { (it.name(), patiently(|| ask(it)).await) }).collect();
        let mut answers: Vec<(T, Vec<&str>)> = Vec::new();
        let mut failures = Vec::new();
        while let Some((name, answer)) = open.next().await {
            match answer {
                Err(error) => failures.push(error),
                Ok(answer) => {
                    let votes = match answers.iter().position(|(it, _)| *it == answer) {
                        Some(known) => &mut answers[known],
                        None => answers.push_mut((answer, Vec::new())),
                    };
                    votes.1.push(name);
                    if votes.1.len() == self.agreement {
                        let winner = answers.iter().position(|(_, votes)| votes.len() == self.agreement);
                        return Ok(answers.swap_remove(winner.unwrap_or_default()).0);
                    }
                }
            }
        }
        Err(self.no_agreement(what, answers, failures))
    }

    fn no_agreement<T: Debug>(
        &self,
        what: &str,
        answers: Vec<(T, Vec<&str>)>,
        failures: Vec<Error>,
    ) -> Error {
        let answered: usize = answers.iter().map(|(_, votes)| votes.len()).sum();
        if answered >= self.agreement || failures.is_empty() {
            let told = answers.iter().map(|(answer, votes)| {
                let answer: String = format!("{answer:?}").chars().take(160).collect();
                format!("{}: {answer}", votes.join(", "))
            });
            return Error::Disagreement {
                what: what.to_owned(),
                answers: told.collect::<Vec<_>>().join("; "),
            };
        }
        self.too_few(what, answered, failures)
    }

    /// With a single endpoint its error says it all. `failures` is not empty.
    fn too_few(&self, what: &str, answered: usize, mut failures: Vec<Error>) -> Error {
        if self.all.len() == 1 {
            return failures.swap_remove(0);
        }
        Error::TooFewAnswers {
            what: what.to_owned(),
            wanted: self.agreement,
            answered,
            failures: failures.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "),
            first: Box::new(failures.swap_remove(0)),
        }
    }

    /// The block to read at: the newest that enough endpoints have and agree on, or one [behind](Self::behind_head) it.
    ///
    /// Heads differ by a block or two between honest endpoints, so the lowest of the first that answer is taken, and
    /// its header asked for again: then a single endpoint that lies about its height cannot turn the clock back.
    ///
    /// # Errors
    /// [`Error::WrongChain`], [`Error::Stale`], and see [`Endpoints::agree`].
    pub async fn view(&self) -> Result<View> {
        let mut open: FuturesUnordered<_> = self.all.iter().map(|it| self.head_of(it)).collect();
        let mut heads: Vec<(u64, Head)> = Vec::new();
        let mut failures = Vec::new();
        while let Some(head) = open.next().await {
            match head {
                Ok(head) => heads.push(head),
                Err(error) => failures.push(error),
            }
            if heads.len() == self.agreement {
                break;
            }
        }
        drop(open);
        if heads.len() < self.agreement {
            return Err(self.too_few("the newest block", heads.len(), failures));
        }
        heads.sort_by_key(|(_, head)| head.number);
        let (chain_id, lowest) = heads.swap_remove(0);
        if let Some((other, _)) = heads.iter().find(|(other, _)| *other != chain_id) {
            return Err(Error::Disagreement {
                what: "the chain".to_owned(),
                answers: format!("{chain_id}; {other}"),
            });
        }
        let newest = match heads.iter().all(|(_, head)| head.hash == lowest.hash) {
            true => lowest,
            false => {
                let head = self.agreed_block("the newest common block", lowest.number.to()).await?;
                self.check_age("the agreed endpoints", chain_id, &head)?;
                head
            }
        };
        let head = match self.behind_head {
            0 => newest,
            blocks => {
                let number = newest.number.to::<u64>().saturating_sub(blocks);
                self.agreed_block("a block behind the newest", number).await?
            }
        };
        Ok(View { chain_id, head })
    }

    /// The block with this hash, from the first endpoint that has it: the hash proves the header. How old it may be, the
    /// one who gives the hash has to know.
    ///
    /// # Errors
    /// [`Error::WrongChain`], and see [`Endpoint::block_with_hash`].
    pub async fn view_of(&self, hash: B256) -> Result<View> {
        let chain_id = self.agree("the chain", |it| self.chain_of(it)).await?;
        let head = self.first_success(async |it| it.block_with_hash(hash).await).await?;
        Ok(View { chain_id, head })
    }

    /// Asks every endpoint and returns the first success: for answers that prove themselves. Cancel safe.
    ///
    /// # Errors
    /// The last endpoint's error.
    pub(crate) async fn first_success<'a, T, F, A>(&'a self, ask: F) -> Result<T>
    where
        F: Fn(&'a Endpoint) -> A,
        A: Future<Output = Result<T>>,
    {
        let mut open: FuturesUnordered<_> = self.all.iter().map(|it| patiently(|| ask(it))).collect();
        let mut last = Error::Agreement { wanted: 1, endpoints: 0 };
        while let Some(answer) = open.next().await {
            match answer {
                Ok(answer) => return Ok(answer),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    async fn agreed_block(&self, what: &str, number: u64) -> Result<Head> {
        let number = format!("{number:#x}");
        self.agree(what, |it| it.block(&number)).await
    }

    async fn chain_of(&self, endpoint: &Endpoint) -> Result<u64> {
        let actual = endpoint.chain_id().await?;
        match self.expected_chain {
            Some(expected) if expected != actual => {
                Err(Error::WrongChain { endpoint: endpoint.name().to_owned(), expected, actual })
            }
            _ => Ok(actual),
        }
    }

    async fn head_of(&self, endpoint: &Endpoint) -> Result<(u64, Head)> {
        let chain_id = patiently(|| self.chain_of(endpoint)).await?;
        let head = patiently(|| endpoint.head()).await?;
        self.check_age(endpoint.name(), chain_id, &head)?;
        Ok((chain_id, head))
    }

    fn check_age(&self, endpoint: &str, chain_id: u64, head: &Head) -> Result<()> {
        let age = (self.clock)().saturating_sub(head.timestamp.to());
        let limit = self.max_head_age.as_secs();
        if chain_id == LOCAL_CHAIN_ID || age <= limit {
            return Ok(());
        }
        Err(Error::Stale { endpoint: endpoint.to_owned(), block: head.number.to(), age, limit })
    }

    /// Runs a call on the state of a block; a revert is an answer the endpoints must agree on too.
    ///
    /// # Errors
    /// [`Error::Reverted`], and see [`Endpoints::agree`].
    pub async fn call(
        &self,
        what: &str,
        view: &View,
        to: Option<Address>,
        from: Option<Address>,
        data: &Bytes,
    ) -> Result<Bytes> {
        let block = view.block();
        let answer = self.agree(what, async |it| match it.call(to, from, data, block).await {
            Ok(bytes) => Ok(Ok(bytes)),
            Err(Error::Reverted { revert, .. }) => Ok(Err(revert)),
            Err(error) => Err(error),
        });
        answer.await?.map_err(|revert: Revert| Error::Reverted { what: what.to_owned(), revert })
    }

    /// One storage slot at a block.
    ///
    /// # Errors
    /// See [`Endpoints::agree`].
    pub async fn storage(&self, what: &str, view: &View, at: Address, slot: B256) -> Result<B256> {
        self.agree(what, |it| it.storage(at, slot, view.block())).await
    }

    /// Makes sure that there is a contract at an address.
    ///
    /// # Errors
    /// [`Error::NoContract`], and see [`Endpoints::agree`].
    pub async fn require_code(&self, view: &View, address: Address) -> Result<()> {
        let empty =
            self.agree("code", async |it| Ok(it.code(address, view.block()).await?.is_empty())).await?;
        match empty {
            false => Ok(()),
            true => Err(Error::NoContract { address, chain_id: view.chain_id }),
        }
    }
}

/// Asks again when the endpoint, not its answer, was the trouble. A deadline that passed is not repeated: whoever
/// hangs once would triple the wait.
pub(crate) async fn patiently<T, A: Future<Output = Result<T>>>(ask: impl Fn() -> A) -> Result<T> {
    let mut attempt = 1;
    loop {
        match ask().await {
            Err(error)
                if attempt < ATTEMPTS && error.is_transient() && !matches!(error, Error::NoAnswer { .. }) =>
            {
                tracing::debug!(%error, attempt, "asking again");
            }
            done => return done,
        }
        let pause = PAUSE * 2u32.pow(attempt - 1);
        let jitter = RandomState::new().hash_one(attempt) % u64::try_from(pause.as_millis()).unwrap_or(1);
        sleep(pause + Duration::from_millis(jitter)).await;
        attempt += 1;
    }
}
