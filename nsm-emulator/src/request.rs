//! The requests of the NSM driver: a text string for those without arguments, else a map with one entry.

use crate::cbor::{Malformed, Reader};
use ciborium_ll::Header;

/// Longest request the driver passes on (`NSM_REQUEST_MAX_SIZE`).
pub const MAX_REQUEST: usize = 0x1000;
/// Longest response the driver has room for (`NSM_RESPONSE_MAX_SIZE`).
pub const MAX_RESPONSE: usize = 0x3000;
/// Longest `user_data` and longest `nonce` of an attestation request.
pub const MAX_USER_DATA: usize = 512;
/// Longest `public_key` of an attestation request; the shortest is one byte.
pub const MAX_PUBLIC_KEY: usize = 1024;

/// Why a request was not carried out, as the driver reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorCode {
    /// The request is not well formed, or an argument has a wrong type or an impossible value.
    InvalidArgument,
    /// There is no such register.
    InvalidIndex,
    /// The register is locked.
    ReadOnlyIndex,
    /// The module has no such command.
    InvalidOperation,
    /// The caller's response buffer is too small for the answer.
    BufferTooSmall,
    /// The request, or one of its byte strings, is too long.
    InputTooLarge,
    /// The module failed.
    InternalError,
}

impl ErrorCode {
    /// The name on the wire.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::InvalidArgument => "InvalidArgument",
            Self::InvalidIndex => "InvalidIndex",
            Self::ReadOnlyIndex => "ReadOnlyIndex",
            Self::InvalidOperation => "InvalidOperation",
            Self::BufferTooSmall => "BufferTooSmall",
            Self::InputTooLarge => "InputTooLarge",
            Self::InternalError => "InternalError",
        }
    }
}

impl From<Malformed> for ErrorCode {
    fn from(_: Malformed) -> Self {
        Self::InvalidArgument
    }
}

/// A decoded request; byte strings are borrowed from the received bytes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Request<'a> {
    DescribeNsm,
    GetRandom,
    DescribePcr { index: u64 },
    ExtendPcr { index: u64, data: &'a [u8] },
    LockPcr { index: u64 },
    LockPcrs { range: u64 },
    Attestation(AttestationRequest<'a>),
}

/// What the caller wants to see inside the document.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct AttestationRequest<'a> {
    pub(crate) user_data: Option<&'a [u8]>,
    pub(crate) nonce: Option<&'a [u8]>,
    pub(crate) public_key: Option<&'a [u8]>,
}

/// The arguments of all commands. Each may be given once, and only to the command that has it.
#[derive(Default)]
struct Arguments<'a> {
    index: Option<u64>,
    range: Option<u64>,
    data: Option<&'a [u8]>,
    user_data: Option<Option<&'a [u8]>>,
    nonce: Option<Option<&'a [u8]>>,
    public_key: Option<Option<&'a [u8]>>,
}

impl<'a> Arguments<'a> {
    fn decode(reader: &mut Reader<'a>, allowed: &[&str]) -> Result<Self, ErrorCode> {
        let mut arguments = Self::default();
        let entries = reader.map()?;
        // More entries than names means an unknown or a repeated one; this also bounds the loop.
        if entries > allowed.len() {
            return Err(ErrorCode::InvalidArgument);
        }
        for _ in 0..entries {
            let name = reader.text()?;
            if !allowed.contains(&name) {
                return Err(ErrorCode::InvalidArgument);
            }
            match name {
                "index" => once(&mut arguments.index, reader.unsigned()?)?,
                "range" => once(&mut arguments.range, reader.unsigned()?)?,
                "data" => once(&mut arguments.data, reader.bytes()?)?,
                "user_data" => once(&mut arguments.user_data, reader.optional_bytes()?)?,
                "nonce" => once(&mut arguments.nonce, reader.optional_bytes()?)?,
                _ => once(&mut arguments.public_key, reader.optional_bytes()?)?,
            }
        }
        Ok(arguments)
    }
}

fn once<T>(slot: &mut Option<T>, value: T) -> Result<(), ErrorCode> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(ErrorCode::InvalidArgument),
    }
}

impl<'a> Request<'a> {
    /// Decodes one request; nothing may follow it.
    pub(crate) fn decode(bytes: &'a [u8]) -> Result<Self, ErrorCode> {
        if bytes.len() > MAX_REQUEST {
            return Err(ErrorCode::InputTooLarge);
        }
        let mut reader = Reader::new(bytes);
        let request = match reader.peek()? {
            Header::Text(_) => match reader.text()? {
                "DescribeNSM" => Self::DescribeNsm,
                "GetRandom" => Self::GetRandom,
                "DescribePCR" | "ExtendPCR" | "LockPCR" | "LockPCRs" | "Attestation" => {
                    return Err(ErrorCode::InvalidArgument);
                }
                _ => return Err(ErrorCode::InvalidOperation),
            },
            Header::Map(_) => {
                if reader.map()? != 1 {
                    return Err(ErrorCode::InvalidArgument);
                }
                let command = reader.text()?;
                Self::decode_command(command, &mut reader)?
            }
            _ => return Err(ErrorCode::InvalidArgument),
        };
        reader.finish()?;
        Ok(request)
    }

    fn decode_command(command: &str, reader: &mut Reader<'a>) -> Result<Self, ErrorCode> {
        let missing = ErrorCode::InvalidArgument;
        match command {
            "DescribePCR" => {
                let index = Arguments::decode(reader, &["index"])?.index.ok_or(missing)?;
                Ok(Self::DescribePcr { index })
            }
            "ExtendPCR" => {
                let arguments = Arguments::decode(reader, &["index", "data"])?;
                let index = arguments.index.ok_or(missing)?;
                let data = arguments.data.ok_or(missing)?;
                Ok(Self::ExtendPcr { index, data })
            }
            "LockPCR" => {
                let index = Arguments::decode(reader, &["index"])?.index.ok_or(missing)?;
                Ok(Self::LockPcr { index })
            }
            "LockPCRs" => {
                let range = Arguments::decode(reader, &["range"])?.range.ok_or(missing)?;
                Ok(Self::LockPcrs { range })
            }
            "Attestation" => {
                let arguments = Arguments::decode(reader, &["user_data", "nonce", "public_key"])?;
                AttestationRequest {
                    user_data: arguments.user_data.flatten(),
                    nonce: arguments.nonce.flatten(),
                    public_key: arguments.public_key.flatten(),
                }
                .within_limits()
                .map(Self::Attestation)
            }
            // Commands without arguments are text strings, never maps.
            "DescribeNSM" | "GetRandom" => Err(ErrorCode::InvalidArgument),
            _ => Err(ErrorCode::InvalidOperation),
        }
    }
}

impl AttestationRequest<'_> {
    fn within_limits(self) -> Result<Self, ErrorCode> {
        let length = |bytes: Option<&[u8]>| bytes.map_or(0, <[u8]>::len);
        if length(self.user_data) > MAX_USER_DATA
            || length(self.nonce) > MAX_USER_DATA
            || length(self.public_key) > MAX_PUBLIC_KEY
        {
            return Err(ErrorCode::InputTooLarge);
        }
        if self.public_key.is_some_and(<[u8]>::is_empty) {
            return Err(ErrorCode::InvalidArgument);
        }
        Ok(self)
    }
}
