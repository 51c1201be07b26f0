//! The little of CBOR that the driver protocol needs: a reader that borrows, accepts definite lengths only and never
//! allocates, and the writer of the answers.

use ciborium_ll::{Decoder, Header, simple};

/// The bytes are not the CBOR item that was expected here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Malformed;

/// Reads items from a slice; strings are borrowed from it.
pub(crate) struct Reader<'a> {
    input: &'a [u8],
    /// How much of `input` was read.
    at: usize,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(input: &'a [u8]) -> Self {
        Self { input, at: 0 }
    }

    /// The header at the cursor, without taking it.
    pub(crate) fn peek(&self) -> Result<Header, Malformed> {
        self.header().map(|(header, _)| header)
    }

    fn header(&self) -> Result<(Header, usize), Malformed> {
        let mut decoder = Decoder::from(&self.input[self.at..]);
        let header = decoder.pull().map_err(|_| Malformed)?;
        Ok((header, decoder.offset()))
    }

    fn pull(&mut self) -> Result<Header, Malformed> {
        let (header, length) = self.header()?;
        self.at += length;
        Ok(header)
    }

    /// The next `length` bytes. The length is compared with what is there, so a huge claim costs nothing.
    fn take(&mut self, length: usize) -> Result<&'a [u8], Malformed> {
        let rest = &self.input[self.at..];
        let bytes = rest.get(..length).ok_or(Malformed)?;
        self.at += length;
        Ok(bytes)
    }

    pub(crate) fn text(&mut self) -> Result<&'a str, Malformed> {
        match self.pull()? {
            Header::Text(Some(length)) => std::str::from_utf8(self.take(length)?).map_err(|_| Malformed),
            _ => Err(Malformed),
        }
    }

    pub(crate) fn bytes(&mut self) -> Result<&'a [u8], Malformed> {
        match self.pull()? {
            Header::Bytes(Some(length)) => self.take(length),
            _ => Err(Malformed),
        }
    }

    /// A byte string, or `null`.
    pub(crate) fn optional_bytes(&mut self) -> Result<Option<&'a [u8]>, Malformed> {
        if self.peek()? == Header::Simple(simple::NULL) {
            self.pull()?;
            return Ok(None);
        }
        self.bytes().map(Some)
    }

    pub(crate) fn unsigned(&mut self) -> Result<u64, Malformed> {
        match self.pull()? {
            Header::Positive(value) => Ok(value),
            _ => Err(Malformed),
        }
    }

    /// The number of entries of the map that starts here.
    pub(crate) fn map(&mut self) -> Result<usize, Malformed> {
        match self.pull()? {
            Header::Map(Some(entries)) => Ok(entries),
            _ => Err(Malformed),
        }
    }

    /// Nothing may be left.
    pub(crate) fn finish(self) -> Result<(), Malformed> {
        if self.at == self.input.len() { Ok(()) } else { Err(Malformed) }
    }
}

/// Writes items into a vector, in the shortest form.
#[derive(Default)]
pub(crate) struct Writer(Vec<u8>);

impl Writer {
    fn head(&mut self, major: u8, argument: u64) -> &mut Self {
        let major = major << 5;
        let bytes = argument.to_be_bytes();
        match argument {
            0..=23 => self.0.push(major | bytes[7]),
            24..=0xff => self.0.extend([major | 24, bytes[7]]),
            0x100..=0xffff => {
                self.0.push(major | 25);
                self.0.extend(&bytes[6..]);
            }
            0x1_0000..=0xffff_ffff => {
                self.0.push(major | 26);
                self.0.extend(&bytes[4..]);
            }
            _ => {
                self.0.push(major | 27);
                self.0.extend(bytes);
            }
        }
        self
    }

    pub(crate) fn unsigned(&mut self, value: u64) -> &mut Self {
        self.head(0, value)
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.head(2, bytes.len() as u64).raw(bytes)
    }

    pub(crate) fn optional_bytes(&mut self, bytes: Option<&[u8]>) -> &mut Self {
        match bytes {
            Some(bytes) => self.bytes(bytes),
            None => self.raw(&[0xf6]),
        }
    }

    pub(crate) fn text(&mut self, text: &str) -> &mut Self {
        self.head(3, text.len() as u64).raw(text.as_bytes())
    }

    pub(crate) fn array(&mut self, items: usize) -> &mut Self {
        self.head(4, items as u64)
    }

    pub(crate) fn map(&mut self, entries: usize) -> &mut Self {
        self.head(5, entries as u64)
    }

    pub(crate) fn boolean(&mut self, value: bool) -> &mut Self {
        self.raw(&[if value { 0xf5 } else { 0xf4 }])
    }

    /// Bytes as they are, for what the other methods cannot express (indefinite lengths, longer integer forms).
    pub(crate) fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub(crate) fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.0)
    }
}
