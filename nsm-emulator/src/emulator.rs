//! The module: registers, the commands on them, and the answers.

use crate::cbor::Writer;
use crate::document::{self, Claims};
use crate::pki::{self, Leaf, Root};
use crate::request::{AttestationRequest, ErrorCode, MAX_RESPONSE, Request};
use crate::{Config, Error, PCR_COUNT, PcrValue};
use aws_lc_rs::digest;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Registers that the hypervisor locks before the enclave starts: `0..LOCKED_AT_BOOT`.
const LOCKED_AT_BOOT: usize = 16;
/// How many bytes `GetRandom` returns.
const RANDOM_BYTES: usize = 256;
/// Version the module reports: 1.0.0.
const VERSION: [u64; 3] = [1, 0, 0];

/// An emulated Nitro Security Module.
///
/// Documents carry a real signature under a root that this instance made when it started
/// ([`root_pem`](Self::root_pem)), so a verifier needs nothing but that root as its trust anchor.
pub struct Emulator {
    module_id: String,
    clock: crate::Clock,
    root: Arc<Root>,
    state: Mutex<State>,
}

struct State {
    registers: [Register; PCR_COUNT],
    leaf: Leaf,
}

#[derive(Clone, Copy)]
struct Register {
    value: PcrValue,
    locked: bool,
}

/// A command's result: the bytes after the response's name, if it has any.
enum Answer {
    DescribeNsm,
    DescribePcr(Register),
    ExtendPcr(PcrValue),
    LockPcr,
    LockPcrs,
    GetRandom(Box<[u8; RANDOM_BYTES]>),
    Attestation(Vec<u8>),
}

impl Emulator {
    /// Makes a module with its own root and a first leaf.
    ///
    /// # Errors
    ///
    /// When `config` names a register or a module id that cannot exist, when the clock is outside of 2020 to 2049,
    /// or when no key can be made.
    pub fn new(config: Config) -> Result<Self, Error> {
        Self::under(Arc::new(Root::generate()?), config)
    }

    /// Makes a module under a root that is kept.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn with_root(root: &crate::LocalRoot, config: Config) -> Result<Self, Error> {
        Self::under(Arc::clone(&root.0), config)
    }

    /// Makes another module under the same root, as another enclave on the same kind of machine has.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn another(&self, config: Config) -> Result<Self, Error> {
        Self::under(Arc::clone(&self.root), config)
    }

    fn under(root: Arc<Root>, config: Config) -> Result<Self, Error> {
        let mut registers = [Register { value: [0; 48], locked: false }; PCR_COUNT];
        for register in &mut registers[..LOCKED_AT_BOOT] {
            register.locked = true;
        }
        for (&index, &value) in &config.pcrs {
            registers.get_mut(usize::from(index)).ok_or(Error::PcrIndex { index })?.value = value;
        }
        let module_id = match config.module_id {
            Some(module_id) if is_module_id(&module_id) => module_id,
            Some(module_id) => return Err(Error::ModuleId { module_id }),
            None => random_module_id()?,
        };
        let leaf = root.issue(&module_id, (config.clock)() / 1000)?;
        let state = Mutex::new(State { registers, leaf });
        Ok(Self { module_id, clock: config.clock, root, state })
    }

    /// The root certificate to verify this module's documents with, as PEM.
    #[must_use]
    pub fn root_pem(&self) -> String {
        self.root.pem()
    }

    /// The root certificate, as DER.
    #[must_use]
    pub fn root_der(&self) -> &[u8] {
        self.root.der()
    }

    /// `i-<instance>-enc<enclave>`, as documents state it.
    #[must_use]
    pub fn module_id(&self) -> &str {
        &self.module_id
    }

    /// Answers one request (CBOR) with one response (CBOR) of at most [`MAX_RESPONSE`] bytes.
    ///
    /// Whatever the bytes are, there is an answer; a request that cannot be carried out is answered with an error
    /// code. Blocks for the time of one P-384 signature, or of five key generations when the leaf is renewed.
    #[must_use]
    pub fn process(&self, request: &[u8]) -> Vec<u8> {
        self.process_within(request, MAX_RESPONSE)
    }

    /// As [`process`](Self::process), for a caller whose response buffer has `capacity` bytes.
    ///
    /// An answer that does not fit becomes `BufferTooSmall`, whatever `capacity` is; what the command changed stays.
    #[must_use]
    pub fn process_within(&self, request: &[u8], capacity: usize) -> Vec<u8> {
        let response = match Request::decode(request).and_then(|request| self.execute(request)) {
            Ok(answer) => self.encode(answer),
            Err(code) => encode_error(code),
        };
        if response.len() > capacity { encode_error(ErrorCode::BufferTooSmall) } else { response }
    }

    /// No command leaves the state half changed, so a panic elsewhere does not spoil it.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn execute(&self, request: Request<'_>) -> Result<Answer, ErrorCode> {
        let mut state = self.state();
        match request {
            Request::DescribeNsm => Ok(Answer::DescribeNsm),
            Request::DescribePcr { index } => Ok(Answer::DescribePcr(*state.register(index)?)),
            Request::ExtendPcr { index, data } => {
                let register = state.unlocked(index)?;
                register.value = extend(&register.value, data);
                Ok(Answer::ExtendPcr(register.value))
            }
            Request::LockPcr { index } => {
                state.unlocked(index)?.locked = true;
                Ok(Answer::LockPcr)
            }
            Request::LockPcrs { range } => {
                let range = usize::try_from(range).map_err(|_| ErrorCode::InvalidIndex)?;
                let registers = state.registers.get_mut(..range).ok_or(ErrorCode::InvalidIndex)?;
                for register in registers {
                    register.locked = true;
                }
                Ok(Answer::LockPcrs)
            }
            Request::GetRandom => pki::random()
                .map(|bytes| Answer::GetRandom(Box::new(bytes)))
                .map_err(|_| ErrorCode::InternalError),
            Request::Attestation(request) => self
                .attest(&mut state, request)
                .map(Answer::Attestation)
                .map_err(|_| ErrorCode::InternalError),
        }
    }

    fn attest(&self, state: &mut State, request: AttestationRequest<'_>) -> Result<Vec<u8>, Error> {
        let timestamp = (self.clock)();
        let now = timestamp / 1000;
        if !state.leaf.serves(now) {
            state.leaf = self.root.issue(&self.module_id, now)?;
        }
        let pcrs = (0u8..)
            .zip(&state.registers)
            .filter(|(_, register)| register.locked)
            .map(|(index, register)| (index, register.value))
            .collect();
        document::sign(&Claims { module_id: &self.module_id, timestamp, pcrs, request }, &state.leaf)
    }

    fn encode(&self, answer: Answer) -> Vec<u8> {
        let mut writer = Writer::default();
        match answer {
            Answer::LockPcr => writer.text("LockPCR"),
            Answer::LockPcrs => writer.text("LockPCRs"),
            Answer::DescribePcr(Register { value, locked }) => {
                writer.map(1).text("DescribePCR").map(2);
                writer.text("lock").boolean(locked).text("data").bytes(&value)
            }
            Answer::ExtendPcr(value) => writer.map(1).text("ExtendPCR").map(1).text("data").bytes(&value),
            Answer::GetRandom(random) => {
                writer.map(1).text("GetRandom").map(1).text("random").bytes(random.as_slice())
            }
            Answer::Attestation(document) => {
                writer.map(1).text("Attestation").map(1).text("document").bytes(&document)
            }
            Answer::DescribeNsm => self.describe(&mut writer),
        };
        writer.take()
    }

    fn describe<'w>(&self, writer: &'w mut Writer) -> &'w mut Writer {
        let registers = self.state().registers;
        let locked = || (0u64..).zip(&registers).filter(|(_, register)| register.locked);
        writer.map(1).text("DescribeNSM").map(7);
        for (key, number) in ["version_major", "version_minor", "version_patch"].into_iter().zip(VERSION) {
            writer.text(key).unsigned(number);
        }
        writer.text("module_id").text(&self.module_id);
        writer.text("max_pcrs").unsigned(PCR_COUNT as u64);
        writer.text("locked_pcrs").array(locked().count());
        for (index, _) in locked() {
            writer.unsigned(index);
        }
        writer.text("digest").text("SHA384")
    }
}

impl State {
    fn register(&mut self, index: u64) -> Result<&mut Register, ErrorCode> {
        let index = usize::try_from(index).map_err(|_| ErrorCode::InvalidIndex)?;
        self.registers.get_mut(index).ok_or(ErrorCode::InvalidIndex)
    }

    fn unlocked(&mut self, index: u64) -> Result<&mut Register, ErrorCode> {
        let register = self.register(index)?;
        if register.locked { Err(ErrorCode::ReadOnlyIndex) } else { Ok(register) }
    }
}

/// The answer to a request that was not carried out.
pub(crate) fn encode_error(code: ErrorCode) -> Vec<u8> {
    Writer::default().map(1).text("Error").text(code.name()).take()
}

/// SHA-384 over the old value and the data.
fn extend(old: &PcrValue, data: &[u8]) -> PcrValue {
    let mut context = digest::Context::new(&digest::SHA384);
    context.update(old);
    context.update(data);
    let mut new = [0; 48];
    new.copy_from_slice(context.finish().as_ref());
    new
}

/// The name goes into certificates, whose common names have at most 64 characters together with the suffix.
fn is_module_id(text: &str) -> bool {
    let is_hex = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_hexdigit());
    text.len() <= 64
        && text
            .strip_prefix("i-")
            .and_then(|rest| rest.split_once("-enc"))
            .is_some_and(|(instance, enclave)| is_hex(instance) && is_hex(enclave))
}

fn random_module_id() -> Result<String, Error> {
    let bytes: [u8; 17] = pki::random()?;
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("i-{}-enc{}", &hex[..17], &hex[18..]))
}
