//! SHA-256 (FIPS 180-4) of several messages at once.
//!
//! The problem: each round waits for the one before it, so that one message leaves most of what a processor has for
//! it idle. [`advance`] works on up to [`LANES`] messages in turn: with the instructions that x86 has for it their
//! rounds run beside each other; elsewhere one message comes after the other. `sha2` is what it has to agree with,
//! and does all that is not worth it.

use sha2::block_api::compress256;

/// How many messages fill a processor: more have no room in its registers.
pub const LANES: usize = 4;

const BLOCK: usize = 64;
/// Where the length of the message begins in the last block (section 5.1.1).
const LENGTH: usize = 56;
/// Section 5.3.3.
const START: [u32; 8] = [
    0x6a09_e667,
    0xbb67_ae85,
    0x3c6e_f372,
    0xa54f_f53a,
    0x510e_527f,
    0x9b05_688c,
    0x1f83_d9ab,
    0x5be0_cd19,
];

/// How many messages are worth more together than one after the other.
pub fn lanes() -> usize {
    #[cfg(target_arch = "x86_64")]
    if x86::is_here() {
        return LANES;
    }
    1
}

/// How far a message is.
#[derive(Debug, Clone)]
pub struct Progress {
    state: [u32; 8],
    /// Bytes of whole blocks that are in it.
    done: usize,
}

impl Default for Progress {
    fn default() -> Self {
        Progress {
            state: START,
            done: 0,
        }
    }
}

impl Progress {
    /// Whether less than a block of this message is left.
    #[must_use]
    pub fn is_at_end(&self, message: &[u8]) -> bool {
        message.len() - self.done < BLOCK
    }

    /// The digest, whatever of the message is left.
    #[must_use]
    pub fn finish(mut self, message: &[u8]) -> [u8; 32] {
        let (blocks, tail) = message[self.done..].as_chunks::<BLOCK>();
        compress256(&mut self.state, blocks);
        let mut last = [[0; BLOCK]; 2];
        last.as_flattened_mut()[..tail.len()].copy_from_slice(tail);
        last.as_flattened_mut()[tail.len()] = 0x80;
        let count = if tail.len() < LENGTH { 1 } else { 2 };
        last[count - 1][LENGTH..].copy_from_slice(&(message.len() as u64 * 8).to_be_bytes());
        compress256(&mut self.state, &last[..count]);
        let mut digest = [0; 32];
        for (into, word) in digest.as_chunks_mut::<4>().0.iter_mut().zip(self.state) {
            *into = word.to_be_bytes();
        }
        digest
    }
}

/// Go on with at most [`LANES`] messages, by `most` blocks of each, or as many as the shortest has.
pub fn advance(messages: &mut [(&mut Progress, &[u8])], most: usize) {
    let left = messages
        .iter()
        .map(|(at, all)| (all.len() - at.done) / BLOCK);
    let count = left.min().unwrap_or(0).min(most);
    match messages {
        [first, second] => together([first, second], count),
        [first, second, third] => together([first, second, third], count),
        [first, second, third, fourth] => together([first, second, third, fourth], count),
        others => others.iter_mut().for_each(|one| alone(one, count)),
    }
}

fn alone((at, message): &mut (&mut Progress, &[u8]), count: usize) {
    let (blocks, _) = message[at.done..].as_chunks();
    compress256(&mut at.state, &blocks[..count]);
    at.done += count * BLOCK;
}

fn together<const N: usize>(mut messages: [&mut (&mut Progress, &[u8]); N], count: usize) {
    #[cfg(target_arch = "x86_64")]
    if x86::is_here() {
        let mut states = [[0; 8]; N];
        let mut blocks = [&[][..]; N];
        for lane in 0..N {
            let (at, message) = &messages[lane];
            states[lane] = at.state;
            blocks[lane] = &message[at.done..].as_chunks().0[..count];
        }
        // SAFETY: the processor has these instructions.
        unsafe { x86::compress(&mut states, blocks) };
        for (one, state) in messages.iter_mut().zip(states) {
            one.0.state = state;
            one.0.done += count * BLOCK;
        }
        return;
    }
    for one in &mut messages {
        alone(one, count);
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m128i, _mm_add_epi32, _mm_alignr_epi8, _mm_extract_epi32, _mm_set_epi32, _mm_set_epi64x,
        _mm_setzero_si128, _mm_sha256msg1_epu32, _mm_sha256msg2_epu32, _mm_sha256rnds2_epu32,
        _mm_shuffle_epi8, _mm_shuffle_epi32,
    };

    use super::BLOCK;

    /// Section 4.2.2.
    const ROUNDS: [[u32; 4]; 16] = [
        [0x428a_2f98, 0x7137_4491, 0xb5c0_fbcf, 0xe9b5_dba5],
        [0x3956_c25b, 0x59f1_11f1, 0x923f_82a4, 0xab1c_5ed5],
        [0xd807_aa98, 0x1283_5b01, 0x2431_85be, 0x550c_7dc3],
        [0x72be_5d74, 0x80de_b1fe, 0x9bdc_06a7, 0xc19b_f174],
        [0xe49b_69c1, 0xefbe_4786, 0x0fc1_9dc6, 0x240c_a1cc],
        [0x2de9_2c6f, 0x4a74_84aa, 0x5cb0_a9dc, 0x76f9_88da],
        [0x983e_5152, 0xa831_c66d, 0xb003_27c8, 0xbf59_7fc7],
        [0xc6e0_0bf3, 0xd5a7_9147, 0x06ca_6351, 0x1429_2967],
        [0x27b7_0a85, 0x2e1b_2138, 0x4d2c_6dfc, 0x5338_0d13],
        [0x650a_7354, 0x766a_0abb, 0x81c2_c92e, 0x9272_2c85],
        [0xa2bf_e8a1, 0xa81a_664b, 0xc24b_8b70, 0xc76c_51a3],
        [0xd192_e819, 0xd699_0624, 0xf40e_3585, 0x106a_a070],
        [0x19a4_c116, 0x1e37_6c08, 0x2748_774c, 0x34b0_bcb5],
        [0x391c_0cb3, 0x4ed8_aa4a, 0x5b9c_ca4f, 0x682e_6ff3],
        [0x748f_82ee, 0x78a5_636f, 0x84c8_7814, 0x8cc7_0208],
        [0x90be_fffa, 0xa450_6ceb, 0xbef9_a3f7, 0xc671_78f2],
    ];

    pub fn is_here() -> bool {
        is_x86_feature_detected!("sha") && is_x86_feature_detected!("avx2")
    }

    #[target_feature(enable = "sha,avx2")]
    fn four([a, b, c, d]: [u32; 4]) -> __m128i {
        _mm_set_epi32(
            d.cast_signed(),
            c.cast_signed(),
            b.cast_signed(),
            a.cast_signed(),
        )
    }

    /// Four words of a block.
    #[target_feature(enable = "sha,avx2")]
    fn words(block: &[u8; BLOCK], group: usize) -> __m128i {
        let (halves, _) = block[16 * group..].as_chunks();
        let swap = _mm_set_epi64x(0x0c0d_0e0f_0809_0a0b, 0x0405_0607_0001_0203);
        let both = _mm_set_epi64x(i64::from_le_bytes(halves[1]), i64::from_le_bytes(halves[0]));
        _mm_shuffle_epi8(both, swap)
    }

    /// Sections 6.2.1 and 6.2.2 for as many blocks of each message.
    #[target_feature(enable = "sha,avx2")]
    pub fn compress<const N: usize>(states: &mut [[u32; 8]; N], blocks: [&[[u8; BLOCK]]; N]) {
        // The instructions want the eight words of a state in this order, its first here the last.
        let mut near = states.map(|[a, b, _, _, e, f, _, _]| four([f, e, b, a]));
        let mut far = states.map(|[_, _, c, d, _, _, g, h]| four([h, g, d, c]));
        let count = blocks.iter().map(|all| all.len()).min().unwrap_or(0);
        for number in 0..count {
            let block = blocks.map(|all| &all[number]);
            let before = (near, far);
            // The last sixteen words of the schedule.
            let mut schedule = [[_mm_setzero_si128(); 4]; N];
            macro_rules! group {
                ($group:literal) => {
                    let rounds = four(ROUNDS[$group]);
                    let mut sum = [_mm_setzero_si128(); N];
                    for lane in 0..N {
                        let last = &mut schedule[lane];
                        last[$group % 4] = if $group < 4 {
                            words(block[lane], $group)
                        } else {
                            let [first, second, third, fourth] =
                                [0, 1, 2, 3].map(|k| last[($group + k) % 4]);
                            let shifted = _mm_alignr_epi8::<4>(fourth, third);
                            let old = _mm_sha256msg1_epu32(first, second);
                            _mm_sha256msg2_epu32(_mm_add_epi32(old, shifted), fourth)
                        };
                        sum[lane] = _mm_add_epi32(last[$group % 4], rounds);
                    }
                    for lane in 0..N {
                        far[lane] = _mm_sha256rnds2_epu32(far[lane], near[lane], sum[lane]);
                    }
                    for lane in 0..N {
                        let upper = _mm_shuffle_epi32::<0x0e>(sum[lane]);
                        near[lane] = _mm_sha256rnds2_epu32(near[lane], far[lane], upper);
                    }
                };
            }
            group!(0);
            group!(1);
            group!(2);
            group!(3);
            group!(4);
            group!(5);
            group!(6);
            group!(7);
            group!(8);
            group!(9);
            group!(10);
            group!(11);
            group!(12);
            group!(13);
            group!(14);
            group!(15);
            for lane in 0..N {
                near[lane] = _mm_add_epi32(near[lane], before.0[lane]);
                far[lane] = _mm_add_epi32(far[lane], before.1[lane]);
            }
        }
        for lane in 0..N {
            let word = |from: [__m128i; N]| {
                [
                    _mm_extract_epi32::<0>(from[lane]).cast_unsigned(),
                    _mm_extract_epi32::<1>(from[lane]).cast_unsigned(),
                    _mm_extract_epi32::<2>(from[lane]).cast_unsigned(),
                    _mm_extract_epi32::<3>(from[lane]).cast_unsigned(),
                ]
            };
            let ([f, e, b, a], [h, g, d, c]) = (word(near), word(far));
            states[lane] = [a, b, c, d, e, f, g, h];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Kind;

    fn message(length: usize, seed: usize) -> Vec<u8> {
        (0..length)
            .map(|k| ((k * 31 + k / 251 + seed * 17) % 256) as u8)
            .collect()
    }

    #[test]
    fn several_messages_have_the_digests_that_each_has_alone() {
        let lengths = [0, 1, 55, 56, 63, 64, 65, 119, 120, 128, 4096, 70_001];
        for lanes in 1..=LANES {
            for start in 0..lengths.len() {
                let messages: Vec<_> = (0..lanes)
                    .map(|lane| message(lengths[(start + lane * 5) % lengths.len()], lane))
                    .collect();
                let mut progress = vec![Progress::default(); lanes];
                for most in [1, 2, 100] {
                    let mut all: Vec<_> = progress
                        .iter_mut()
                        .zip(&messages)
                        .map(|(at, one)| (at, &one[..]))
                        .collect();
                    advance(&mut all, most);
                }
                for (at, one) in progress.into_iter().zip(&messages) {
                    assert_eq!(at.finish(one).to_vec(), Kind::Sha256.of(one));
                }
            }
        }
    }

    #[test]
    fn what_moves_on_ends() {
        let (long, short) = (message(100_000, 1), message(30_000, 2));
        let (mut first, mut second) = (Progress::default(), Progress::default());
        let mut turns = 0;
        while !second.is_at_end(&short) {
            advance(&mut [(&mut first, &long), (&mut second, &short)], 100);
            turns += 1;
        }
        assert_eq!(turns, 5);
        assert!(!first.is_at_end(&long));
        advance(&mut [(&mut first, &long)], usize::MAX);
        assert!(first.is_at_end(&long));
        assert_eq!(second.finish(&short).to_vec(), Kind::Sha256.of(&short));
        assert_eq!(first.finish(&long).to_vec(), Kind::Sha256.of(&long));
    }
}
