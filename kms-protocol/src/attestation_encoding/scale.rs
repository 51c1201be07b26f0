//! The part of SCALE the protocol uses (§4.2), read strictly from a slice.

use super::Error;

/// Reads values off the front of a slice.
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// Everything not read yet.
    pub(crate) fn into_rest(self) -> &'a [u8] {
        self.rest
    }

    pub(crate) fn end(self) -> Result<(), Error> {
        match self.rest.len() {
            0 => Ok(()),
            left => Err(Error::TrailingBytes { left }),
        }
    }

    pub(crate) fn take(&mut self, len: usize, what: &'static str) -> Result<&'a [u8], Error> {
        let (taken, rest) = self.rest.split_at_checked(len).ok_or(Error::Truncated { what })?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], Error> {
        let (taken, rest) = self.rest.split_first_chunk().ok_or(Error::Truncated { what })?;
        self.rest = rest;
        Ok(*taken)
    }

    pub(crate) fn u8(&mut self, what: &'static str) -> Result<u8, Error> {
        self.array::<1>(what).map(|[byte]| byte)
    }

    pub(crate) fn u32(&mut self, what: &'static str) -> Result<u32, Error> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self, what: &'static str) -> Result<u64, Error> {
        self.array(what).map(u64::from_le_bytes)
    }

    pub(crate) fn fixed64(&mut self, what: &'static str) -> Result<[u8; 64], Error> {
        self.array(what)
    }

    pub(crate) fn bool(&mut self, what: &'static str) -> Result<bool, Error> {
        match self.u8(what)? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(Error::Invalid { what }),
        }
    }

    /// A value that may be absent.
    pub(crate) fn option<T>(
        &mut self,
        what: &'static str,
        read: impl FnOnce(&mut Self) -> Result<T, Error>,
    ) -> Result<Option<T>, Error> {
        if self.bool(what)? { read(self).map(Some) } else { Ok(None) }
    }

    /// A compact integer in its shortest form. The fourth form starts at 2^30, more than any input can hold.
    fn compact(&mut self, what: &'static str) -> Result<usize, Error> {
        let first = self.u8(what)?;
        let (value, shortest) = match first & 3 {
            0 => (u32::from(first >> 2), 0),
            1 => {
                let [second] = self.array::<1>(what)?;
                (u32::from(u16::from_le_bytes([first, second]) >> 2), 1 << 6)
            }
            2 => {
                let [second, third, fourth] = self.array::<3>(what)?;
                (u32::from_le_bytes([first, second, third, fourth]) >> 2, 1 << 14)
            }
            _ => return Err(Error::Truncated { what }),
        };
        if value < shortest {
            return Err(Error::Invalid { what });
        }
        usize::try_from(value).map_err(|_| Error::Truncated { what })
    }

    pub(crate) fn bytes(&mut self, what: &'static str) -> Result<Vec<u8>, Error> {
        let len = self.compact(what)?;
        self.take(len, what).map(<[u8]>::to_vec)
    }

    pub(crate) fn string(&mut self, what: &'static str) -> Result<String, Error> {
        let len = self.compact(what)?;
        let bytes = self.take(len, what)?;
        std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| Error::NotUtf8 { what })
    }

    /// A list whose items are at least `smallest` bytes long each, so that a count the input cannot hold is refused
    /// before anything is allocated for it.
    pub(crate) fn list<T>(
        &mut self,
        what: &'static str,
        smallest: usize,
        mut read: impl FnMut(&mut Self) -> Result<T, Error>,
    ) -> Result<Vec<T>, Error> {
        let count = self.compact(what)?;
        if count > self.rest.len() / smallest {
            return Err(Error::Truncated { what });
        }
        // Grown while reading: an item in memory can be much larger than its shortest encoding.
        let mut items = Vec::new();
        for _ in 0..count {
            items.push(read(self)?);
        }
        Ok(items)
    }
}

/// Appends values to a buffer.
#[derive(Default)]
pub(crate) struct Writer {
    pub(crate) out: Vec<u8>,
}

impl Writer {
    pub(crate) fn u8(&mut self, value: u8) {
        self.out.push(value);
    }

    pub(crate) fn u32(&mut self, value: u32) {
        self.out.extend(value.to_le_bytes());
    }

    pub(crate) fn bool(&mut self, value: bool) {
        self.u8(u8::from(value));
    }

    pub(crate) fn raw(&mut self, bytes: &[u8]) {
        self.out.extend_from_slice(bytes);
    }

    #[expect(clippy::cast_possible_truncation, reason = "each arm writes a value below its bound")]
    fn compact(&mut self, len: usize) {
        match len {
            0..0x40 => self.u8((len as u8) << 2),
            0x40..0x4000 => self.raw(&(((len as u16) << 2) | 1).to_le_bytes()),
            0x4000..0x4000_0000 => self.raw(&(((len as u32) << 2) | 2).to_le_bytes()),
            // Beyond MAX_LEN in any case: the encoders refuse such output.
            _ => {
                self.u8(3);
                self.u32(u32::try_from(len).unwrap_or(u32::MAX));
            }
        }
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        self.compact(bytes.len());
        self.raw(bytes);
    }

    pub(crate) fn string(&mut self, text: &str) {
        self.bytes(text.as_bytes());
    }

    pub(crate) fn list<T>(&mut self, items: &[T], mut write: impl FnMut(&mut Self, &T)) {
        self.compact(items.len());
        for item in items {
            write(self, item);
        }
    }

    pub(crate) fn option<T>(&mut self, value: Option<T>, write: impl FnOnce(&mut Self, T)) {
        self.bool(value.is_some());
        if let Some(value) = value {
            write(self, value);
        }
    }
}
