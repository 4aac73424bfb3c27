//! Digests: how content is known again.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use sha2::{Digest as _, Sha256};

/// Which digest; told by how many bytes it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// SHA-256, 32 bytes.
    Sha256,
    /// BLAKE3 cut to 16 bytes: a third of the work.
    Blake3,
}

impl Kind {
    /// The kind whose digests have so many bytes.
    #[must_use]
    pub fn of_size(size: usize) -> Option<Self> {
        match size {
            32 => Some(Kind::Sha256),
            16 => Some(Kind::Blake3),
            _ => None,
        }
    }

    /// How many bytes its digests have.
    #[must_use]
    pub fn size(self) -> usize {
        match self {
            Kind::Sha256 => 32,
            Kind::Blake3 => 16,
        }
    }

    /// The digest of all these bytes.
    #[must_use]
    pub fn of(self, bytes: &[u8]) -> Vec<u8> {
        let mut digest = Digest::new(self);
        digest.update(bytes);
        digest.finish()
    }

    /// The digest of a file from `start` on.
    ///
    /// # Errors
    /// Where it cannot be read.
    pub fn of_file(self, path: &Path, start: u64) -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        file.seek(SeekFrom::Start(start))?;
        let mut digest = Digest::new(self);
        let mut part = vec![0; 1 << 18];
        loop {
            match file.read(&mut part) {
                Ok(0) => return Ok(digest.finish()),
                Ok(count) => digest.update(&part[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// A digest of what has come so far.
pub enum Digest {
    /// 32 bytes.
    Sha256(Sha256),
    /// 16 bytes.
    Blake3(Box<blake3::Hasher>),
}

impl Digest {
    /// Of nothing yet.
    #[must_use]
    pub fn new(kind: Kind) -> Self {
        match kind {
            Kind::Sha256 => Digest::Sha256(Sha256::new()),
            Kind::Blake3 => Digest::Blake3(Box::default()),
        }
    }

    /// These bytes come next.
    pub fn update(&mut self, bytes: &[u8]) {
        match self {
            Digest::Sha256(state) => state.update(bytes),
            Digest::Blake3(state) => {
                state.update(bytes);
            }
        }
    }

    /// The digest of all that came.
    #[must_use]
    pub fn finish(self) -> Vec<u8> {
        match self {
            Digest::Sha256(state) => state.finalize().to_vec(),
            Digest::Blake3(state) => state.finalize().as_bytes()[..16].to_vec(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|one| format!("{one:02x}")).collect()
    }

    #[test]
    fn digests_are_those_of_the_standards() {
        // FIPS 180-2 appendix B.1, and the test vectors of BLAKE3 for no input and for 0, 1, 2, ..., 250, 0, ...
        assert_eq!(
            hex(&Kind::Sha256.of(b"abc")),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        assert_eq!(
            hex(&Kind::Blake3.of(b"")),
            "af1349b9f5f9a1a6a0404dea36dcc949"
        );
        let counted: Vec<u8> = (0..102_400_u32).map(|k| (k % 251) as u8).collect();
        assert_eq!(
            hex(&Kind::Blake3.of(&counted)),
            "bc3e3d41a1146b069abffad3c0d44860"
        );
    }

    #[test]
    fn parts_give_the_digest_of_the_whole() {
        let data: Vec<u8> = (0..100_000_u32).map(|k| (k % 253) as u8).collect();
        for kind in [Kind::Sha256, Kind::Blake3] {
            let mut digest = Digest::new(kind);
            for part in data.chunks(777) {
                digest.update(part);
            }
            let whole = kind.of(&data);
            assert_eq!(digest.finish(), whole);
            assert_eq!(Kind::of_size(whole.len()), Some(kind));
        }
    }
}
