//! Memory for what arrives.
//!
//! The problem: memory that comes from the system costs more than to read an image into it: each page is looked for
//! and zeroed at its first use. [`Bytes`] and [`Input`] take what others have let go, and let go of it in turn. What
//! rests is bounded, and nobody sees what was in it.

use std::mem;
use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, PoisonError};

/// How much is read at once.
const INPUT: usize = 256 << 10;
/// Less is had from the system at once, more is not kept for others.
const RESTING: std::ops::RangeInclusive<usize> = (64 << 10)..=(8 << 20);

static DATASETS: Pool = Pool::new(16 << 20);
static INPUTS: Pool = Pool::new(8 << 20);

/// Memory that rests, all of it written once, so that it need not be zeroed again; the last to come goes first.
struct Pool {
    rest: Mutex<Vec<Vec<u8>>>,
    /// Bytes in all.
    most: usize,
}

impl Pool {
    const fn new(most: usize) -> Self {
        Pool {
            rest: Mutex::new(Vec::new()),
            most,
        }
    }

    fn take(&self) -> Vec<u8> {
        let mut rest = self.rest.lock().unwrap_or_else(PoisonError::into_inner);
        rest.pop().unwrap_or_default()
    }

    fn give(&self, memory: Vec<u8>) {
        if !RESTING.contains(&memory.len()) {
            return;
        }
        let mut rest = self.rest.lock().unwrap_or_else(PoisonError::into_inner);
        let held: usize = rest.iter().map(Vec::len).sum();
        if held + memory.len() <= self.most {
            rest.push(memory);
        }
    }
}

/// Bytes that grow at their end.
#[derive(Debug, Default)]
pub struct Bytes {
    memory: Vec<u8>,
    length: usize,
}

impl Bytes {
    /// At least so much room behind the bytes.
    pub(crate) fn room(&mut self, count: usize) -> &mut [u8] {
        if self.memory.is_empty() && count > 0 {
            self.memory = DATASETS.take();
        }
        let end = self.length + count;
        if end > self.memory.len() {
            let wanted = end.max(self.memory.len().saturating_mul(2).min(end + (8 << 20)));
            self.memory.resize(wanted, 0);
        }
        &mut self.memory[self.length..end]
    }

    /// So many bytes were put into the room.
    pub(crate) fn filled(&mut self, count: usize) {
        self.length = self.memory.len().min(self.length + count);
    }

    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.room(bytes.len()).copy_from_slice(bytes);
        self.filled(bytes.len());
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        DATASETS.give(mem::take(&mut self.memory));
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[..self.length]
    }
}

impl PartialEq for Bytes {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for Bytes {}

/// Room for what is read from a connection.
#[derive(Default)]
pub(crate) struct Input(Vec<u8>);

impl Input {
    /// How much is read at once.
    pub const SIZE: usize = INPUT;

    /// Have room, if there is none yet.
    pub fn begin(&mut self) {
        if self.0.is_empty() {
            self.0 = INPUTS.take();
            self.0.resize(INPUT, 0);
        }
    }

    /// Have more room.
    pub fn grow(&mut self) {
        self.0.resize(self.0.len() + INPUT, 0);
    }
}

impl Drop for Input {
    fn drop(&mut self) {
        if self.0.len() == INPUT {
            INPUTS.give(mem::take(&mut self.0));
        }
    }
}

impl Deref for Input {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for Input {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_rests_is_used_again_and_is_bounded() {
        let pool = Pool::new(10 << 20);
        for size in [1, 9 << 20, 4 << 20, 4 << 20, 4 << 20] {
            pool.give(vec![1; size]);
        }
        let sizes = [pool.take(), pool.take(), pool.take()].map(|one| one.len());
        assert_eq!(sizes, [4 << 20, 4 << 20, 0]);
    }

    #[test]
    fn bytes_are_those_that_were_put_in_whatever_was_there_before() {
        for round in 0..3_u8 {
            let mut bytes = Bytes::default();
            assert!(bytes.is_empty());
            for part in 0..4_u8 {
                bytes.push(&vec![round * 4 + part; 100_000]);
            }
            bytes.room(1000)[0] = 99;
            bytes.filled(1);
            assert_eq!(bytes.len(), 400_001);
            for (at, byte) in bytes[..400_000].iter().enumerate() {
                assert_eq!(usize::from(*byte), usize::from(round) * 4 + at / 100_000);
            }
        }
    }
}
