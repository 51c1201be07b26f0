//! Writes CBOR, right or wrong: every function gives the bytes of one item.

pub(crate) fn head(major: u8, value: u64) -> Vec<u8> {
    let bytes = value.to_be_bytes();
    let (info, from) = match value {
        0..24 => return vec![major << 5 | bytes[7]],
        24..0x100 => (24, 7),
        0x100..0x1_0000 => (25, 6),
        0x1_0000..0x1_0000_0000 => (26, 4),
        _ => (27, 0),
    };
    [&[major << 5 | info], &bytes[from..]].concat()
}

/// A head in `1 << (info - 24)` bytes, whether or not a shorter form exists.
pub(crate) fn long_head(major: u8, info: u8, value: u64) -> Vec<u8> {
    let len = 1 << (info - 24);
    [&[major << 5 | info], &value.to_be_bytes()[8 - len..]].concat()
}

pub(crate) fn uint(value: u64) -> Vec<u8> {
    head(0, value)
}

/// -1 minus `value`.
pub(crate) fn negative(value: u64) -> Vec<u8> {
    head(1, value)
}

pub(crate) fn bytes(value: &[u8]) -> Vec<u8> {
    [head(2, value.len() as u64), value.to_vec()].concat()
}

pub(crate) fn text(value: &str) -> Vec<u8> {
    [head(3, value.len() as u64), value.into()].concat()
}

pub(crate) fn array(items: &[Vec<u8>]) -> Vec<u8> {
    [head(4, items.len() as u64), items.concat()].concat()
}

pub(crate) fn indefinite_array(items: &[Vec<u8>]) -> Vec<u8> {
    [vec![0x9f], items.concat(), vec![0xff]].concat()
}

pub(crate) fn map(entries: &[(Vec<u8>, Vec<u8>)]) -> Vec<u8> {
    [head(5, entries.len() as u64), joined(entries)].concat()
}

pub(crate) fn indefinite_map(entries: &[(Vec<u8>, Vec<u8>)]) -> Vec<u8> {
    [vec![0xbf], joined(entries), vec![0xff]].concat()
}

pub(crate) fn tagged(tag: u64, item: &[u8]) -> Vec<u8> {
    [head(6, tag), item.to_vec()].concat()
}

/// A byte string in two chunks.
pub(crate) fn chunked_bytes(value: &[u8]) -> Vec<u8> {
    let (first, second) = value.split_at(value.len() / 2);
    [vec![0x5f], bytes(first), bytes(second), vec![0xff]].concat()
}

pub(crate) const NULL: [u8; 1] = [0xf6];

fn joined(entries: &[(Vec<u8>, Vec<u8>)]) -> Vec<u8> {
    entries.iter().flat_map(|(key, value)| [key.as_slice(), value].concat()).collect()
}
