//! Requests and answers in the guest's memory. The guest writes all of it, at any time, so nothing read here is
//! believed: sizes are bounded before memory is reserved, addresses are checked by the memory map, and a ring that
//! makes no sense ends the service to this guest and nothing else.
//!
//! The Linux driver hands over a request in two descriptor chains: one readable with the request, then one writable
//! with room for the answer. A single chain with both, readable part first, is served as well. What fits neither is
//! given back empty:
//!
//! ```text
//!            readable             writable
//! Idle ────────────────▶ Waiting ───────────▶ Idle, both chains used, answer written
//! Idle ── writable ────▶ Idle, chain used with length 0: nobody asked
//! Waiting ── readable ─▶ Waiting for the new one; the old chain used with length 0
//! ```

use std::sync::Arc;

use nsm_emulator::{MAX_REQUEST, MAX_RESPONSE};
use tracing::debug;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory};

use super::Module;

/// Descriptors in one chain, more than any driver needs for 16 KiB.
const MAX_DESCRIPTORS: usize = 64;

/// The queue's state between two looks at it.
pub(crate) struct RequestQueue {
    module: Arc<dyn Module>,
    waiting: Option<Waiting>,
}

/// A request whose answer buffer has not come yet.
struct Waiting {
    head: u16,
    request: Vec<u8>,
}

/// What a chain is made of.
struct Chain {
    head: u16,
    request: Vec<u8>,
    readable: bool,
    buffers: Vec<(GuestAddress, usize)>,
    capacity: usize,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
enum Fault {
    #[error("more than {MAX_DESCRIPTORS} descriptors in one chain")]
    TooManyDescriptors,
    #[error("a readable descriptor behind a writable one")]
    Order,
    #[error("a descriptor outside of the guest's memory")]
    Address,
    #[error("a chain without descriptors")]
    Empty,
}

impl RequestQueue {
    pub(crate) fn new(module: Arc<dyn Module>) -> Self {
        Self { module, waiting: None }
    }

    /// Forgets what was waiting: the device was reset.
    pub(crate) fn reset(&mut self) {
        self.waiting = None;
    }

    /// Serves what is available, at most one ring full, so that a guest that adds chains as fast as they are served
    /// cannot keep the thread for itself. Returns how many chains were given back.
    ///
    /// # Errors
    ///
    /// When the rings themselves make no sense. The device is useless from there on until it is reset.
    pub(crate) fn serve<M>(&mut self, memory: &M, queue: &mut Queue) -> Result<usize, virtio_queue::Error>
    where
        M: GuestMemory,
    {
        let mut used = 0;
        for _ in 0..queue.size() {
            let Some(chain) = queue.iter(memory)?.next() else { break };
            let head = chain.head_index();
            match Chain::read(memory, chain) {
                Ok(chain) => used += self.accept(memory, queue, chain)?,
                Err(fault) => {
                    debug!(%fault, "the guest's NSM request makes no sense");
                    queue.add_used(memory, head, 0)?;
                    used += 1;
                }
            }
        }
        Ok(used)
    }

    /// Returns how many chains were given back.
    fn accept<M>(
        &mut self,
        memory: &M,
        queue: &mut Queue,
        mut chain: Chain,
    ) -> Result<usize, virtio_queue::Error>
    where
        M: GuestMemory,
    {
        let mut used = 0;
        if chain.readable {
            if let Some(abandoned) = self.waiting.take() {
                queue.add_used(memory, abandoned.head, 0)?;
                used += 1;
            }
            if chain.buffers.is_empty() {
                self.waiting = Some(Waiting { head: chain.head, request: chain.request });
                return Ok(used);
            }
            let request = std::mem::take(&mut chain.request);
            let written = self.write_answer(memory, &chain, &request);
            queue.add_used(memory, chain.head, written)?;
            return Ok(used + 1);
        }
        let Some(Waiting { head, request }) = self.waiting.take() else {
            queue.add_used(memory, chain.head, 0)?;
            return Ok(used + 1);
        };
        let written = self.write_answer(memory, &chain, &request);
        // The driver matches the two completions to its buffers by their order.
        queue.add_used(memory, head, 0)?;
        queue.add_used(memory, chain.head, written)?;
        Ok(used + 2)
    }

    /// Returns the bytes written, none where the guest's buffer is not in its memory.
    fn write_answer<M>(&self, memory: &M, chain: &Chain, request: &[u8]) -> u32
    where
        M: GuestMemory,
    {
        let answer = self.module.answer(request, chain.capacity);
        let mut left = answer.as_slice();
        for &(address, len) in &chain.buffers {
            let (now, later) = left.split_at(len.min(left.len()));
            if memory.write_slice(now, address).is_err() {
                debug!(fault = %Fault::Address, "the guest's NSM answer buffer makes no sense");
                return 0;
            }
            left = later;
        }
        u32::try_from(answer.len() - left.len()).unwrap_or(0)
    }
}

impl Chain {
    fn read<M>(memory: &M, chain: DescriptorChain<&M>) -> Result<Self, Fault>
    where
        M: GuestMemory,
    {
        let mut parts = Self {
            head: chain.head_index(),
            request: Vec::new(),
            readable: false,
            buffers: Vec::new(),
            capacity: 0,
        };
        for (count, descriptor) in chain.enumerate() {
            if count == MAX_DESCRIPTORS {
                return Err(Fault::TooManyDescriptors);
            }
            let len = usize::try_from(descriptor.len()).map_err(|_| Fault::Address)?;
            if descriptor.is_write_only() {
                // A response is never longer, so room beyond that is not looked at.
                let len = len.min(MAX_RESPONSE - parts.capacity);
                parts.buffers.push((descriptor.addr(), len));
                parts.capacity += len;
            } else if parts.buffers.is_empty() {
                parts.readable = true;
                // One byte more than allowed is enough for the module to refuse the request as too long.
                let start = parts.request.len();
                parts.request.resize(start + len.min(MAX_REQUEST + 1 - start), 0);
                memory
                    .read_slice(&mut parts.request[start..], descriptor.addr())
                    .map_err(|_| Fault::Address)?;
            } else {
                return Err(Fault::Order);
            }
        }
        if parts.readable || !parts.buffers.is_empty() { Ok(parts) } else { Err(Fault::Empty) }
    }
}

#[cfg(test)]
mod tests;
