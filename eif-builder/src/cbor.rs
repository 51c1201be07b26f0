//! The few CBOR items of which signature sections consist: definite lengths, shortest form.

const UINT: u8 = 0;
const BYTES: u8 = 2;
const TEXT: u8 = 3;
const ARRAY: u8 = 4;
const MAP: u8 = 5;
const TAG: u8 = 6;

/// Appends items to a buffer.
#[derive(Debug, Default)]
pub(crate) struct Encoder(Vec<u8>);

impl Encoder {
    pub(crate) fn array(mut self, len: usize) -> Self {
        self.head(ARRAY, len as u64);
        self
    }

    pub(crate) fn map(mut self, len: usize) -> Self {
        self.head(MAP, len as u64);
        self
    }

    pub(crate) fn uint(mut self, value: u64) -> Self {
        self.head(UINT, value);
        self
    }

    pub(crate) fn text(mut self, text: &str) -> Self {
        self.head(TEXT, text.len() as u64);
        self.0.extend_from_slice(text.as_bytes());
        self
    }

    pub(crate) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.head(BYTES, bytes.len() as u64);
        self.0.extend_from_slice(bytes);
        self
    }

    /// An array with one integer per byte: how the reference stores byte vectors.
    pub(crate) fn byte_array(mut self, bytes: &[u8]) -> Self {
        self.head(ARRAY, bytes.len() as u64);
        for byte in bytes {
            self.head(UINT, u64::from(*byte));
        }
        self
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        self.0
    }

    fn head(&mut self, major: u8, value: u64) {
        let major = major << 5;
        let bytes = value.to_be_bytes();
        match value {
            0..24 => self.0.push(major | bytes[7]),
            24..0x100 => self.0.extend_from_slice(&[major | 24, bytes[7]]),
            0x100..0x1_0000 => self.0.extend_from_slice(&[major | 25, bytes[6], bytes[7]]),
            0x1_0000..0x1_0000_0000 => {
                self.0.push(major | 26);
                self.0.extend_from_slice(&bytes[4..]);
            }
            _ => {
                self.0.push(major | 27);
                self.0.extend_from_slice(&bytes);
            }
        }
    }
}

/// Takes items from the front of a slice. Errors say what was expected where.
#[derive(Debug)]
pub(crate) struct Decoder<'a> {
    whole: usize,
    rest: &'a [u8],
}

impl<'a> Decoder<'a> {
    pub(crate) fn new(input: &'a [u8]) -> Self {
        Self { whole: input.len(), rest: input }
    }

    pub(crate) fn array(&mut self, what: &str) -> Result<u64, String> {
        self.head(ARRAY, what)
    }

    pub(crate) fn map(&mut self, what: &str) -> Result<u64, String> {
        self.head(MAP, what)
    }

    pub(crate) fn uint(&mut self, what: &str) -> Result<u64, String> {
        self.head(UINT, what)
    }

    pub(crate) fn bytes(&mut self, what: &str) -> Result<&'a [u8], String> {
        let len = self.head(BYTES, what)?;
        self.take(len, what)
    }

    pub(crate) fn text(&mut self, what: &str) -> Result<&'a [u8], String> {
        let len = self.head(TEXT, what)?;
        self.take(len, what)
    }

    /// Skips a tag, if one is there.
    pub(crate) fn optional_tag(&mut self, tag: u64) -> Result<(), String> {
        if self.rest.first().is_some_and(|first| first >> 5 == TAG) {
            let found = self.head(TAG, "a tag")?;
            if found != tag {
                return Err(format!("tag {found}, expected {tag} or none"));
            }
        }
        Ok(())
    }

    /// An array with one integer per byte.
    pub(crate) fn byte_array(&mut self, what: &str) -> Result<Vec<u8>, String> {
        let len = self.head(ARRAY, what)?;
        if len > self.rest.len() as u64 {
            return Err(format!("{what} claims {len} entries, {} bytes are left", self.rest.len()));
        }
        (0..len)
            .map(|at| {
                let value = self.head(UINT, what)?;
                u8::try_from(value).map_err(|_| format!("{what}, entry {at}, is {value}, expected a byte"))
            })
            .collect()
    }

    pub(crate) fn end(self, what: &str) -> Result<(), String> {
        match self.rest.len() {
            0 => Ok(()),
            left => Err(format!("{left} bytes after the end of {what}")),
        }
    }

    fn take(&mut self, len: u64, what: &str) -> Result<&'a [u8], String> {
        let split = usize::try_from(len).ok().and_then(|len| self.rest.split_at_checked(len));
        let Some((taken, rest)) = split else {
            return Err(format!("{what} claims {len} bytes, {} are left", self.rest.len()));
        };
        self.rest = rest;
        Ok(taken)
    }

    fn head(&mut self, major: u8, what: &str) -> Result<u64, String> {
        let at = self.whole - self.rest.len();
        let first = self.take(1, what)?[0];
        if first >> 5 != major {
            return Err(format!("byte {at}: {what} has CBOR type {}, expected {major}", first >> 5));
        }
        let (len, least) = match first & 31 {
            short @ 0..24 => return Ok(u64::from(short)),
            24 => (1, 24),
            25 => (2, 1 << 8),
            26 => (4, 1 << 16),
            27 => (8, 1 << 32),
            _ => return Err(format!("byte {at}: {what} has no definite length")),
        };
        let value = self.take(len, what)?.iter().fold(0, |value, byte| value << 8 | u64::from(*byte));
        if value < least {
            return Err(format!("byte {at}: {what} is not in its shortest form"));
        }
        Ok(value)
    }
}
