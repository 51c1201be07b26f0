//! A guest made of bytes: what a driver does, what none should, and anything at all.

use std::sync::Mutex;

use proptest::prelude::*;
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::GuestMemoryMmap;

use super::*;

const SIZE: u16 = 16;
const MEMORY: usize = 1 << 20;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const REQUEST: u64 = 0x1_0000;
const ANSWER: u64 = 0x2_0000;
const READ: u32 = 0;
const WRITE: u32 = VRING_DESC_F_WRITE;
const NEXT: u32 = VRING_DESC_F_NEXT;

/// Answers with the request and a mark, and remembers the room it was given.
#[derive(Default)]
struct Echo(Mutex<Vec<usize>>);

impl Module for Echo {
    fn answer(&self, request: &[u8], capacity: usize) -> Vec<u8> {
        self.0.lock().unwrap().push(capacity);
        [b"re:", request].concat().into_iter().take(capacity).collect()
    }
}

struct Guest {
    memory: GuestMemoryMmap,
    queue: Queue,
    requests: RequestQueue,
    module: Arc<Echo>,
    available: u16,
}

impl Guest {
    fn new() -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let mut queue = Queue::new(SIZE).unwrap();
        queue.set_size(SIZE);
        queue.set_desc_table_address(Some(0), None);
        queue.set_avail_ring_address(Some(u32::try_from(AVAILABLE).unwrap()), None);
        queue.set_used_ring_address(Some(u32::try_from(USED).unwrap()), None);
        queue.set_ready(true);
        let module = Arc::new(Echo::default());
        let requests = RequestQueue::new(Arc::clone(&module) as Arc<dyn Module>);
        Self { memory, queue, requests, module, available: 0 }
    }

    fn descriptor(&self, index: u16, address: u64, len: u32, flags: u32, next: u16) {
        let at = u64::from(index) * 16;
        self.memory.write_obj(address, GuestAddress(at)).unwrap();
        self.memory.write_obj(len, GuestAddress(at + 8)).unwrap();
        self.memory.write_obj(u16::try_from(flags).unwrap(), GuestAddress(at + 12)).unwrap();
        self.memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    fn offer(&mut self, head: u16) {
        let slot = AVAILABLE + 4 + u64::from(self.available % SIZE) * 2;
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.available = self.available.wrapping_add(1);
        self.memory.write_obj(self.available, GuestAddress(AVAILABLE + 2)).unwrap();
    }

    fn put(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    fn get(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    fn serve(&mut self) -> Result<usize, virtio_queue::Error> {
        self.requests.serve(&self.memory, &mut self.queue)
    }

    /// Chains given back so far: head and length.
    fn used(&self) -> Vec<(u32, u32)> {
        let count: u16 = self.memory.read_obj(GuestAddress(USED + 2)).unwrap();
        let element = |at: u16, offset: u64| {
            self.memory.read_obj(GuestAddress(USED + 4 + u64::from(at % SIZE) * 8 + offset)).unwrap()
        };
        (0..count).map(|at| (element(at, 0), element(at, 4))).collect()
    }

    /// What the Linux driver does: a readable chain, then a writable one.
    fn ask(&mut self, request: &[u8], room: u32) {
        self.put(REQUEST, request);
        self.descriptor(0, REQUEST, u32::try_from(request.len()).unwrap(), READ, 0);
        self.descriptor(1, ANSWER, room, WRITE, 0);
        self.offer(0);
        self.offer(1);
    }
}

#[test]
fn a_request_and_its_answer_are_two_chains() {
    let mut guest = Guest::new();
    guest.ask(b"hello", 0x3000);
    assert_eq!(guest.serve().unwrap(), 2);
    assert_eq!(guest.used(), [(0, 0), (1, 8)]);
    assert_eq!(guest.get(ANSWER, 9), b"re:hello\0");
    assert_eq!(*guest.module.0.lock().unwrap(), [0x3000]);
}

#[test]
fn a_request_waits_for_its_answer_buffer() {
    let mut guest = Guest::new();
    guest.put(REQUEST, b"hello");
    guest.descriptor(0, REQUEST, 5, READ, 0);
    guest.descriptor(1, ANSWER, 0x3000, WRITE, 0);
    guest.offer(0);
    assert_eq!(guest.serve().unwrap(), 0);
    assert_eq!(guest.serve().unwrap(), 0);
    guest.offer(1);
    assert_eq!(guest.serve().unwrap(), 2);
    assert_eq!(guest.used(), [(0, 0), (1, 8)]);
}

#[test]
fn the_ring_wraps() {
    let mut guest = Guest::new();
    for round in 0..40u8 {
        guest.ask(&[round], 0x3000);
        assert_eq!(guest.serve().unwrap(), 2);
        assert_eq!(guest.get(ANSWER, 4), [b"re:".as_slice(), &[round]].concat());
    }
}

#[test]
fn one_chain_with_both_parts_is_served() {
    let mut guest = Guest::new();
    guest.put(REQUEST, b"hello");
    guest.descriptor(3, REQUEST, 2, READ | NEXT, 4);
    guest.descriptor(4, REQUEST + 2, 3, READ | NEXT, 5);
    guest.descriptor(5, ANSWER, 4, WRITE | NEXT, 6);
    guest.descriptor(6, ANSWER + 0x100, 100, WRITE, 0);
    guest.offer(3);
    assert_eq!(guest.serve().unwrap(), 1);
    assert_eq!(guest.used(), [(3, 8)]);
    assert_eq!(guest.get(ANSWER, 4), b"re:h");
    assert_eq!(guest.get(ANSWER + 0x100, 4), b"ello");
}

#[test]
fn a_request_behind_an_indirect_descriptor_is_served() {
    let mut guest = Guest::new();
    guest.put(REQUEST, b"hello");
    // The table is at 16 * 32, so that the helper can write it.
    guest.descriptor(32, REQUEST, 5, READ | NEXT, 1);
    guest.descriptor(33, ANSWER, 0x3000, WRITE, 0);
    guest.descriptor(0, 16 * 32, 32, VRING_DESC_F_INDIRECT, 0);
    guest.offer(0);
    assert_eq!(guest.serve().unwrap(), 1);
    assert_eq!(guest.used(), [(0, 8)]);
}

#[test]
fn a_short_answer_buffer_is_known_to_the_module_and_never_overrun() {
    let mut guest = Guest::new();
    guest.put(ANSWER, &[0xee; 16]);
    guest.ask(b"hello", 4);
    assert_eq!(guest.serve().unwrap(), 2);
    assert_eq!(guest.used(), [(0, 0), (1, 4)]);
    assert_eq!(guest.get(ANSWER, 6), b"re:h\xee\xee");
}

#[test]
fn room_beyond_the_longest_response_is_not_counted() {
    let mut guest = Guest::new();
    guest.ask(b"hello", u32::MAX);
    assert_eq!(guest.serve().unwrap(), 2);
    assert_eq!(*guest.module.0.lock().unwrap(), [MAX_RESPONSE]);
}

#[test]
fn an_answer_buffer_that_nobody_asked_for_comes_back_empty() {
    let mut guest = Guest::new();
    guest.descriptor(1, ANSWER, 0x3000, WRITE, 0);
    guest.offer(1);
    assert_eq!(guest.serve().unwrap(), 1);
    assert_eq!(guest.used(), [(1, 0)]);
    assert!(guest.module.0.lock().unwrap().is_empty());
}

#[test]
fn a_second_request_replaces_the_one_that_waits() {
    let mut guest = Guest::new();
    guest.put(REQUEST, b"firstsecond");
    guest.descriptor(0, REQUEST, 5, READ, 0);
    guest.descriptor(1, REQUEST + 5, 6, READ, 0);
    guest.descriptor(2, ANSWER, 0x3000, WRITE, 0);
    for head in 0..3 {
        guest.offer(head);
    }
    assert_eq!(guest.serve().unwrap(), 3);
    assert_eq!(guest.used(), [(0, 0), (1, 0), (2, 9)]);
    assert_eq!(guest.get(ANSWER, 9), b"re:second");
}

#[test]
fn a_request_of_any_claimed_length_is_read_up_to_the_limit() {
    let mut guest = Guest::new();
    guest.descriptor(0, REQUEST, u32::try_from(MEMORY).unwrap() / 2, READ, 0);
    guest.descriptor(1, ANSWER, 0x3000, WRITE, 0);
    guest.offer(0);
    guest.offer(1);
    assert_eq!(guest.serve().unwrap(), 2);
    // The mark and one byte more than a request may have, for the module to refuse.
    assert_eq!(guest.used()[1], (1, u32::try_from(MAX_REQUEST).unwrap() + 1 + 3));
}

#[test]
fn chains_that_make_no_sense_come_back_empty_and_the_next_is_served() {
    let end = u64::try_from(MEMORY).unwrap();
    /// Address, length and flags.
    type Fields = (u64, u32, u32);
    let cases: [(&str, [Fields; 2]); 5] = [
        ("readable behind writable", [(ANSWER, 16, WRITE | NEXT), (REQUEST, 16, READ)]),
        ("request outside of memory", [(end, 16, READ), (0, 0, READ)]),
        ("request across the end of memory", [(end - 8, 16, READ), (0, 0, READ)]),
        ("address that overflows", [(u64::MAX - 4, 16, READ), (0, 0, READ)]),
        ("answer outside of memory", [(REQUEST, 16, READ | NEXT), (end, 16, WRITE)]),
    ];
    for (what, descriptors) in cases {
        let mut guest = Guest::new();
        for (index, (address, len, flags)) in (0u16..).zip(descriptors) {
            guest.descriptor(index, address, len, flags, 1);
        }
        guest.offer(0);
        assert_eq!(guest.serve().unwrap(), 1, "{what}");
        assert_eq!(guest.used(), [(0, 0)], "{what}");
        guest.ask(b"hello", 0x3000);
        assert_eq!(guest.serve().unwrap(), 2, "{what}");
        assert_eq!(guest.used()[1..], [(0, 0), (1, 8)], "{what}");
    }
}

#[test]
fn an_endless_chain_ends() {
    let mut guest = Guest::new();
    guest.descriptor(0, ANSWER, 1, WRITE | NEXT, 0);
    guest.offer(0);
    assert_eq!(guest.serve().unwrap(), 1);
    assert_eq!(guest.used(), [(0, 0)]);
}

#[test]
fn a_long_indirect_chain_is_refused() {
    let mut guest = Guest::new();
    let table = 0x800;
    for index in 0..256 {
        guest.descriptor(table + index, ANSWER, 1, WRITE | NEXT, index + 1);
    }
    guest.ask(b"hello", 0x3000);
    guest.descriptor(1, u64::from(table) * 16, 256 * 16, VRING_DESC_F_INDIRECT, 0);
    assert_eq!(guest.serve().unwrap(), 1);
    assert_eq!(guest.used(), [(1, 0)]);
    assert!(guest.module.0.lock().unwrap().is_empty());
}

#[test]
fn an_available_index_beyond_the_ring_ends_the_service() {
    let mut guest = Guest::new();
    guest.memory.write_obj(SIZE + 1, GuestAddress(AVAILABLE + 2)).unwrap();
    assert!(guest.serve().is_err());
}

#[test]
fn one_look_serves_one_ring_at_most() {
    let mut guest = Guest::new();
    guest.descriptor(1, ANSWER, 16, WRITE, 0);
    for _ in 0..SIZE {
        guest.offer(1);
    }
    assert_eq!(guest.serve().unwrap(), usize::from(SIZE));
    guest.offer(1);
    assert_eq!(guest.serve().unwrap(), 1);
}

#[test]
fn a_reset_forgets_the_request_that_waited() {
    let mut guest = Guest::new();
    guest.descriptor(0, REQUEST, 5, READ, 0);
    guest.descriptor(1, ANSWER, 0x3000, WRITE, 0);
    guest.offer(0);
    guest.serve().unwrap();
    guest.requests.reset();
    guest.offer(1);
    assert_eq!(guest.serve().unwrap(), 1);
    assert_eq!(guest.used(), [(1, 0)]);
}

proptest! {
    /// Whatever the guest writes into the tables, the rings and their indices, every look ends, nothing panics, and no
    /// more chains come back than a ring has.
    #[test]
    fn arbitrary_rings_do_no_harm(
        table in proptest::collection::vec(any::<u8>(), 16 * usize::from(SIZE)),
        heads in proptest::collection::vec(0..SIZE + 2, usize::from(SIZE)),
        flags in proptest::collection::vec(0u16..8, usize::from(SIZE)),
        small in any::<bool>(),
        available in any::<u16>(),
    ) {
        let mut guest = Guest::new();
        guest.put(0, &table);
        for (index, flags) in (0u64..).zip(&flags) {
            guest.memory.write_obj(*flags, GuestAddress(index * 16 + 12)).unwrap();
            if small {
                // Addresses and links that are mostly good lead further than random ones.
                guest.put(index * 16 + 3, &[0; 5]);
                guest.put(index * 16 + 10, &[0; 2]);
                guest.put(index * 16 + 15, &[0]);
            }
        }
        for (slot, head) in (0u64..).zip(&heads) {
            guest.memory.write_obj(*head, GuestAddress(AVAILABLE + 4 + slot * 2)).unwrap();
        }
        let available = if small { available % (SIZE + 1) } else { available };
        guest.memory.write_obj(available, GuestAddress(AVAILABLE + 2)).unwrap();
        for _ in 0..3 {
            if let Ok(used) = guest.serve() {
                prop_assert!(used <= usize::from(SIZE) + 1);
            }
        }
    }
}
