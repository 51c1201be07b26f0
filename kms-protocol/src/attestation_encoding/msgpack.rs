//! The part of MessagePack the protocol uses (§4.4), read strictly from a slice.

use super::Error;

/// How deep unknown values may nest. Known ones reach seven.
const MAX_DEPTH: usize = 16;

/// The head of a value: its type with its length or number.
enum Head {
    Nil,
    Uint(u64),
    /// Negative integers, floats, booleans and extensions: only ever skipped. The length of what follows.
    Other(usize),
    Str(usize),
    Bin(usize),
    Array(usize),
    Map(usize),
}

/// Reads values off the front of a slice.
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    pub(crate) fn end(self) -> Result<(), Error> {
        match self.rest.len() {
            0 => Ok(()),
            left => Err(Error::TrailingBytes { left }),
        }
    }

    fn take(&mut self, len: usize, what: &'static str) -> Result<&'a [u8], Error> {
        let (taken, rest) = self.rest.split_at_checked(len).ok_or(Error::Truncated { what })?;
        self.rest = rest;
        Ok(taken)
    }

    /// A big-endian number of `width` bytes.
    fn number(&mut self, width: usize, what: &'static str) -> Result<u64, Error> {
        Ok(self.take(width, what)?.iter().fold(0, |number, byte| (number << 8) | u64::from(*byte)))
    }

    fn len(&mut self, width: usize, what: &'static str) -> Result<usize, Error> {
        usize::try_from(self.number(width, what)?).map_err(|_| Error::Truncated { what })
    }

    /// The marker is returned for error messages.
    fn head(&mut self, what: &'static str) -> Result<(u8, Head), Error> {
        let [marker] = *self.take(1, what)? else { return Err(Error::Truncated { what }) };
        let head = match marker {
            0x00..=0x7F => Head::Uint(u64::from(marker)),
            0x80..=0x8F => Head::Map(usize::from(marker & 0x0F)),
            0x90..=0x9F => Head::Array(usize::from(marker & 0x0F)),
            0xA0..=0xBF => Head::Str(usize::from(marker & 0x1F)),
            0xC0 => Head::Nil,
            0xC1 => return Err(Error::Invalid { what }),
            0xC2 | 0xC3 | 0xE0..=0xFF => Head::Other(0),
            0xC4 => Head::Bin(self.len(1, what)?),
            0xC5 => Head::Bin(self.len(2, what)?),
            0xC6 => Head::Bin(self.len(4, what)?),
            // Extensions: a length, and one byte for the type.
            0xC7 => Head::Other(self.len(1, what)?.saturating_add(1)),
            0xC8 => Head::Other(self.len(2, what)?.saturating_add(1)),
            0xC9 => Head::Other(self.len(4, what)?.saturating_add(1)),
            0xCA | 0xD2 => Head::Other(4),
            0xCB | 0xD3 => Head::Other(8),
            0xCC => Head::Uint(self.number(1, what)?),
            0xCD => Head::Uint(self.number(2, what)?),
            0xCE => Head::Uint(self.number(4, what)?),
            0xCF => Head::Uint(self.number(8, what)?),
            0xD0 => Head::Other(1),
            0xD1 => Head::Other(2),
            0xD4..=0xD8 => Head::Other((1 << (marker - 0xD4)) + 1),
            0xD9 => Head::Str(self.len(1, what)?),
            0xDA => Head::Str(self.len(2, what)?),
            0xDB => Head::Str(self.len(4, what)?),
            0xDC => Head::Array(self.len(2, what)?),
            0xDD => Head::Array(self.len(4, what)?),
            0xDE => Head::Map(self.len(2, what)?),
            0xDF => Head::Map(self.len(4, what)?),
        };
        Ok((marker, head))
    }

    /// A number that is not negative, in any width.
    pub(crate) fn uint(&mut self, what: &'static str) -> Result<u64, Error> {
        match self.head(what)? {
            (_, Head::Uint(number)) => Ok(number),
            (marker, _) => Err(Error::WrongType { what, marker }),
        }
    }

    pub(crate) fn u32(&mut self, what: &'static str) -> Result<u32, Error> {
        u32::try_from(self.uint(what)?).map_err(|_| Error::Invalid { what })
    }

    pub(crate) fn str(&mut self, what: &'static str) -> Result<&'a str, Error> {
        match self.head(what)? {
            (_, Head::Str(len)) => {
                std::str::from_utf8(self.take(len, what)?).map_err(|_| Error::NotUtf8 { what })
            }
            (marker, _) => Err(Error::WrongType { what, marker }),
        }
    }

    pub(crate) fn string(&mut self, what: &'static str) -> Result<String, Error> {
        self.str(what).map(str::to_owned)
    }

    /// Bytes, either as `bin` or as an array of numbers below 256: writers use both.
    pub(crate) fn bytes(&mut self, what: &'static str) -> Result<Vec<u8>, Error> {
        match self.head(what)? {
            (_, Head::Bin(len)) => self.take(len, what).map(<[u8]>::to_vec),
            (_, Head::Array(count)) => {
                // Each number takes at least a byte, so the input bounds the allocation.
                if count > self.rest.len() {
                    return Err(Error::Truncated { what });
                }
                let mut bytes = Vec::with_capacity(count);
                for _ in 0..count {
                    bytes.push(u8::try_from(self.uint(what)?).map_err(|_| Error::Invalid { what })?);
                }
                Ok(bytes)
            }
            (marker, _) => Err(Error::WrongType { what, marker }),
        }
    }

    pub(crate) fn array_len(&mut self, what: &'static str) -> Result<usize, Error> {
        match self.head(what)? {
            (_, Head::Array(count)) if count <= self.rest.len() => Ok(count),
            (_, Head::Array(_)) => Err(Error::Truncated { what }),
            (marker, _) => Err(Error::WrongType { what, marker }),
        }
    }

    pub(crate) fn list<T>(
        &mut self,
        what: &'static str,
        mut read: impl FnMut(&mut Self) -> Result<T, Error>,
    ) -> Result<Vec<T>, Error> {
        let count = self.array_len(what)?;
        // Grown while reading: an item in memory can be much larger than its shortest encoding.
        let mut items = Vec::new();
        for _ in 0..count {
            items.push(read(self)?);
        }
        Ok(items)
    }

    /// True, and the value is consumed, when `nil` comes next.
    pub(crate) fn nil(&mut self) -> bool {
        let nil = self.rest.first() == Some(&0xC0);
        if nil {
            self.rest = &self.rest[1..];
        }
        nil
    }

    /// Whether an array comes next.
    pub(crate) fn at_array(&self) -> bool {
        matches!(self.rest.first(), Some(0x90..=0x9F | 0xDC | 0xDD))
    }

    /// Reads a map: `field` is called with each key and reads its value, or answers `false` for a key it does not
    /// know, whose value is then skipped.
    pub(crate) fn map(
        &mut self,
        what: &'static str,
        mut field: impl FnMut(&mut Self, &str) -> Result<bool, Error>,
    ) -> Result<(), Error> {
        let count = match self.head(what)? {
            // A pair takes at least two bytes.
            (_, Head::Map(count)) if count <= self.rest.len() / 2 => count,
            (_, Head::Map(_)) => return Err(Error::Truncated { what }),
            (marker, _) => return Err(Error::WrongType { what, marker }),
        };
        for _ in 0..count {
            let key = self.str(what)?;
            if !field(self, key)? {
                self.skip(what)?;
            }
        }
        Ok(())
    }

    /// Skips one value and answers a reader of just its bytes.
    pub(crate) fn skipped(&mut self, what: &'static str) -> Result<Self, Error> {
        let before = self.rest;
        self.skip(what)?;
        Ok(Self { rest: &before[..before.len() - self.rest.len()] })
    }

    /// Skips one value of any type. The stack is ours and bounded, not the call stack.
    fn skip(&mut self, what: &'static str) -> Result<(), Error> {
        let mut open = vec![1_usize];
        while let Some(left) = open.last_mut() {
            if *left == 0 {
                open.pop();
                continue;
            }
            *left -= 1;
            let inner = match self.head(what)?.1 {
                Head::Nil | Head::Uint(_) => 0,
                Head::Other(len) | Head::Str(len) | Head::Bin(len) => {
                    self.take(len, what)?;
                    0
                }
                Head::Array(count) => count,
                Head::Map(count) => count.saturating_mul(2),
            };
            if inner > self.rest.len() {
                return Err(Error::Truncated { what });
            }
            if inner > 0 {
                if open.len() == MAX_DEPTH {
                    return Err(Error::TooDeep(MAX_DEPTH));
                }
                open.push(inner);
            }
        }
        Ok(())
    }
}

/// The value of a key that may appear once.
pub(crate) struct Once<T> {
    key: &'static str,
    value: Option<T>,
}

impl<T> Once<T> {
    pub(crate) fn new(key: &'static str) -> Self {
        Self { key, value: None }
    }

    /// Takes the value; answers `true` so that it can end a match arm of [`Reader::map`].
    pub(crate) fn set(&mut self, value: T) -> Result<bool, Error> {
        match self.value.replace(value) {
            None => Ok(true),
            Some(_) => Err(Error::DuplicateKey { key: self.key }),
        }
    }

    pub(crate) fn required(self) -> Result<T, Error> {
        self.value.ok_or(Error::MissingKey { key: self.key })
    }

    pub(crate) fn optional(self) -> Option<T> {
        self.value
    }
}

/// Appends values to a buffer, each in its shortest form.
#[derive(Default)]
pub(crate) struct Writer {
    pub(crate) out: Vec<u8>,
}

impl Writer {
    /// A head whose length fits `short` (base marker, exclusive bound), else the wider markers for 8, 16 and 32 bits.
    #[expect(clippy::cast_possible_truncation, reason = "each arm writes a value below its bound")]
    fn head(&mut self, len: usize, short: (u8, usize), wide: [Option<u8>; 3]) {
        if len < short.1 {
            self.out.push(short.0 | len as u8);
        } else if let (Some(marker), true) = (wide[0], len < 0x100) {
            self.out.extend([marker, len as u8]);
        } else if let (Some(marker), true) = (wide[1], len < 0x1_0000) {
            self.out.push(marker);
            self.out.extend((len as u16).to_be_bytes());
        } else if let Some(marker) = wide[2] {
            // Longer values are beyond MAX_LEN: the encoder refuses such output.
            self.out.push(marker);
            self.out.extend(u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes());
        }
    }

    pub(crate) fn map(&mut self, pairs: usize) {
        self.head(pairs, (0x80, 16), [None, Some(0xDE), Some(0xDF)]);
    }

    pub(crate) fn array(&mut self, items: usize) {
        self.head(items, (0x90, 16), [None, Some(0xDC), Some(0xDD)]);
    }

    pub(crate) fn str(&mut self, text: &str) {
        self.head(text.len(), (0xA0, 32), [Some(0xD9), Some(0xDA), Some(0xDB)]);
        self.out.extend_from_slice(text.as_bytes());
    }

    pub(crate) fn bin(&mut self, bytes: &[u8]) {
        self.head(bytes.len(), (0, 0), [Some(0xC4), Some(0xC5), Some(0xC6)]);
        self.out.extend_from_slice(bytes);
    }

    pub(crate) fn nil(&mut self) {
        self.out.push(0xC0);
    }

    pub(crate) fn u32(&mut self, value: u32) {
        match value {
            0..0x80 => self.out.push(value.to_be_bytes()[3]),
            0x80..0x100 => self.out.extend([0xCC, value.to_be_bytes()[3]]),
            0x100..0x1_0000 => {
                self.out.push(0xCD);
                self.out.extend_from_slice(&value.to_be_bytes()[2..]);
            }
            _ => {
                self.out.push(0xCE);
                self.out.extend(value.to_be_bytes());
            }
        }
    }

    /// Bytes as an array of numbers, as upstream's plain byte vectors come out.
    pub(crate) fn numbers(&mut self, bytes: &[u8]) {
        self.array(bytes.len());
        for byte in bytes {
            self.u32(u32::from(*byte));
        }
    }
}
