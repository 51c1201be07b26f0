//! A small, strict CBOR reader (RFC 8949) that borrows from its input and allocates nothing.
//!
//! Strict means, beyond being well-formed: integers and lengths in their shortest form, strings of definite length,
//! no key twice in a map, text in UTF-8. Arrays and maps may be of indefinite length, since real NSMs have written
//! their payload so since 2025. Nothing else of this has been seen from a real NSM, and each freedom taken away is one
//! way less to write two documents that read alike.

/// How deep unknown values may nest (arrays, maps and tags alike). The documents themselves nest two levels.
const MAX_DEPTH: u8 = 8;

/// How many entries an array or map that is only skipped may have.
const MAX_SKIPPED_ENTRIES: usize = 64;

/// Why bytes are not the CBOR that was expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CborFault {
    /// The input ends inside of an item.
    #[error("ends too early")]
    Truncated,
    /// Bytes are left after the item.
    #[error("{left} bytes after the end")]
    TrailingBytes {
        /// How many.
        left: usize,
    },
    /// An item of another type.
    #[error("is {actual}, expected {expected}")]
    WrongType {
        /// The type that belongs here.
        expected: &'static str,
        /// The type found.
        actual: &'static str,
    },
    /// Additional information 28 to 30, or 31 where no indefinite length exists.
    #[error("has reserved additional information {info}")]
    Reserved {
        /// The low five bits of the initial byte.
        info: u8,
    },
    /// A break code outside of an item of indefinite length, or in the place of a map's value.
    #[error("has a break code where none may be")]
    StrayBreak,
    /// A simple value below 32 written in two bytes, which RFC 8949 §3.3 forbids.
    #[error("has simple value {value} in two bytes")]
    SimpleValue {
        /// The value.
        value: u8,
    },
    /// An integer or a length that is not in its shortest form.
    #[error("has the number {value} in {bytes} bytes, a shorter form exists")]
    NotShortest {
        /// The number.
        value: u64,
        /// Bytes it was written in.
        bytes: u8,
    },
    /// A byte or text string in chunks.
    #[error("is a string of indefinite length")]
    IndefiniteString,
    /// Text that is not UTF-8.
    #[error("is text that is not UTF-8")]
    Utf8,
    /// Items nested too deeply.
    #[error("nests deeper than {MAX_DEPTH} levels")]
    TooDeep,
    /// An array or a map with too many entries.
    #[error("has more than {max} entries")]
    TooManyEntries {
        /// The most allowed.
        max: usize,
    },
    /// Two equal keys in a map.
    #[error("has a key twice")]
    DuplicateKey,
}

impl CborFault {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Truncated => "cbor-truncated",
            Self::TrailingBytes { .. } => "cbor-trailing-bytes",
            Self::WrongType { .. } => "cbor-wrong-type",
            Self::Reserved { .. } => "cbor-reserved",
            Self::StrayBreak => "cbor-stray-break",
            Self::SimpleValue { .. } => "cbor-simple-value",
            Self::NotShortest { .. } => "cbor-not-shortest",
            Self::IndefiniteString => "cbor-indefinite-string",
            Self::Utf8 => "cbor-not-utf8",
            Self::TooDeep => "cbor-too-deep",
            Self::TooManyEntries { .. } => "cbor-too-many-entries",
            Self::DuplicateKey => "cbor-duplicate-key",
        }
    }
}

type Result<T> = std::result::Result<T, CborFault>;

const UNSIGNED: u8 = 0;
const NEGATIVE: u8 = 1;
const BYTES: u8 = 2;
const TEXT: u8 = 3;
const ARRAY: u8 = 4;
const MAP: u8 = 5;
const TAG: u8 = 6;
const SIMPLE: u8 = 7;

/// The start of an item: major type and argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Head {
    major: u8,
    info: u8,
    /// `None` for an indefinite length.
    argument: Option<u64>,
}

impl Head {
    fn type_name(self) -> &'static str {
        match (self.major, self.info) {
            (UNSIGNED, _) => "an unsigned integer",
            (NEGATIVE, _) => "a negative integer",
            (BYTES, _) => "a byte string",
            (TEXT, _) => "a text string",
            (ARRAY, _) => "an array",
            (MAP, _) => "a map",
            (TAG, _) => "a tagged item",
            (_, 20 | 21) => "a boolean",
            (_, 22) => "null",
            (_, 23) => "undefined",
            (_, 25..=27) => "a float",
            _ => "a simple value",
        }
    }

    fn mismatch(self, expected: &'static str) -> CborFault {
        CborFault::WrongType { expected, actual: self.type_name() }
    }
}

/// An integer of CBOR's full range, -2^64 to 2^64-1, kept without narrowing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Integer {
    /// The value.
    Unsigned(u64),
    /// -1 minus this.
    Negative(u64),
}

/// The key of a header map: `label = int / tstr` (RFC 9052 §1.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Label<'a> {
    Int(Integer),
    Text(&'a str),
}

/// What is left of an array or a map: a number of entries, or up to the break code.
pub(crate) struct Entries {
    left: Option<u64>,
    seen: usize,
    max: usize,
}

/// Reads items one after the other from a slice.
#[derive(Clone)]
pub(crate) struct Reader<'a> {
    input: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(input: &'a [u8]) -> Self {
        Self { input, at: 0 }
    }

    /// Bytes read so far.
    pub(crate) fn position(&self) -> usize {
        self.at
    }

    /// The input must end here.
    pub(crate) fn finish(&self) -> Result<()> {
        match self.input.len() - self.at {
            0 => Ok(()),
            left => Err(CborFault::TrailingBytes { left }),
        }
    }

    /// The number of a tag, if a tag is next.
    pub(crate) fn tag_if_any(&mut self) -> Result<Option<u64>> {
        let mut ahead = self.clone();
        let head = ahead.head()?;
        if head.major != TAG {
            return Ok(None);
        }
        *self = ahead;
        Ok(head.argument)
    }

    /// Takes a null, if one is next.
    pub(crate) fn take_null(&mut self) -> bool {
        let found = self.input.get(self.at) == Some(&0xf6);
        self.at += usize::from(found);
        found
    }

    pub(crate) fn unsigned(&mut self) -> Result<u64> {
        let head = self.head()?;
        match (head.major, head.argument) {
            (UNSIGNED, Some(value)) => Ok(value),
            _ => Err(head.mismatch("an unsigned integer")),
        }
    }

    pub(crate) fn label(&mut self) -> Result<Label<'a>> {
        let head = self.head()?;
        match (head.major, head.argument) {
            (UNSIGNED, Some(value)) => Ok(Label::Int(Integer::Unsigned(value))),
            (NEGATIVE, Some(value)) => Ok(Label::Int(Integer::Negative(value))),
            (TEXT, _) => self.text_after(head).map(Label::Text),
            _ => Err(head.mismatch("an integer or a text string")),
        }
    }

    pub(crate) fn bytes(&mut self) -> Result<&'a [u8]> {
        let head = self.head()?;
        if head.major != BYTES {
            return Err(head.mismatch("a byte string"));
        }
        self.string_after(head)
    }

    pub(crate) fn text(&mut self) -> Result<&'a str> {
        let head = self.head()?;
        if head.major != TEXT {
            return Err(head.mismatch("a text string"));
        }
        self.text_after(head)
    }

    /// Enters an array of at most `max` items.
    pub(crate) fn array(&mut self, max: usize) -> Result<Entries> {
        let head = self.head()?;
        if head.major != ARRAY {
            return Err(head.mismatch("an array"));
        }
        self.entries(head, max)
    }

    /// Enters a map of at most `max` entries.
    pub(crate) fn map(&mut self, max: usize) -> Result<Entries> {
        let head = self.head()?;
        if head.major != MAP {
            return Err(head.mismatch("a map"));
        }
        self.entries(head, max)
    }

    /// Whether another entry follows; takes the break code of an indefinite length.
    pub(crate) fn next(&mut self, entries: &mut Entries) -> Result<bool> {
        let more = match &mut entries.left {
            Some(0) => false,
            Some(left) => {
                *left -= 1;
                true
            }
            None => *self.input.get(self.at).ok_or(CborFault::Truncated)? != 0xff,
        };
        if !more {
            self.at += usize::from(entries.left.is_none());
            return Ok(false);
        }
        if entries.seen == entries.max {
            return Err(CborFault::TooManyEntries { max: entries.max });
        }
        entries.seen += 1;
        Ok(true)
    }

    /// Reads past one item of any type and gives its bytes.
    pub(crate) fn skip(&mut self) -> Result<&'a [u8]> {
        let start = self.at;
        self.skip_nested(MAX_DEPTH)?;
        Ok(&self.input[start..self.at])
    }

    fn skip_nested(&mut self, depth: u8) -> Result<()> {
        let head = self.head()?;
        match head.major {
            UNSIGNED | NEGATIVE => Ok(()),
            BYTES => self.string_after(head).map(drop),
            TEXT => self.text_after(head).map(drop),
            SIMPLE => check_simple(head),
            _ => {
                let depth = depth.checked_sub(1).ok_or(CborFault::TooDeep)?;
                match head.major {
                    ARRAY => self.skip_array(head, depth),
                    MAP => self.skip_map(head, depth),
                    _ => self.skip_nested(depth),
                }
            }
        }
    }

    fn skip_array(&mut self, head: Head, depth: u8) -> Result<()> {
        let mut entries = self.entries(head, MAX_SKIPPED_ENTRIES)?;
        while self.next(&mut entries)? {
            self.skip_nested(depth)?;
        }
        Ok(())
    }

    /// Numbers are in their shortest form and strings in one piece, so keys are equal where their bytes are.
    fn skip_map(&mut self, head: Head, depth: u8) -> Result<()> {
        let mut entries = self.entries(head, MAX_SKIPPED_ENTRIES)?;
        let mut keys = Keys::<MAX_SKIPPED_ENTRIES>::new();
        while self.next(&mut entries)? {
            let start = self.at;
            self.skip_nested(depth)?;
            keys.add(&self.input[start..self.at])?;
            self.skip_nested(depth)?;
        }
        Ok(())
    }

    fn entries(&self, head: Head, max: usize) -> Result<Entries> {
        // A claimed count above the limit is refused before anything is read for it.
        if head.argument.is_some_and(|count| count > max as u64) {
            return Err(CborFault::TooManyEntries { max });
        }
        Ok(Entries { left: head.argument, seen: 0, max })
    }

    fn text_after(&mut self, head: Head) -> Result<&'a str> {
        std::str::from_utf8(self.string_after(head)?).map_err(|_| CborFault::Utf8)
    }

    fn string_after(&mut self, head: Head) -> Result<&'a [u8]> {
        let len = head.argument.ok_or(CborFault::IndefiniteString)?;
        self.take(usize::try_from(len).map_err(|_| CborFault::Truncated)?)
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        let taken = self.input[self.at..].get(..len).ok_or(CborFault::Truncated)?;
        self.at += len;
        Ok(taken)
    }

    fn head(&mut self) -> Result<Head> {
        let initial = self.take(1)?[0];
        let (major, info) = (initial >> 5, initial & 0x1f);
        let argument = match info {
            0..=23 => Some(u64::from(info)),
            24..=27 => Some(self.argument(major, info)?),
            31 if matches!(major, BYTES | TEXT | ARRAY | MAP) => None,
            31 if major == SIMPLE => return Err(CborFault::StrayBreak),
            _ => return Err(CborFault::Reserved { info }),
        };
        Ok(Head { major, info, argument })
    }

    /// The 1, 2, 4 or 8 bytes after the initial byte.
    fn argument(&mut self, major: u8, info: u8) -> Result<u64> {
        let bytes = 1 << (info - 24);
        let value = self.take(usize::from(bytes))?.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        let shorter_exists = match info {
            24 => value < 24,
            25 => value <= 0xff,
            26 => value <= 0xffff,
            _ => value <= 0xffff_ffff,
        };
        // Of a simple value or a float these bytes are no number; `check_simple` looks at them.
        if shorter_exists && major != SIMPLE {
            return Err(CborFault::NotShortest { value, bytes });
        }
        Ok(value)
    }
}

fn check_simple(head: Head) -> Result<()> {
    match (head.info, head.argument) {
        (24, Some(value @ 0..32)) => Err(CborFault::SimpleValue { value: value.to_le_bytes()[0] }),
        _ => Ok(()),
    }
}

/// The encoded keys of a map that is being read, to find one that comes twice.
pub(crate) struct Keys<'a, const MAX: usize> {
    seen: [&'a [u8]; MAX],
    len: usize,
}

impl<'a, const MAX: usize> Keys<'a, MAX> {
    pub(crate) fn new() -> Self {
        Self { seen: [&[]; MAX], len: 0 }
    }

    pub(crate) fn add(&mut self, key: &'a [u8]) -> Result<()> {
        if self.seen[..self.len].contains(&key) {
            return Err(CborFault::DuplicateKey);
        }
        *self.seen.get_mut(self.len).ok_or(CborFault::TooManyEntries { max: MAX })? = key;
        self.len += 1;
        Ok(())
    }
}
